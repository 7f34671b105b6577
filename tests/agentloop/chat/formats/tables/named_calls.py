"""Cases of the formats that write a call's name, and then its arguments."""

from __future__ import annotations

from tests.agentloop.chat.formats.tables.cases import Case

F = ("f", {"a": 1})
G = ("g", {})


def kimi(call_id: str, arguments: str) -> str:
    return f"<|tool_call_begin|>{call_id}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


def section(*calls: str) -> str:
    return f"<|tool_calls_section_begin|>{''.join(calls)}<|tool_calls_section_end|>"


def gemma(body: str) -> str:
    return f"<|tool_call>call:{body}<tool_call|>"


Q = '<|"|>'
ONE_KIMI, ONE_GEMMA = kimi("functions.f:0", '{"a": 1}'), gemma("f{a:1}")

GEMMA4 = [
    Case("one call", ONE_GEMMA, (F,)),
    Case("two calls", ONE_GEMMA + gemma("g{}"), (F, G)),
    Case("a string", gemma(f"f{{s:{Q}x, y}} z{Q}}}"), (("f", {"s": "x, y} z"}),)),
    Case(
        "a string with lines and quotes", gemma(f"f{{s:{Q}a\n\"b\" 'c' \\n{Q}}}"), (("f", {"s": "a\n\"b\" 'c' \\n"}),)
    ),
    Case("an empty string", gemma(f"f{{s:{Q}{Q}}}"), (("f", {"s": ""}),)),
    Case("unicode", gemma(f"f{{s:{Q}漢字 🙂{Q}}}"), (("f", {"s": "漢字 🙂"}),)),
    Case("scalars", gemma("f{a:-3,b:true,n:0.5,x:1e-07}"), (("f", {"a": -3, "b": True, "n": 0.5, "x": 1e-07}),)),
    Case("null and None", gemma("f{n:null,x:None}"), (("f", {"n": None, "x": None}),)),
    Case("an array", gemma(f"f{{l:[1,{Q}x{Q},[],false]}}"), (("f", {"l": [1, "x", [], False]}),)),
    Case("an object", gemma(f"f{{o:{{k:{Q}v{Q},m:{{}}}}}}"), (("f", {"o": {"k": "v", "m": {}}}),)),
    Case("quoted keys", gemma(f"f{{o:{{{Q}k:1{Q}:2}}}}"), (("f", {"o": {"k:1": 2}}),)),
    Case("white space", gemma("f {\n a : 1 , b : true\n}\n"), (("f", {"a": 1, "b": True}),)),
    Case("JSON strings", gemma('f{s:"x"}'), (("f", {"s": "x"}),)),
    Case("text around", f"Ok. {ONE_GEMMA} Done.", (F,), said="Ok.  Done."),
    Case("thought", f"<|channel>thought\nhm {ONE_GEMMA}<channel|>{ONE_GEMMA}", (F,), thought=f"hm {ONE_GEMMA}"),
    Case("an empty thought", f"<|channel>thought\n<channel|>{ONE_GEMMA}", (F,)),
    Case("the tag of a response", f"{ONE_GEMMA}<|tool_response>", (F,)),
    Case("closing tag missing at the end", "<|tool_call>call:f{a:1}", (F,)),
    Case("closing tag missing before the next", f"<|tool_call>call:f{{a:1}}{ONE_GEMMA}", (F, F)),
    Case("the tag twice", f"<|tool_call>{ONE_GEMMA}", (F,)),
    Case("a word without quotes", gemma("f{s:Paris}"), faults=("is not a number",)),
    Case("a string that is not closed", gemma(f"f{{s:{Q}x}}"), faults=("cut off before the string ends",)),
    Case("not closed, then valid", gemma(f"f{{s:{Q}x}}") + ONE_GEMMA, (F,), faults=("cut off",)),
    Case("cut in a string", f"<|tool_call>call:f{{s:{Q}x", faults=("cut off",)),
    Case("cut after a key", "<|tool_call>call:f{s", faults=("cut off",)),
    Case("cut in the object", "<|tool_call>call:f{a:1,", faults=("cut off",)),
    Case("cut after the tag", "Hm <|tool_call>", said="Hm", faults=("cut off",)),
    Case("no call:", "<|tool_call>f{a:1}<tool_call|>", faults=("call:NAME",)),
    Case("no name", "<|tool_call>call:{a:1}<tool_call|>", faults=("call:NAME",)),
    Case("no object", "<|tool_call>call:f<tool_call|>", faults=("call:NAME",)),
    Case("JSON", '<|tool_call>{"name": "f"}<tool_call|>', faults=("call:NAME",)),
    Case("a key twice", gemma("f{a:1,a:2}"), faults=("twice",)),
    Case("no comma", gemma("f{a:1 b:2}"), faults=("comma",)),
    Case("a leading zero", gemma("f{a:07}"), faults=("begin with 0",)),
    Case("no value", gemma("f{a:}"), faults=("is not a number",)),
    Case("too deep", gemma("f{a:" + "[" * 80 + "]" * 80 + "}"), faults=("nested",)),
    Case("text before the closing tag", "<|tool_call>call:f{a:1} so<tool_call|>", faults=("text after",)),
    Case("malformed, then valid", gemma("f{") + ONE_GEMMA, (F,), faults=("",)),
]


