"""A replica behind HTTP: a rollout server of one engine, started by this server or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import httpx
import orjson

from agentloop.client.connections import ConnectionPool, OnData, Origin, request_head
from agentloop.client.sent_images import SentImages
from agentloop.wire import TRACEPARENT_HEADER, bearer
from rollout_server.engines.base import (
    BroadcastWeights,
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
    WeightsSource,
)
from rollout_server.errors import ReplicaGone, RequestError, UnknownImage, WeightsError
from rollout_server.replica.answer import Answer, json_of, refusal

MAX_CONNECTIONS = 65_536
CONNECT_TIMEOUT_S = 5.0

_STATS = set(EngineStats.__dataclass_fields__)


class HttpReplica:
    """A client of a server with the API of `agentloop.wire`.

    Args:
        url: its base URL.
        info: facts about its engine.
        version: version of the weights that it serves.
        token: bearer token.
        stream_tokens: answers are streamed this many tokens at a time, so that little is lost with
            the replica.
        incremental: events of its streams hold new tokens only; else all tokens so far.
        keeps_images: whether it is sent each image only once.
        admin_timeout_s: timeout of pause, resume, flush and abort.
        update_timeout_s: timeout of a weight update.
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
        keeps_images: bool = False,
        admin_timeout_s: float = 20.0,
        update_timeout_s: float = 600.0,
    ) -> None:
        self._name = name
        self._url = httpx.URL(url)
        self._info = info
        self._version = version
        self._stream_tokens = stream_tokens
        self._incremental = incremental
        self._admin_timeout_s = admin_timeout_s
        self._update_timeout_s = update_timeout_s

        self._origin = Origin.of(self._url)
        self._headers = [(b"host", self._url.netloc), (b"content-type", b"application/json")]
        if token:
            self._headers.append((b"authorization", bearer(token).encode()))

        self._generate_head = self._head(b"POST", "/generate")
        self._pool = ConnectionPool(MAX_CONNECTIONS)
        self._stats = EngineStats()
        self._sent_images = SentImages() if keeps_images else None
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
        return self._stream_tokens

    def stats(self) -> EngineStats:
        return self._stats

    async def generate(self, generation: Generation) -> GenerationResult:
        request = self._request(generation)
        if self._sent_images is None or not generation.image_data:
            return await self._answer(generation, request)
        request["image_data"] = self._sent_images.named(generation.image_data)
        try:
            result = await self._answer(generation, request)
        except UnknownImage:
            self._sent_images.forget()
            result = await self._answer(generation, request | {"image_data": generation.image_data})
        self._sent_images.sent(generation.image_data)
        return result

    async def _answer(self, generation: Generation, request: dict[str, Any]) -> GenerationResult:
        answer = Answer(generation, self._version_of, self._sampling_version(), incremental=self._incremental)
        head = self._generate_head
        if generation.traceparent is not None:
            head += b"%b: %b\r\n" % (TRACEPARENT_HEADER.encode(), generation.traceparent)

        self.in_flight += 1
        try:
            on_data = None if generation.on_chunk is None else answer.feed
            status, content = await self._send(head, orjson.dumps(request), None, on_data)
        finally:
            self.in_flight -= 1

        if status != 200:
            raise refusal(status, content)
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
        except RequestError as exc:
            raise WeightsError(exc.message) from exc

        if not isinstance(checksum := answer.get("checksum"), str):
            raise WeightsError(f"{self._name} does not confirm a checksum")
        self._version = version
        return WeightsConfirmation(version, checksum)

    async def rename_weights(self, version: str) -> None:
        await self.post("/update_weight_version", {"new_version": version, "abort_all_requests": False})
        self._version = version

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
        except RequestError as exc:
            raise WeightsError(exc.message) from exc

    async def leave_weights_group(self, name: str) -> bool:
        try:
            await self.post("/destroy_weights_update_group", {"group_name": name})
        except RequestError:
            return False  # it was in no such group
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

    async def close(self) -> None:
        self._closed = True
        await self._pool.aclose()

    async def get(self, path: str) -> dict[str, Any]:
        """Send a GET and return the JSON of the answer, {} when it has none.

        Raises:
            ReplicaGone: no answer in time.
            EngineError: the replica failed.
            RequestError: it refused the request.
        """
        return json_of(*await self._send(self._head(b"GET", path), b"", self._admin_timeout_s))

    async def post(self, path: str, body: dict[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """Send a POST and return the JSON of the answer, {} when it has none.

        Raises:
            ReplicaGone: no answer in time.
            EngineError: the replica failed.
            RequestError: it refused the request.
        """
        head = self._head(b"POST", path)
        return json_of(*await self._send(head, orjson.dumps(body), timeout_s or self._admin_timeout_s))

    def _request(self, generation: Generation) -> dict[str, Any]:
        """Return the body of `/generate`."""
        request: dict[str, Any] = {
            "rid": generation.rid,
            "input_ids": generation.input_ids,
            "sampling_params": generation.sampling.model_dump(mode="json", exclude_none=True, exclude_defaults=True),
            "return_logprob": True,
        }
        if generation.image_data:
            request["image_data"] = generation.image_data
        if generation.on_chunk is not None:
            request["stream"] = True
            request["sampling_params"]["stream_interval"] = generation.stream_tokens
        return request

    def _version_of(self, version: str) -> str:
        """Translate the replica's name of a version into ours."""
        return version

    def _sampling_version(self) -> Callable[[], str | None] | None:
        """Return, for one answer, a function that returns the version which sampled all of it so
        far, or None where that is uncertain. None: the events of its streams name their versions.
        """
        return None

    def _head(self, method: bytes, path: str) -> bytes:
        return request_head(method, self._url.raw_path.rstrip(b"/") + path.encode(), self._headers)

    async def _send(
        self, head: bytes, body: bytes, timeout_s: float | None, on_data: OnData | None = None
    ) -> tuple[int, bytes]:
        """Send a request and return status and body of the answer."""
        if self._closed:
            raise ReplicaGone(f"the connection to {self._name} is closed")

        try:
            status, _, content = await self._pool.send(
                self._origin, head, body, connect_s=CONNECT_TIMEOUT_S, read_s=timeout_s, on_data=on_data
            )
        except httpx.TransportError as exc:
            raise ReplicaGone(f"{self._name} does not answer: {exc or type(exc).__name__}") from exc
        return status, content


def broadcast_request(source: BroadcastWeights) -> dict[str, Any]:
    """Return the fields of `/update_weights_from_distributed` that describe a broadcast, without
    the copy."""
    request: dict[str, Any] = {
        "names": source.names,
        "dtypes": source.dtypes,
        "shapes": source.shapes,
        "group_name": source.group,
    }
    if source.bucket_bytes is not None:
        request |= {"load_format": "flattened_bucket", "bucket_bytes": source.bucket_bytes}
    return request
