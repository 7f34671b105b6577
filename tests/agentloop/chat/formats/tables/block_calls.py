"""Cases of the formats that write blocks of calls, with arguments as text between named tags."""

from __future__ import annotations

from collections.abc import Callable

from tests.agentloop.chat.formats.tables.cases import Case

F = ("f", {"a": 1})
G = ("g", {})
LONG = 'a line\n  <b>another</b> & "one"\n'


def invokes(opening: str, closing: str, prefix: str, attribute: Callable[[str], str] = lambda value: "") -> list[Case]:
    """Return the cases of calls in blocks.

    Args:
        opening, closing: the tags of a block.
        prefix: what stands before the names of the tags within it.
        attribute: returns further attributes of the tag of a value.
    """

    def call(name: str, *given: tuple[str, str]) -> str:
        inner = "".join(
            f'<{prefix}parameter name="{key}"{attribute(value)}>{value}</{prefix}parameter>\n' for key, value in given
        )
        return f'<{prefix}invoke name="{name}">\n{inner}</{prefix}invoke>\n'

    def block(*calls: str) -> str:
        return f"{opening}\n{''.join(calls)}{closing}"

    one, end = call("f", ("a", "1")), f"</{prefix}parameter>"
    cut = one[: one.index(end)]
    return [
        Case("one call", block(one), (F,)),
        Case("two calls in a block", block(one, call("g")), (F, G)),
        Case("two blocks", block(one) + "\n" + block(call("g")), (F, G)),
        Case("no arguments", block(call("g")), (G,)),
        Case("a string", block(call("f", ("s", LONG))), (("f", {"s": LONG}),)),
        Case("unicode", block(call("f", ("s", "漢字 🙂"))), (("f", {"s": "漢字 🙂"}),)),
        Case("an empty string", block(call("f", ("s", ""))), (("f", {"s": ""}),)),
        Case("a string of digits", block(call("f", ("s", "07"))), (("f", {"s": "07"}),)),
        Case(
            "several arguments",
            block(call("f", ("a", "1"), ("b", "true"), ("s", "x"))),
            (("f", {"a": 1, "b": True, "s": "x"}),),
        ),
        Case(
            "nested",
            block(call("f", ("l", '[1, {"k": null}]'), ("o", '{"k": ["x"]}'))),
            (("f", {"l": [1, {"k": None}], "o": {"k": ["x"]}}),),
        ),
        Case("null", block(call("f", ("n", "null"))), (("f", {"n": None}),)),
        Case("text around", f"Ok.\n{block(one)}\nDone.", (F,), said="Ok.\n\nDone."),
        Case("thought", f"<think>hm {block(one)}</think>{block(one)}", (F,), thought=f"hm {block(one)}"),
        Case("the block is not closed", block(one).removesuffix(closing), (F,)),
        Case("the block is opened twice", opening + block(one), (F,)),
        Case("the next block follows", block(one).removesuffix(closing) + block(call("g")), (F, G)),
        Case("all on one line", block(one).replace("\n", ""), (F,)),
        Case("a value on its own line", block(call("f", ("a", "\n1\n"))), (F,)),
        Case(
            "closing tag of a value missing",
            block(call("f", ("a", "1"), ("s", "x")).replace(end, "", 1)),
            (("f", {"a": 1, "s": "x"}),),
        ),
        Case("closing tag of the last value missing", block(one.replace(end, "")), (F,)),
        Case("a value runs into the next call", block(cut, call("g")), (G,), faults=("invoke must not stand within",)),
        Case(
            "a value runs into the block's end",
            block(cut) + " after",
            said="after",
            faults=(f"{closing} must not stand",),
        ),
        Case("the wrong type", block(call("f", ("a", "one")), call("g")), (G,), faults=("must be of type",)),
        Case("a leading zero", block(call("f", ("a", "07"))), faults=("must be of type integer",)),
        Case("the argument twice", block(call("f", ("a", "1"), ("a", "2"))), faults=("given twice",)),
        Case("no name", block(call("f").replace(' name="f"', ""), call("g")), (G,), faults=('name="NAME"',)),
        Case(
            "a name that is not closed", block(call("f").replace('"f"', '"f'), call("g")), (G,), faults=('name="NAME"',)
        ),
        Case(
            "text between the arguments",
            block(one.replace(f"{end}\n", f"{end} so "), call("g")),
            (G,),
            faults=("must follow the arguments",),
        ),
        Case("no call in the block", block("f(1)"), faults=("must be followed by",)),
        Case("an empty block", block(), faults=("must be followed by",)),
        Case("text after the calls", block(one + "so"), (F,), faults=("text after the call",)),
        Case("cut after the block's tag", f"Hm {opening}", said="Hm", faults=("cut off",)),
        Case("cut in a value", f"{opening}\n{cut}", faults=("cut off",)),
        Case("cut in a tag", f'{opening}\n<{prefix}invoke name="f', faults=("",)),
        Case("cut after a value", block(one)[: block(one).index(end) + len(end)], faults=("cut off",)),
        Case("cut in the second call", f"{opening}\n{one}{cut}", (F,), faults=("cut off",)),
        Case("without a block", one, said=one.strip()),
    ]


