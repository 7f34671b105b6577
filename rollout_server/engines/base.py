"""The seam between server and engine: plain data in, plain data out, one protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from agentloop.wire import SamplingParams, VersionSpan

FinishType = Literal["stop", "length", "abort"]
PauseMode = Literal["retract", "in_place", "abort"]
RunningMode = Literal["retract", "in_place"]


@dataclass(slots=True, frozen=True)
class FolderWeights:
    """Safetensors in a folder, read into memory of the engine's own.

    `checksum` is what the trainer says of them (`agentloop.weights.layout.checksum`); None: it says nothing.
    """

    folder: Path
    checksum: str | None = None


@dataclass(slots=True, frozen=True)
class SharedWeights:
    """One safetensors file in shared memory, used where it lies if dtype and device allow, and read while it is being
    written (`agentloop.weights.shared`). Nobody may change it before the version after it is served."""

    folder: Path
    checksum: str | None = None


@dataclass(slots=True, frozen=True)
class BroadcastWeights:
    """Tensors that rank 0 of a weights group is about to broadcast.

    `bucket_bytes` None: one broadcast of each tensor. Else tensors travel together, as the bytes of all in a row
    (`agentloop.weights.layout.buckets`). `copy` is a folder with the same tensors, for a replica that was not there.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    group: str
    bucket_bytes: int | None = None
    copy: Path | None = None
    checksum: str | None = None


WeightsSource = FolderWeights | SharedWeights | BroadcastWeights


@dataclass(slots=True, frozen=True)
class UpdateGroup:
    """A group to receive broadcasts in, whose rank 0 keeps a TCP store at `address:port`."""

    name: str
    address: str
    port: int
    rank: int
    world_size: int
    backend: Literal["nccl", "gloo"]


@dataclass(slots=True, frozen=True)
class WeightsConfirmation:
    """What is served now: the version, and the checksum of the tensors as they came, its algorithm before a colon."""

    version: str
    checksum: str


@dataclass(slots=True, frozen=True)
class AnswerChunk:
    """What has been sampled of an answer since the piece before it. The spans cover the whole answer so far."""

    output_ids: list[int]
    logprobs: list[float]
    spans: list[VersionSpan]


@dataclass(slots=True)
class Generation:
    """One request, validated: every id is in the vocabulary and prompt plus new tokens fit the context.

    With `on_chunk` an engine tells of the answer while it grows, at least `stream_tokens` tokens at a time, on the
    event loop's thread. What comes after the last piece is in the result alone, which always holds everything.

    `image_data` holds the prompt's images in base64, in their order; `input_ids` hold one pad token for each token that
    an image becomes.
    """

    rid: str
    input_ids: list[int]
    sampling: SamplingParams
    on_chunk: Callable[[AnswerChunk], None] | None = None
    stream_tokens: int = 1
    image_data: list[str] = field(default_factory=list)


@dataclass(slots=True)
class GenerationResult:
    """What became of a `Generation`.

    `logprobs[i]` belongs to `output_ids[i]`: natural log of its probability in the distribution after temperature and
    before truncation by top-p and top-k (temperature 0: at temperature 1). The spans cover the output exactly.
    """

    output_ids: list[int]
    logprobs: list[float]
    spans: list[VersionSpan]
    finish: FinishType
    matched: int | None
    cached_tokens: int
    weight_version: str
    message: str | None = None


@dataclass(slots=True, frozen=True)
class EngineInfo:
    """What does not change while an engine lives."""

    name: str
    model_path: str
    context_length: int
    vocab_size: int
    images: bool = False


@dataclass(slots=True)
class EngineStats:
    """Counters since the start, and the state of now. Counters only grow."""

    running: int = 0
    waiting: int = 0
    paused: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    sampled_tokens: int = 0
    prefilled_tokens: int = 0
    finished: int = 0
    failed: int = 0
    aborted: int = 0
    preempted: int = 0
    steps: int = 0
    step_failures: int = 0
    kv_tokens: int = 0
    kv_tokens_max: int = 0
    weight_updates: int = 0
    weight_update_s: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """A generator of tokens. All methods are called from one event loop."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def weight_version(self) -> str:
        """The version that the next token is sampled from."""
        ...

    @property
    def failure(self) -> str | None:
        """Why the engine will never answer again, or None while it serves."""
        ...

    async def generate(self, generation: Generation) -> GenerationResult:
        """Generate. A cancelled call frees what it held at the next step.

        Raises:
            EngineError: the engine failed; sending the same again may succeed.
            RequestError: the request is wrong.
        """
        ...

    async def abort(self, rid: str | None) -> int:
        """End request `rid` (None: all) with finish reason `abort`; returns how many were ended."""
        ...

    async def pause(self, mode: PauseMode) -> None:
        """Return when no step runs. `retract` drops the KV cache of running requests, `in_place` keeps it."""
        ...

    async def resume(self) -> None: ...

    async def flush_cache(self) -> None:
        """Forget the prefixes of finished requests."""
        ...

    async def update_weights(
        self, source: WeightsSource, version: str, running: RunningMode = "retract"
    ) -> WeightsConfirmation:
        """Serve the weights of `source` as `version` from the next step on. All of them are read and verified while the
        old version goes on, before anything live changes. Kept prefixes are forgotten.

        Args:
            running: whether requests that run are recomputed or keep their cache; a pause decides by its own mode.

        Raises:
            WeightsError: these are not this model's weights, whole and finite; the old version goes on serving.
        """
        ...

    async def join_weights_group(self, group: UpdateGroup) -> None:
        """Meet the trainer in a group for `BroadcastWeights`; one of the same name is left first.

        Raises:
            WeightsError: the group did not come about.
        """
        ...

    async def leave_weights_group(self, name: str) -> bool:
        """Close a group; False: there was none of this name."""
        ...

    def stats(self) -> EngineStats: ...

    async def close(self) -> None: ...
