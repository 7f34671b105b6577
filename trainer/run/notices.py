"""Notices and warnings about a run: one line each, two at most."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from agentloop.chat.proof.proof import Difference, Proof, Verdict
from agentloop.config import AlgorithmConfig, DataConfig, Recipe, TrainerConfig
from agentloop.config.algorithm import estimators_with
from agentloop.data import ValidatedRows
from agentloop.errors import DataError
from agentloop.reward.checks import mentions
from agentloop.reward.loading import reads_step_rewards
from agentloop.text import counted, did_you_mean
from agentloop.types import Task
from trainer.rollouts.producer import Group
from trainer.run.episode_metrics import equal_groups

SHOWN_BEFORE, SHOWN_AFTER = 8, 28
"""Characters of a rewritten turn that a notice shows, before and after the first difference."""


READ_OF_EXTRA_INFO = frozenset({"tools_kwargs", "interaction_kwargs", "need_tools_kwargs"})
"""Keys of `extra_info` that mean something; all others are a user's own."""


@functools.lru_cache(1024)  # rows have the same keys
def _meant(key: str) -> str | None:
    """Return which key of `extra_info` another is meant to be, if it differs by a letter or two."""
    near = difflib.get_close_matches(key, READ_OF_EXTRA_INFO, n=1, cutoff=0.85)
    return near[0] if near else None


def row_notices(data: DataConfig, split: str, found: ValidatedRows) -> list[str]:
    """Report rows that are dropped, cut, or run by the default agent."""
    notices = []
    if found.without_agent:
        notices.append(f"data.{split}: {found.without_agent} rows name no agent; they run {data.default_agent}")

    rows = len(found.tasks) + found.dropped
    longer = f"their prompts are longer than {found.limit.name}"
    if found.dropped:
        notices.append(f"data.{split}: {found.dropped} of {rows} rows left out, {longer}")
    if found.cut:
        notices.append(f"data.{split}: {found.cut} of {rows} rows cut, {longer}")
    return notices


def unused_agents(recipe: Recipe, found: Iterable[ValidatedRows]) -> list[str]:
    """Return a warning for each agent of a recipe that no row runs, with where to change that."""
    splits = list(found)
    names = sorted(set().union(*(split.agents for split in splits)))
    named = any(split.without_agent < len(split.tasks) + split.dropped for split in splits)
    warnings = []
    for name in recipe.agents:
        if name in names:
            continue
        fix = f"set data.default_agent: {name}"
        if named:
            fix = f"a row's agent_name wins over data.default_agent, so write the rows with agent_name: {name}"
            fix += ", or without that column" if name == recipe.data.default_agent else ""
        warnings.append(f"agents.{name}: rows run {', '.join(names)}, so these limits are not used; {fix}")
    return warnings


def unreadable_text(split: str, found: ValidatedRows) -> str | None:
    """Return a warning about rows with an image that cannot be read; None if there are none."""
    first = found.first_unreadable
    if first is None:
        return None
    rows, key = len(found.tasks) + found.dropped, f"data.{split}: "
    return (
        f"{key}{found.unreadable} of {rows} rows have an image that cannot be read; their episodes fail, and are "
        f"masked. The first: {first.message.removeprefix(key)}\n  fix: {first.hint}"
    )


def unknown_best_metric(recipe: Recipe, metrics: Mapping[str, object]) -> str | None:
    """Return a warning if no checkpoint can be a best one, because `best_metric` names no metric.

    Args:
        metrics: of the first step, or of the first step with an evaluation.
    """
    key = recipe.checkpoint.best_metric
    if not recipe.checkpoint.keep_best or isinstance(metrics.get(key), int | float):
        return None
    if key.startswith("eval/"):
        if recipe.data.val is None:
            return f"checkpoint.best_metric is {key}, and without data.val nothing is evaluated: no best one is kept"
        if "eval/reward_mean" not in metrics:
            return None  # not evaluated yet
    elif "reward/mean" not in metrics:
        return None  # not a training step: an evaluation before the first
    numbers = [name for name, value in metrics.items() if isinstance(value, int | float)]
    fix = did_you_mean(key, numbers, "the keys are those of metrics.jsonl")
    return f"checkpoint.best_metric: step {metrics['step']} has no number {key!r}, so no best one is kept; {fix}"


@dataclass
class RowCounts:
    """Counts of what a split's rows lack or have in vain.

    Args:
        key: the config key of the split.
    """

    key: str
    rows: int = 0
    without_truth: int = 0
    first_without_truth: str = ""
    with_tool_kwargs: int = 0
    misspelt: dict[str, int] = field(default_factory=dict)

    def count(self, task: Task, where: str) -> None:
        """Count one row; `where` names it."""
        self.rows += 1
        self.with_tool_kwargs += bool(task.extra_info.get("tools_kwargs"))
        for key in task.extra_info.keys() - READ_OF_EXTRA_INFO:
            if _meant(key):
                self.misspelt[key] = self.misspelt.get(key, 0) + 1
        if task.ground_truth is None:
            self.without_truth += 1
            self.first_without_truth = self.first_without_truth or where

    def require_truth(self, reward: str) -> None:
        """Refuse a split without any ground truth for a reward that reads it.

        Raises:
            DataError: no row has one.
        """
        if self.rows and self.without_truth == self.rows:
            raise DataError(
                f"{self.first_without_truth}, and every other row, has no reward_model.ground_truth, which the reward "
                f"{reward} reads",
                "add reward_model: {ground_truth: ...} to the rows; an empty text if the reward can do without",
            )

    def warnings(self, *, needs_truth: bool, tools: bool) -> list[str]:
        """Return a sentence for each count that is probably a mistake."""
        found = []
        if needs_truth and self.without_truth:
            found.append(
                f"{self.key}: {self.without_truth} of {self.rows} rows have no reward_model.ground_truth, which the "
                f"reward reads; the first is {self.first_without_truth.removeprefix(f'{self.key}: ')}"
            )
        if self.with_tool_kwargs and not tools:
            found.append(
                f"{self.key}: {counted(self.with_tool_kwargs, 'row')} with extra_info.tools_kwargs, "
                "but the run has no tools"
            )
        for key, count in self.misspelt.items():
            found.append(
                f"{self.key}: {counted(count, 'row')} with extra_info.{key}, which nothing but your own code reads: "
                f"did you mean {_meant(key)!r}?"
            )
        return found


