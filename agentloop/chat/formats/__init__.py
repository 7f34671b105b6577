"""Tool-call formats: how models write tool calls, and how a sampled turn is read.

A `SampledText` comes in, a `ParsedTurn` goes out: text, reasoning, tool calls, and malformed calls
with the reason, which the model is shown. docs/tool_formats.md lists the formats. The files:

    lookup        the format of a model: by name, by entry point, or by what its template renders
    base          `ToolFormat` and base classes: reasoning, tags around a call, calls as JSON
    values        values as models write them: the one place that decides on leniency
    literals      Python's literals and calls
    typed         arguments written as bare text between tags: their type and their end
    variants      a family of models with several grammars
    json_calls/   a call as one JSON object: hermes, llama3_json, mistral, cohere, granite, phi4, ..
    named_calls/  the name, then the arguments: deepseek_v3, kimi_k2, gemma4
    tagged_calls/ arguments as bare text between tags: qwen3_coder, glm45, minimax_m2, step3, ..
    python_calls/ calls in Python syntax, `f(a="x", n=1)`: lfm2, pythonic
    framed_calls/ framed messages, of which some are calls: harmony
"""

from agentloop.chat.formats.base import BaseFormat, TaggedFormat, ToolFormat
from agentloop.chat.formats.json_calls.hermes import HermesFormat
from agentloop.chat.formats.lookup import FORMATS, find_format, known_formats, load_format, reasoning_openings

__all__ = [
    "FORMATS",
    "BaseFormat",
    "HermesFormat",
    "TaggedFormat",
    "ToolFormat",
    "find_format",
    "known_formats",
    "load_format",
    "reasoning_openings",
]
