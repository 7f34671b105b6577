"""Notices and warnings about a run: one line each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from agentloop.chat.proof.proof import Proof, Verdict
from agentloop.config import AlgorithmConfig, DataConfig, Recipe, TrainerConfig
from agentloop.config.algorithm import estimators_with
from agentloop.data import ValidatedRows
from trainer.rollouts.producer import Group
from trainer.run.episode_metrics import equal_groups


def row_notices(data: DataConfig, split: str, found: ValidatedRows) -> list[str]:
    """Report rows that are dropped, cut, or run by the default agent."""
    notices = []
    if found.without_agent:
        notices.append(f"data.{split}: {found.without_agent} rows name no agent; they run {data.default_agent}")

    rows = len(found.tasks) + found.dropped
    longer = f"their prompts are longer than data.max_prompt_tokens {data.max_prompt_tokens}"
    if found.dropped:
        notices.append(f"data.{split}: {found.dropped} of {rows} rows left out, {longer}")
    if found.cut:
        notices.append(f"data.{split}: {found.cut} of {rows} rows cut, {longer}")
    return notices


def template_notices(proof: Proof) -> list[str]:
    """Report limits of a chat template that is accepted."""
    notices = []
    if proof.verdict is Verdict.KEPT and proof.differences:
        first = proof.differences[0]
        notices.append(
            "the chat template rewrites earlier turns when a conversation continues; training keeps them as they were "
            f"sampled: {first.sampled!r} would become {first.rewritten!r} (`agentloop template` shows more)"
        )
    if "tool schemas" in proof.abilities.missing:
        notices.append(f"tool schemas: {proof.abilities.missing['tool schemas']}")
    return notices


def unused_settings(trainer: TrainerConfig) -> list[str]:
    """Report settings of the trainer that have no effect in this run."""
    notices = []
    if trainer.device == "cpu" and (trainer.fsdp.offload_policy or trainer.fsdp.offload_reference):
        notices.append("trainer.fsdp.offload_*: no effect with trainer.device cpu, where all state is in host memory")
    if trainer.fsdp.offload_reference and (trainer.lora is not None or not trainer.algorithm.kl_coef):
        notices.append("trainer.fsdp.offload_reference: no effect, this run keeps no separate reference model")
    return notices


def algorithm_notices(algorithm: AlgorithmConfig) -> list[str]:
    """Report if the chosen algorithm makes training wait."""
    reason = algorithm.needs_whole_batch
    return [] if reason is None else [f"training waits for the last group of a step: {reason}"]


def algorithm_warnings(algorithm: AlgorithmConfig) -> list[str]:
    """Report choices of the algorithm that are probably mistakes."""
    warnings = []
    if algorithm.kl_coef and algorithm.kl_in == "loss" and algorithm.kl_estimator == "k1":
        warnings.append(
            "trainer.algorithm.kl_estimator=k1 in the loss has an expected gradient of 0 on policy, so it does not "
            "regularize. Use k2, k3 or low_var_kl, or kl_in=reward"
        )
    if algorithm.shaping.turn_bonus and algorithm.shaping.turn_bonus_cap is None:
        warnings.append(
            "trainer.algorithm.shaping.turn_bonus without turn_bonus_cap: each turn makes a wrong answer cheaper, so a "
            "policy may learn to call tools without end. Set turn_bonus_cap (docs/algorithms.md)"
        )
    return warnings


def ignores_step_rewards(recipe: Recipe) -> bool:
    """Whether step rewards have no effect on training: only the reward's number is read."""
    needs = recipe.trainer.algorithm.needs
    return recipe.reward is not None and not (needs.step_rewards or needs.token_rewards)


def step_reward_text(recipe: Recipe, names: Iterable[str]) -> str:
    """Return the sentence on step rewards that have no effect."""
    advantage = recipe.trainer.algorithm.advantage
    others = f"{estimators_with('step_rewards')}, {estimators_with('token_rewards')}"
    return (
        f"step rewards ({', '.join(sorted(names))}) have no effect on training: with a `reward:`, "
        f"trainer.algorithm.advantage={advantage} reads only its number, and they are kept in reward_parts. "
        f"Use {others}, leave out `reward:`, or add them up in the reward function (trajectory.step_rewards)"
    )


def signal_warnings(recipe: Recipe, step: int, groups: Sequence[Group]) -> dict[str, str]:
    """Return warnings about rewards that teach nothing in a step, by kind."""
    warnings = {}
    algorithm = recipe.trainer.algorithm
    names = {reward.name for group in groups for t in group.trajectories for reward in t.step_rewards}
    if names and ignores_step_rewards(recipe):
        warnings["step rewards"] = step_reward_text(recipe, names)

    equal, compared = equal_groups(groups)
    if compared and equal == compared and algorithm.needs.group_baseline and not algorithm.shaping.chosen:
        warnings["equal rewards"] = (
            f"step {step} learns nothing: the rewards within each of its {compared} groups are equal, so every "
            "advantage is 0. If reward/zero_std_share (metrics.jsonl) stays at 1, the task is too hard or too easy, or "
            "the reward is wrong"
        )
    return warnings


def mismatch_warning(trainer: TrainerConfig, mismatch: float | None) -> str | None:
    """Report a step whose engine logprobs differ from the trainer's, unless a correction handles
    it.

    Args:
        mismatch: `mismatch/logprob_abs_mean` of the step; None: nothing was trained.
    """
    if mismatch is None or mismatch <= trainer.mismatch_warn or trainer.algorithm.correction.chosen:
        return None
    return (
        f"engine and trainer disagree: the mean |logprob difference| {mismatch:.3g} exceeds trainer.mismatch_warn "
        f"{trainer.mismatch_warn:g}, and no correction is on, so the loss treats the engine's probabilities as the "
        "trainer's. Check dtype, temperature and that the published weights arrived; if the difference is expected "
        "(low precision, max_staleness), set trainer.algorithm.correction: decoupled, importance, importance_cap, "
        "mask, veto (docs/algorithms.md)"
    )
