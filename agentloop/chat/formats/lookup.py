"""Find a model's tool-call format: by name, or by what its chat template renders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from agentloop.chat.formats.base import BaseFormat, ToolFormat, Tools
from agentloop.chat.formats.framed_calls.harmony import HarmonyFormat
from agentloop.chat.formats.json_calls.apertus import ApertusFormat
from agentloop.chat.formats.json_calls.cohere import CohereFormat
from agentloop.chat.formats.json_calls.ernie45 import Ernie45Format
from agentloop.chat.formats.json_calls.granite import GraniteFormat
from agentloop.chat.formats.json_calls.hermes import HermesFormat
from agentloop.chat.formats.json_calls.internlm import InternLMFormat
from agentloop.chat.formats.json_calls.llama3_json import Llama3JsonFormat
from agentloop.chat.formats.json_calls.mistral import MistralFormat
from agentloop.chat.formats.json_calls.nemotron import NemotronFormat
from agentloop.chat.formats.json_calls.phi4 import Phi4Format
from agentloop.chat.formats.json_calls.xlam import XlamFormat
from agentloop.chat.formats.named_calls.deepseek_v3 import DeepSeekV3Format
from agentloop.chat.formats.named_calls.gemma4 import FunctionGemmaFormat, Gemma4Format
from agentloop.chat.formats.named_calls.kimi_k2 import KimiK2Format
from agentloop.chat.formats.python_calls.lfm2 import Lfm2Format
from agentloop.chat.formats.python_calls.pythonic import PythonicFormat
from agentloop.chat.formats.tagged_calls.deepseek_v32 import DeepSeekV32Format
from agentloop.chat.formats.tagged_calls.glm45 import Glm45Format
from agentloop.chat.formats.tagged_calls.hunyuan import HunyuanFormat
from agentloop.chat.formats.tagged_calls.kimi_k3 import KimiK3Format
from agentloop.chat.formats.tagged_calls.longcat import LongCatFormat
from agentloop.chat.formats.tagged_calls.minimax_m2 import MiniMaxM2Format
from agentloop.chat.formats.tagged_calls.qwen3_coder import Qwen3CoderFormat
from agentloop.chat.formats.tagged_calls.seed_oss import SeedOssFormat
from agentloop.chat.formats.tagged_calls.step3 import Step3Format
from agentloop.chat.sampled import SampledText
from agentloop.errors import ModelError
from agentloop.registry import load, registered

TOOL_FORMATS = "agentloop.tool_formats"
"""Entry-point group of formats: an instance, or a class without arguments."""

FORMATS: dict[str, ToolFormat] = {
    form.name: form
    for form in (
        HermesFormat(),
        Qwen3CoderFormat(),
        Glm45Format(),
        Llama3JsonFormat(),
        MistralFormat(),
        HarmonyFormat(),
        DeepSeekV3Format(),
        Lfm2Format(),
        PythonicFormat(),
        CohereFormat(),
        KimiK2Format(),
        KimiK3Format(),
        DeepSeekV32Format(),
        MiniMaxM2Format(),
        Gemma4Format(),
        FunctionGemmaFormat(),
        HunyuanFormat(),
        GraniteFormat(),
        Phi4Format(),
        SeedOssFormat(),
        Ernie45Format(),
        InternLMFormat(),
        LongCatFormat(),
        Step3Format(),
        NemotronFormat(),
        ApertusFormat(),
        XlamFormat(),
    )
}
"""The built-in formats, in the order in which they are tried on a template."""

ALIASES = {
    "qwen2_5": "hermes",
    "qwen3": "hermes",
    "qwen3_5": "qwen3_coder",
    "glm4_5": "glm45",
    "llama3": "llama3_json",
    "gpt_oss": "harmony",
    "gptoss": "harmony",
    "deepseek_r1": "deepseek_v3",
    "llama4": "pythonic",
    "olmo3": "pythonic",
    "command": "cohere",
    "deepseek_v3_1": "deepseek_v3",
    "deepseek_v3.1": "deepseek_v3",
    "deepseek_v3.2": "deepseek_v3_2",
    "deepseek_v4": "deepseek_v3_2",
    "kimi": "kimi_k2",
    "minimax": "minimax_m2",
    "glm4_7": "glm45",
    "nemotron_3": "qwen3_coder",
    "step3_5": "qwen3_coder",
    "granite_4": "hermes",
    "phi4_mini": "phi4",
    "jamba": "hunyuan",
    "apriel": "hunyuan",
}
"""Other names of the built-in formats, after the models that write them."""

Call = dict[str, Any]
"""`{"name": .., "arguments": {..}}`."""

PROBES: list[Call] = [
    {
        "name": "probe_tool",
        "arguments": {
            "text": "Zürich \"quoted\" 'so'\nand a second line, with \\ and 漢字 🙂",
            "count": 3,
            "ratio": 0.5,
            "flag": True,
            "nothing": None,
            "list": [1, "two", None],
            "object": {"inner": {"key": "value"}, "off": False},
        },
    },
    {"name": "second_probe", "arguments": {"text": "another one"}},
]
"""Calls for a template to render. The format that reads them back is the template's."""

