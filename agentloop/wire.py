"""What crosses HTTP between agent loops, trainer and rollout server: SGLang's dialect, restricted to tokens.

The models are strict: an unknown field is an error, a number is a number. Importing this module costs pydantic only.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

SESSION_HEADER = "X-Session-Id"
"""Requests that carry the same value go to the same replica, where their prefix is cached."""


class WireModel(BaseModel):
    """Base of all messages: unknown fields are refused, infinities and NaN too."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


LogitBias = Annotated[float, Field(ge=-100.0, le=100.0)]


class SamplingParams(WireModel):
    """How to sample. Names and defaults are SGLang's."""

    max_new_tokens: int = Field(128, ge=1, description="sampled tokens at most")
    temperature: float = Field(1.0, ge=0.0, le=100.0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(-1, ge=-1, description="-1: all tokens")
    min_p: float = Field(
        0.0, ge=0.0, le=1.0, description="leave out tokens less likely than this share of the likeliest"
    )
    repetition_penalty: float = Field(
        1.0,
        gt=0.0,
        le=2.0,
        description="positive logits of tokens sampled before are divided by it, negative ones multiplied",
    )
    presence_penalty: float = Field(
        0.0, ge=-2.0, le=2.0, description="subtracted from the logits of tokens sampled before"
    )
    frequency_penalty: float = Field(
        0.0, ge=-2.0, le=2.0, description="subtracted from a token's logit once for each time it was sampled"
    )
    logit_bias: dict[int, LogitBias] | None = Field(None, description="added to the logits of these token ids")
    min_new_tokens: int = Field(
        0, ge=0, description="no end token and no stop token before so many tokens were sampled"
    )
    stop_token_ids: list[int] | None = Field(None, description="end the turn after one of these; it is returned")
    ignore_eos: bool = Field(False, description="do not stop at the model's own end tokens")
    stream_interval: int | None = Field(None, ge=1, description="tokens between two events of a stream; null: 1")
    sampling_seed: int | None = Field(
        None,
        ge=0,
        lt=2**63,
        description="same seed, same weights, same prompt: same tokens, whatever else runs",
    )

    @field_validator("min_new_tokens")
    @classmethod
    def _can_be_reached(cls, value: int, info: ValidationInfo) -> int:
        most = info.data.get("max_new_tokens", value)
        if value > most:
            raise ValueError(f"{value} is more than max_new_tokens {most}")
        return value


class GenerateRequest(WireModel):
    """`POST /generate`. Tokens in; there is no field for text on purpose."""

    input_ids: Annotated[list[int], Field(min_length=1, description="the whole prompt")]
    sampling_params: SamplingParams
    return_logprob: bool = True
    rid: str | None = Field(None, max_length=256, description="request id, to abort it by")
    session_id: str | None = Field(None, max_length=256, description="as the header X-Session-Id, which comes first")
    image_data: list[str] | str | None = Field(None, description="images as base64 data, in the prompt's order")
    stream: bool = Field(False, description="answer in server-sent events while it is sampled")


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
    """Facts about one generation. A bare SGLang adds fields of its own: they are kept."""

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
    """Answer of `POST /generate`: sampled ids, each with its logprob and the policy version that sampled it."""

    model_config = ConfigDict(extra="allow")

    output_ids: list[int]
    meta_info: MetaInfo


WeightsVersion = Annotated[str, Field(min_length=1, max_length=64)]


class UpdateRequest(WireModel):
    """What all weight updates have in common."""

    weight_version: WeightsVersion | None = Field(None, description="null: the folder's name")
    flush_cache: bool = True
    abort_all_requests: bool = False
    checksum: str | None = Field(
        None,
        description="checksum of the published tensors (`agentloop.weights.layout`): a replica refuses others",
    )
    running: Literal["retract", "in_place"] = Field(
        "retract", description="what becomes of requests that run, unless the server is paused: recomputed, or not"
    )


class UpdateWeightsFromDiskRequest(UpdateRequest):
    """Load safetensors from `model_path` and serve them as `weight_version`."""

    model_path: str
    load_format: str | None = None


class UpdateWeightsFromTensorRequest(UpdateRequest):
    """Serve `model.safetensors` of a folder in shared memory where it lies, while or after it is written.

    SGLang's fields for pickled tensors are not taken: unpickling runs whatever code the sender likes.
    """

    shm_path: str


class UpdateWeightsFromDistributedRequest(UpdateRequest):
    """Receive broadcasts of rank 0 in a group; the answer comes when they have arrived and are served."""

    names: list[str] = Field(min_length=1)
    dtypes: list[str] = Field(description="torch's names, as float32")
    shapes: list[list[Annotated[int, Field(ge=0)]]]
    group_name: str = "weight_update_group"
    load_format: Literal["flattened_bucket"] | None = Field(
        None, description="flattened_bucket: tensors travel together, as bytes in a row; null: one broadcast of each"
    )
    bucket_bytes: int | None = Field(
        None, ge=1, description="size at which a flattened bucket ends; null: all tensors are in one"
    )
    copy_path: str | None = Field(
        None, description="folder with the same tensors, for replicas that have to be started again later"
    )


class InitWeightsUpdateGroupRequest(WireModel):
    """Join a group whose rank 0 keeps a store at `master_address:master_port`; the serving replicas take the ranks from
    `rank_offset` on, in their order."""

    master_address: str
    master_port: int = Field(ge=1, le=65535)
    rank_offset: int = Field(ge=1)
    world_size: int = Field(ge=2)
    group_name: str = Field("weight_update_group", min_length=1, max_length=256)
    backend: Literal["nccl", "gloo"] = "nccl"


class DestroyWeightsUpdateGroupRequest(WireModel):
    """Leave a group."""

    group_name: str = "weight_update_group"


class AdminResponse(BaseModel):
    """Answer of the admin endpoints."""

    model_config = ConfigDict(extra="allow")

    success: bool
    message: str = ""
    weight_version: str | None = Field(None, description="after an update: what every serving replica confirmed")
    checksum: str | None = Field(None, description="after an update: of what they serve")


class PauseRequest(WireModel):
    """`retract`: drop the KV cache of running requests and recompute it later; `in_place`: keep it; `wait`: let them
    end first; `abort`: end them now."""

    mode: Literal["retract", "in_place", "wait", "abort"] = "retract"


class AbortRequest(WireModel):
    """Abort one request by id, those of a session, or all."""

    rid: str = Field("", max_length=256)
    session_id: str | None = Field(None, max_length=256, description="value of X-Session-Id that the requests carried")
    abort_all: bool = False


class MemoryRequest(WireModel):
    """Which memory to release or to take again."""

    tags: list[Literal["weights", "kv_cache"]] | None = Field(None, description="null: both")


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
    checksum: str | None = Field(None, description="of the weights that are served; null: the model's own")
    incremental_streaming_output: bool = False


class ErrorBody(BaseModel):
    """Every 4xx and 5xx answer: `{"error": {"message", "field", "type"}}`."""

    error: dict[str, Any]
