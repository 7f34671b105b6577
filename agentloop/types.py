"""The data that flows through the system: tasks in, trajectories out. No dependencies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, Literal, NotRequired, TypedDict

from agentloop.columns import Logprobs, LossMask, TokenIds, Versions
from agentloop.errors import TokenLawError
from agentloop.faults import Fault

TRAJECTORY_FORMAT = 1
"""Version of the JSON form of a `Trajectory`; raised by one with each incompatible change."""


class StopReason(StrEnum):
    """Why a generation, or a whole episode, ended. Closed: metrics count every member by name."""

    STOP = "stop"  # the model ended its turn
    LENGTH = "length"  # the tokens of the turn (max_new_tokens, max_turn_tokens) or of the response ran out
    ABORT = "abort"  # cut off by the server or the run
    MAX_TURNS = "max_turns"  # max_assistant_turns
    MAX_USER_TURNS = "max_user_turns"  # max_user_turns
    MAX_TOOL_CALLS = "max_tool_calls"  # the model called again after max_calls_per_episode was used up
    EPISODE_TOKENS = "episode_tokens"  # max_episode_tokens, over all trajectories of the episode
    CONTEXT = "context"  # the model's context is full
    TIMEOUT = "timeout"  # the episode's wall time ran out
    ERROR = "error"  # infrastructure failed; the episode is masked


class EpisodeStatus(StrEnum):
    """Whether the trainer may use a trajectory."""

    OK = "ok"  # scored and trainable
    FAILED = "failed"  # infrastructure failure: kept in the trace, masked out of the loss
    REJECTED = "rejected"  # breaks the token law: never trained, counted with its reason


class FunctionCall(TypedDict):
    name: str
    arguments: dict[str, Any]


class ToolCallDict(TypedDict):
    """One tool call in a message, in the shape chat templates render."""

    type: Literal["function"]
    id: NotRequired[str]
    function: FunctionCall


class Message(TypedDict):
    """A chat message. `content` is text, or a list of parts `{"type": "text" | "image", ...}`."""

    role: str
    content: str | list[dict[str, Any]]
    tool_calls: NotRequired[list[ToolCallDict]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    reasoning_content: NotRequired[str]


@dataclass(slots=True)
class ToolCall:
    """A tool call that was parsed from a sampled turn."""

    name: str
    arguments: dict[str, Any]
    id: str = ""


@dataclass(slots=True)
class MalformedCall:
    """Text in a sampled turn that looks like a tool call but is invalid; answered with `reason`."""

    text: str
    reason: str


@dataclass(slots=True)
class ParsedTurn:
    """One sampled turn as `ChatRenderer.parse` reads it."""

    text: str
    reasoning: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)
    malformed_calls: list[MalformedCall] = field(default_factory=list)


@dataclass(slots=True)
class Turn:
    """One generation. `start` and `end` bound the sampled tokens in the trajectory:
    `token_ids[start:end]`.

    `request_id` is the request that sampled it, `order` its place among the generations of the
    episode, forks included. `prompt_digest` is `law.extend_digest` of the ids that were sent for
    it, `sampled_digest` that of the same ids and those that came back; None: unknown (older
    traces).
    """

    start: int
    end: int
    text: str
    stop_reason: StopReason
    tool_calls: list[ToolCall] = field(default_factory=list)
    malformed_calls: list[MalformedCall] = field(default_factory=list)
    reasoning: str | None = None
    cached_tokens: int = 0
    latency_s: float = 0.0
    request_id: str = ""
    order: int = 0
    prompt_digest: int | None = None
    sampled_digest: int | None = None


@dataclass(slots=True)
class StepReward:
    """A reward inside an episode: from a tool call, an interaction, or the agent loop.

    `token_ids[start:end]` is the sampled turn that it belongs to; for a tool's reward, the turn
    that made the call.
    """

    name: str
    value: float
    start: int
    end: int


AttributeValue = str | int | float | bool


@dataclass(slots=True)
class Span:
    """A part of an episode and how long it took: `start_ns` to `end_ns`, nanoseconds since 1970.

    Its `name` is `episode`, `turn`, `generate`, `parse`, `tool`, `interaction` or `reward`, or an
    agent's own. `parent_id` is None only for `episode`. `attributes` refer to the trajectory
    instead of repeating it: `request_id` of a turn, `tool` and `call_id` of a tool call.
    """

    name: str
    span_id: str
    parent_id: str | None
    start_ns: int
    end_ns: int
    status: Literal["ok", "error", "cancelled"] = "ok"
    error: str | None = None
    attributes: dict[str, AttributeValue] = field(default_factory=dict)


@dataclass(slots=True)
class ToolResult:
    """The outcome of one tool call.

    The model sees `text`. `error` is set when the call was wrong or the tool refused it: it is
    counted, and the text still goes to the model. `reward` is a step reward, or None.
    """

    text: str
    reward: float | None = None
    error: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    images: list[Any] = field(default_factory=list)


LONGEST_TEXT = 1_000_000
"""Characters of a tool's text or of an interaction's message; a tool's is cut there."""


