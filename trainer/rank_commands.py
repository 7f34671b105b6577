"""Commands from the main process to the ranks: one dataclass each, and their form on the wire.

`WorkerGroup.ask` sends a command; `trainer.learner.process` decodes it, calls `run` on the rank's
learner and sends back what `run` returned. To add a command, add its class here: the wire form
follows from the types of its fields and of its answer.

Nothing here imports torch. `Learner` is named for the type checker only.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar, cast, get_args

import numpy as np
from pydantic import BeforeValidator, TypeAdapter

from agentloop.config import OptimConfig
from trainer.types import (
    Accumulated,
    LearnerSettings,
    LossSpec,
    Published,
    SaveStatus,
    TokenNumbers,
    TrainSample,
    ValueSample,
)

if TYPE_CHECKING:
    from trainer.learner.learner import Learner

R = TypeVar("R")
S = TypeVar("S", TrainSample, ValueSample)

# JSON writes NaN and infinities as null. They must reach the optimizer step, whose error names the
# cause, instead of failing here.
Numbers = dict[str, Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]]
"""Sums or metrics by name."""

PublishedLayout = list[tuple[str, str, list[int]]]
"""Name, dtype and shape of each published tensor, in the order of files and broadcasts."""


@dataclass(frozen=True)
class Start:
    """The first message to a rank: join the process group and load the model.

    Attributes:
        rank, ranks: number of this rank, and of all.
        store: file at which the ranks of one machine meet.
        meeting: host and port of rank 0's store, at which those of several machines meet.
    """

    settings: LearnerSettings
    rank: int
    ranks: int
    store: Path | None
    meeting: tuple[str, int] | None = None


OPEN_MEETING = {"command": "OpenMeeting"}
"""Sent to rank 0 before `Start` where ranks meet at a store: it opens that, and answers with host
and port."""


class Command(ABC, Generic[R]):
    """A command that all ranks run with the same arguments, and that each answers with an R.

    Fields can be sent as JSON: numbers, texts, paths, config models, dataclasses. So can R, except
    the arrays of `TokenNumbers` and `Accumulated`, which are sent as they are.
    """

    @abstractmethod
    def run(self, learner: Learner) -> R:
        """Run the command in a rank."""


class SampleCommand(ABC, Generic[S, R]):
    """A command over samples, divided over the ranks. Otherwise like `Command`."""

    @abstractmethod
    def run(self, learner: Learner, samples: Sequence[S]) -> R:
        """Run the command in a rank, on its share of the samples."""


# -- training --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accumulate(SampleCommand[TrainSample, Accumulated]):
    """Add the policy's gradient; see `WorkerGroup.accumulate`."""

    temperature: float
    loss: LossSpec
    keep_logprobs: bool = False
    forward_only: bool = False

    def run(self, learner: Learner, samples: Sequence[TrainSample]) -> Accumulated:
        kept: list[TokenNumbers] | None = [] if self.keep_logprobs else None
        sums = learner.accumulate(samples, self.temperature, self.loss, kept, forward_only=self.forward_only)
        return Accumulated(sums, in_sample_order(samples, kept or ()))


@dataclass(frozen=True)
class Step(Command[Numbers]):
    """Take an optimizer step of the policy."""

    normalizer: float

    def run(self, learner: Learner) -> Numbers:
        return learner.step(self.normalizer)


@dataclass(frozen=True)
class ResetOptimizer(Command[None]):
    """Start a new schedule at step 0, with empty moments."""

    optim: OptimConfig
    total_steps: int

    def run(self, learner: Learner) -> None:
        learner.reset_optimizer(self.optim, self.total_steps)


@dataclass(frozen=True)
class Logprobs(SampleCommand[TrainSample, TokenNumbers]):
    """Compute the logprobs of the trained tokens."""

    temperature: float
    of: Literal["policy", "reference"]

    def run(self, learner: Learner, samples: Sequence[TrainSample]) -> TokenNumbers:
        return learner.logprobs(samples, self.temperature, of=self.of)


@dataclass(frozen=True)
class Values(SampleCommand[TrainSample, TokenNumbers]):
    """Compute the critic's values at the trained tokens."""

    def run(self, learner: Learner, samples: Sequence[TrainSample]) -> TokenNumbers:
        return learner.values(samples)


@dataclass(frozen=True)
class AccumulateValues(SampleCommand[ValueSample, Numbers]):
    """Add the critic's gradient."""

    def run(self, learner: Learner, samples: Sequence[ValueSample]) -> Numbers:
        return learner.accumulate_values(samples)


@dataclass(frozen=True)
class StepCritic(Command[Numbers]):
    """Take an optimizer step of the critic."""

    normalizer: float

    def run(self, learner: Learner) -> Numbers:
        return learner.critic.step(self.normalizer)


# -- sharing a device with the engine --------------------------------------------------------------


@dataclass(frozen=True)
class MoveOut(Command[None]):
    """Move state from the device to host memory, and release the device's cached memory.

    Attributes:
        policy: the policy's parameters too; else only what publishing does not need.
    """

    policy: bool

    def run(self, learner: Learner) -> None:
        learner.move_out(policy=self.policy)


@dataclass(frozen=True)
class MoveIn(Command[None]):
    """Move all state back to the device."""

    def run(self, learner: Learner) -> None:
        learner.move_in()


