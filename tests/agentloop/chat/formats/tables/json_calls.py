"""Cases of the formats that write a call as one JSON object."""

from __future__ import annotations

from tests.agentloop.chat.formats.tables.cases import Case

F = ("f", {"a": 1})
G = ("g", {})
ONE = '{"name": "f", "arguments": {"a": 1}}'
TWO = f'{ONE}, {{"name": "g", "arguments": {{}}}}'
DEEP = '{"name": "f", "arguments": {"o": {"k": [1, {"m": null}]}, "s": "漢字 🙂 \\"q\\" \\n"}}'
DEEP_CALL = ("f", {"o": {"k": [1, {"m": None}]}, "s": '漢字 🙂 "q" \n'})


def arrays(opening: str, closing: str) -> list[Case]:
    """Return the cases of an array of calls between tags; empty: there is no closing tag."""
    return [
        Case("one call", f"{opening}[{ONE}]{closing}", (F,)),
        Case("two calls", f"{opening}[{TWO}]{closing}", (F, G)),
        Case("on lines of its own", f"{opening}\n[\n  {ONE}\n]\n{closing}", (F,)),
        Case("a single object", f"{opening}{ONE}{closing}", (F,)),
        Case("nested, unicode", f"{opening}[{DEEP}]{closing}", (DEEP_CALL,)),
        Case("text before", f"Let me see.\n{opening}[{ONE}]{closing}", (F,), said="Let me see."),
        Case("text after", f"{opening}[{ONE}]{closing} Done.", (F,), said="Done."),
        Case("after reasoning", f"<think>Hm {opening}</think>{opening}[{ONE}]{closing}", (F,), thought=f"Hm {opening}"),
        Case("closing tag missing at the end", f"{opening}[{ONE}]", (F,)),
        Case("no arguments", f'{opening}[{{"name": "g"}}]{closing}', (G,)),
        Case("arguments as JSON text", f'{opening}[{{"name": "f", "arguments": "{{\\"a\\": 1}}"}}]{closing}', (F,)),
        Case(
            "a line break in a string",
            f'{opening}[{{"name": "f", "arguments": {{"s": "x\ny"}}}}]{closing}',
            (("f", {"s": "x\ny"}),),
        ),
        Case(
            "Python literals", f"{opening}[{{'name': 'f', 'arguments': {{'b': True}}}}]{closing}", (("f", {"b": True}),)
        ),
        Case("the tag twice", f"{opening}{opening}[{ONE}]{closing}", (F,)),
        Case("two blocks", f"{opening}[{ONE}]{closing}\n{opening}[{TWO}]{closing}", (F, F, G)),
        Case("empty", f"{opening}{closing}", faults=("",)),
        Case("empty array", f"{opening}[]{closing}"),
        Case("cut in the JSON", f'{opening}[{ONE}, {{"name": "f", "argum', (F,), faults=("cut off",)),
        Case("cut after the opening tag", f"Well. {opening}", said="Well.", faults=("cut off",)),
        Case("not JSON", f"{opening}call f please{closing}", faults=("not valid JSON",)),
        Case("no name", f'{opening}[{{"arguments": {{}}}}, {ONE}]{closing}', (F,), faults=('no string "name"',)),
        Case(
            "arguments are a list",
            f'{opening}[{{"name": "f", "arguments": [1]}}]{closing}',
            faults=('no object "arguments"',),
        ),
        Case("an element is a number", f"{opening}[1, {ONE}]{closing}", (F,), faults=("not a JSON object",)),
        Case(
            "a leading zero", f'{opening}[{{"name": "f", "arguments": {{"a": 07}}}}]{closing}', faults=("begin with 0",)
        ),
        Case("NaN", f'{opening}[{{"name": "f", "arguments": {{"n": NaN}}}}]{closing}', faults=("not a number",)),
        Case("a key twice", f'{opening}[{{"name": "f", "arguments": {{"a": 1, "a": 2}}}}]{closing}', faults=("twice",)),
    ]


INTERNLM = "<|action_start|><|plugin|>"
END = "<|action_end|>"