def bounded_text(text: str) -> str:
    """Return a tool's text, at most `LONGEST_TEXT` characters of it with a mark where it is cut."""
    if len(text) <= LONGEST_TEXT:
        return text
    mark = f"\n[cut: {len(text):,} characters are too many; the first of them are kept]"
    return text[: LONGEST_TEXT - len(mark)] + mark


def result_text(result: Any) -> str:
    """Return what a plain function returned as the text that the model reads.

    Text stays, None is empty, a number is its digits, lists and dicts are JSON.

    Raises:
        TypeError: it has no such text, like bytes, a set or an object without `__str__`. Python's
            own representation would show addresses, which differ between runs.
    """
    if isinstance(result, str):
        return result
    if result is None:
        return ""
    if isinstance(result, bool | int | float):
        return str(result)
    plain = not isinstance(result, bytes | bytearray | dict | list | tuple)
    own: object = type(result).__str__
    if plain and own is not object.__str__:  # it says itself what its text is: Decimal, Path
        return str(result)
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        wanted = "return text, a number, or what JSON can hold"
        if _is_picture(result):
            wanted = "for an image, return ToolResult(text, images=[image]); else text, a number, or what JSON can hold"
        raise TypeError(f"it returned {type(result).__name__}: {wanted}") from None


def _is_picture(value: Any) -> bool:
    """Whether a value is an image of Pillow, which is not imported for the answer."""
    return any(base.__module__ == "PIL.Image" and base.__name__ == "Image" for base in type(value).__mro__)


TOOL_KWARGS = ("create_kwargs", "execute_kwargs", "calc_reward_kwargs", "release_kwargs")
"""Arguments that a row can give to a tool: of `open`, `execute`, `reward` and `close`."""