def typed(value: str) -> str:
    """Return the attribute of a value's tag in DeepSeek V3.2."""
    is_json = value.strip() in ("1", "2", "true", "null", "one") or value.startswith(("[", "{"))
    return f' string="{"false" if is_json else "true"}"'


DSML = "｜DSML｜"
STEP, END_STEP = "<｜tool_call_begin｜>function<｜tool_sep｜>", "<｜tool_call_end｜>"
STEP_CALL = '<steptml:invoke name="f">\n<steptml:parameter name="a">1</steptml:parameter>\n</steptml:invoke>'

TABLES: dict[str, list[Case]] = {
    "minimax_m2": [
        *invokes("<minimax:tool_call>", "</minimax:tool_call>", ""),
        Case(
            "a tag within JSON",
            '<minimax:tool_call><invoke name="f"><parameter name="o">{"k": "</parameter>"}</parameter></invoke>'
            "</minimax:tool_call>",
            (("f", {"o": {"k": "</parameter>"}}),),
        ),
    ],
    "deepseek_v3_2": [
        case
        for case in invokes(f"<{DSML}function_calls>", f"</{DSML}function_calls>", DSML, typed)
        if case.title != "a leading zero"
    ]
    + [
        Case(
            "arguments as one object",
            f'<{DSML}function_calls>\n<{DSML}invoke name="f">\n{{"a": 1}}\n</{DSML}invoke>\n</{DSML}function_calls>',
            (F,),
        ),
        Case(
            "a tag that closes itself",
            f'<{DSML}function_calls>\n<{DSML}invoke name="g"/>\n</{DSML}function_calls>',
            (G,),
        ),
        Case(
            "no attribute string",
            f'<{DSML}function_calls><{DSML}invoke name="f"><{DSML}parameter name="a">1</{DSML}parameter>'
            f"</{DSML}invoke></{DSML}function_calls>",
            (F,),
        ),
        Case(
            "the attribute string is wrong",
            f'<{DSML}function_calls><{DSML}invoke name="f"><{DSML}parameter name="a" string="false">one'
            f"</{DSML}parameter></{DSML}invoke></{DSML}function_calls>",
            faults=("must be of type",),
        ),
    ],
    "deepseek_v3_2 V4": invokes(f"<{DSML}tool_calls>", f"</{DSML}tool_calls>", DSML, typed)[:23],
    "deepseek_v3_2 V4.1": invokes(f"<{DSML} calls>", f"</{DSML} calls>", f"{DSML} ", typed)[:23],
    "step3": [
        *invokes("<｜tool_calls_begin｜>", "<｜tool_calls_end｜>", "steptml:"),
        Case(
            "with frames",
            f"<｜tool_calls_begin｜>\n{STEP}{STEP_CALL}{END_STEP}\n{STEP}{STEP_CALL}{END_STEP}\n<｜tool_calls_end｜>",
            (F, F),
        ),
        Case(
            "separated",
            f"<｜tool_calls_begin｜><｜tool_call_begin｜>{STEP_CALL}{END_STEP}<｜tool_sep｜><｜tool_call_begin｜>{STEP_CALL}"
            f"{END_STEP}<｜tool_calls_end｜>",
            (F, F),
        ),
        Case(
            "in the block that the template speaks of",
            f"<｜tool_calls_begin｜>{STEP}<steptml:toolcall>{STEP_CALL}</steptml:toolcall>{END_STEP}<｜tool_calls_end｜>",
            (F,),
        ),
        Case(
            "as the template misspells it",
            f"<｜tool_calls_begin｜>\n<｜tool_call_begin>｜>\nfunction<｜tool_sep｜>{STEP_CALL}{END_STEP}\n<｜tool_calls_end｜>",
            (F,),
        ),
        Case(
            "a frame ends a malformed call",
            f'<｜tool_calls_begin｜>{STEP}<steptml:invoke name="f">so{END_STEP}'
            f"{STEP}{STEP_CALL}{END_STEP}<｜tool_calls_end｜>",
            (F,),
            faults=("must follow the arguments",),
        ),
        Case(
            "not a function",
            f"<｜tool_calls_begin｜><｜tool_call_begin｜>thought<｜tool_sep｜>hm{END_STEP}<｜tool_calls_end｜>",
            faults=("must be followed by",),
        ),
    ],
}
CONTROLS = {
    "minimax_m2": ["<minimax:tool_call>", "</minimax:tool_call>", "<think>", "</think>"],
    "deepseek_v3_2": [DSML, "<think>", "</think>"],
    "deepseek_v3_2 V4": [DSML, "<think>", "</think>"],
    "deepseek_v3_2 V4.1": [DSML, "<think>", "</think>"],
    "step3": [
        "<｜tool_calls_begin｜>",
        "<｜tool_calls_end｜>",
        "<｜tool_call_begin｜>",
        END_STEP,
        "<｜tool_sep｜>",
        "<think>",
        "</think>",
    ],
}


