"""HTTP messages between agent loops, trainer and rollout server: SGLang's API for tokens only.

The models are strict: unknown fields and wrong types are errors. Importing this module costs
    pydantic only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import ipaddress
import socket
import zlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationInfo,
    field_validator,
)

from agentloop.errors import ConfigError

SESSION_HEADER = "X-Session-Id"
"""Requests with the same value go to the same replica, where their prefix is cached."""

TRACEPARENT_HEADER = "traceparent"
"""W3C Trace Context: the span in which a request is made. Servers pass it on; none needs it."""

IMAGE_NAME = "sha256:"
"""How the name of an image begins, which no base64 does."""

LEAST_NAMED_IMAGE = 1024
"""Characters of base64 from which on an image is kept and named: less costs little to send."""

UNKNOWN_IMAGE = "unknown_image"
"""Type of the error that a named image is not kept any more."""

MAX_NAME_LENGTH = 256
"""Longest id of a request, a session or a group."""

PACKINGS = ("gzip", "x-gzip", "deflate")
"""Content encodings that `unpacked` reads."""


def unpacked(data: bytes, encoding: str, most: int | None = None) -> bytes:
    """Return a packed body as it was.

    Args:
        encoding: one of `PACKINGS`.
        most: bytes; None: no limit.

    Raises:
        OverflowError: it has more than `most`.
        ValueError: it is cut off, goes on after its end, or is packed in another way.
    """
    if encoding not in PACKINGS:
        raise ValueError(f"the encoding {encoding[:40]!r} is not supported")
    unpacker = zlib.decompressobj(wbits=47)  # 32 + 15: the header says whether it is gzip or zlib
    try:
        found = unpacker.decompress(data, 0 if most is None else most + 1)
    except zlib.error as exc:
        raise ValueError(f"it is not {encoding}: {exc}") from exc
    if most is not None and len(found) > most:
        raise OverflowError
    if not unpacker.eof:
        raise ValueError(f"the {encoding} data is cut off")
    if unpacker.unused_data:
        raise ValueError(f"the {encoding} data goes on after its end")
    return found


def bearer(token: str, name: str = "the token") -> str:
    """Return the value of the `Authorization` header for a bearer token.

    Args:
        name: names the token in the error, which never shows its value.

    Raises:
        ConfigError: a header cannot hold the token.
    """
    wrong = next((i for i, character in enumerate(token, 1) if not "!" <= character <= "~"), None)
    if wrong is not None:
        raise ConfigError(
            f"{name} cannot be sent in an HTTP header: its character {wrong} of {len(token)} is a space, a control "
            "character or outside ASCII",
            "use a token of printable ASCII characters, without a line break at its end",
        )
    return f"Bearer {token}"


def image_name(image: str) -> str:
    """Return the name of an image for a server that keeps it.

    Args:
        image: the file, base64-encoded; equal images in other encodings have other names.
    """
    return IMAGE_NAME + hashlib.sha256(image.encode()).hexdigest()


def printable(value: str) -> str:
    """Return `value`, a name that goes into logs.

    Raises:
        ValueError: it has control characters or line breaks.
    """
    if not value.isprintable():
        raise ValueError("it may not contain control characters or line breaks")
    return value


Name = Annotated[str, Field(max_length=MAX_NAME_LENGTH), AfterValidator(printable)]


class WireModel(BaseModel):
    """Base of all requests: refuses unknown fields, infinities and NaN."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


FIRST_ERROR = Field(fail_fast=True)
"""For lists: validation ends at the first wrong entry. A body may hold millions of them."""

LogitBias = Annotated[float, Field(ge=-100.0, le=100.0)]

MaxNewTokens = Annotated[int, Field(ge=1, description="sampled tokens of one turn at most")]


_max_new_tokens = TypeAdapter(MaxNewTokens)


class SamplingFields(BaseModel):
    """Fields that a request's sampling parameters and a recipe's `sampling` section share. Names
    are SGLang's."""

    max_new_tokens: MaxNewTokens
    temperature: float = Field(1.0, ge=0.0, le=100.0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="sample from the likeliest tokens of this total probability")
    top_k: int = Field(-1, ge=-1, description="sample from this many of the likeliest tokens; -1: all")
    min_p: float = Field(
        0.0, ge=0.0, le=1.0, description="drop tokens less likely than this share of the likeliest one's probability"
    )
    repetition_penalty: float = Field(
        1.0, gt=0.0, le=2.0, description="divides positive logits of tokens sampled before, multiplies negative ones"
    )
    presence_penalty: float = Field(
        0.0, ge=-2.0, le=2.0, description="subtracted from the logits of tokens sampled before"
    )
    frequency_penalty: float = Field(
        0.0, ge=-2.0, le=2.0, description="subtracted from a token's logit once for each time it was sampled"
    )
    logit_bias: dict[int, LogitBias] | None = Field(
        None, description="added to the logits of these token ids, e.g. {151643: -100}; null: none"
    )
    min_new_tokens: int = Field(
        0, ge=0, description="no end token and no stop token before this many tokens; fewer where a limit leaves less"
    )

    @field_validator("min_new_tokens")
    @classmethod
    def _can_be_reached(cls, value: int, info: ValidationInfo) -> int:
        most = info.data.get("max_new_tokens", value)
        if value > most:
            raise ValueError(f"{value} is more than max_new_tokens {most}")
        return value


