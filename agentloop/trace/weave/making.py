"""`CallMaker`: complete calls as weave's server takes them.

weave's client makes the first call of each op, and every call whose values it changes: those with
images, and all if it hides personal data. From the first it is seen what weave adds to the calls of
an op; the others get the same. The client takes 0.1 ms of CPU for each call: it walks through
inputs and output several times, to find objects and ops in them, and these are JSON.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from agentloop.trace.weave.calls import EpisodeCall

RESERVED = "weave"
"""Key of attributes in which weave notes its version and the machine's system."""

USAGE, STATUS_COUNTS = "usage", "status_counts"
"""Keys of a summary. Both hold counts, which are summed over the calls below."""

OF_ONE_CALL = (
    "id", "trace_id", "parent_id", "display_name", "started_at", "ended_at", "attributes", "inputs", "output",
    "exception", "summary",
)  # fmt: skip
"""Fields of a complete call that are its own; the others are those of its op and of the project."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Made = Mapping[str, dict[str, Any]]
"""Complete calls by id."""


class CallMaker:
    """Makes the calls of one project. Imports weave.

    Args:
        client: of weave, the active one.
        collected: returns calls, by their ids, that the client has made. Raises `ExportError` if
            one could not be made, or what it refers to did not arrive.
        model: name of the policy, under which tokens are counted.
    """

    def __init__(self, client: Any, collected: Callable[[Sequence[str]], Made], model: str) -> None:
        from weave.trace.settings import should_redact_pii
        from weave.trace.weave_client import redact_sensitive_keys
        from weave.utils.exception import exception_to_json_str
        from weave.utils.sanitize import should_redact

        self._client = client
        self._collected = collected
        self._model = model
        self._hides_personal = should_redact_pii
        self._redact = redact_sensitive_keys
        self._is_secret = functools.lru_cache(4096)(should_redact)
        self._error_text = exception_to_json_str
        self._ops: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}  # fields and attributes of every call

    def make(self, episodes: Sequence[Sequence[EpisodeCall]]) -> Iterator[dict[str, Any]]:
        """Yield complete calls, which are JSON but for their times.

        Args:
            episodes: the calls of each, a call after its parent.

        Raises:
            ExportError: weave's client could not make one, or its op or image did not arrive.
        """
        made = self._by_client(episodes)
        for calls in episodes:
            summaries = self._summaries(calls)
            for call in calls:
                yield self._call(call, calls[0].id, summaries[call.id], made.get(call.id))

    def _by_client(self, episodes: Sequence[Sequence[EpisodeCall]]) -> Made:
        """Return calls that weave's client made: without their places in a tree."""
        asked: list[EpisodeCall] = []
        first: dict[str, EpisodeCall] = {}
        personal = self._hides_personal()
        for call in (call for calls in episodes for call in calls):
            reserved = RESERVED in call.attributes
            new = call.op not in self._ops and call.op not in first
            if new or reserved or personal or not call.plain:
                asked.append(call)
            if new and not reserved:
                first[call.op] = call

        for call in asked:
            running = self._client.create_call(
                call.op, call.inputs, attributes=call.attributes, use_stack=False, _call_id_override=call.id
            )
            self._client.finish_call(running, call.output)
        self._client.flush()
        made = self._collected([call.id for call in asked])
        for op, call in first.items():
            added = {name: value for name, value in made[call.id]["attributes"].items() if name not in call.attributes}
            shared = {name: value for name, value in made[call.id].items() if name not in OF_ONE_CALL}
            self._ops[op] = shared, added
        return made

    def _call(self, call: EpisodeCall, trace_id: str, summary: dict[str, Any], made: Any) -> dict[str, Any]:
        shared, added = (made, {}) if made is not None else self._ops[call.op]
        return {
            **shared,
            "id": call.id,
            "trace_id": trace_id,
            "parent_id": call.parent,
            "display_name": call.name,
            "started_at": _time(call.start_ns),
            "ended_at": _time(call.end_ns),
            "attributes": {**added, **call.attributes} if made is None else made["attributes"],
            "inputs": self._shown(call.inputs) if made is None else made["inputs"],
            "output": call.output if made is None else made["output"],
            "exception": None if call.error is None else self._error_text(_exception(*call.error)),
            "summary": summary,
        }

    def _shown(self, inputs: dict[str, Any]) -> Any:
        return self._redact(inputs) if self._has_secret(inputs) else inputs

    def _has_secret(self, value: Any) -> bool:
        """Whether a key, at any depth, is one whose value weave hides."""
        if type(value) is dict:
            return any(self._is_secret(key) or self._has_secret(item) for key, item in value.items())
        return type(value) is list and any(map(self._has_secret, value))

    def _summaries(self, calls: Sequence[EpisodeCall]) -> dict[str, dict[str, Any]]:
        """Return the summaries of calls by id: their own counts and those of the calls below."""
        found: dict[str, dict[str, Any]] = {}
        below: dict[str, list[dict[str, Any]]] = {}
        for call in reversed(calls):
            status = {"success": int(call.error is None), "error": int(call.error is not None)}
            summary: dict[str, Any] = {STATUS_COUNTS: status}
            if call.usage is not None:
                prompt, answer = call.usage
                tokens = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
                summary[USAGE] = {self._model: {"requests": 1, **tokens}}
            for counts in below.get(call.id, ()):
                _add(summary, counts)
            found[call.id] = summary
            if call.parent is not None:
                below.setdefault(call.parent, []).append(summary)
        return found


def _add(counts: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, dict):
            _add(counts.setdefault(name, {}), value)
        else:
            counts[name] = counts.get(name, 0) + value


def _time(nanoseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=nanoseconds // 1000)


def _exception(name: str, text: str) -> Exception:
    """Return an exception that weave shows under the class name of the original."""
    kind = type(name, (Exception,), {})
    error: Exception = kind(text)
    return error
