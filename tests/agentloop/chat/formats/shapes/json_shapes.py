"""Shapes of the formats that write a call as one JSON object."""

from __future__ import annotations

from functools import partial

from tests.agentloop.chat.formats.support import Pieces, Shape, Sources, dumped, joined, json_object, words


def call(name: str, arguments: str, *, name_key: str = "name", key: str = "arguments", more: str = "") -> str:
    """Return a call as JSON, with its arguments as source text."""
    return f'{{"{name_key}": {dumped(name)}, "{key}": {arguments}{more}}}'


def array(calls: list[str]) -> str:
    return f"[{', '.join(calls)}]"


def tagged(calls: Sources, opening: str, closing: str) -> Pieces:
    """Return each call between two tags."""
    return joined(([opening, f"\n{call(n, json_object(a))}\n", closing] for n, a in calls), "\n")


def tagged_given(name: str, arguments: str, opening: str, closing: str) -> Pieces:
    """Return one call between two tags, its arguments as a whole."""
    return [opening, f"\n{call(name, arguments)}\n", closing]


def llama3(calls: Sources) -> Pieces:
    return ["<|python_tag|>", "; ".join(call(n, json_object(a), key="parameters") for n, a in calls)]


def mistral_array(calls: Sources) -> Pieces:
    return ["[TOOL_CALLS]", " " + array([call(n, json_object(a), more=', "id": "123456789"') for n, a in calls])]


def mistral_arguments(calls: Sources) -> Pieces:
    return joined(["[TOOL_CALLS]", n, "[ARGS]", json_object(a)] for n, a in calls)


def mistral_ids(calls: Sources) -> Pieces:
    return joined(["[TOOL_CALLS]", n, "[CALL_ID]", "123456789", "[ARGS]", json_object(a)] for n, a in calls)


def cohere(calls: Sources) -> Pieces:
    made = [call(n, json_object(a), name_key="tool_name", key="parameters") for n, a in calls]
    actions = ",\n".join(f'    {{"tool_call_id": "{i}", {one[1:]}' for i, one in enumerate(made))
    return ["<|START_ACTION|>", f"[\n{actions}\n]", "<|END_ACTION|>"]


def cohere_fenced(calls: Sources) -> Pieces:
    made = [call(n, json_object(a), name_key="tool_name", key="parameters") for n, a in calls]
    return ["Action: ```json\n", array(made), "\n```"]


OPEN, CLOSE = "<tool_call>", "</tool_call>"
MISTRAL = words("[TOOL_CALLS] [ARGS] [CALL_ID]")
COHERE = words("<|START_ACTION|> <|END_ACTION|> <|START_RESPONSE|> <|END_RESPONSE|> <|START_TEXT|> <|END_TEXT|>")
SHAPES = [
    Shape(
        "hermes",
        partial(tagged, opening=OPEN, closing=CLOSE),
        words("<tool_call> </tool_call>"),
        given=partial(tagged_given, opening=OPEN, closing=CLOSE),
        opening="<tool_call>",
    ),
    Shape(
        "hermes",
        partial(tagged, opening=OPEN, closing=CLOSE),
        frozenset(),
        variant="text",
        given=partial(tagged_given, opening=OPEN, closing=CLOSE),
        opening="<tool_call>",
    ),
    Shape(
        "llama3_json",
        llama3,
        words("<|python_tag|>"),
        listed=True,
        closing=0,
        given=lambda n, a: ["<|python_tag|>", call(n, a, key="parameters")],
        opening="<|python_tag|>",
    ),
    Shape(
        "llama3_json",
        lambda calls: llama3(calls)[1:],
        words("<|python_tag|>"),
        variant="bare",
        listed=True,
        closing=0,
        announced=False,
        given=lambda n, a: [call(n, a, key="parameters")],
    ),
    Shape(
        "mistral",
        mistral_array,
        MISTRAL,
        variant="array",
        listed=True,
        closing=0,
        given=lambda n, a: ["[TOOL_CALLS]", array([call(n, a)])],
        opening="[TOOL_CALLS]",
    ),
    Shape(
        "mistral",
        mistral_arguments,
        MISTRAL,
        variant="arguments",
        closing=0,
        given=lambda n, a: ["[TOOL_CALLS]", n, "[ARGS]", a],
        opening="[TOOL_CALLS]",
    ),
    Shape(
        "mistral",
        mistral_ids,
        MISTRAL,
        variant="ids",
        closing=0,
        given=lambda n, a: ["[TOOL_CALLS]", n, "[CALL_ID]", "123456789", "[ARGS]", a],
        opening="[TOOL_CALLS]",
    ),
    Shape(
        "cohere",
        cohere,
        COHERE,
        listed=True,
        given=lambda n, a: [
            "<|START_ACTION|>",
            array([call(n, a, name_key="tool_name", key="parameters")]),
            "<|END_ACTION|>",
        ],
        opening="<|START_ACTION|>",
    ),
    Shape(
        "cohere",
        cohere_fenced,
        COHERE,
        variant="fenced",
        listed=True,
        announced=False,
        given=lambda n, a: [
            "Action: ```json\n",
            array([call(n, a, name_key="tool_name", key="parameters")]),
            "\n```",
        ],
    ),
]
