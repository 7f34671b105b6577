"""A replica behind HTTP: a rollout server of one engine, started by this one or running elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import httpx
import orjson

from agentloop.client.connections import ConnectionPool, OnData, Origin, request_head
from agentloop.wire import VersionSpan
from rollout_server.engines.base import (
    AnswerChunk,
    BroadcastWeights,
    EngineError,
    EngineInfo,
    EngineStats,
    FolderWeights,
    Generation,
    GenerationResult,
    PauseMode,
    RunningMode,
    SharedWeights,
    UpdateGroup,
    WeightsConfirmation,
    WeightsError,
    WeightsSource,
)
from rollout_server.errors import HttpError
from rollout_server.replica.base import ReplicaGone

MAX_CONNECTIONS = 65_536
CONNECT_TIMEOUT_S = 5.0

_STATS = set(EngineStats.__dataclass_fields__)


class HttpReplica:
    """Speaks the dialect of `agentloop.wire` to a server.

    Args:
        url: its base URL.
        info: facts about its engine.
        version: of the weights that it serves.
        token: bearer token.
        stream_tokens: answers are streamed so many tokens at a time, so that they are not lost with the replica.
        incremental: events of its streams hold new tokens only, not all so far.
        admin_timeout_s: for pause, resume, flush and abort.
        update_timeout_s: for a weight update.
    """

    def __init__(
        self,
        name: str,
        url: str,
        info: EngineInfo,
        *,
        version: str = "0",
        token: str | None = None,
        stream_tokens: int = 0,
        incremental: bool = True,
        admin_timeout_s: float = 20.0,
        update_timeout_s: float = 600.0,
    ) -> None:
        self._name = name
        self._url = httpx.URL(url)
        self._info = info
        self._version = version
        self._piece_tokens = stream_tokens
        self._incremental = incremental
        self._admin_timeout_s = admin_timeout_s
        self._update_timeout_s = update_timeout_s
        self._origin = Origin.of(self._url)
        self._headers = [(b"host", self._url.netloc), (b"content-type", b"application/json")]
        if token:
            self._headers.append((b"authorization", f"Bearer {token}".encode()))
        self._generate_head = self._head(b"POST", "/generate")
        self._pool = ConnectionPool(MAX_CONNECTIONS)
        self._stats = EngineStats()
        self._closed = False
        self.in_flight = 0

    @property
    def ranks(self) -> int:
        return 1

    @property
    def name(self) -> str:
        return self._name

    @property
    def url(self) -> str:
        return str(self._url)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def weight_version(self) -> str:
        return self._version

    @property
    def failure(self) -> str | None:
        return None

    @property
    def stream_tokens(self) -> int:
        return self._piece_tokens

    def stats(self) -> EngineStats:
        return self._stats

    async def generate(self, generation: Generation) -> GenerationResult:
        request: dict[str, Any] = {
            "rid": generation.rid,
            "input_ids": generation.input_ids,
            "sampling_params": generation.sampling.model_dump(mode="json", exclude_none=True, exclude_defaults=True),
            "return_logprob": True,
        }
        if generation.image_data:
            request["image_data"] = generation.image_data
        answer = _Answer(generation, self._version_of, self._sampling_version(), incremental=self._incremental)
        if generation.on_chunk is not None:
            request["stream"] = True
            request["sampling_params"]["stream_interval"] = generation.stream_tokens
        self.in_flight += 1
        try:
            on_data = None if generation.on_chunk is None else answer.feed
            status, content = await self._send(self._generate_head, orjson.dumps(request), None, on_data)
        finally:
            self.in_flight -= 1
        if status != 200:
            raise _refusal(status, content)
        if generation.on_chunk is None:
            answer.take(content)
        return answer.result()

    async def abort(self, rid: str | None) -> int:
        body = await self.post("/abort_request", {"abort_all": True} if rid is None else {"rid": rid})
        count = str(body.get("message", "")).split(" ")[0]
        return int(count) if count.isdecimal() else 0

    async def pause(self, mode: PauseMode) -> None:
        await self.post("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        await self.post("/continue_generation", {})

    async def flush_cache(self) -> None:
        await self.post("/flush_cache", {})

    async def update_weights(
        self, source: WeightsSource, version: str, running: RunningMode = "retract"
    ) -> WeightsConfirmation:
        common = {"weight_version": version, "checksum": source.checksum, "running": running}
        match source:
            case FolderWeights():
                path, request = "/update_weights_from_disk", {"model_path": str(source.folder)}
            case SharedWeights():
                path, request = "/update_weights_from_tensor", {"shm_path": str(source.folder)}
            case BroadcastWeights():
                path, request = "/update_weights_from_distributed", broadcast_request(source)
        try:
            answer = await self.post(path, {**common, **request}, self._update_timeout_s)
        except HttpError as exc:
            raise WeightsError(exc.message) from exc
        if not isinstance(checksum := answer.get("checksum"), str):
            raise WeightsError(f"{self._name} confirms no checksum")
        self._version = version
        return WeightsConfirmation(version, checksum)

    async def join_weights_group(self, group: UpdateGroup) -> None:
        request = {
            "master_address": group.address,
            "master_port": group.port,
            "rank_offset": group.rank,
            "world_size": group.world_size,
            "group_name": group.name,
            "backend": group.backend,
        }
        try:
            await self.post("/init_weights_update_group", request, self._update_timeout_s)
        except HttpError as exc:
            raise WeightsError(exc.message) from exc

    async def leave_weights_group(self, name: str) -> bool:
        try:
            await self.post("/destroy_weights_update_group", {"group_name": name})
        except HttpError:
            return False  # it was in none
        return True

    async def memory(self, what: Literal["release", "resume"], tags: Sequence[str] | None) -> None:
        await self.post(
            f"/{what}_memory_occupation", {} if tags is None else {"tags": list(tags)}, self._update_timeout_s
        )

    async def probe(self) -> None:
        await self.get("/health_generate")

    async def alive(self) -> None:
        await self.get("/health")

    async def refresh(self) -> None:
        facts = await self.get("/server_info")
        states = facts.get("states") or [{}]
        self._stats = EngineStats(**{name: value for name, value in states[0].items() if name in _STATS})

    async def read_version(self) -> None:
        """Ask which version it serves."""
        self._version = str((await self.get("/server_info")).get("weight_version", "0"))

    async def close(self) -> None:
        self._closed = True
        await self._pool.aclose()

    async def get(self, path: str) -> dict[str, Any]:
        """GET; the JSON of the answer, {} when it has none.

        Raises:
            ReplicaGone: no answer in time.
            EngineError: an answer other than 200.
        """
        return _json_of(*await self._send(self._head(b"GET", path), b"", self._admin_timeout_s))

    async def post(self, path: str, body: dict[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """POST; the JSON of the answer.

        Raises:
            ReplicaGone: no answer in time.
            EngineError: the replica failed.
            HttpError: it refused the request.
        """
        head = self._head(b"POST", path)
        return _json_of(*await self._send(head, orjson.dumps(body), timeout_s or self._admin_timeout_s))

    def _version_of(self, version: str) -> str:
        """What a version that the replica names is called here."""
        return version

    def _sampling_version(self) -> Callable[[], str | None]:
        """For one answer: tells the version that sampled all of it so far, or None where that is not sure."""
        return lambda: None

    def _head(self, method: bytes, path: str) -> bytes:
        return request_head(method, self._url.raw_path.rstrip(b"/") + path.encode(), self._headers)

    async def _send(
        self, head: bytes, body: bytes, timeout_s: float | None, on_data: OnData | None = None
    ) -> tuple[int, bytes]:
        """Status and body of the answer."""
        if self._closed:
            raise ReplicaGone(f"{self._name} is gone")
        try:
            status, _, content = await self._pool.send(
                self._origin, head, body, connect_s=CONNECT_TIMEOUT_S, read_s=timeout_s, on_data=on_data
            )
        except httpx.TransportError as exc:
            raise ReplicaGone(f"{self._name} does not answer: {exc or type(exc).__name__}") from exc
        return status, content


def broadcast_request(source: BroadcastWeights) -> dict[str, Any]:
    """The fields of `/update_weights_from_distributed` that say what comes. The copy is the router's business."""
    request: dict[str, Any] = {
        "names": source.names,
        "dtypes": source.dtypes,
        "shapes": source.shapes,
        "group_name": source.group,
    }
    if source.bucket_bytes is not None:
        request |= {"load_format": "flattened_bucket", "bucket_bytes": source.bucket_bytes}
    return request