class SamplingParams(SamplingFields, WireModel):
    """Sampling parameters of one generation. Defaults are SGLang's."""

    max_new_tokens: Annotated[int, Field(ge=0, description="sampled tokens at most; 0: none")] = 128
    stop_token_ids: Annotated[list[int], FIRST_ERROR] | None = Field(
        None, description="end the turn after one of these; it is returned"
    )
    ignore_eos: bool = Field(
        False, description="stop at no token, neither the model's own end tokens nor `stop_token_ids`"
    )
    stream_interval: int | None = Field(None, ge=1, description="tokens between two events of a stream; null: 1")
    sampling_seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="same seed, same weights, same prompt: same tokens, whatever else runs"
    )

    @classmethod
    def merged(cls, base: SamplingFields, changes: Mapping[str, Any], *, room: int) -> SamplingParams:
        """Return `base` with `changes`, its limits of new tokens cut to `room`.

        Raises:
            ValidationError: a change is not a field, or its value is wrong.
        """
        values = {name: getattr(base, name) for name in SamplingFields.model_fields} | dict(changes)
        # A turn samples something; only other clients of the server ask for 0 tokens.
        values["max_new_tokens"] = min(_max_new_tokens.validate_python(values["max_new_tokens"]), room)
        values["min_new_tokens"] = min(values["min_new_tokens"], values["max_new_tokens"])
        return cls(**values)


class GenerateRequest(WireModel):
    """`POST /generate`. Tokens only: deliberately without a field for text.

    SGLang's batches are accepted too: `input_ids` as a list of prompts and `sampling_params.n`, and
    then a list for each other field that differs. Their answer is a list.
    """

    input_ids: Annotated[list[int], FIRST_ERROR, Field(min_length=1, description="the whole prompt")]
    sampling_params: SamplingParams = Field(default_factory=SamplingParams)
    return_logprob: bool = True
    rid: Name | None = Field(None, description="request id, for /abort_request")
    session_id: Name | None = Field(None, description="as the header X-Session-Id, which wins over it")
    image_data: Annotated[list[str], FIRST_ERROR] | str | None = Field(
        None, description="images as base64 data, in the prompt's order; or the names of such that were sent before"
    )
    stream: bool = Field(False, description="answer with server-sent events while it is sampled")


class VersionSpan(WireModel):
    """Output tokens `[start, end)` were sampled under policy `version`."""

    version: str
    start: int
    end: int


class FinishReason(BaseModel):
    """`type` is stop, length or abort; `matched` is the token that stopped the turn."""

    model_config = ConfigDict(extra="allow")

    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    length: int | None = None
    message: str | None = None


class MetaInfo(BaseModel):
    """Facts about one generation. Extra fields of a bare SGLang are kept."""

    model_config = ConfigDict(extra="allow")

    id: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    weight_version: str = "default"
    weight_versions: list[VersionSpan] | None = None
    output_token_logprobs: list[tuple[float, int, Any]] | None = None


class GenerateResponse(BaseModel):
    """Answer of `POST /generate`: sampled ids, each with its logprob and the policy version that
    sampled it."""

    model_config = ConfigDict(extra="allow")

    output_ids: list[int]
    meta_info: MetaInfo


WeightsVersion = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(printable)]


class UpdateRequest(WireModel):
    """Fields of every weight update."""

    weight_version: WeightsVersion | None = Field(None, description="null: the version keeps its name")
    flush_cache: bool = True
    abort_all_requests: bool = False
    checksum: str | None = Field(
        None,
        description="checksum of the published tensors (`agentloop.weights.layout`): a replica refuses different ones",
    )
    running: Literal["retract", "in_place"] = Field(
        "retract",
        description="running requests: retract recomputes their KV cache, in_place keeps it; a pause decides itself",
    )


class UpdateWeightsFromDiskRequest(UpdateRequest):
    """Load safetensors from `model_path` and serve them as `weight_version`."""

    model_path: str
    load_format: str | None = None