def small_data_text(rows: int, batch: int) -> str:
    """Return the sentence on a batch that is larger than the data."""
    least, more = divmod(batch, rows)
    times = f"{least} or {least + 1} times" if more else f"{least} times"
    return (
        f"rollout.batch_size {batch} is more than the {rows} rows of data.train: each row is in a step {times}, in "
        "separate groups. Lower rollout.batch_size, or add rows"
    )


def template_notices(proof: Proof) -> list[str]:
    """Report limits of a chat template that is accepted."""
    notices = []
    if proof.verdict is Verdict.KEPT and proof.differences:
        first = proof.differences[0]
        notices.append(
            "the chat template rewrites earlier turns when a conversation continues; training keeps them as sampled\n"
            f"  for example {_change(first)} (more: `agentloop template`)"
        )
    if "tool schemas" in proof.abilities.missing:
        notices.append(f"tool schemas: {proof.abilities.missing['tool schemas']}")
    return notices


def _change(difference: Difference) -> str:
    """Return the first change that a template makes: `'<think>\\nthe' -> 'the tool'`."""
    sampled, rewritten = difference.sampled, difference.rewritten
    pairs = zip(sampled, rewritten, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(sampled), len(rewritten)))
    begin = max(0, at - SHOWN_BEFORE)
    return " -> ".join(repr(text[begin : at + SHOWN_AFTER]) for text in (sampled, rewritten))


def unused_settings(trainer: TrainerConfig) -> list[str]:
    """Report settings of the trainer that have no effect in this run."""
    notices = []
    if trainer.device == "cpu" and (trainer.fsdp.offload_policy or trainer.fsdp.offload_reference):
        notices.append("trainer.fsdp.offload_*: no effect with trainer.device cpu, where all state is in host memory")
    if trainer.fsdp.offload_reference and (trainer.lora is not None or not trainer.algorithm.kl_coef):
        notices.append("trainer.fsdp.offload_reference: no effect, this run keeps no separate reference model")
    return notices


def shared_gpus(recipe: Recipe) -> str | None:
    """Return a warning if engine and trainer share a GPU without `rollout.colocated`, or take turns
    without sharing one."""
    rollout, trainer = recipe.rollout, recipe.trainer
    if rollout.url is not None or trainer.device != "cuda" or rollout.device != "cuda":
        return None
    if recipe.cluster.kind == "ray":  # which gives each its own
        return None
    per_replica = rollout.gpus_per_replica if rollout.engine == "sglang" else 1
    last = rollout.first_gpu + rollout.replicas * per_replica - 1
    if rollout.first_gpu >= trainer.ranks:
        if not rollout.colocated:
            return None
        return (
            f"engine (GPUs {rollout.first_gpu} to {last}) and trainer (GPUs 0 to {trainer.ranks - 1}) share none, and "
            "wait for each other all the same: set rollout.colocated=false, or rollout.first_gpu=0"
        )
    if rollout.colocated:
        return None
    return (
        f"engine (GPUs {rollout.first_gpu} to {last}) and trainer (GPUs 0 to {trainer.ranks - 1}) are both on GPU "
        f"{rollout.first_gpu}: set rollout.first_gpu={trainer.ranks}, or rollout.colocated=true to take turns"
    )


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
    """Whether step rewards have no effect on training: only the reward's number is read, and the
    reward function does not seem to read them."""
    needs = recipe.trainer.algorithm.needs
    if recipe.reward is None or needs.step_rewards or needs.token_rewards:
        return False
    return not reads_step_rewards(recipe.reward)


def step_reward_text(recipe: Recipe, names: Iterable[str]) -> str:
    """Return the sentence on step rewards that have no effect."""
    advantage = recipe.trainer.algorithm.advantage
    others = f"{estimators_with('step_rewards')}, {estimators_with('token_rewards')}"
    return (
        f"step rewards ({', '.join(sorted(names))}) have no effect on training: with a `reward:`, "
        f"trainer.algorithm.advantage={advantage} reads only its number, and they are kept in reward_parts. "
        f"Use {others}, leave out `reward:`, or add them up in the reward function (trajectory.step_rewards)"
    )


def step_reward_sources(
    agents: Iterable[type], tools: Mapping[str, object], interactions: Mapping[str, object]
) -> list[str]:
    """Return what seems to give step rewards by its code: `add_reward`, or an argument `reward`."""
    found = [kind.__name__ for kind in agents if _methods_mention(kind, "add_reward")]
    for name, instance in (*tools.items(), *interactions.items()):
        if _methods_mention(type(instance), "reward"):
            found.append(name)
    return found


def _methods_mention(kind: type, name: str) -> bool:
    own = [base for base in kind.__mro__ if base.__module__.partition(".")[0] != "agentloop"]
    return any(mentions(method, name) for base in own for method in vars(base).values() if inspect.isfunction(method))


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