# -- checkpoints -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Save(Command[SaveStatus]):
    """Start saving a checkpoint, and finish it if `wait`; see `WorkerGroup.save`."""

    folder: Path
    state: dict[str, Any]
    wait: bool
    files: dict[str, Path] = field(default_factory=dict)

    def run(self, learner: Learner) -> SaveStatus:
        files = {name: str(path) for name, path in self.files.items()}
        return SaveStatus(**learner.save(self.folder, self.state, files, wait=self.wait))


@dataclass(frozen=True)
class Saved(Command[SaveStatus]):
    """Report on the latest save; with `wait`, after it has ended."""

    wait: bool

    def run(self, learner: Learner) -> SaveStatus:
        return SaveStatus(**learner.saved(wait=self.wait))


@dataclass(frozen=True)
class Load(Command[None]):
    """Load a checkpoint."""

    folder: Path
    optimizer: bool

    def run(self, learner: Learner) -> None:
        learner.load(self.folder, optimizer=self.optimizer)


# -- weights ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PublishWeights(Command[Published]):
    """Publish the policy through one transport.

    Attributes:
        transport: name of a file in `trainer.learner.weights`.
        options: keyword arguments of that transport's `publish`, which checks them.
    """

    transport: str
    options: Mapping[str, Any]

    def run(self, learner: Learner) -> Published:
        return learner.publisher.publish(self.transport, self.options)


@dataclass(frozen=True)
class Layout(Command[PublishedLayout]):
    """Describe the published tensors."""

    def run(self, learner: Learner) -> PublishedLayout:
        return learner.publisher.tensors.layout


@dataclass(frozen=True)
class OpenGroup(Command[int]):
    """Open a store for a weight update group at `address`; return its port."""

    address: str

    def run(self, learner: Learner) -> int:
        return learner.publisher.broadcast.open_group(self.address)


@dataclass(frozen=True)
class JoinGroup(Command[str]):
    """Join the engines in a weight update group; return why that failed, or an empty string."""

    group: str
    world_size: int
    backend: Literal["nccl", "gloo"]

    def run(self, learner: Learner) -> str:
        return learner.publisher.broadcast.join_group(self.group, self.world_size, self.backend)


@dataclass(frozen=True)
class LeaveGroup(Command[None]):
    """Close a weight update group, if it is open."""

    group: str

    def run(self, learner: Learner) -> None:
        learner.publisher.broadcast.leave_group(self.group)


# -- on the wire -----------------------------------------------------------------------------------


def to_json(value: Start | Command[Any] | SampleCommand[Any, Any]) -> dict[str, Any]:
    """Encode a command: the name of its class, and its fields."""
    kind: Any = type(value)
    return {"command": kind.__name__, "fields": _adapter(kind).dump_python(value, mode="json")}


def start_from_json(body: dict[str, Any]) -> Start:
    """Decode the first message."""
    start: Start = _adapter(Start).validate_python(body["fields"])
    return start


def command_from_json(body: dict[str, Any]) -> Command[Any] | SampleCommand[Any, Any]:
    """Decode any later message."""
    known = {kind.__name__: kind for kind in (*Command.__subclasses__(), *SampleCommand.__subclasses__())}
    kind: Any = known[body["command"]]
    command: Command[Any] | SampleCommand[Any, Any] = _adapter(kind).validate_python(body["fields"])
    return command


def sample_type(command: SampleCommand[S, Any]) -> type[S]:
    """Return the class of the samples that a command takes: S of its base class."""
    kind: type[S] = _type_arguments(command)[0]
    return kind


def answer_to_message(answer: Any) -> tuple[Any, Sequence[np.ndarray]]:
    """Encode an answer as JSON body and arrays."""
    if isinstance(answer, Accumulated):
        return answer.sums, [answer.logprobs]
    return (None, answer) if isinstance(answer, TokenNumbers) else (answer, ())


def answer_from_message(command: Command[R] | SampleCommand[Any, R], body: Any, arrays: Sequence[np.ndarray]) -> R:
    """Decode the answer to `command`: R of its base class."""
    kind = _type_arguments(command)[-1]
    answer: Any
    if kind is Accumulated:
        answer = Accumulated(_adapter(Numbers).validate_python(body), *arrays)
    else:
        answer = TokenNumbers(*arrays) if kind is TokenNumbers else _adapter(kind).validate_python(body)
    return cast("R", answer)


def in_sample_order(samples: Sequence[TrainSample], numbers: Sequence[TokenNumbers]) -> np.ndarray:
    """Return the numbers of all trained tokens, sample after sample, float32; empty if there are
    none."""
    if not numbers:
        return np.zeros(0, dtype=np.float32)
    starts = np.cumsum([0] + [len(sample) for sample in samples])
    column = np.zeros(starts[-1], dtype=np.float32)
    for sample_index, token_index, part in numbers:
        column[starts[sample_index] + token_index] = part
    trained: np.ndarray = column[np.concatenate([sample.loss_mask for sample in samples])]
    return trained


def _type_arguments(command: Command[Any] | SampleCommand[Any, Any]) -> tuple[Any, ...]:
    (base,) = type(command).__orig_bases__  # type: ignore[union-attr]  # every generic class has it
    return get_args(base)


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
