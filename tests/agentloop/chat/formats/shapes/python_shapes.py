"""Shapes of the formats that write calls in Python syntax."""

from __future__ import annotations

from tests.agentloop.chat.formats.support import Pieces, Shape, Sources, words


def python_list(calls: Sources) -> str:
    return f"[{', '.join(python_call(*call) for call in calls)}]"


def python_call(name: str, given: list[tuple[str, str]]) -> str:
    return f"{name}({', '.join(f'{key}={source}' for key, source in given)})"


def lfm2(calls: Sources) -> Pieces:
    return ["<|tool_call_start|>", python_list(calls), "<|tool_call_end|>"]


def llama4(calls: Sources) -> Pieces:
    return ["<|python_start|>", python_list(calls), "<|python_end|>"]


def olmo3(calls: Sources) -> Pieces:
    return ["<function_calls>", "\n".join(python_call(*call) for call in calls), "</function_calls>"]


LFM2 = words("<|tool_call_start|> <|tool_call_end|>")
PYTHONIC = words("<|python_start|> <|python_end|> <function_calls> </function_calls>")
SHAPES = [
    Shape("lfm2", lfm2, LFM2, language="python", listed=True, opening="<|tool_call_start|>"),
    Shape(
        "pythonic",
        lambda calls: [python_list(calls)],
        PYTHONIC,
        language="python",
        listed=True,
        variant="bare",
        closing=0,
        announced=False,
    ),
    Shape("pythonic", llama4, PYTHONIC, language="python", listed=True, variant="llama4", opening="<|python_start|>"),
    Shape("pythonic", olmo3, PYTHONIC, language="python", listed=True, variant="olmo3", opening="<function_calls>"),
]