_TYPES = {
    "text": "string",
    "count": "integer",
    "ratio": "number",
    "flag": "boolean",
    "nothing": "null",
    "list": "array",
    "object": "object",
}

PROBE_TOOLS: Tools = [
    {
        "type": "function",
        "function": {
            "name": call["name"],
            "description": "A probe.",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": _TYPES[key], "description": "A probe."} for key in call["arguments"]},
            },
        },
    }
    for call in PROBES
]
"""The schemas of the probes."""


def load_format(name: str) -> ToolFormat:
    """Return the format called `name`: a built-in one, an alias, or one that a package registered.

    Raises:
        ModelError: the name is not known (the message lists those that are), or what is registered
            under it is not a format.
        RegistryError: what is registered cannot be imported.
    """
    built_in = FORMATS.get(ALIASES.get(name, name))
    if built_in is not None:
        return built_in

    others = registered(TOOL_FORMATS)
    if name not in others:
        known = ", ".join([*FORMATS, *ALIASES, *others])
        raise ModelError(f"model.tool_format {name!r} is not known", f"use one of: {known}")
    return _load_registered(name)


def known_formats() -> dict[str, ToolFormat]:
    """Return every format by name: the built-in ones, then the registered ones.

    Raises:
        ModelError: what is registered is not a format.
        RegistryError: what is registered cannot be imported.
    """
    return dict(_formats())


def reasoning_openings() -> tuple[str, ...]:
    """Return the tags that open a block of reasoning in the built-in formats."""
    openings = (form.reasoning_openings for form in FORMATS.values() if isinstance(form, BaseFormat))
    return tuple(dict.fromkeys(tag for tags in openings for tag in tags))


def find_format(
    turn_of: Callable[[Sequence[Call]], SampledText | None], tools: Tools | None = None
) -> ToolFormat | None:
    """Return the format that reads back the calls that a template rendered, or None.

    Of several formats, one that reads two calls in a turn is chosen, then one that leaves the least
    of the turn as text, then the first. Registered formats are tried if no built-in one reads both.

    Args:
        turn_of: renders an assistant turn with these calls and returns its text, without what
            precedes the turn; None if the template cannot render them.
        tools: schemas offered in addition to the probes' own.
    """
    one, two = turn_of(PROBES[:1]), turn_of(PROBES)
    if two is not None and PROBES[1]["name"] not in two.text:
        two = None  # the template writes one call a turn and silently drops the others
    schemas = [*PROBE_TOOLS, *(tools or [])]

    def text_left(form: ToolFormat, turn: SampledText | None, calls: list[Call]) -> int | None:
        """Return how much of the turn is text; None if the format does not find these calls."""
        if turn is None:
            return None
        parsed = form.parse(turn, schemas)
        given = [{"name": call.name, "arguments": call.arguments} for call in parsed.tool_calls]
        # Compared as JSON, which distinguishes True from 1 and 3 from 3.0; templates may sort the
        # keys.
        found = not parsed.malformed_calls and _as_json(given) == _as_json(calls)
        return len(parsed.text) if found else None

    fitting: list[tuple[bool, int, ToolFormat]] = []
    for formats in (FORMATS.items(), _registered_formats()):
        for _, form in formats:
            left = text_left(form, one, PROBES[:1])
            if left is not None:
                reads_both = two is None or text_left(form, two, PROBES) is not None
                fitting.append((not reads_both, left, form))
        if any(not one_only for one_only, _, _ in fitting):
            break
    return min(fitting, key=lambda fit: fit[:2])[2] if fitting else None


def _as_json(calls: list[Call]) -> str:
    return json.dumps(calls, sort_keys=True)


def _formats() -> Iterator[tuple[str, ToolFormat]]:
    """Yield every format with its name, the built-in ones first."""
    yield from FORMATS.items()
    yield from _registered_formats()


def _registered_formats() -> Iterator[tuple[str, ToolFormat]]:
    """Yield the formats that packages registered under names of their own."""
    for name in registered(TOOL_FORMATS):
        if name not in FORMATS:
            yield name, _load_registered(name)


def _load_registered(name: str) -> ToolFormat:
    found = load(TOOL_FORMATS, name)
    form = found() if isinstance(found, type) else found
    if not callable(getattr(form, "parse", None)):
        raise ModelError(
            f"tool format {name!r} is {found!r}, which has no parse method", "subclass BaseFormat, or add parse"
        )
    result: ToolFormat = form
    return result
