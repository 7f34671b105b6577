"""Commands to the ranks survive the socket, and errors come back by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from agentloop.config import OptimConfig, TrainerConfig
from agentloop.errors import AgentloopError, ModelError, WorkerError
from agentloop.faults import error_from_json, error_to_json
from trainer.channel import decode_header, encode
from trainer.rank_commands import (
    Accumulate,
    AccumulateValues,
    Command,
    JoinGroup,
    Layout,
    LeaveGroup,
    Load,
    Logprobs,
    MoveIn,
    MoveOut,
    OpenGroup,
    PublishWeights,
    ResetOptimizer,
    SampleCommand,
    Save,
    Saved,
    Start,
    Step,
    StepCritic,
    Values,
    answer_from_message,
    answer_to_message,
    command_from_json,
    sample_type,
    start_from_json,
    to_json,
)
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

FOLDER = Path("/a/folder")

ANSWERS: list[tuple[Command[Any] | SampleCommand[Any, Any], Any]] = [
    (
        Accumulate(0.5, LossSpec(kind="pg", veto=0.1), keep_logprobs=True),
        Accumulated({"loss_sum": 0.1, "tokens": 3.0}, np.array([-0.5, -2], np.float32)),
    ),
    (Step(12.0), {"lr": 1e-6, "grad_norm": 0.25}),
    (ResetOptimizer(OptimConfig(lr=3e-4, betas=(0.8, 0.9)), 7), None),
    (Logprobs(1.0, "reference"), TokenNumbers(np.array([0, 1]), np.array([3, 4]), np.array([-1, -2], np.float32))),
    (Values(), TokenNumbers(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))),
    (AccumulateValues(), {"value_loss_sum": 1.0}),
    (StepCritic(1.0), {"lr": 1e-5, "grad_norm": 1.0}),
    (Save(FOLDER, {"step": 3}, True, {"groups.parquet": FOLDER / "groups"}), SaveStatus(True, "")),
    (Saved(False), SaveStatus(False, "no room")),
    (Load(FOLDER, False), None),
    (PublishWeights("disk", {"folder": "/a/folder"}), Published("xxh3:00")),
    (MoveOut(True), None),
    (MoveIn(), None),
    (Layout(), [("a", "float32", [2, 3])]),
    (OpenGroup("127.0.0.1"), 4711),
    (JoinGroup("g", 3, "gloo"), "no answer"),
    (LeaveGroup("g"), None),
]


def over_the_socket(body: Any, arrays: Any = ()) -> tuple[Any, list[np.ndarray]]:
    header, *buffers = encode(body, arrays)
    decoded, described = decode_header(header[4:])
    pairs = zip(buffers, described, strict=True)
    return decoded, [np.frombuffer(data, dtype).reshape(shape) for data, (dtype, shape) in pairs]


@pytest.mark.parametrize(("command", "answer"), ANSWERS, ids=lambda value: type(value).__name__)
def test_a_command_and_its_answer_survive_the_socket(command: Any, answer: Any) -> None:
    body, _ = over_the_socket(to_json(command))
    assert command_from_json(body) == command
    received = answer_from_message(command, *over_the_socket(*answer_to_message(answer)))
    if isinstance(answer, Accumulated):
        assert received.sums == answer.sums and np.array_equal(received.logprobs, answer.logprobs)
    elif isinstance(answer, TokenNumbers):
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(answer, received, strict=True))
    else:
        assert received == answer and type(received) is type(answer)


def test_numbers_that_json_cannot_write_arrive_as_nan() -> None:
    sent = {"loss_sum": math.nan, "grad_norm": math.inf, "tokens": 3.0}
    none = np.zeros(0, dtype=np.float32)
    answer = answer_from_message(Accumulate(1.0, LossSpec()), *over_the_socket(sent, [none])).sums
    assert answer["tokens"] == 3.0 and math.isnan(answer["loss_sum"]) and math.isnan(answer["grad_norm"])


def test_every_command_is_tried_here() -> None:
    known = {*Command.__subclasses__(), *SampleCommand.__subclasses__()}
    assert {type(command) for command, _ in ANSWERS} == {kind for kind in known if kind.__module__ != __name__}


def test_the_first_message_survives_the_socket() -> None:
    config = TrainerConfig.model_validate({"ranks": 2, "algorithm": {"advantage": "gae"}, "critic": {}, "lora": {}})
    start = Start(LearnerSettings("m", config, "bfloat16", 10, 3, reference=True), 1, 2, FOLDER)
    assert start_from_json(orjson.loads(orjson.dumps(to_json(start)))) == start


def test_a_command_names_its_samples() -> None:
    assert sample_type(Values()) is TrainSample and sample_type(AccumulateValues()) is ValueSample


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (ModelError("no such model", "give another"), ModelError, "no such model\n  fix: give another"),
        (KeyError("x"), WorkerError, "rank failed: KeyError: 'x'"),
    ],
)
def test_errors_come_back_by_name(raised: Exception, kind: type[AgentloopError], text: str) -> None:
    body, _ = over_the_socket(error_to_json(raised))
    error = error_from_json(body, lambda message: WorkerError(f"rank failed: {message}"))
    assert type(error) is kind and str(error) == text


def test_a_name_that_is_not_an_error_of_ours_does_not_become_one() -> None:
    described = {"error": "StrEnum", "message": "m", "hint": None}
    assert type(error_from_json(described, WorkerError)) is WorkerError
