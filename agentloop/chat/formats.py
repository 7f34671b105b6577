"""How models write tool calls. A format reads the text of one sampled turn."""

from __future__ import annotations

from typing import Any, Protocol

from agentloop.chat.call_json import CallError, read_json
from agentloop.errors import ModelError
from agentloop.types import MalformedCall, ParsedTurn, ToolCall


class ToolFormat(Protocol):
    """Reads tool calls from a turn's text; never raises on what a model may write."""

    name: str

    def parse(self, text: str) -> ParsedTurn: ...


class HermesFormat:
    """`<tool_call>\\n{"name": .., "arguments": {..}}\\n</tool_call>`, any number of them, text around them kept."""

    name = "hermes"
    OPEN, CLOSE = "<tool_call>", "</tool_call>"

    def parse(self, text: str) -> ParsedTurn:
        """Read one turn. A call that cannot be read is returned as malformed, with the reason."""
        turn = ParsedTurn(text="")
        kept: list[str] = []
        position = 0
        while (start := text.find(self.OPEN, position)) >= 0:
            kept.append(text[position:start])
            position = self._read_call(text, start + len(self.OPEN), turn)
        kept.append(text[position:])
        turn.text = "".join(kept).strip()
        return turn

    def _read_call(self, text: str, start: int, turn: ParsedTurn) -> int:
        """Read the call whose body starts at `start`; returns where the text goes on."""
        try:
            # The JSON decides where the call ends: a string in it may hold the closing tag.
            call, end = read_json(text, start)
        except CallError as exc:
            close = text.find(self.CLOSE, start)
            end = close if close >= 0 else len(text)
            reason = str(exc) if close >= 0 else f"cut off before {self.CLOSE}"
            turn.malformed_calls.append(MalformedCall(text[start:end].strip(), reason))
            return end + len(self.CLOSE) if close >= 0 else end
        close = text.find(self.CLOSE, end)
        if close < 0 or text[end:close].strip():
            stop = close if close >= 0 else len(text)
            reason = f"cut off before {self.CLOSE}" if close < 0 else "text after the JSON object"
            turn.malformed_calls.append(MalformedCall(text[start:stop].strip(), reason))
            return stop + len(self.CLOSE) if close >= 0 else stop
        fault = self._fault(call)
        if fault:
            turn.malformed_calls.append(MalformedCall(text[start:close].strip(), fault))
        else:
            turn.tool_calls.append(ToolCall(call["name"], call["arguments"]))
        return close + len(self.CLOSE)

    @staticmethod
    def _fault(call: Any) -> str | None:
        if not isinstance(call, dict):
            return "the call is not a JSON object"
        if not isinstance(call.get("name"), str):
            return 'the call has no string "name"'
        if not isinstance(call.get("arguments"), dict):
            return 'the call has no object "arguments"'
        return None


FORMATS: dict[str, ToolFormat] = {"hermes": HermesFormat()}


def load_format(name: str) -> ToolFormat:
    """The format called `name`.

    Raises:
        ModelError: there is none; the known ones are named.
    """
    if name not in FORMATS:
        raise ModelError(f"model.tool_format {name!r} is not known", f"one of: {', '.join(sorted(FORMATS))}")
    return FORMATS[name]