@dataclass(slots=True)
class Task:
    """One dataset row, validated. The columns are those of common RL datasets (docs/data.md)."""

    task_id: str
    agent_name: str
    prompt: list[Message]
    data_source: str = ""
    images: list[Any] = field(default_factory=list)
    ability: str = ""
    ground_truth: Any = None
    reward_style: str = "rule"
    extra_info: dict[str, Any] = field(default_factory=dict)

    def tool_kwargs(self, tool: str) -> dict[str, dict[str, Any]]:
        """`{create_kwargs, execute_kwargs, calc_reward_kwargs, release_kwargs}` of this row for
        `tool`, without nulls: a null argument is one that the row does not give."""
        kwargs = (self.extra_info.get("tools_kwargs") or {}).get(tool) or {}
        return {
            kind: {key: value for key, value in (given or {}).items() if value is not None}
            for kind, given in kwargs.items()
        }

    @property
    def interaction_kwargs(self) -> dict[str, Any] | None:
        """`extra_info.interaction_kwargs` of this row: the interaction's `name` and the arguments
        of its start."""
        kwargs = self.extra_info.get("interaction_kwargs") or {}
        # Parquet fills the keys that only other rows have with null.
        return {key: value for key, value in kwargs.items() if value is not None} or None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of an episode, equal for all of its trajectories. Fields as in `Trajectory`.

    Made by the runner when the episode is scored; `Trajectory.with_outcome` adds it.
    """

    status: EpisodeStatus = EpisodeStatus.OK
    reward: float | None = None
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    outcome: float | None = None
    answer: str | None = None
    error: str | None = None
    broken_rule: str | None = None
    faults: Sequence[Fault] = ()


@dataclass(slots=True)
class Trajectory:
    """One finished sequence of an episode, for the trainer and for traces.

    `token_ids`, `loss_mask`, `logprobs` and `versions` have one length L. Position i has mask 1
    exactly if an engine sampled `token_ids[i]`; then `logprobs[i]` (natural log, of the
    distribution sampled from) and `versions[i]` (policy version) come from the engine, else both
    are None. `prompt_length` is the length of the first prompt.

    The ledger writes the columns compactly (`agentloop.columns`); lists are accepted too.

    `reward` is the episode's, the same in all of its trajectories; `reward_parts` holds its parts
    and the sums of the episode's step rewards by name. `outcome` is the reward function's number,
    or None without a reward function: then the reward is the sum of the step rewards. `answer` is
    the answer that the reward function read, or None. `broken_rule` names the rule that a rejected
    trajectory breaks (`errors.LawRule`). `faults` are exceptions of user code: of the tools,
    which the model was told, and the one that failed the episode. `trace_id` (32 hexadecimal
    digits) is the episode's; its last trajectory has its `spans`.
    """

    token_ids: Sequence[int]
    loss_mask: Sequence[int]
    logprobs: Sequence[float | None]
    versions: Sequence[int | None]
    prompt_length: int
    turns: list[Turn] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    reward: float | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)
    outcome: float | None = None
    answer: str | None = None
    step_rewards: list[StepReward] = field(default_factory=list)
    stop_reason: StopReason = StopReason.STOP
    status: EpisodeStatus = EpisodeStatus.OK
    error: str | None = None
    broken_rule: str | None = None
    agent_name: str = ""
    task_id: str = ""
    group_id: str = ""
    sample_index: int = 0
    data_source: str = ""
    messages: list[Message] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    trace_id: str = ""
    spans: list[Span] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def response_length(self) -> int:
        """Tokens after the first prompt, tool output included."""
        return len(self.token_ids) - self.prompt_length

    @property
    def sampled_tokens(self) -> int:
        return self.loss_mask.count(1)

    @property
    def min_version(self) -> int | None:
        """The oldest policy version that sampled a token; None if no token was sampled."""
        return min((version for version in set(self.versions) if version is not None), default=None)

    def with_outcome(self, outcome: Outcome) -> Trajectory:
        """Return this trajectory with its episode's outcome; columns and messages are shared."""
        return replace(
            self,
            status=outcome.status,
            reward=outcome.reward,
            reward_parts=dict(outcome.reward_parts),
            outcome=outcome.outcome,
            answer=outcome.answer,
            error=outcome.error,
            broken_rule=outcome.broken_rule,
            faults=list(outcome.faults),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the versioned JSON form of traces and checkpoints. Images are left out."""
        data = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("turns", "step_rewards", "images")
        }
        data |= {name: list(data[name]) for name in ("token_ids", "loss_mask", "logprobs", "versions")}
        data["messages"] = [without_images(message) for message in self.messages]
        data["turns"] = [asdict(turn) for turn in self.turns]
        data["step_rewards"] = [asdict(reward) for reward in self.step_rewards]
        data["faults"] = [asdict(fault) for fault in self.faults]
        data["spans"] = [asdict(span) for span in self.spans]
        return {"format": TRAJECTORY_FORMAT, **data}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Trajectory:
        """Read the JSON form; fields that older traces lack get their defaults.

        Raises:
            TokenLawError: the format version is unknown or a field is missing.
        """
        data = dict(data)
        version = data.pop("format", None)
        if version != TRAJECTORY_FORMAT:
            raise TokenLawError(f"trajectory format {version!r} is not {TRAJECTORY_FORMAT}")
        try:
            data["turns"] = [
                Turn(
                    **{
                        **turn,
                        "stop_reason": StopReason(turn["stop_reason"]),
                        "tool_calls": [ToolCall(**call) for call in turn["tool_calls"]],
                        "malformed_calls": [MalformedCall(**call) for call in turn["malformed_calls"]],
                    }
                )
                for turn in data["turns"]
            ]
            data["step_rewards"] = [StepReward(**reward) for reward in data.get("step_rewards", ())]
            data["faults"] = [Fault(**fault) for fault in data.get("faults", ())]
            data["spans"] = [Span(**span) for span in data.get("spans", ())]
            data["token_ids"] = TokenIds(data["token_ids"])
            data["loss_mask"] = LossMask(data["loss_mask"])
            data["logprobs"] = Logprobs(data["logprobs"])
            data["versions"] = Versions(data["versions"])
            data["stop_reason"] = StopReason(data["stop_reason"])
            data["status"] = EpisodeStatus(data["status"])
            return cls(**data)
        except (KeyError, TypeError, ValueError) as exc:
            raise TokenLawError(f"not a trajectory: {exc!r}") from exc


def without_images(message: Message) -> Message:
    """Replace the images of a message by placeholders, as traces show them."""
    content = message["content"]
    if isinstance(content, str):
        return message
    parts = [{"type": "image"} if "image" in part or "image_url" in part else part for part in content]
    return {**message, "content": parts}
