"""Tool-call formats: how models write tool calls, and how a sampled turn is read.

A `SampledText` comes in, a `ParsedTurn` goes out: text, reasoning, tool calls, and malformed calls
with the reason, which the model is shown. docs/tool_formats.md lists the formats. The files:

    lookup        the format of a model: by name, by entry point, or by what its template renders
    base          `ToolFormat` and base classes: reasoning, tags around a call, calls as JSON
    hermes, qwen3_coder, glm45, llama3_json, mistral, harmony, deepseek_v3, lfm2, cohere
                  one format each
    typed         arguments written as bare text between tags: their type and their end
    pythonic      calls in Python syntax, `f(a="x", n=1)`
"""

from agentloop.chat.formats.base import BaseFormat, TaggedFormat, ToolFormat
from agentloop.chat.formats.hermes import HermesFormat
from agentloop.chat.formats.lookup import FORMATS, find_format, known_formats, load_format

__all__ = [
    "FORMATS",
    "BaseFormat",
    "HermesFormat",
    "TaggedFormat",
    "ToolFormat",
    "find_format",
    "known_formats",
    "load_format",
]
