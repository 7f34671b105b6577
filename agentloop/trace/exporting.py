"""What a destination of spans gets and how it is loaded: the protocol `SpanExporter`.

An exporter is a class registered in the entry-point group `agentloop.traces` and called as
`Exporter(config, run)`. Built in are `otlp` and `weave`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from agentloop.config import Recipe, SpanSampling, TraceConfig
from agentloop.errors import ConfigError
from agentloop.registry import TRACES, load
from agentloop.text import counted
from agentloop.trace.record import TraceRecord
from agentloop.types import Span, Trajectory


@dataclass(frozen=True, slots=True)
class ExportRun:
    """The run whose episodes are exported.

    Attributes:
        name: `run.name`.
        folder: the run directory.
        model: `model.path`, the name of the policy.
        rollout_n: episodes of a group in training.
        eval_n: episodes of a row in an evaluation.
    """

    name: str
    folder: Path
    model: str = ""
    rollout_n: int = 1
    eval_n: int = 1

    @classmethod
    def of(cls, recipe: Recipe, folder: Path) -> ExportRun:
        """Return the run of a recipe that begins in a run directory."""
        return cls(recipe.run.name, folder, recipe.model.path, recipe.rollout.group_size, recipe.eval.n)


TRACE_ID = re.compile(r"[0-9a-f]{32}")


def is_trace_id(value: object) -> bool:
    """Whether a value is 32 hexadecimal digits, not all zero, as OpenTelemetry wants them."""
    return isinstance(value, str) and TRACE_ID.fullmatch(value) is not None and value.strip("0") != ""


@dataclass(frozen=True, slots=True)
class TracedEpisode:
    """One episode of a step: its trajectories in order, the main one last.

    Attributes:
        records: at least one; all of one episode.
    """

    run: ExportRun
    records: tuple[TraceRecord, ...]

    @property
    def main(self) -> TraceRecord:
        """The record with the answer and the spans."""
        return self.records[-1]

    @property
    def spans(self) -> list[Span]:
        """Empty for episodes of older versions; else the first is `episode`."""
        return self.main.trajectory.spans

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits, equal whenever this episode is read again."""
        given = self.main.trajectory.trace_id
        return given if is_trace_id(given) else _digest(self.main)

    @property
    def key(self) -> str:
        """`train/12/<group_id>/<sample_index>`: names the episode in its run."""
        return self.main.key.rsplit("/", 1)[0]

    @property
    def content(self) -> str:
        """Key, tokens and rewards of the episode as 32 hexadecimal digits.

        Equal for an episode that a resumed run sampled again, to the bit, with another trace id.
        """
        digest = hashlib.blake2b(self.key.encode("utf-8", "replace"), digest_size=16)
        for record in self.records:
            trajectory = record.trajectory
            digest.update(f"{len(trajectory)} {trajectory.reward} {trajectory.status} ".encode("utf-8", "replace"))
            digest.update(np.asarray(trajectory.token_ids, dtype=np.int32).tobytes())
        return digest.hexdigest()

    def attributes(self) -> dict[str, str | int | bool]:
        """Return what is known of the episode since the end of its step, as spans show it."""
        record, trajectory = self.main, self.main.trajectory
        return {
            "step": record.step,
            "version": record.version,
            "sample_index": trajectory.sample_index,
            "rollout_n": self.run.rollout_n if record.split == "train" else self.run.eval_n,
            "group_id": trajectory.group_id,
            "validate": record.split == "eval",
            "experiment_name": self.run.name,
            "agent_name": trajectory.agent_name,
            "task_id": trajectory.task_id,
            "status": trajectory.status.value,
        }


