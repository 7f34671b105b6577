"""Notices and warnings about a run's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agentloop.agent.base import AgentLoop
from agentloop.agent.single_turn import SingleTurnAgent
from agentloop.agent.tool_agent import ToolAgent
from agentloop.chat.proof.conversations import Abilities
from agentloop.chat.proof.proof import Difference, Proof, Verdict
from agentloop.config import AlgorithmConfig, Recipe
from agentloop.interaction.base import Interaction, Response
from agentloop.tool.base import Tool
from agentloop.types import StepReward, ToolResult
from tests.trainer.episodes import group, trajectory
from tools.calculator import Calculator
from trainer.run.notices import (
    algorithm_notices,
    algorithm_warnings,
    shared_gpus,
    signal_warnings,
    step_reward_sources,
    template_notices,
    unknown_best_metric,
)


def test_a_template_that_rewrites_turns_is_told_in_two_short_lines() -> None:
    turn = "<|im_start|>assistant\n"
    change = Difference(f"{turn}<think>\n{'the tool ' * 30}", f"{turn}{'the answer ' * 30}")
    (notice,) = template_notices(Proof(Verdict.KEPT, Abilities(*[True] * 8), differences=[change]))
    first, second = notice.splitlines()
    assert first.endswith("training keeps them as sampled")
    assert second == (
        "  for example 'sistant\\n<think>\\nthe tool the tool th' -> 'sistant\\nthe answer the answer the an' "
        "(more: `agentloop template`)"
    )
    assert all(len(line) <= 140 for line in (first, second))


def test_waiting_for_the_whole_batch_and_unwise_choices_are_reported() -> None:
    def said(**keys: Any) -> str:
        algorithm = AlgorithmConfig.model_validate(keys)
        return " ".join(algorithm_notices(algorithm) + algorithm_warnings(algorithm))

    assert said() == ""
    assert "whitened" in said(advantage="reinforce_pp") and "last group" in said(advantage="reinforce_pp")
    assert said(advantage="reinforce_pp", whiten=False) == ""
    assert "proximal" in said(minibatches=2, correction={"decoupled": True})
    assert "proximal" in said(minibatches=2, correction={"mask": "token"})
    assert said(correction={"decoupled": True}) == ""
    assert "expected gradient of 0" in said(kl_coef=0.1, kl_estimator="k1")
    assert "without end" in said(shaping={"wrong_reward": -1, "turn_bonus": 0.1, "turn_bonus_cap": None})


IGNORES = str(Path(__file__).parents[3] / "recipes/quickstart/reward.py:score")
"""A reward that does not read step rewards."""


def test_engine_and_trainer_on_one_gpu_are_reported() -> None:
    def said(**rollout: Any) -> str:
        return (
            shared_gpus(
                Recipe.model_validate(
                    {
                        "run": {"steps": 1},
                        "model": {"path": "m"},
                        "data": {"train": "x"},
                        "rollout": {"engine": "sglang", "device": "cuda", "replicas": 2} | rollout,
                        "trainer": {"device": "cuda", "ranks": 4},
                    }
                )
            )
            or ""
        )

    assert "set rollout.first_gpu=4, or rollout.colocated=true" in said()
    assert "GPUs 2 to 5" in said(first_gpu=2, gpus_per_replica=2)
    assert "share none" in said(first_gpu=4, colocated=True) and "GPUs 4 to 5" in said(first_gpu=4, colocated=True)
    assert said(first_gpu=4) == said(colocated=True) == said(device="cpu") == said(url="http://h:1") == ""


def test_rewards_that_teach_nothing_are_reported() -> None:
    def said(groups: list[Any], reward: str | None = IGNORES, **algorithm: Any) -> list[str]:
        recipe = Recipe.model_validate(
            {
                "run": {"steps": 1},
                "model": {"path": "m"},
                "data": {"train": "x"},
                "reward": reward,
                "trainer": {"algorithm": algorithm},
            }
        )
        return sorted(signal_warnings(recipe, 3, groups))

    def rewarded(*rewards: float, step: bool = False) -> Any:
        episodes = [[trajectory(reward)] for reward in rewards]
        if step:
            episodes[0][0].step_rewards = [StepReward("closer", 0.1, 2, 3)]
        return group(*episodes)

    assert said([rewarded(1, 0)]) == []
    assert said([rewarded(1, 1), rewarded(0, 0)]) == ["equal rewards"]
    assert said([rewarded(1, 1), rewarded(1, 0)]) == []
    assert said([rewarded(1, 1)], shaping={"wrong_reward": -1}) == []
    assert said([rewarded(1, 1)], advantage="reinforce_pp") == []
    assert said([rewarded(1, 0, step=True)]) == ["step rewards"]
    assert said([rewarded(1, 0, step=True)], reward=None) == []
    assert said([rewarded(1, 0, step=True)], reward="gsm8k") == []  # it adds them up
    assert said([rewarded(1, 0, step=True)], advantage="grpo_process") == []


def test_what_gives_step_rewards_is_found_in_its_code() -> None:
    class Adds(AgentLoop):
        async def run(self, episode: Any) -> None:
            self.judge(episode)

        def judge(self, episode: Any) -> None:
            episode.add_reward("closer", 0.1)

    class Gives(Tool):
        async def execute(self, state: Any, arguments: dict[str, Any], **_: Any) -> ToolResult:
            return ToolResult("x", reward=0.1)

    class Answers(Interaction):
        async def respond(self, state: Any, messages: Any) -> Response:
            return Response(reward=0.1, done=True)

    tool = Gives({}, {"function": {"name": "check"}})
    assert step_reward_sources([Adds, ToolAgent], {"check": tool, "calc": Calculator({}, {})}, {"user": Answers()}) == [
        "Adds",
        "check",
        "user",
    ]
    assert step_reward_sources([ToolAgent, SingleTurnAgent], {"calc": Calculator({}, {})}, {}) == []


def test_a_misspelt_best_metric_is_reported_when_it_should_have_had_a_value() -> None:
    def said(key: str, metrics: dict[str, Any], *, keep_best: int = 1, val: str | None = "v.jsonl") -> str:
        data = {"train": "t.jsonl", "val": val, "max_prompt_tokens": 64}
        checkpoint = {"best_metric": key, "keep_best": keep_best}
        recipe = Recipe.model_validate(
            {"run": {"steps": 1}, "model": {"path": "m"}, "data": data, "checkpoint": checkpoint}
        )
        return unknown_best_metric(recipe, {"step": 4, "reward/mean": 0.5, "note": "x", **metrics}) or ""

    evaluated = {"eval/reward_mean": 0.5, "eval/pass_at_4": 0.7}
    for metrics in ({}, evaluated):
        assert said("reward/mean", metrics) == said("eval/reward_mean", metrics) == ""
        assert "step 4 has no number 'reward/meen'" in said("reward/meen", metrics)
        assert "did you mean 'reward/mean'?" in said("reward/meen", metrics)
        assert "no number 'note'" in said("note", metrics)
        assert said("reward/meen", metrics, keep_best=0) == ""
        assert "without data.val" in said("eval/reward_mean", {}, val=None)
    assert said("eval/pass_at_8", {}) == ""  # not evaluated yet
    assert "did you mean 'eval/pass_at_4'?" in said("eval/pass_at_8", evaluated)
