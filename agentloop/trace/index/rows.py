"""Read a trace file as rows of the index: one an episode."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from agentloop.errors import TraceError
from agentloop.text import finite
from agentloop.trace.index.search import searchable
from agentloop.trace.store import TraceFile, TraceStore
from agentloop.trace.store.exact_json import load
from agentloop.trace.store.schema import CHEAP

BATCH = 256
"""Trajectories read at a time."""

TOKENS = ("logprobs", "logprobs64", "trainer_logprobs", "advantages")
READ = (*CHEAP, *TOKENS, "messages", "turns", "faults")

REQUIRED = ("step", "split", "version", "group_id", "sample_index", "part", "parts")
"""Columns that every row of a trace has."""

SHOWN = 240
"""Characters of a prompt, a reply or an answer in a table."""

LONGEST_CAUSE = 300

_SPACE = re.compile(r"\s+")
_NUMBER = re.compile(r"\d+")


Means = tuple[float | None, float | None]
"""Over the sampled tokens: the difference of engine and trainer logprobs, the advantage."""


@dataclass(slots=True)
class Texts:
    """The texts of one episode that can be searched, by column; a text that repeats counts once."""

    prompt: dict[str, None] = field(default_factory=dict)
    answer: dict[str, None] = field(default_factory=dict)
    calls: dict[str, None] = field(default_factory=dict)
    results: dict[str, None] = field(default_factory=dict)
    errors: dict[str, None] = field(default_factory=dict)

    def add_message(self, message: Mapping[str, Any]) -> None:
        """Add a message of the conversation to the columns of its role."""
        role, text = message.get("role"), message_text(message)
        where = {"assistant": self.answer, "tool": self.results}.get(str(role), self.prompt)
        where[text] = None
        if reasoning := message.get("reasoning_content"):
            self.answer[str(reasoning)] = None
        for call in _dicts(message.get("tool_calls")):
            function = call.get("function")
            if isinstance(function, dict):
                self.calls[f"{function.get('name')} {_plain(function.get('arguments'))}"] = None

    def columns(self) -> tuple[str, str, str, str, str]:
        """Return the values of `schema.SEARCHED`."""
        prompt, answer, calls, results, errors = (
            searchable("\n".join(texts)) for texts in (self.prompt, self.answer, self.calls, self.results, self.errors)
        )
        return prompt, answer, calls, results, errors


@dataclass(slots=True)
class EpisodeRow:
    """One episode: the values of `schema.EPISODE_COLUMNS` after `file`, of `TEXT_COLUMNS` after
    `id`, and of `SEARCHED`."""

    columns: tuple[Any, ...]
    texts: tuple[Any, ...]
    words: tuple[str, ...]


def read_rows(store: TraceStore, file: TraceFile) -> Iterator[EpisodeRow]:
    """Yield the episodes of a trace file. The trajectories of an episode lie side by side in it.

    Raises:
        TraceError: the file is cut, damaged or of another format.
    """
    texts = Texts()
    last: tuple[dict[str, Any], Means] | None = None
    for batch in _batches(store, file):
        light = batch.drop_columns(list(TOKENS))
        for row, means in zip(light.to_pylist(), _means(batch), strict=True):
            if last is not None and _episode(row) != _episode(last[0]):
                yield _finish(*last, texts)
                texts = Texts()
            _collect(row, texts)
            last = row, means
    if last is not None:
        yield _finish(*last, texts)


def _batches(store: TraceStore, file: TraceFile) -> Iterator[Any]:
    import pyarrow as pa

    if file.old:
        tables = [table for _, table in store.scan(READ, files=[file])]
        if not tables:
            raise TraceError(f"{file.path} holds lines that cannot be read", "restore it from a copy, or delete it")
        yield from tables[0].to_batches(max_chunksize=BATCH)
        return
    try:
        with file.open() as parquet:
            yield from parquet.iter_batches(batch_size=BATCH, columns=list(READ))
    except (OSError, KeyError, pa.ArrowException) as exc:
        raise TraceError(f"{file.path} is cut or damaged: {exc}", "restore it from a copy, or delete it") from exc


def message_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message; of its parts, those that are text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(str(part["text"]) for part in _dicts(content) if isinstance(part.get("text"), str))


def seconds_of(metrics: Mapping[str, float]) -> float | None:
    """Return how long an episode took: generation, tools, interaction and reward."""
    seconds = [metrics[name] for name in ("generate_s", "tool_s", "interaction_s", "reward_s") if name in metrics]
    return sum(seconds) if seconds else None


def cause_of(error: str | None) -> str:
    """Return what is equal for errors of one cause: the first line, numbers replaced by `#`."""
    first = (error or "").strip().partition("\n")[0]
    return _NUMBER.sub("#", first)[:LONGEST_CAUSE] or "no reason recorded"


def short(text: str | None, limit: int = SHOWN) -> str | None:
    """Return a text on one line of at most `limit` characters."""
    if text is None:
        return None
    line = _SPACE.sub(" ", text[: 4 * limit]).strip()
    line = line.encode("utf-8", "replace").decode()
    return line if len(line) <= limit and len(text) <= 4 * limit else line[: limit - 1] + "…"


def _episode(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["group_id"], row["sample_index"]


def _collect(row: Mapping[str, Any], texts: Texts) -> None:
    for message in _list(row["messages"]):
        texts.add_message(message)
    for turn in _list(row["turns"]):
        for call in _dicts(turn.get("malformed_calls")):
            texts.errors[str(call.get("reason"))] = None
    if row["error"]:
        texts.errors[row["error"]] = None
    for fault in _list(row["faults"]):
        texts.errors[f"{fault.get('source')} {fault.get('error')} {fault.get('where')}"] = None


def _finish(row: Mapping[str, Any], means: Means, texts: Texts) -> EpisodeRow:
    if missing := next((name for name in REQUIRED if row[name] is None), None):
        raise TraceError(f"it has a row without {missing}", "restore it from a copy, or delete it")
    metrics = {name: number for name, value in row["metrics"] or () if (number := finite(value)) is not None}
    oldest, version = row["min_version"], row["version"]
    unhealthy = row["status"] != "ok"
    columns = (
        row["step"], row["split"], version, row["row"], row["group_id"], row["sample_index"], row["part"], row["parts"],
        row["task_id"], row["agent_name"], row["data_source"], row["status"], row["stop_reason"],
        finite(row["reward"]), finite(row["outcome"]),
        None if oldest is None or version is None else version - oldest,
        row["turn_count"], row["tool_calls"], row["malformed_calls"], int(metrics.get("tool_errors", 0)),
        row["length"], row["prompt_length"], row["sampled"], *means, seconds_of(metrics),
        row["broken_rule"], cause_of(row["error"]) if unhealthy else None,
    )  # fmt: skip
    messages = _list(row["messages"])
    shown = (
        row["trace_id"],
        short(row["answer"]),
        short(row["error"], 4 * SHOWN),
        short(next((message_text(message) for message in messages if message.get("role") == "user"), None)),
        short(next((message_text(m) for m in reversed(messages) if m.get("role") == "assistant"), None)),
        orjson.dumps({name: finite(value) for name, value in row["reward_parts"] or ()}).decode(),
    )
    return EpisodeRow(tuple(map(_storable, columns)), tuple(map(_storable, shown)), texts.columns())


def _means(batch: Any) -> list[Means]:
    """Return the means over the sampled tokens of each trajectory."""
    single, double, trainer, advantages = (batch.column(name) for name in TOKENS)
    found: list[Means] = []
    for i in range(len(batch)):
        engine = _numbers(single[i] if single[i].is_valid else double[i])
        theirs = _numbers(trainer[i])
        difference = None
        if engine is not None and theirs is not None and engine.shape == theirs.shape:
            difference = np.abs(engine - theirs)
        found.append((_mean(difference), _mean(_numbers(advantages[i]))))
    return found


def _numbers(cell: Any) -> np.ndarray | None:
    from agentloop.trace import arrays

    return np.asarray(arrays.to_numpy(cell.values), np.float64) if cell.is_valid else None


def _mean(values: np.ndarray | None) -> float | None:
    known = values[np.isfinite(values)] if values is not None else np.empty(0)
    return float(known.mean()) if known.size else None


def _list(text: str | None) -> Sequence[dict[str, Any]]:
    """Return the objects of a JSON list; none of a text that is something else."""
    if not text or text == "[]":
        return []
    try:
        return _dicts(load(text))
    except ValueError:
        return []


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _plain(arguments: Any) -> str:
    if isinstance(arguments, dict):
        return " ".join(f"{name} {_plain(value)}" for name, value in arguments.items())
    if isinstance(arguments, list):
        return " ".join(map(_plain, arguments))
    return str(arguments)


def _storable(value: Any) -> Any:
    """Return a value that sqlite can hold: text without lone surrogates, 64-bit integers."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return float(value)
    return value