TABLES: dict[str, list[Case]] = {
    "granite": [
        *arrays("<|tool_call|>", ""),
        Case("Granite 3.1", f"<tool_call>[{TWO}]", (F, G)),
        Case("Granite 4", f"<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{ONE}\n</tool_call>", (F, F)),
        Case("Granite 4, text in between", f"<tool_call>{ONE}</tool_call> and", (F,), said="and"),
        Case("Granite 20b", f"<function_call> {ONE} <function_call> {ONE}", (F, F)),
        Case("Granite 20b, no tool", '<function_call> {"name": "no_function", "arguments": {}}'),
        Case("parameters", '<|tool_call|>[{"name": "f", "parameters": {"a": 1}}]', (F,)),
    ],
    "phi4": [
        *arrays("<|tool_call|>", "<|/tool_call|>"),
        Case("functools", f"functools[{TWO}]", (F, G)),
        Case("functools, text around", f"Sure. functools[{ONE}] Done.", (F,), said="Sure.  Done."),
        Case("functools, cut", f'functools[{ONE}, {{"na', (F,), faults=("cut off",)),
        Case("functools in prose", "Use functools.partial(f).", said="Use functools.partial(f)."),
        Case("text before the closing tag", f"<|tool_call|>[{ONE}] x<|/tool_call|>", (F,), faults=("text after",)),
        Case(
            "a tag within a string",
            '<|tool_call|>[{"name": "f", "arguments": {"s": "<|/tool_call|>',
            faults=("cut off",),
        ),
    ],
    "nemotron": [
        *arrays("<TOOLCALL>", "</TOOLCALL>"),
        Case("the first models", f"<toolcall> {ONE} </toolcall> <toolcall> {ONE} </toolcall>", (F, F)),
        Case("text before the closing tag", f"<TOOLCALL>[{ONE}] x</TOOLCALL>", (F,), faults=("text after",)),
    ],
    "hunyuan": [
        *arrays("<tool_calls>", "</tool_calls>"),
        Case("objects side by side", f"<tool_calls>\n{ONE}\n{ONE}\n</tool_calls>", (F, F)),
        Case("the second object is cut", f'<tool_calls>{ONE}\n{{"name": ', (F,), faults=("cut off",)),
        Case("the answer's prefix", "助手：Yes.", said="Yes."),
    ],
    "ernie45": [
        Case("one call", f"<tool_call>\n{ONE}\n</tool_call>", (F,)),
        Case("two calls", f"<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{ONE}\n</tool_call>\n", (F, F)),
        Case("nested, unicode", f"<tool_call>{DEEP}</tool_call>", (DEEP_CALL,)),
        Case("an answer", "\n<response>\nYes.\n</response>\n", said="Yes."),
        Case(
            "thought, answer and call",
            f"<think>\nhm\n</think>\n\n<response>\nYes.\n</response>\n\n<tool_call>\n{ONE}\n</tool_call>\n",
            (F,),
            said="Yes.",
            thought="hm",
        ),
        Case("answer cut", "<response>\nYes", said="Yes"),
        Case("an array", f"<tool_call>[{TWO}]</tool_call>", (F, G)),
        Case("closing tag missing at the end", f"<tool_call>{ONE}", (F,)),
        Case("closing tag missing before the next", f"<tool_call>{ONE}<tool_call>{ONE}</tool_call>", (F, F)),
        Case("closing tag missing before an answer", f"<tool_call>{ONE}<response>Hm</response>", (F,), said="Hm"),
        Case("the tag twice", f"<tool_call><tool_call>{ONE}</tool_call>", (F,)),
        Case("no arguments", '<tool_call>{"name": "g"}</tool_call>', (G,)),
        Case("null arguments", '<tool_call>{"name": "g", "arguments": null}</tool_call>', (G,)),
        Case("arguments as JSON text", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', (F,)),
        Case(
            "arguments as JSON text in JSON text",
            r"""<tool_call>{"name": "f", "arguments": "\"{\\\"a\\\": 1}\""}</tool_call>""",
            (F,),
        ),
        Case(
            "a line break in a string",
            '<tool_call>{"name": "f", "arguments": {"s": "x\ny"}}</tool_call>',
            (("f", {"s": "x\ny"}),),
        ),
        Case(
            "Python literals", "<tool_call>{'name': 'f', 'arguments': {'n': None}}</tool_call>", (("f", {"n": None}),)
        ),
        Case("text after the JSON", f"<tool_call>{ONE} so</tool_call>", faults=("text after",)),
        Case("cut in the JSON", '<tool_call>{"name": "f", "arg', faults=("cut off",)),
        Case("cut after the tag", "Hm <tool_call>", said="Hm", faults=("cut off",)),
        Case("empty", "<tool_call></tool_call>", faults=("",)),
        Case("not JSON", "<tool_call>f(1)</tool_call>", faults=("not valid JSON",)),
        Case("no name", '<tool_call>{"arguments": {}}</tool_call>', faults=('no string "name"',)),
        Case("a name that is a number", '<tool_call>{"name": 3}</tool_call>', faults=('no string "name"',)),
        Case("arguments are a list", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', faults=("no object",)),
        Case(
            "a leading zero", '<tool_call>{"name": "f", "arguments": {"a": 07}}</tool_call>', faults=("begin with 0",)
        ),
        Case(
            "malformed, then valid",
            f"<tool_call>{{</tool_call><tool_call>{ONE}</tool_call>",
            (F,),
            faults=("",),
        ),
    ],
    "internlm": [
        Case("one call", f'Ok.{INTERNLM}\n{{"name": "f", "parameters": {{"a": 1}}}}{END}\n', (F,), said="Ok."),
        Case("a space between the tags", f"<|action_start|> <|plugin|>\n{ONE}{END}", (F,)),
        Case("two calls", f"{INTERNLM}\n{ONE}{END}{INTERNLM}\n{ONE}{END}", (F, F)),
        Case("nested, unicode", f"{INTERNLM}{DEEP}{END}", (DEEP_CALL,)),
        Case("text after", f"{INTERNLM}{ONE}{END} Done.", (F,), said="Done."),
        Case("closing tag missing at the end", f"{INTERNLM}{ONE}", (F,)),
        Case("closing tag missing before the next", f"{INTERNLM}{ONE}{INTERNLM}{ONE}{END}", (F, F)),
        Case("no parameters", f'{INTERNLM}{{"name": "g"}}{END}', (G,)),
        Case("parameters as JSON text", f'{INTERNLM}{{"name": "f", "parameters": "{{\\"a\\": 1}}"}}{END}', (F,)),
        Case(
            "a line break in a string",
            f'{INTERNLM}{{"name": "f", "parameters": {{"s": "x\ny"}}}}{END}',
            (("f", {"s": "x\ny"}),),
        ),
        Case(
            "Python literals", f"{INTERNLM}{{'name': 'f', 'parameters': {{'b': False}}}}{END}", (("f", {"b": False}),)
        ),
        Case(
            "program text",
            f"<|action_start|><|interpreter|>\n```python\nprint('x')\n```{END}\n",
            (("interpreter", {"code": "print('x')"}),),
        ),
        Case(
            "program text without a fence",
            f"<|action_start|><|interpreter|>\n1 + 1\n{END}",
            (("interpreter", {"code": "1 + 1"}),),
        ),
        Case(
            "program text, fence open",
            f"<|action_start|><|interpreter|>\n```python\nx = 1{END}",
            faults=("closed fence",),
        ),
        Case("no program text", f"<|action_start|><|interpreter|>{END}", faults=("program text",)),
        Case("neither plugin nor interpreter", f"<|action_start|>{ONE}{END}", faults=("<|plugin|>",)),
        Case("cut after the tag", "Hm<|action_start|>", said="Hm", faults=("",)),
        Case("cut after plugin", f"Hm{INTERNLM}", said="Hm", faults=("cut off",)),
        Case("cut in the JSON", f'{INTERNLM}{{"name": "f", "par', faults=("cut off",)),
        Case("text after the JSON", f"{INTERNLM}{ONE} so{END}", faults=("text after",)),
        Case("not JSON", f"{INTERNLM}f(1){END}", faults=("not valid JSON",)),
        Case("no name", f'{INTERNLM}{{"parameters": {{}}}}{END}', faults=('no string "name"',)),
        Case("parameters are a list", f'{INTERNLM}{{"name": "f", "parameters": [1]}}{END}', faults=("no object",)),
        Case("a leading zero", f'{INTERNLM}{{"name": "f", "parameters": {{"a": 07}}}}{END}', faults=("begin with 0",)),
        Case(
            "a control token in a string",
            f'{INTERNLM}{{"name": "f", "parameters": {{"s": "x{END}"}}}}',
            faults=("cut off",),
            said='"}}',
        ),
        Case("malformed, then valid", f"{INTERNLM}{{{END}{INTERNLM}{ONE}{END}", (F,), faults=("",)),
    ],
    "apertus": [
        Case("one call", '<|tools_prefix|>[{"f": {"a": 1}}]<|tools_suffix|>', (F,)),
        Case("two calls", '<|tools_prefix|>[{"f": {"a": 1}}, {"g": {}}]<|tools_suffix|>', (F, G)),
        Case("nested", '<|tools_prefix|>[{"f": {"o": {"k": [null]}}}]<|tools_suffix|>', (("f", {"o": {"k": [None]}}),)),
        Case("unicode", '<|tools_prefix|>[{"f": {"s": "漢字 🙂"}}]<|tools_suffix|>', (("f", {"s": "漢字 🙂"}),)),
        Case("text around", 'Ok. <|tools_prefix|>[{"g": {}}]<|tools_suffix|> Done.', (G,), said="Ok.  Done."),
        Case(
            "thought",
            '<|inner_prefix|>hm<|inner_suffix|><|tools_prefix|>[{"g": {}}]<|tools_suffix|>',
            (G,),
            thought="hm",
        ),
        Case("a single object", '<|tools_prefix|>{"f": {"a": 1}}<|tools_suffix|>', (F,)),
        Case(
            "two blocks",
            '<|tools_prefix|>[{"g": {}}]<|tools_suffix|><|tools_prefix|>[{"g": {}}]<|tools_suffix|>',
            (G, G),
        ),
        Case("the tag twice", '<|tools_prefix|><|tools_prefix|>[{"g": {}}]<|tools_suffix|>', (G,)),
        Case("closing tag missing at the end", '<|tools_prefix|>[{"g": {}}]', (G,)),
        Case("null arguments", '<|tools_prefix|>[{"g": null}]<|tools_suffix|>', (G,)),
        Case("arguments as JSON text", '<|tools_prefix|>[{"f": "{\\"a\\": 1}"}]<|tools_suffix|>', (F,)),
        Case(
            "a line break in a string",
            '<|tools_prefix|>[{"f": {"s": "x\ny"}}]<|tools_suffix|>',
            (("f", {"s": "x\ny"}),),
        ),
        Case("Python literals", "<|tools_prefix|>[{'f': {'b': True}}]<|tools_suffix|>", (("f", {"b": True}),)),
        Case("empty array", "<|tools_prefix|>[]<|tools_suffix|>"),
        Case("empty", "<|tools_prefix|><|tools_suffix|>", faults=("",)),
        Case("cut", '<|tools_prefix|>[{"g": {}}, {"f": {"a"', (G,), faults=("cut off",)),
        Case("cut after the tag", "Hm<|tools_prefix|>", said="Hm", faults=("cut off",)),
        Case("cut before the array ends", '<|tools_prefix|>[{"g": {}}', (G,), faults=("cut off",)),
        Case("two keys", '<|tools_prefix|>[{"f": {}, "g": {}}]<|tools_suffix|>', faults=("one key",)),
        Case("no key", '<|tools_prefix|>[{}, {"g": {}}]<|tools_suffix|>', (G,), faults=("one key",)),
        Case("arguments are a list", '<|tools_prefix|>[{"f": [1]}]<|tools_suffix|>', faults=("no object",)),
        Case("OpenAI's form", f"<|tools_prefix|>[{ONE}]<|tools_suffix|>", faults=("one key",)),
        Case("not JSON", "<|tools_prefix|>f(1)<|tools_suffix|>", faults=("not valid JSON",)),
        Case(
            "text before the closing tag",
            '<|tools_prefix|>[{"g": {}}] so<|tools_suffix|>',
            (G,),
            faults=("text after",),
        ),
        Case("a leading zero", '<|tools_prefix|>[{"f": {"a": 07}}]<|tools_suffix|>', faults=("begin with 0",)),
    ],
    "xlam": [
        Case("one call", f"[{ONE}]", (F,)),
        Case("two calls", f"[{TWO}]", (F, G)),
        Case("on lines of its own", f"\n[\n    {ONE}\n]\n", (F,)),
        Case("nested, unicode", f"[{DEEP}]", (DEEP_CALL,)),
        Case("after reasoning", f"<think>hm</think>[{ONE}]", (F,), thought="hm"),
        Case("text after", f"[{ONE}] Done.", (F,), said="Done."),
        Case("in a fence", f"Ok.\n```json\n[{ONE}]\n```\nDone.", (F,), said="Ok.\n\nDone."),
        Case("in a fence without a language", f"```\n[{ONE}]\n```", (F,)),
        Case("in two fences", f"```json\n[{ONE}]\n```\n```json\n[{ONE}]\n```", (F, F)),
        Case("after [TOOL_CALLS]", f"[TOOL_CALLS] [{TWO}]", (F, G)),
        Case("between tags", f"<tool_call>[{TWO}]</tool_call>", (F, G)),
        Case("xLAM 1", f'{{"tool_calls": [{TWO}]}}', (F, G)),
        Case("xLAM 1 in a fence", f'```json\n{{"tool_calls": [{ONE}]}}\n```', (F,)),
        Case("no arguments", '[{"name": "g"}]', (G,)),
        Case("arguments as JSON text", '[{"name": "f", "arguments": "{\\"a\\": 1}"}]', (F,)),
        Case("and that in JSON text", r"""[{"name": "f", "arguments": "\"{\\\"a\\\": 1}\""}]""", (F,)),
        Case("a line break in a string", '[{"name": "f", "arguments": {"s": "x\ny"}}]', (("f", {"s": "x\ny"}),)),
        Case("Python literals as arguments", "[{\"name\": 'f', \"arguments\": {'b': True}}]", (("f", {"b": True}),)),
        Case("the fence is not closed", f"```json\n[{ONE}]", (F,)),
        Case("a JSON answer", "[1, 2, 3]", said="[1, 2, 3]"),
        Case("objects without a name", '[{"x": 1}]', said='[{"x": 1}]'),
        Case("empty array", "[]", said="[]"),
        Case("a program in a fence", "```python\n[x]\n```", said="```python\n[x]\n```"),
        Case("an array behind prose", f"I would call [{ONE}]", said=f"I would call [{ONE}]"),
        Case("cut in the JSON", f'[{ONE}, {{"name": "f", "argum', (F,), faults=("cut off",)),
        Case("cut before the array ends", f"[{ONE}", (F,), faults=("cut off",)),
        Case("a leading zero", '[{"name": "f", "arguments": {"a": 07}}]', faults=("begin with 0",)),
        Case("the second has no name", f'[{ONE}, {{"arguments": {{}}}}]', (F,), faults=('no string "name"',)),
        Case("arguments are a list", '[{"name": "f", "arguments": [1]}]', faults=("no object",)),
        Case("no comma", f"[{ONE} {ONE}]", (F,), faults=("separated by commas",)),
        Case("a key twice", '[{"name": "f", "arguments": {"a": 1, "a": 2}}]', faults=("twice",)),
    ],
}
CONTROLS = {
    "granite": ["<|tool_call|>", "<tool_call>", "</tool_call>", "<think>", "</think>"],
    "phi4": ["<|tool_call|>", "<|/tool_call|>", "<think>", "</think>"],
    "nemotron": ["<TOOLCALL>", "</TOOLCALL>", "<think>", "</think>"],
    "hunyuan": [],
    "ernie45": ["<tool_call>", "</tool_call>", "<response>", "</response>", "<think>", "</think>"],
    "internlm": ["<|action_start|>", "<|action_end|>", "<|plugin|>", "<|interpreter|>"],
    "apertus": ["<|tools_prefix|>", "<|tools_suffix|>", "<|inner_prefix|>", "<|inner_suffix|>"],
    "xlam": [],
}
