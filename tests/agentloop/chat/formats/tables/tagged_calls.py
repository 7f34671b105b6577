"""Cases of the formats that write arguments as text between tags, each call in tags of its own."""

from __future__ import annotations

from tests.agentloop.chat.formats.tables.cases import Case

F = ("f", {"a": 1})
G = ("g", {})
LONG = 'a line\n  <b>another</b> & "one"\n'


def pairs(opening: str, closing: str, name_end: str, key: str, value: str, think: str = "think") -> list[Case]:
    """Return the cases of calls with the name as text, and pairs of keys and values in tags.

    Args:
        opening, closing: the tags around a call.
        name_end: what follows the name.
        key, value, think: the names of the tags of keys, values and reasoning.
    """

    def pair(name: str, text: str) -> str:
        return f"<{key}>{name}</{key}>\n<{value}>{text}</{value}>\n"

    def call(name: str, *given: tuple[str, str]) -> str:
        return f"{opening}{name}{name_end}{''.join(pair(*one) for one in given)}{closing}"

    think, end_think = f"<{think}>", f"</{think}>"
    one, end = call("f", ("a", "1")), f"</{value}>"
    return [
        Case("one call", one, (F,)),
        Case("two calls", f"{one}\n{call('g')}", (F, G)),
        Case("no arguments", call("g"), (G,)),
        Case("a string", call("f", ("s", LONG)), (("f", {"s": LONG}),)),
        Case("unicode", call("f", ("s", "漢字 🙂")), (("f", {"s": "漢字 🙂"}),)),
        Case("an empty string", call("f", ("s", "")), (("f", {"s": ""}),)),
        Case("a string of digits", call("f", ("s", "07")), (("f", {"s": "07"}),)),
        Case(
            "several arguments",
            call("f", ("a", "1"), ("b", "true"), ("s", "x")),
            (("f", {"a": 1, "b": True, "s": "x"}),),
        ),
        Case(
            "nested",
            call("f", ("l", '[1, {"k": null}]'), ("o", '{"k": ["x"]}')),
            (("f", {"l": [1, {"k": None}], "o": {"k": ["x"]}}),),
        ),
        Case("null", call("f", ("n", "null")), (("f", {"n": None}),)),
        Case(
            "Python literals", call("f", ("b", "True"), ("o", "{'k': None}")), (("f", {"b": True, "o": {"k": None}}),)
        ),
        Case("without a schema", call("g", ("x", "1"), ("y", "word")), (("g", {"x": 1, "y": "word"}),)),
        Case("text around", f"Ok. {one} Done.", (F,), said="Ok.  Done."),
        Case("thought", f"{think}hm {one}{end_think}{one}", (F,), thought=f"hm {one}"),
        Case("all on one line", one.replace("\n", ""), (F,)),
        Case("the tag twice", opening + one, (F,)),
        Case("closing tag missing before the next", one.removesuffix(closing) + call("g"), (F, G)),
        Case(
            "closing tag of a value missing",
            call("f", ("a", "1"), ("s", "x")).replace(end, "", 1),
            (("f", {"a": 1, "s": "x"}),),
        ),
        Case("closing tag of the last value missing", one.replace(end, ""), (F,)),
        Case(
            "a value runs into the next call",
            one[: one.index(end)] + call("g"),
            (G,),
            faults=(f"{opening} must not stand",),
        ),
        Case("the wrong type", call("f", ("a", "one")) + call("g"), (G,), faults=("must be of type integer",)),
        Case("a leading zero", call("f", ("a", "07")), faults=("must be of type integer",)),
        Case("the argument twice", call("f", ("a", "1"), ("a", "2")), faults=("given twice",)),
        Case("no name", call("", ("a", "1")), faults=("the tool's name alone",)),
        Case("two words as the name", call("call f", ("a", "1")), faults=("the tool's name alone",)),
        Case("a key that is not closed", one.replace(f"</{key}>", "") + call("g"), (G,), faults=(f"without </{key}>",)),
        Case("no value", one.replace(f"<{value}>1</{value}>", ""), faults=(f"must be followed by <{value}>",)),
        Case("text between the arguments", one.replace(closing, f"so{closing}"), faults=("text after the call",)),
        Case("cut after the tag", f"Hm {opening}", said="Hm", faults=("cut off",)),
        Case("cut in the name", f"{opening}f", faults=("cut off",)),
        Case("cut in a key", one[: one.index(f"</{key}>")], faults=(f"without </{key}>",)),
        Case("cut in a value", one[: one.index(end)], faults=("cut off",)),
        Case("cut after a value", one.removesuffix(closing), faults=("cut off",)),
        Case("malformed, then valid", call("f", ("a", "{")) + one, (F,), faults=("must be of type integer",)),
    ]


def seed(name: str, *given: tuple[str, str]) -> str:
    inner = "".join(f"<parameter={key}>{value}</parameter>\n" for key, value in given)
    return f"<seed:tool_call>\n<function={name}>\n{inner}</function>\n</seed:tool_call>"


ONE_SEED, SEED_G = seed("f", ("a", "1")), seed("g")
HUNYUAN = {"opening": "<tool_call>", "closing": "</tool_call>", "key": "arg_key", "value": "arg_value"}
SUFFIXED = {key: f"{tag.removesuffix('>')}:opensource{'>' * tag.endswith('>')}" for key, tag in HUNYUAN.items()}
LONGCAT, END_LONGCAT = "<longcat_tool_call>", "</longcat_tool_call>"

