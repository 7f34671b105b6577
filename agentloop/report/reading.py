"""Read a run directory, expecting torn lines, missing files and invalid numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from agentloop.text import finite
from agentloop.types import EpisodeStatus

SCAN_BYTES = 1 << 30
"""Maximum bytes of traces searched for failures; the page shows if the search was incomplete."""

READ_BYTES = 32 << 20
"""Bytes of one trace file that samples are chosen from."""


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
    def from_json(cls, data: dict[str, Any], step: int) -> Traced | None:
        """Read a line of a trace; None if it has no token ids."""
        ids = data.get("token_ids")
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            return None

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
        merged: dict[int, dict[str, Any]] = {}
        for row in read_lines(root / "metrics.jsonl"):
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

    def trace_steps(self, split: str) -> list[int]:
        """Return the steps that have a trace of `split` (`train` or `eval`), in order."""
        suffixes = (path.parent.name.removeprefix("step_") for path in self.root.glob(f"traces/step_*/{split}.jsonl"))
        return sorted(int(suffix) for suffix in suffixes if suffix.isdigit())

    def trace_file(self, step: int, split: str) -> Path:
        return self.root / "traces" / f"step_{step}" / f"{split}.jsonl"

    def trajectories(self, step: int, split: str) -> list[Traced]:
        """Return the trajectories in the first `READ_BYTES` of a step's trace."""
        lines = read_lines(self.trace_file(step, split), READ_BYTES)
        return [traced for line in lines if (traced := Traced.from_json(line, step)) is not None]

    def unhealthy(self) -> tuple[list[Traced], bool]:
        """Return failed and rejected training trajectories, and if all traces were read."""
        found: list[Traced] = []
        left = SCAN_BYTES
        for step in self.trace_steps("train"):
            path = self.trace_file(step, "train")
            for line in read_lines(path, left, only=_UNHEALTHY):
                traced = Traced.from_json(line, step)
                if traced is not None and traced.status in (EpisodeStatus.FAILED, EpisodeStatus.REJECTED):
                    found.append(traced)
            left -= path.stat().st_size
            if left <= 0:
                return found, False
        return found, True


_UNHEALTHY = re.compile(rb'"status"\s*:\s*"(?:failed|rejected)"')


def read_lines(path: Path, limit: int | None = None, only: re.Pattern[bytes] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a jsonl file; skip other lines, such as a torn last one.

    Args:
        limit: stop after this many bytes.
        only: skip lines without a match of this pattern, unparsed.
    """
    if not path.is_file():
        return
    read = 0
    with path.open("rb") as file:
        for line in file:
            read += len(line)
            if limit is not None and read > limit:
                return
            if only is not None and not only.search(line):
                continue
            data = _parse(line)
            if isinstance(data, dict):
                yield data


def _parse(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass
    try:  # the standard library also accepts NaN and lone surrogates, which other writers produce
        return json.loads(data.decode("utf-8", "replace"))
    except (json.JSONDecodeError, RecursionError):
        return None


def _read_object(path: Path) -> dict[str, Any]:
    data = _parse(path.read_bytes()) if path.is_file() else None
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
