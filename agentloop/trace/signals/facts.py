"""Take from the records of a step what the rules read: a few numbers and texts an episode."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from agentloop.columns import Versions
from agentloop.text import finite
from agentloop.trace.record import TraceRecord
from agentloop.types import EpisodeStatus, Trajectory

MOST_EPISODES = 512
"""Episodes of a step that are read: whole groups, the first ones of the step. A share among so many
has a standard error of 2%, and reading ten steps takes two seconds."""

LONGEST_TEXT = 200
"""Characters of an answer or a call that are kept; a longer one is told apart by its digest."""

POSITIONS = (0, 128, 512, 2048, 8192)
"""First tokens of the parts of a response whose mismatch is compared."""

BLANKS = re.compile(r"\s+")


@dataclass(slots=True)
class Sums:
    """Sums of |logprob difference| and counts, by an index."""

    total: np.ndarray = field(default_factory=lambda: np.zeros(0))
    count: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of(cls, indices: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> Sums:
        """Sum `values` by their indices; both come in parts of equal lengths."""
        if not indices:
            return cls()
        index, value = np.concatenate(indices), np.concatenate(values)
        return cls(np.bincount(index, weights=value), np.bincount(index).astype(np.float64))

    def __add__(self, other: Sums) -> Sums:
        size = max(len(self.total), len(other.total))
        pad = [np.pad(a, (0, size - len(a))) for a in (self.total, other.total, self.count, other.count)]
        return Sums(pad[0] + pad[1], pad[2] + pad[3])

    @property
    def mean(self) -> float | None:
        """Mean over everything; None without a token."""
        count = float(self.count.sum())
        return float(self.total.sum()) / count if count else None


@dataclass(slots=True)
class Drift:
    """|engine logprob - trainer logprob| of tokens that the trained version sampled."""

    by_turn: Sums = field(default_factory=Sums)
    by_position: Sums = field(default_factory=Sums)
    by_token: Sums = field(default_factory=Sums)

    def __add__(self, other: Drift) -> Drift:
        return Drift(self.by_turn + other.by_turn, self.by_position + other.by_position, self.by_token + other.by_token)


class _Gaps:
    """Collects |engine logprob - trainer logprob| of a step's trajectories."""

    def __init__(self) -> None:
        self._turns: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []
        self._gaps: list[np.ndarray] = []

    def add(self, record: TraceRecord) -> float | None:
        """Add a trajectory; return its own mean, or None if it has nothing to compare.

        Only tokens of the version that is trained are compared: those of older versions differ
        because the policy has changed since.
        """
        theirs, t = record.trainer_logprobs, record.trajectory
        if theirs is None or len(theirs) != len(t) or t.status is not EpisodeStatus.OK:
            return None
        sampled, fresh = np.asarray(t.loss_mask, bool), np.zeros(len(t), bool)
        for start, end, version in _runs(t):
            fresh[start:end] = version == record.version
        ours = np.asarray(t.logprobs, np.float64)
        at = np.flatnonzero(sampled & fresh & np.isfinite(ours) & np.isfinite(theirs))
        if not len(at):
            return None

        gap = np.abs(ours[at] - np.asarray(theirs, np.float64)[at])
        starts = np.array([turn.start for turn in t.turns] or [0])
        turns = np.maximum(0, np.searchsorted(starts, at, side="right") - 1)
        positions = np.searchsorted(POSITIONS, np.maximum(0, at - t.prompt_length), side="right") - 1
        self._turns.append(turns.astype(np.int32))
        self._positions.append(positions.astype(np.uint8))
        self._tokens.append(np.asarray(t.token_ids, np.int32)[at])
        self._gaps.append(gap.astype(np.float32))
        return float(gap.mean())

    def drift(self) -> Drift:
        """Return the sums of everything that was added."""
        return Drift(*(Sums.of(indices, self._gaps) for indices in (self._turns, self._positions, self._tokens)))


@dataclass(slots=True)
class EpisodeFacts:
    """What the rules read of one episode.

    Attributes:
        key: of its main trajectory.
        ok: it was scored and may be trained.
        answer: the answer that the reward read, else the text of its last turn; blanks collapsed.
        answered: whether it is the answer that the reward read.
        calls: its tool calls in order, as `name(arguments)`.
        turn_stops: why its turns ended.
        tools: calls and failed calls by tool; `""` holds all of them if it has no spans.
        staleness: versions between the one trained and the oldest token.
        mismatch: mean |logprob difference| of its fresh tokens; None: nothing to compare.
    """

    key: str
    group: str
    task: str
    ok: bool
    reward: float | None
    parts: dict[str, float]
    answer: str
    answered: bool
    calls: tuple[str, ...]
    turn_stops: tuple[str, ...]
    tokens: int
    tools: dict[str, tuple[int, int]]
    staleness: int | None
    mismatch: float | None = None