class UpdateWeightsFromTensorRequest(UpdateRequest):
    """Serve `model.safetensors` of a folder in shared memory without a copy, while or after it is
    written.

    SGLang's fields for pickled tensors are refused: unpickling runs any code that the sender likes.
    """

    shm_path: str


class UpdateWeightsFromDistributedRequest(UpdateRequest):
    """Receive the broadcasts of rank 0 of a group; answered once the tensors are served."""

    names: list[str] = Field(min_length=1, fail_fast=True)
    dtypes: list[str] = Field(description="torch's names, as float32", fail_fast=True)
    shapes: list[Annotated[list[Annotated[int, Field(ge=0)]], FIRST_ERROR]] = Field(fail_fast=True)
    group_name: Name = "weight_update_group"
    load_format: Literal["flattened_bucket"] | None = Field(
        None, description="flattened_bucket: one broadcast for the bytes of many tensors; null: one for each tensor"
    )
    bucket_bytes: int | None = Field(
        None, ge=1, description="size at which a flattened bucket ends; null: one bucket for all tensors"
    )
    copy_path: str | None = Field(None, description="folder with the same tensors, for replicas that restart later")


def _number(value: Any) -> Any:
    """Return the number that a text of decimal digits spells; some clients send ports so."""
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) <= 5 else value


class InitWeightsUpdateGroupRequest(WireModel):
    """Join an update group whose rank 0 runs a TCP store at `master_address:master_port`. The
    serving replicas take the ranks from `rank_offset` on, in their order."""

    master_address: Name
    master_port: Annotated[int, Field(ge=1, le=65535), BeforeValidator(_number)]
    rank_offset: int = Field(ge=1)
    world_size: int = Field(ge=2)
    group_name: Name = Field("weight_update_group", min_length=1)
    backend: Literal["nccl", "gloo"] = "nccl"


class DestroyWeightsUpdateGroupRequest(WireModel):
    """Leave an update group."""

    group_name: Name = "weight_update_group"


class WeightUpdateRequest(WireModel):
    """Begin or end a weight update."""


class UpdateWeightVersionRequest(WireModel):
    """Give the served weights another name."""

    new_version: WeightsVersion
    abort_all_requests: bool = True


class AdminResponse(BaseModel):
    """Answer of the admin endpoints."""

    model_config = ConfigDict(extra="allow")

    success: bool
    message: str = ""
    weight_version: str | None = Field(
        None, description="after an update: the version that every serving replica confirmed"
    )
    checksum: str | None = Field(None, description="after an update: checksum of that version")


class PauseRequest(WireModel):
    """`abort`: end running requests now; `retract`: drop their KV cache and recompute it later;
    `in_place`: keep it; `wait`: let them end first."""

    mode: Literal["retract", "in_place", "wait", "abort"] = "abort"


class AbortRequest(WireModel):
    """Abort one request by id, those of a session, or all."""

    rid: Name = ""
    session_id: Name | None = Field(None, description="value of X-Session-Id that the requests carried")
    abort_all: bool = False


class MemoryRequest(WireModel):
    """Which device memory to release or to take again."""

    tags: Annotated[list[Literal["weights", "kv_cache"]], FIRST_ERROR] | None = Field(None, description="null: both")


class ServerInfo(BaseModel):
    """`GET /server_info`."""

    model_config = ConfigDict(extra="allow")

    version: str
    engine: str
    model_path: str
    weight_version: str
    context_length: int
    vocab_size: int
    replicas: int
    pid: int
    checksum: str | None = Field(None, description="checksum of the served weights; null: the model's own")
    incremental_streaming_output: bool = False
    keeps_images: bool = Field(False, description="whether requests may name images that were sent before")


class ErrorBody(BaseModel):
    """Every 4xx and 5xx answer: `{"success": false, "message", "error": {"message", "field",
    "type"}}`."""

    success: bool = False
    message: str = ""
    error: dict[str, Any]


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket. Bind before loading a model, so that a taken port is reported at once.

    Raises:
        ConfigError: names the port and the possible fixes.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as exc:
        sock.close()
        if exc.errno == errno.EADDRINUSE:
            fix = "stop the process that uses it, or choose another --port (0: any free one)"
            raise ConfigError(f"port {port} on {host} is taken", fix) from exc
        reason = f"port {port} on {host} cannot be bound: {exc.strerror or exc}"
        raise ConfigError(reason, "give another --host or --port") from exc
    return sock


def url_of(sock: socket.socket, host: str) -> str:
    """Return the URL under which this machine reaches the socket."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # compared, not bound
    return f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{sock.getsockname()[1]}"


def is_local(url: str) -> bool:
    """Return whether a server is on this machine."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False