class _Answer:
    """One answer of `/generate`, whole or in events, checked: an id, a logprob and a version for each token."""

    def __init__(
        self,
        generation: Generation,
        version_of: Callable[[str], str],
        sampling_version: Callable[[], str | None],
        *,
        incremental: bool,
    ) -> None:
        self._generation = generation
        self._version_of = version_of
        self._sampling_version = sampling_version
        self._incremental = incremental
        self._sure = True
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._meta: dict[str, Any] | None = None
        self._buffer = b""
        self._error: EngineError | None = None

    def feed(self, data: bytes) -> None:
        """Server-sent events, cut anywhere."""
        *events, self._buffer = (self._buffer + data).split(b"\n\n")
        for event in events:
            payload = event.removeprefix(b"data: ")
            if payload and payload != b"[DONE]" and self._error is None:
                try:
                    self.take(payload)
                except EngineError as exc:
                    self._error = exc  # raised where the answer is awaited, not in the connection's callback

    def take(self, payload: bytes) -> None:
        """The JSON of one event, or of the whole answer."""
        try:
            message = orjson.loads(payload)
            if "error" in message:
                raise EngineError(str(message["error"].get("message", message["error"])))
            ids, meta = message["output_ids"], message["meta_info"]
            pairs = meta["output_token_logprobs"]
            if [pair[1] for pair in pairs] != ids:
                raise EngineError(f"the replica gives {len(pairs)} logprobs for {len(ids)} other tokens")
            logprobs = [float(pair[0]) for pair in pairs]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as exc:
            raise EngineError(f"the replica's answer is none of a rollout server: {exc!r}") from exc
        if not self._incremental:
            ids, logprobs = ids[len(self._ids) :], logprobs[len(self._ids) :]
        self._ids += ids
        self._logprobs += logprobs
        if meta.get("finish_reason"):
            self._meta = meta
        elif self._generation.on_chunk is not None and self._sure:
            spans = self._spans(meta)
            if not spans and (version := self._sampling_version()) is not None:
                spans = [VersionSpan(version=version, start=0, end=len(self._ids))]
            # Tokens of a version that nobody knows wait for the end of the answer, which names it.
            self._sure = bool(spans)
            if spans:
                self._generation.on_chunk(AnswerChunk(ids, logprobs, spans))

    def result(self) -> GenerationResult:
        if self._error is not None:
            raise self._error
        meta = self._meta
        if meta is None:
            raise ReplicaGone("the answer broke off")
        finish = meta["finish_reason"]
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

    def _spans(self, meta: dict[str, Any]) -> list[VersionSpan]:
        return [
            VersionSpan(version=self._version_of(str(span["version"])), start=span["start"], end=span["end"])
            for span in meta.get("weight_versions") or ()
        ]


def _refusal(status: int, content: bytes) -> Exception:
    """An answer other than 200 as what it means here."""
    try:
        error = orjson.loads(content)["error"]
        message = str(error["message"]) if isinstance(error, dict) else str(error)
        field = error.get("field") if isinstance(error, dict) else None
    except (ValueError, KeyError, TypeError):
        message, field = content[:300].decode(errors="replace") or f"status {status}", None
    if status < 500:
        return HttpError(status, "invalid_request", message, field)
    return EngineError(message)


def _json_of(status: int, content: bytes) -> dict[str, Any]:
    if status != 200:
        raise _refusal(status, content)
    try:
        body = orjson.loads(content)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
