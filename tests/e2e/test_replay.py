"""Every token of a traced trajectory is accounted for: the recorded ids, replayed, give the recorded logprobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentloop.episode.law import check_trajectory
from agentloop.types import Trajectory

from .conftest import Run

TOLERANCE = 1e-4


def logprobs_of(model_path: Path, token_ids: list[int]) -> Any:
    """(L - 1,) log p(token i + 1 | tokens 0..i), from a plain forward of transformers in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]


@pytest.fixture
def traced(finished: Run) -> list[Trajectory]:
    """Trajectories of a first step, sampled by version 0: the model as it is in the recipe's folder."""
    return [Trajectory.from_json(line) for line in finished.trace(1)]


def test_a_trace_replays_turn_by_turn(traced: list[Trajectory], quickstart_model: Path) -> None:
    replayed_turns = 0
    for trajectory in traced:
        check_trajectory(trajectory)
        replayed = logprobs_of(quickstart_model, trajectory.token_ids)
        for turn in trajectory.turns:
            for position in range(turn.start, turn.end):
                assert trajectory.versions[position] == 0
                recorded = trajectory.logprobs[position]
                assert recorded == pytest.approx(float(replayed[position - 1]), abs=TOLERANCE)
            replayed_turns += 1
        sampled = sum(turn.end - turn.start for turn in trajectory.turns)
        observed = sum(1 for logprob in trajectory.logprobs if logprob is None)
        assert sampled + observed == len(trajectory)
    assert replayed_turns > len(traced), "some episodes have a second turn"


async def test_a_mask_shifted_by_one_token_shows_as_mismatch(
    traced: list[Trajectory], quickstart_model: Path, tmp_path: Path
) -> None:
    import numpy as np

    from agentloop.config import AlgorithmConfig, TrainerConfig
    from agentloop.types import Task
    from trainer.rollouts.producer import Group
    from trainer.rollouts.samples import collect, set_advantages
    from trainer.workers.group import WorkerGroup

    groups = [collect(Group(index, Task("0", "a", []), [[trajectory]])) for index, trajectory in enumerate(traced)]
    for group in groups:
        set_advantages(group, AlgorithmConfig(advantage="grpo"))
    samples = [sample for group in groups for sample in group.samples]
    workers = await WorkerGroup.start(
        model_path=str(quickstart_model),
        config=TrainerConfig(),
        dtype="float32",
        total_steps=1,
        seed=0,
        log_dir=tmp_path,
    )
    try:
        sums = await workers.accumulate(samples, temperature=1.0)
        assert sums["logprob_abs_sum"] / sums["tokens"] <= 1e-5
        for sample in samples:
            # One position to the left, still after the prompt: every token is held to its neighbour's logprob.
            sample.old_logprobs = np.roll(sample.old_logprobs, -1)
            sample.loss_mask = np.roll(sample.loss_mask, -1)
            sample.loss_mask[: sample.prompt_length] = False
        shifted = await workers.accumulate(samples, temperature=1.0)
        assert shifted["logprob_abs_sum"] / shifted["tokens"] > 0.1
    finally:
        await workers.close()