def functiongemma(case: Case) -> Case:
    """Return a case of Gemma 4 with the tags of FunctionGemma."""

    def changed(text: str) -> str:
        for old, new in (
            ("<|tool_call>", "<start_function_call>"),
            ("<tool_call|>", "<end_function_call>"),
            ("<|tool_response>", "<start_function_response>"),
            ("<|channel>thought\n", "<think>"),
            ("<channel|>", "</think>"),
            (Q, "<escape>"),
        ):
            text = text.replace(old, new)
        return text

    thought = changed(case.thought) if case.thought else case.thought
    return Case(case.title, changed(case.text), case.calls, changed(case.said), case.faults, thought=thought)


TABLES: dict[str, list[Case]] = {
    "kimi_k2": [
        Case("one call", section(ONE_KIMI), (F,), ids=("functions.f:0",)),
        Case(
            "two calls", section(ONE_KIMI, kimi("functions.g:1", "{}")), (F, G), ids=("functions.f:0", "functions.g:1")
        ),
        Case(
            "nested, unicode",
            section(kimi("functions.f:0", '{"s": "漢字 🙂", "o": {"k": [null]}}')),
            (("f", {"s": "漢字 🙂", "o": {"k": [None]}}),),
        ),
        Case("without functions.", section(kimi("f:3", '{"a": 1}')), (F,), ids=("f:3",)),
        Case("a name with dots", section(kimi("functions.web.search-v2:0", "{}")), (("web.search-v2", {}),)),
        Case("text around", f"Ok. {section(ONE_KIMI)} Done.", (F,), said="Ok.  Done."),
        Case("thought", f"<think>hm {ONE_KIMI}</think>{section(ONE_KIMI)}", (F,), thought=f"hm {ONE_KIMI}"),
        Case("without a section", ONE_KIMI, (F,)),
        Case("white space", section(kimi(" functions.f:0 ", '\n{"a": 1}\n')), (F,), ids=("functions.f:0",)),
        Case("a section that is not closed", f"<|tool_calls_section_begin|>{ONE_KIMI}", (F,)),
        Case("closing tag missing at the end", ONE_KIMI.removesuffix("<|tool_call_end|>"), (F,)),
        Case("closing tag missing before the section's", section(ONE_KIMI.removesuffix("<|tool_call_end|>")), (F,)),
        Case(
            "closing tag missing before the next", section(ONE_KIMI.removesuffix("<|tool_call_end|>"), ONE_KIMI), (F, F)
        ),
        Case("the tag twice", section("<|tool_call_begin|>" + ONE_KIMI), (F,)),
        Case("arguments as JSON text", section(kimi("functions.f:0", '"{\\"a\\": 1}"')), (F,)),
        Case("a line break in a string", section(kimi("functions.f:0", '{"s": "x\ny"}')), (("f", {"s": "x\ny"}),)),
        Case("Python literals", section(kimi("functions.f:0", "{'b': True}")), (("f", {"b": True}),)),
        Case(
            "a closing tag in a string",
            section(kimi("functions.f:0", '{"s": "<|tool_call_end|>"}')),
            faults=("cut off",),
            said='"}<|tool_call_end|>',
        ),
        Case("the id is a number", section(kimi("0", "{}"), ONE_KIMI), (F,), faults=("functions.NAME:INDEX",)),
        Case("no index", section(kimi("functions.f", "{}")), faults=("functions.NAME:INDEX",)),
        Case("no id", section(kimi("", "{}")), faults=("functions.NAME:INDEX",)),
        Case(
            "no arguments tag",
            section("<|tool_call_begin|>functions.f:0<|tool_call_end|>"),
            faults=("<|tool_call_argument_begin|>",),
        ),
        Case("the arguments are a list", section(kimi("functions.f:0", "[1]")), faults=("not a JSON object",)),
        Case("no arguments", section(kimi("functions.f:0", ""), ONE_KIMI), (F,), faults=("",)),
        Case("not JSON", section(kimi("functions.f:0", "a=1")), faults=("not valid JSON",)),
        Case("a leading zero", section(kimi("functions.f:0", '{"a": 07}')), faults=("begin with 0",)),
        Case(
            "cut in the id",
            "Hm <|tool_calls_section_begin|><|tool_call_begin|>functions.f",
            said="Hm",
            faults=("cut off",),
        ),
        Case(
            "cut in the JSON", '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a"', faults=("cut off",)
        ),
        Case("text before the closing tag", section(kimi("functions.f:0", "{} so")), faults=("text after",)),
        Case("malformed, then valid", section(kimi("functions.f:0", "{"), ONE_KIMI), (F,), faults=("",)),
    ],
    "gemma4": GEMMA4,
    "functiongemma": [functiongemma(case) for case in GEMMA4],
}
CONTROLS = {
    "kimi_k2": [
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
        "<|tool_call_argument_begin|>",
        "<think>",
        "</think>",
    ],
    "gemma4": ["<|tool_call>", "<tool_call|>", Q, "<|channel>", "<channel|>", "<|tool_response>"],
    "functiongemma": [
        "<start_function_call>",
        "<end_function_call>",
        "<escape>",
        "<think>",
        "</think>",
        "<start_function_response>",
    ],
}