class SpanExporter(Protocol):
    """A destination of spans: `Exporter(config, run)`, with its section of `trace` and `ExportRun`.

    The constructor must not use the network, and raises `ConfigError` if the exporter cannot work.
    A run calls it twice: in its main process, to check the recipe, and in its sender process, where
    one thread calls `export`. `agentloop trace push` calls both in its own process.

    Attributes:
        library: optional, of the class; the module that it needs, checked before the run starts.
        extra: optional, of the class; the extra of this package that installs it.
        destination: names the receiver in the record of what was sent where: address or project,
            without secrets. Episodes sent to another one are sent again.
    """

    destination: str

    def export(self, episodes: Sequence[TracedEpisode]) -> None:
        """Send episodes, and return once the receiver has confirmed them.

        Sending an episode again must not make a second one there: derive ids from
        `TracedEpisode.trace_id` and `Span.span_id`.

        Raises:
            ExportError: not all of them arrived. They are sent again later; if `final`, once alone,
                and not again by this run. Other exceptions are taken as final.
            ConfigError: the environment lacks something.
        """
        ...

    def close(self, timeout_s: float) -> None:
        """Release what it holds. `export` may be running in another thread: end it early."""
        ...


def episodes_of(run: ExportRun, records: Iterable[TraceRecord]) -> Iterator[TracedEpisode]:
    """Yield the episodes of records, in which each episode's are adjacent and in order."""
    for _, group in itertools.groupby(records, lambda record: record.key.rsplit("/", 1)[0]):
        yield TracedEpisode(run, tuple(group))


def chosen_groups(split: str, step: int, groups: Iterable[str], sampling: SpanSampling) -> set[str]:
    """Return those of a step's groups that `sampling` chooses.

    The choice depends on split, step and group id alone, so that it can be made again.
    """
    drawn = sorted((_draw(f"{split}/{step}/{group}"), group) for group in set(groups))
    within = [group for number, group in drawn if number < sampling.sample_rate]
    return set(within[: sampling.max_groups_per_step])


@dataclass(frozen=True, slots=True)
class Destination:
    """An exporter and its section of the recipe.

    Attributes:
        name: as `agentloop trace push --to` takes it.
    """

    name: str
    exporter: SpanExporter
    sampling: SpanSampling


def sampled_text(sampling: SpanSampling) -> str:
    """Return what of a step is sent, as an appendix to a sentence; empty: all."""
    parts = [f"{sampling.sample_rate:.3g} of the groups"] if sampling.sample_rate < 1 else []
    if sampling.max_groups_per_step is not None:
        parts.append(f"at most {counted(sampling.max_groups_per_step, 'group')} of a step")
    return f" ({', '.join(parts)})" if parts else ""


def load_destinations(config: TraceConfig, run: ExportRun, only: str | None = None) -> list[Destination]:
    """Construct the exporters that `trace` names. Uses no network.

    Args:
        only: the one with this name, if it is there.

    Raises:
        RegistryError: an exporter is not registered.
        ConfigError: its library is not installed, or its options are wrong.
    """
    sections: list[tuple[str, SpanSampling]] = []
    if config.otlp is not None:
        sections.append(("otlp", config.otlp))
    if config.weave is not None:
        sections.append(("weave", config.weave))
    sections += [(section.name, section) for section in config.exporters]
    return [
        Destination(name, load_exporter(name)(section, run), section)
        for name, section in sections
        if only in (None, name)
    ]


def load_exporter(name: str) -> Callable[[Any, ExportRun], SpanExporter]:
    """Return the class of an exporter whose library is installed.

    Raises:
        RegistryError: no such exporter is registered.
        ConfigError: its library is not installed.
    """
    factory: Callable[[Any, ExportRun], SpanExporter] = load(TRACES, name)
    library = getattr(factory, "library", None)
    if library is not None and not _installed(library):
        extra = getattr(factory, "extra", None)
        raise ConfigError(
            f"trace.{name} needs the library {library!r}, which is not installed",
            f"pip install 'agentloop-rl[{extra}]'" if extra else f"pip install {library}",
        )
    return factory


def _installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:  # of `a.b`: there is no `a`
        return False


def _draw(name: str) -> float:
    """Return a number in [0, 1) that depends on the name only."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()) / 2**64


def _digest(record: TraceRecord) -> str:
    """Return an id for an episode of a version without trace ids."""
    trajectory: Trajectory = record.trajectory
    text = json.dumps([record.key, [turn.request_id for turn in trajectory.turns], list(trajectory.token_ids)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