TABLES: dict[str, list[Case]] = {
    "hunyuan Hy3": pairs(**HUNYUAN, name_end="<tool_sep>\n"),
    "hunyuan Hy4": pairs(**SUFFIXED, name_end="", think="think:opensource"),
    "longcat": [
        *pairs(LONGCAT, "</longcat_tool_call>", "\n", "longcat_arg_key", "longcat_arg_value", "longcat_think"),
        Case("JSON", f'{LONGCAT}\n{{"name": "f", "arguments": {{"a": 1}}}}\n{END_LONGCAT}', (F,)),
        Case("two as JSON", f'{LONGCAT}{{"name": "g"}}{END_LONGCAT}\n{LONGCAT}{{"name": "g"}}{END_LONGCAT}', (G, G)),
        Case("JSON, not closed", f'{LONGCAT}{{"name": "g"}}', (G,)),
        Case("JSON, cut", f'{LONGCAT}{{"name": "g', faults=("cut off",)),
        Case("JSON without a name", f"{LONGCAT}{{}}</longcat_tool_call>", faults=('no string "name"',)),
    ],
    "seed_oss": [
        Case("one call", ONE_SEED, (F,)),
        Case("two calls", f"{ONE_SEED}\n{SEED_G}", (F, G)),
        Case("no arguments", SEED_G, (G,)),
        Case("a string", seed("f", ("s", LONG)), (("f", {"s": LONG}),)),
        Case("unicode", seed("f", ("s", "漢字 🙂")), (("f", {"s": "漢字 🙂"}),)),
        Case("an empty string", seed("f", ("s", "")), (("f", {"s": ""}),)),
        Case("a string of digits", seed("f", ("s", "07")), (("f", {"s": "07"}),)),
        Case("Python's words", seed("f", ("b", "True"), ("n", "None")), (("f", {"b": True, "n": None}),)),
        Case(
            "Python's containers",
            seed("f", ("l", "[1, 'x', None]"), ("o", "{'k': [True]}")),
            (("f", {"l": [1, "x", None], "o": {"k": [True]}}),),
        ),
        Case("JSON", seed("f", ("l", '["x", null]'), ("b", "true")), (("f", {"l": ["x", None], "b": True}),)),
        Case("text around", f"Ok.\n\n{ONE_SEED}\nDone.", (F,), said="Ok.\n\n\nDone."),
        Case("thought", f"<seed:think>hm {ONE_SEED}</seed:think>\n{ONE_SEED}", (F,), thought=f"hm {ONE_SEED}"),
        Case("all on one line", ONE_SEED.replace("\n", ""), (F,)),
        Case("the tag twice", "<seed:tool_call>" + ONE_SEED, (F,)),
        Case("closing tag missing at the end", ONE_SEED.removesuffix("</seed:tool_call>"), (F,)),
        Case("closing tag missing before the next", ONE_SEED.removesuffix("</seed:tool_call>") + SEED_G, (F, G)),
        Case(
            "closing tag of a value missing",
            seed("f", ("a", "1"), ("s", "x")).replace("</parameter>", "", 1),
            (("f", {"a": 1, "s": "x"}),),
        ),
        Case(
            "a value runs into the next call",
            f"<seed:tool_call><function=f><parameter=s>x{SEED_G}",
            (G,),
            faults=("must not stand within",),
        ),
        Case("the wrong type", seed("f", ("a", "one")) + SEED_G, (G,), faults=("must be of type integer",)),
        Case("a leading zero", seed("f", ("a", "07")), faults=("must be of type integer",)),
        Case("the argument twice", seed("f", ("a", "1"), ("a", "2")), faults=("given twice",)),
        Case("no function", "<seed:tool_call>f(1)</seed:tool_call>", faults=("does not begin with <function=",)),
        Case(
            "JSON instead", '<seed:tool_call>{"name": "f"}</seed:tool_call>', faults=("does not begin with <function=",)
        ),
        Case(
            "a name that is not closed",
            "<seed:tool_call><function=f\n</seed:tool_call>",
            faults=("not followed by a name",),
        ),
        Case("cut after the tag", "Hm <seed:tool_call>", said="Hm", faults=("",)),
        Case("cut in a value", ONE_SEED[: ONE_SEED.index("</parameter>")], faults=("cut off",)),
        Case("cut after a value", ONE_SEED[: ONE_SEED.index("</function>")], faults=("cut off",)),
        Case("malformed, then valid", f"<seed:tool_call>f</seed:tool_call>{ONE_SEED}", (F,), faults=("",)),
    ],
}
PAIRS = [
    f"<{slash}{tag}>" for slash in ("", "/") for tag in ("tool_calls", "tool_call", "arg_key", "arg_value", "think")
]
CONTROLS = {
    "hunyuan Hy3": [*PAIRS, "<tool_sep>"],
    "hunyuan Hy4": [f"{tag[:-1]}:opensource>" for tag in PAIRS],
    "longcat": [f"{tag[0]}longcat_{tag[1:]}" if tag[1] != "/" else f"</longcat_{tag[2:]}" for tag in PAIRS],
    "seed_oss": ["<seed:tool_call>", "</seed:tool_call>", "<seed:think>", "</seed:think>"],
}
