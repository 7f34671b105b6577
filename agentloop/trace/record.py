"""One trajectory of one episode in one step of a run: what the store holds and exporters send."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from agentloop.types import Trajectory

if TYPE_CHECKING:
    import numpy as np

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = get_args(Split)


class RecordKey(NamedTuple):
    """The parts of `TraceRecord.key`."""

    split: str
    step: int
    group_id: str
    sample_index: int
    part: int

    def __str__(self) -> str:
        return f"{self.split}/{self.step}/{self.group_id}/{self.sample_index}/{self.part}"

    @classmethod
    def parse(cls, text: str) -> RecordKey:
        """Read a key; a group id may contain slashes.

        Raises:
            ValueError: it is not a key.
        """
        split, step, rest = text.split("/", 2)
        group_id, sample_index, part = rest.rsplit("/", 2)
        if split not in SPLITS:
            raise ValueError(f"{split!r} is neither train nor eval")
        return cls(split, int(step), group_id, int(sample_index), int(part))


@dataclass(slots=True)
class TraceRecord:
    """One trajectory, with what a run knows about it beside the trajectory itself.

    Attributes:
        split: `train` or `eval`.
        version: the policy version that is trained or evaluated. Tokens may be older
            (`trajectory.versions`).
        part: number among the trajectories of its episode, from 0; the last is the main one.
        parts: trajectories of the episode.
        advantages: (L) float32, 0 where the mask is 0; None: not trained.
        trainer_logprobs: (L) float32 under the trainer's weights before the update, NaN where the
            mask is 0; None: unknown.
        row: index of the dataset row, if known.
    """

    step: int
    split: str
    version: int
    part: int
    parts: int
    trajectory: Trajectory
    advantages: np.ndarray | None = None
    trainer_logprobs: np.ndarray | None = None
    row: int | None = None

    @property
    def key(self) -> str:
        """`train/12/<group_id>/<sample_index>/<part>`: stable, unique in a run."""
        t = self.trajectory
        return str(RecordKey(self.split, self.step, t.group_id, t.sample_index, self.part))

    @property
    def is_main(self) -> bool:
        """Whether it is its episode's last trajectory, which holds the answer and the spans."""
        return self.part == self.parts - 1