def element(name: str, inner: str, attributes: str = "") -> str:
    return f"<|open|>{name}{attributes}<|sep|>{inner}<|close|>{name}<|sep|>"


def k3(name: str, *given: tuple[str, str, str]) -> str:
    inner = "".join(element("argument", value, f' key="{key}" type="{kind}"') for key, kind, value in given)
    return element("call", inner, f' tool="{name}" index="1"')


def k3_tools(*calls: str) -> str:
    return element("tools", "".join(calls))


K3 = k3("f", ("a", "number", "1"))
CUT_K3 = K3[: K3.index("<|close|>argument")]
TABLES["kimi_k3"] = [
    Case("one call", k3_tools(K3), (F,)),
    Case("two calls", k3_tools(K3, k3("g")), (F, G)),
    Case("a string", k3_tools(k3("f", ("s", "string", LONG))), (("f", {"s": LONG}),)),
    Case("unicode", k3_tools(k3("f", ("s", "string", "漢字 🙂"))), (("f", {"s": "漢字 🙂"}),)),
    Case("a string of digits", k3_tools(k3("f", ("s", "string", "07"))), (("f", {"s": "07"}),)),
    Case("an empty string", k3_tools(k3("f", ("s", "string", ""))), (("f", {"s": ""}),)),
    Case("nested", k3_tools(k3("f", ("o", "object", '{"k": [1, null]}'))), (("f", {"o": {"k": [1, None]}}),)),
    Case("null", k3_tools(k3("f", ("n", "null", "null"))), (("f", {"n": None}),)),
    Case(
        "a boolean and a number",
        k3_tools(k3("f", ("b", "boolean", "true"), ("n", "number", "0.5"))),
        (("f", {"b": True, "n": 0.5}),),
    ),
    Case("an escaped attribute", k3_tools(k3("f", ("&quot;a&amp;", "number", "1"))), (("f", {'"a&': 1}),)),
    Case("the answer's element", element("response", "Yes."), said="Yes."),
    Case("an answer and calls", element("response", "Yes.") + k3_tools(K3), (F,), said="Yes."),
    Case("thought", element("think", "hm") + element("response", "") + k3_tools(K3), (F,), thought="hm"),
    Case("the end of the message", k3_tools(K3) + "<|close|>message<|sep|>", (F,)),
    Case(
        "one object",
        k3_tools(element("call", element("json", '{"a": 1}', ' type="object"'), ' tool="f" index="1"')),
        (F,),
    ),
    Case("no type", k3_tools(element("call", element("argument", "1", ' key="a"'), ' tool="f" index="1"')), (F,)),
    Case("no index", k3_tools(element("call", "", ' tool="g"')), (G,)),
    Case("without tools around it", K3, (F,)),
    Case("closing tag missing before the next", k3_tools(K3.removesuffix("<|close|>call<|sep|>"), k3("g")), (F, G)),
    Case("closing tag of a value missing", k3_tools(K3.replace("<|close|>argument<|sep|>", "")), (F,)),
    Case("a value runs into the next call", k3_tools(CUT_K3, k3("g")), (G,), faults=("must not stand within",)),
    Case("the wrong type", k3_tools(k3("f", ("a", "number", "one")), k3("g")), (G,), faults=("must be of type",)),
    Case("the argument twice", k3_tools(k3("f", ("a", "number", "1"), ("a", "number", "1"))), faults=("given twice",)),
    Case("no tool", k3_tools(element("call", "", ' index="1"')), faults=("names no tool",)),
    Case("no key", k3_tools(element("call", element("argument", "1"), ' tool="f"')), faults=("no key",)),
    Case("no sep", "<|open|>tools<|sep|><|open|>call tool=f<|close|>call<|sep|>", faults=("attributes",)),
    Case(
        "text between the arguments", k3_tools(K3.replace("<|close|>call", "so<|close|>call")), faults=("text after",)
    ),
    Case("cut in a tag", '<|open|>tools<|sep|><|open|>call tool="f', faults=("cut off",)),
    Case("cut in a value", CUT_K3, faults=("cut off",)),
    Case("cut after a value", K3.removesuffix("<|close|>call<|sep|>"), faults=("cut off",)),
]
CONTROLS["kimi_k3"] = ["<|open|>", "<|close|>", "<|sep|>"]
