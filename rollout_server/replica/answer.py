"""Reads answers of other servers: each token must come with a logprob and a version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from agentloop.wire import UNKNOWN_IMAGE, VersionSpan
from rollout_server.engines.base import AnswerChunk, Generation, GenerationResult
from rollout_server.errors import EngineError, Refused, ReplicaGone, RequestError, ServingError, UnknownImage


class Answer:
    """One answer of `/generate`, whole or in events.

    Args:
        generation: the request; its `on_chunk` gets the chunks of a stream.
        version_of: translates the replica's name of a version into ours.
        sampling_version: for servers whose events do not name versions: returns the version that
            sampled everything so far, or None where that is uncertain. None: events name their
            versions.
        incremental: each event holds new tokens only; else all tokens so far.
    """

    def __init__(
        self,
        generation: Generation,
        version_of: Callable[[str], str],
        sampling_version: Callable[[], str | None] | None,
        *,
        incremental: bool,
    ) -> None:
        self._generation = generation
        self._version_of = version_of
        self._sampling_version = sampling_version
        self._incremental = incremental
        self._versions_known = True
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._meta: dict[str, Any] | None = None
        self._buffer = b""
        self._error: EngineError | None = None

    def feed(self, data: bytes) -> None:
        """Take bytes of server-sent events, split anywhere."""
        *events, self._buffer = (self._buffer + data).split(b"\n\n")
        for event in events:
            payload = event.removeprefix(b"data: ")
            if payload and payload != b"[DONE]" and self._error is None:
                try:
                    self.take(payload)
                except EngineError as exc:
                    self._error = exc  # raised by `result`, not in the connection's callback

    def take(self, payload: bytes) -> None:
        """Take the JSON of one event, or of the whole answer.

        Raises:
            EngineError: the replica reports an error, or its answer does not follow the protocol.
        """
        try:
            message = orjson.loads(payload)
            if "error" in message:
                raise EngineError(str(message["error"].get("message", message["error"])))
            ids, meta = message["output_ids"], message["meta_info"]
            pairs = meta["output_token_logprobs"]
            if [pair[1] for pair in pairs] != ids:
                raise EngineError(
                    f"the replica's answer does not follow the /generate protocol: its {len(pairs)} logprobs do not "
                    f"belong to its {len(ids)} tokens"
                )
            logprobs = [float(pair[0]) for pair in pairs]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as exc:
            raise EngineError(f"the replica's answer does not follow the /generate protocol: {exc!r}") from exc

        if not self._incremental:
            ids, logprobs = ids[len(self._ids) :], logprobs[len(self._ids) :]
        self._ids += ids
        self._logprobs += logprobs

        if meta.get("finish_reason"):
            self._meta = meta
        elif self._generation.on_chunk is not None and self._versions_known:
            spans = self._spans(meta) or self._presumed_spans()
            # Tokens of an unknown version wait for the end of the answer, which names it; so do all
            # after them.
            self._versions_known = bool(spans)
            if spans:
                self._generation.on_chunk(AnswerChunk(ids, logprobs, spans))

    def result(self) -> GenerationResult:
        """Return the complete answer.

        Raises:
            ReplicaGone: it broke off.
            EngineError: an event reported an error.
            RequestError: the replica read another prompt than the one that was sent.
        """
        if self._error is not None:
            raise self._error
        meta = self._meta
        if meta is None:
            raise ReplicaGone("the answer ended without a finish reason")

        finish = meta["finish_reason"]
        self._check_prompt(meta, aborted=finish["type"] == "abort")
        version = self._version_of(str(meta.get("weight_version", "0")))
        spans = self._spans(meta)
        if not spans and self._ids:
            spans = [VersionSpan(version=version, start=0, end=len(self._ids))]
        return GenerationResult(
            output_ids=self._ids,
            logprobs=self._logprobs,
            spans=spans,
            finish=finish["type"],
            matched=finish.get("matched"),
            cached_tokens=int(meta.get("cached_tokens") or 0),
            weight_version=version,
            message=finish.get("message"),
        )

    def _check_prompt(self, meta: dict[str, Any], *, aborted: bool) -> None:
        """Compare the length of the prompt that the replica read: SGLang expands images itself."""
        sent, read = len(self._generation.input_ids), meta.get("prompt_tokens")
        if read not in (None, sent) and not aborted:
            images = len(self._generation.image_data)
            raise RequestError(
                f"the replica read {read} prompt tokens instead of {sent}, which have {images} images: give it the "
                "preprocessor_config.json of the model that is trained",
                "image_data" if images else "input_ids",
            )

    def _spans(self, meta: dict[str, Any]) -> list[VersionSpan]:
        return [
            VersionSpan(version=self._version_of(str(span["version"])), start=span["start"], end=span["end"])
            for span in meta.get("weight_versions") or ()
        ]

    def _presumed_spans(self) -> list[VersionSpan]:
        """Return one span over everything so far if its version is certain, else none."""
        version = None if self._sampling_version is None else self._sampling_version()
        return [] if version is None else [VersionSpan(version=version, start=0, end=len(self._ids))]


def refusal(status: int, content: bytes) -> ServingError:
    """Translate an answer other than 200 into our error."""
    try:
        error = orjson.loads(content)["error"]
        message = str(error["message"]) if isinstance(error, dict) else str(error)
        field = error.get("field") if isinstance(error, dict) else None
        if isinstance(error, dict) and error.get("type") == UNKNOWN_IMAGE:
            return UnknownImage(message, field)
    except (ValueError, KeyError, TypeError):
        message, field = content[:300].decode(errors="replace") or f"status {status}", None

    if status < 500:
        return Refused(status, message, field)
    return EngineError(message)


def json_of(status: int, content: bytes) -> dict[str, Any]:
    """Return the JSON object of an answer, {} when it has none.

    Raises:
        Refused: status 4xx.
        EngineError: any other status but 200.
    """
    if status != 200:
        raise refusal(status, content)
    try:
        body = orjson.loads(content)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
