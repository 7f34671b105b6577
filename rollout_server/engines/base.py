"""The interface between server and engines: plain data in, plain data out, one protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from agentloop.wire import SamplingParams, VersionSpan
from rollout_server.placeholders import Placeholders

FinishType = Literal["stop", "length", "abort"]
PauseMode = Literal["retract", "in_place", "abort"]
RunningMode = Literal["retract", "in_place"]


# Sources: the places where the trainer publishes a version. Each has a transport of the same name
# on both sides, `trainer/publishing` and `torch_engine/weights`.


@dataclass(slots=True, frozen=True)
class FolderWeights:
    """Safetensors files in a folder, which the engine copies into its memory.

    Attributes:
        checksum: as the trainer computed it (`agentloop.weights.layout.checksum`); None: not
            checked.
    """

    folder: Path
    checksum: str | None = None


@dataclass(slots=True, frozen=True)
class SharedWeights:
    """One safetensors file in shared memory, read while it is being written
    (`agentloop.weights.shared`).

    The engine serves the tensors in place, if dtype and device allow. The file must not change
    before the next version is served.
    """

    folder: Path
    checksum: str | None = None


@dataclass(slots=True, frozen=True)
class BroadcastWeights:
    """Tensors that rank 0 of a weights group is about to broadcast.

    Attributes:
        names, dtypes, shapes: of the tensors, in the order of the broadcasts.
        group: name of an `UpdateGroup` that the engine has joined.
        bucket_bytes: size of the buckets in which tensors are broadcast together, as their
            concatenated bytes (`agentloop.weights.layout.buckets`); None: one broadcast for each
            tensor.
        copy: folder with the same tensors, for replicas that start later.
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
    """A process group that receives broadcasts. Its rank 0, the trainer, keeps a TCP store at
    `address:port`."""

    name: str
    address: str
    port: int
    rank: int
    world_size: int
    backend: Literal["nccl", "gloo"]


@dataclass(slots=True, frozen=True)
class WeightsConfirmation:
    """The version that is served now, and the checksum (`algorithm:digest`) of its tensors."""

    version: str
    checksum: str


@dataclass(slots=True, frozen=True)
class AnswerChunk:
    """The tokens of an answer sampled since its last chunk; spans of the whole answer so far."""

    output_ids: list[int]
    logprobs: list[float]
    spans: list[VersionSpan]


@dataclass(slots=True)
class Generation:
    """One validated request: its ids are in the vocabulary, its tokens fit the context.

    Attributes:
        input_ids: the prompt; it has one pad token for each token that an image becomes.
        on_chunk: called on the event loop's thread while the answer grows. Tokens after the last
            chunk are in the result only, which always has all of them.
        stream_tokens: smallest number of tokens in a chunk.
        image_data: the prompt's images in base64, in their order.
        traceparent: of the request, for a replica behind HTTP; engines may ignore it.
    """

    rid: str
    input_ids: list[int]
    sampling: SamplingParams
    on_chunk: Callable[[AnswerChunk], None] | None = None
    stream_tokens: int = 1
    image_data: list[str] = field(default_factory=list)
    traceparent: bytes | None = None


@dataclass(slots=True)
class GenerationResult:
    """The answer to a `Generation`.

    Attributes:
        logprobs: for each output id the natural log of its probability, after temperature and
            before truncation by top-p and top-k; temperature 0 counts as 1.
        spans: the policy versions that sampled the output; they cover it exactly.
        matched: the stop token that ended it.
        cached_tokens: prompt tokens taken from the cache.
        weight_version: that was served when it ended.
        message: why it was aborted.
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
    """Facts that do not change while an engine runs.

    Attributes:
        images: whether the model takes images.
        model_type: of its config.json; None: not known.
        placeholders: of a model whose images are counted here; None: of any other.
    """

    name: str
    model_path: str
    context_length: int
    vocab_size: int
    images: bool = False
    model_type: str | None = None
    placeholders: Placeholders | None = None


@dataclass(slots=True)
class EngineStats:
    """Counters since the start, which only grow, and the current state."""

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


class Engine(Protocol):
    """Samples tokens. All methods are called on one event loop."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def weight_version(self) -> str:
        """The version that samples the next token."""
        ...

    @property
    def failure(self) -> str | None:
        """The reason why the engine has stopped permanently; None while it serves."""
        ...

    async def generate(self, generation: Generation) -> GenerationResult:
        """Sample an answer. Cancelling the call frees its resources at the next step.

        Raises:
            EngineError: the engine failed; sending the request again may succeed.
            RequestError: the request is wrong.
        """
        ...

    async def abort(self, rid: str | None) -> int:
        """Finish request `rid` (None: all) with reason `abort`; return how many."""
        ...

    async def pause(self, mode: PauseMode) -> None:
        """Stop between two steps. `retract` drops the KV cache of running requests, `in_place`
        keeps it, `abort` finishes them."""
        ...

    async def resume(self) -> None: ...

    async def flush_cache(self) -> None:
        """Drop the cached prefixes of finished requests."""
        ...

    async def update_weights(
        self, source: WeightsSource, version: str, running: RunningMode = "retract"
    ) -> WeightsConfirmation:
        """Serve the weights of `source` as `version` from the next step on.

        They are read and verified while the old version serves. Cached prefixes are dropped.

        Args:
            running: whether the cache of running requests is recomputed or kept. While paused, the
                pause's mode counts instead.

        Raises:
            WeightsError: the weights are incomplete, not finite or of another model; the old
                version stays in service.
        """
        ...

    async def rename_weights(self, version: str) -> None:
        """Name the served weights `version` from the next step on; they stay the same."""
        ...

    async def join_weights_group(self, group: UpdateGroup) -> None:
        """Join a group for `BroadcastWeights`; first leave a group of the same name.

        Raises:
            WeightsError: the group could not be formed.
        """
        ...

    async def leave_weights_group(self, name: str) -> bool:
        """Leave a group; return False if there is none of this name."""
        ...

    def stats(self) -> EngineStats: ...

    async def close(self) -> None: ...


@runtime_checkable
class ReleasesMemory(Protocol):
    """An `Engine` that can release its device memory for a while. Optional."""

    async def memory(self, what: Literal["release", "resume"], tags: Sequence[str] | None) -> None:
        """Release device memory, or allocate it again. Requests that come in between wait.

        Args:
            tags: `weights`, `kv_cache`; None: both.

        Raises:
            Conflict: requests are in flight, or the engine was started without this ability.
        """
        ...
