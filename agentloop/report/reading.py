"""Read a run directory, expecting torn lines, missing files and invalid numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentloop.errors import TraceError
from agentloop.files import read_json_leniently, read_json_lines
from agentloop.text import finite
from agentloop.trace.record import TraceRecord
from agentloop.trace.store import TraceFile, TraceStore
from agentloop.types import EpisodeStatus

SCAN_BYTES = 1 << 30
"""Bytes of old traces searched for failures; the page says if the search was incomplete."""

READ_BYTES = 32 << 20
"""Bytes of one old trace file that samples are chosen from."""

READ_TOKENS = 4_000_000
"""Tokens of one trace that samples are chosen from."""

UNHEALTHY = (EpisodeStatus.FAILED, EpisodeStatus.REJECTED)


@dataclass(slots=True)
class Traced:
    """One trajectory of a trace. All lists have the same length, whatever the line holds.

    Unlike `Trajectory`, this accepts trajectories that break the token law, because a report must
    show those above all.
    """

    step: int
    token_ids: list[int]
    mask: list[bool]
    logprobs: list[float | None]
    versions: list[int | None]
    pieces: list[str] | None
    prompt_length: int
    reward: float | None
    reward_parts: dict[str, float]
    status: str
    stop_reason: str
    error: str | None
    agent_name: str
    task_id: str
    turns: int
    metrics: dict[str, float]

    @classmethod
    def from_record(cls, record: TraceRecord) -> Traced:
        """Show a record of a trace."""
        trajectory = record.trajectory
        data = trajectory.to_json() | {"status": str(trajectory.status), "stop_reason": str(trajectory.stop_reason)}
        traced = cls.from_json(data, record.step)
        return traced if traced is not None else cls._of_columns({**data, "token_ids": []}, record.step)

    @classmethod
    def from_json(cls, data: dict[str, Any], step: int) -> Traced | None:
        """Read a line of an old trace; None if it has no token ids."""
        ids = data.get("token_ids")
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            return None
        return cls._of_columns(data, step)

    @classmethod
    def _of_columns(cls, data: dict[str, Any], step: int) -> Traced:
        ids = data["token_ids"]
        n = len(ids)
        pieces = data.get("pieces")
        usable = isinstance(pieces, list) and len(pieces) == n and all(isinstance(piece, str) for piece in pieces)
        versions = [v if isinstance(v, int) else None for v in _list(data, "versions", n)]
        prompt_length = data.get("prompt_length")
        return cls(
            step=step,
            token_ids=ids,
            mask=[value == 1 for value in _list(data, "loss_mask", n)],
            logprobs=[finite(value) for value in _list(data, "logprobs", n)],
            versions=versions,
            pieces=pieces if usable else None,
            prompt_length=min(n, max(0, prompt_length)) if isinstance(prompt_length, int) else 0,
            reward=finite(data.get("reward")),
            reward_parts=_numbers(data.get("reward_parts")),
            status=str(data.get("status") or EpisodeStatus.OK),
            stop_reason=str(data.get("stop_reason") or ""),
            error=str(data["error"]) if data.get("error") else None,
            agent_name=str(data.get("agent_name") or ""),
            task_id=str(data.get("task_id") or ""),
            turns=len(data["turns"]) if isinstance(data.get("turns"), list) else 0,
            metrics=_numbers(data.get("metrics")),
        )


@dataclass(slots=True)
class RunRecord:
    """Configuration, environment and metrics of a run directory."""

    root: Path
    config: dict[str, Any]
    env: dict[str, Any]
    rows: list[dict[str, Any]]
    """One dict per step, in order. A step that was written twice is merged; later values win."""

    @classmethod
    def read(cls, root: Path) -> RunRecord:
        """Read config, environment and metrics; a missing file reads as empty."""
        metrics = root / "metrics.jsonl"
        merged: dict[int, dict[str, Any]] = {}
        for row in read_json_lines(metrics) if metrics.is_file() else ():
            step = finite(row.get("step"))
            if step is not None:
                merged.setdefault(int(step), {}).update(row)
        return cls(
            root=root,
            config=_read_object(root / "config" / "resolved.json"),
            env=_read_object(root / "env.json"),
            rows=[merged[step] for step in sorted(merged)],
        )

    @property
    def train_rows(self) -> list[dict[str, Any]]:
        """The rows of training steps. The evaluation before training has a row without a reward."""
        return [row for row in self.rows if "reward/mean" in row]

    @property
    def is_sft(self) -> bool:
        """Whether the run is one of `agentloop sft`: it has losses instead of episodes."""
        return "stages" in self.config or any("loss" in row for row in self.rows)

    def setting(self, dotted: str) -> Any:
        """Return a value of the config; None if it is missing."""
        value: Any = self.config
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def traces(self) -> TraceStore:
        """The traces of the run."""
        return TraceStore(self.root)

    def trace_steps(self, split: str) -> list[int]:
        """Return the steps that have a trace of `split` (`train` or `eval`), in order."""
        return self.traces.steps(split)

    def trajectories(self, step: int, split: str) -> list[Traced]:
        """Return the first trajectories of a step's trace, up to `READ_TOKENS` tokens; none of one
        that is cut."""
        store = self.traces
        try:
            file = store.file(step, split)
            if file.old:
                lines = read_json_lines(file.path, READ_BYTES)
                return [traced for line in lines if (traced := Traced.from_json(line, step)) is not None]
            found: list[Traced] = []
            tokens = 0
            for record in store.iterate(step, split):
                found.append(Traced.from_record(record))
                tokens += len(record.trajectory.token_ids)
                if tokens >= READ_TOKENS:
                    break
            return found
        except TraceError:
            return []

    def unhealthy(self) -> tuple[list[Traced], bool]:
        """Return failed and rejected training trajectories, and if all traces were read.

        Those of parquet traces have no tokens: only the columns that name a cause are read.
        """
        found: list[Traced] = []
        store, left = self.traces, SCAN_BYTES
        for file in store.files("train"):
            if not file.old:
                found += _unhealthy(store, file)
                continue
            for line in read_json_lines(file.path, left, only=_UNHEALTHY_LINE):
                traced = Traced.from_json(line, file.step)
                if traced is not None and traced.status in UNHEALTHY:
                    found.append(traced)
            left -= file.path.stat().st_size
            if left <= 0:
                return found, False
        return found, True

    def trace_problems(self) -> list[str]:
        """Return what is wrong with the traces, a sentence each."""
        return [str(problem) for problem in self.traces.problems()]


def _unhealthy(store: TraceStore, file: TraceFile) -> list[Traced]:
    columns = ("status", "error", "task_id", "agent_name", "stop_reason", "step", "part", "parts")
    found = []
    for _, table in store.scan(columns, files=[file]):
        chosen = [i for i, status in enumerate(table.column("status").to_pylist()) if status in UNHEALTHY]
        for row in table.take(chosen).to_pylist() if chosen else ():
            traced = Traced.from_json({**row, "token_ids": []}, row["step"])
            if traced is not None and row["part"] == row["parts"] - 1:  # an episode counts once
                found.append(traced)
    return found


_UNHEALTHY_LINE = re.compile(rb'"status"\s*:\s*"(?:failed|rejected)"')


def _read_object(path: Path) -> dict[str, Any]:
    data = read_json_leniently(path.read_bytes()) if path.is_file() else None
    return data if isinstance(data, dict) else {}


def _list(data: dict[str, Any], key: str, n: int) -> list[Any]:
    values = data.get(key)
    return (values if isinstance(values, list) else [])[:n] + [None] * (
        n - min(n, len(values) if isinstance(values, list) else 0)
    )


def _numbers(data: Any) -> dict[str, float]:
    if not isinstance(data, dict):
        return {}
    return {str(key): number for key, value in data.items() if (number := finite(value)) is not None}