@dataclass(slots=True)
class StepFacts:
    """The episodes of one training step, and the mismatch of all of them."""

    step: int
    episodes: list[EpisodeFacts]
    drift: Drift = field(default_factory=Drift)
    groups: list[list[EpisodeFacts]] = field(init=False)
    """The scored episodes, by group."""

    def __post_init__(self) -> None:
        found: dict[str, list[EpisodeFacts]] = defaultdict(list)
        for episode in self.episodes:
            if episode.ok and episode.reward is not None:
                found[episode.group].append(episode)
        self.groups = list(found.values())


def facts_of(step: int, records: Iterable[TraceRecord], most: int = MOST_EPISODES) -> StepFacts:
    """Return the facts of a step's training episodes; records of other splits are left out."""
    episodes: dict[tuple[str, int], list[TraceRecord]] = defaultdict(list)
    groups: Counter[str] = Counter()
    for record in records:
        if record.split != "train":
            continue
        group, sample = record.trajectory.group_id, record.trajectory.sample_index
        if group not in groups and groups.total() >= most:
            break
        if (group, sample) not in episodes:
            groups[group] += 1
        episodes[group, sample].append(record)

    gaps = _Gaps()
    found = [_episode(sorted(parts, key=lambda record: record.part), gaps) for parts in episodes.values()]
    return StepFacts(step, found, gaps.drift())


def _episode(parts: Sequence[TraceRecord], drift: _Gaps) -> EpisodeFacts:
    main = parts[-1].trajectory
    trajectories = [record.trajectory for record in parts]
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    ok = main.status is EpisodeStatus.OK
    # The columns of a rejected trajectory may hold anything.
    versions = [version for t in trajectories if ok for _, _, version in _runs(t) if version is not None]
    gaps = [gap for record in parts if (gap := drift.add(record)) is not None]
    text = main.turns[-1].text if main.turns else ""
    return EpisodeFacts(
        key=parts[-1].key,
        group=main.group_id,
        task=main.task_id or main.group_id,
        ok=ok,
        reward=finite(main.reward),
        parts={name: value for name, given in main.reward_parts.items() if (value := finite(given)) is not None},
        answer=brief(main.answer if main.answer is not None else text),
        answered=main.answer is not None,
        calls=tuple(call_text(call.name, call.arguments) for turn in turns for call in turn.tool_calls),
        turn_stops=tuple(str(turn.stop_reason) for turn in turns),
        tokens=sum(trajectory.response_length for trajectory in trajectories),
        tools=_tools(main, trajectories),
        staleness=parts[-1].version - min(versions) if versions else None,
        mismatch=max(gaps, default=None),
    )


def _runs(trajectory: Trajectory) -> list[tuple[int, int, int | None]]:
    """Return (start, end, version) of the runs of equal versions."""
    versions = trajectory.versions
    return list((versions if isinstance(versions, Versions) else Versions(versions)).runs())


def _tools(main: Trajectory, trajectories: Sequence[Trajectory]) -> dict[str, tuple[int, int]]:
    """Return calls and failed calls by tool: from the spans, else from the counts of metrics."""
    tools: dict[str, tuple[int, int]] = {}
    for span in main.spans:
        if span.name == "tool" and span.status != "cancelled":
            name = str(span.attributes.get("tool", ""))
            calls, failed = tools.get(name, (0, 0))
            tools[name] = (calls + 1, failed + (span.status == "error"))
    if tools:
        return tools
    calls, failed = (
        int(sum(finite(t.metrics.get(key)) or 0 for t in trajectories)) for key in ("tool_calls", "tool_errors")
    )
    return {"": (calls, failed)} if calls else {}


def brief(text: str) -> str:
    """Return a text on one line, short enough to keep, and different for different texts."""
    flat = BLANKS.sub(" ", text).strip()
    if len(flat) <= LONGEST_TEXT:
        return flat
    return f"{flat[:LONGEST_TEXT]}… ({hashlib.sha256(flat.encode(errors='replace')).hexdigest()[:8]})"


def call_text(name: str, arguments: object) -> str:
    """Return a tool call as text, equal for equal arguments in any order."""
    return f"{name}({brief(json.dumps(arguments, ensure_ascii=False, sort_keys=True, default=str))})"
