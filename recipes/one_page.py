"""GRPO on one page: a small model learns to call a calculator, with agentloop's parts and no run.

    python recipes/one_page.py                      # 60 steps, some minutes on two cores
    python recipes/one_page.py --steps 3 --prompts 8

Read it from top to bottom. It is `agentloop train` reduced to the algorithm: rows, agent loops, a
rollout server, advantages, FSDP ranks, published weights. It also shows how to use the framework
from Python: every import is one that your own program would use.

Left out, and done by `agentloop train` (trainer/run):

- rollout and training overlap: groups are trained while later ones are still sampled;
- evaluation, traces, checkpoints and resume, loggers, the report;
- supervision: here a dead server ends the program; there it is restarted at the served version.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agentloop import AgentLoop, ChatRenderer, EpisodeStatus, GenerateClient, StopReason, Task, Trajectory
from agentloop.agent.runner import EpisodeRunner
from agentloop.chat import load_tokenizer
from agentloop.config import (
    AgentConfig,
    AlgorithmConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
    TrainerConfig,
)
from agentloop.data import RowOrder, load_tasks
from agentloop.episode.episode import Episode
from agentloop.reward.loading import close_reward, load_reward
from agentloop.tool.loading import load_toolset
from agentloop.trace import trace_headers
from trainer.algorithms import advantage
from trainer.publishing.disk import DiskPublisher
from trainer.publishing.server_link import ServerLink
from trainer.publishing.server_process import ServerProcess
from trainer.types import TrainSample, add_sums
from trainer.workers.group import WorkerGroup

TASK = Path(__file__).parent / "quickstart"

# -- what to train, and how ------------------------------------------------------------------------

MODEL = ModelConfig(path=str(TASK / "model"))
SAMPLING = SamplingConfig(temperature=1.0, max_new_tokens=48)
LIMITS = AgentConfig(max_assistant_turns=2, max_response_tokens=128)
ROLLOUT = RolloutConfig(max_running=64)
GROUP_SIZE = 8
MINIBATCHES = 2
AGENT = "tool_agent"  # the `agent_name` in the rows; here it runs the loop below


def trainer_config() -> TrainerConfig:
    """One rank; the clipped policy-gradient loss of PPO, on advantages of GRPO."""
    return TrainerConfig(
        ranks=1,
        algorithm=AlgorithmConfig(advantage="grpo", loss="ppo_clip", clip_ratio_low=0.2, clip_ratio_high=0.2),
        optim=OptimConfig(lr=2e-4, lr_end=0.0, schedule="linear", warmup_steps=10, grad_clip=1.0),
        tokens_per_micro_batch=4096,
    )


# -- the agent -------------------------------------------------------------------------------------


class CalculatorAgent(AgentLoop):
    """Generate; if the model called a tool, show it the result and let it answer.

    A loop sees messages. The episode owns the tokens: it renders only new messages, and sampled
    tokens stay unchanged.
    """

    async def run(self, episode: Episode) -> None:
        while True:
            turn = await episode.generate()
            if not turn.tool_calls or turn.stop_reason is not StopReason.STOP:
                return
            await episode.call_tools(turn.tool_calls)


# -- the processes ---------------------------------------------------------------------------------


@dataclass
class Parts:
    """The parts of a step: an episode runner, the trainer's ranks, a publisher between them."""

    runner: EpisodeRunner
    workers: WorkerGroup
    publisher: DiskPublisher


@contextlib.asynccontextmanager
async def start(folder: Path, steps: int, seed: int) -> AsyncIterator[Parts]:
    """Start the rollout server and the trainer; stop both at the end, whatever happens."""
    weights = folder / "weights"
    weights.mkdir(parents=True)
    toolset = load_toolset(TASK / "tools.yaml")
    reward = load_reward(RewardConfig(function=f"{TASK}/reward.py:score"))

    server = ServerProcess(
        model_path=MODEL.path,
        model=MODEL,
        rollout=ROLLOUT,
        seed=seed,
        log_file=folder / "server.log",
        weights_roots=[weights],
        on_restart=print,
    )
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(close_reward, reward)
        stack.callback(toolset.close)

        stack.push_async_callback(server.stop)
        url = await server.start(0, None)

        workers = await WorkerGroup.start(
            model_path=MODEL.path,
            config=trainer_config(),
            dtype=MODEL.dtype,
            total_steps=steps * MINIBATCHES,
            seed=seed,
            log_dir=folder,
        )
        stack.push_async_callback(workers.close)

        link = ServerLink(url, running="retract", token=server.token, timeout_s=60)
        stack.push_async_callback(link.close)
        publisher = DiskPublisher(workers, link, weights, server.serves)
        stack.push_async_callback(publisher.close)

        client = await stack.enter_async_context(GenerateClient(url, token=server.token, context_headers=trace_headers))
        context_length = await client.context_length()
        assert context_length is not None, "our own server reports it"
        runner = EpisodeRunner(
            renderer=ChatRenderer(load_tokenizer(MODEL.path)),
            generator=client,
            agents={AGENT: CalculatorAgent},
            limits={AGENT: LIMITS},
            toolset=toolset,
            reward=reward,
            context_length=context_length,
        )
        yield Parts(runner, workers, publisher)


# -- one step --------------------------------------------------------------------------------------


async def sample_group(runner: EpisodeRunner, task: Task, index: int, seed: int) -> list[Trajectory]:
    """Sample a prompt GROUP_SIZE times; return the episodes that may be trained.

    An episode whose infrastructure failed is left out. It says nothing about the policy, so it is
    not given the reward 0.

    Raises:
        RuntimeError: all of them failed.
    """
    episodes = await asyncio.gather(
        *(
            runner.run(
                task,
                group_id=str(index),
                sample_index=k,
                sampling=SAMPLING,
                seed=seed + index * GROUP_SIZE + k,
            )
            for k in range(GROUP_SIZE)
        )
    )
    mains = [trajectories[-1] for trajectories in episodes]
    usable = [main for main in mains if main.status is EpisodeStatus.OK and main.reward is not None]
    if not usable:
        raise RuntimeError(f"every episode of row {task.task_id} failed; the first one: {mains[0].error}")
    return usable


def to_samples(group: Sequence[Trajectory], index: int) -> list[TrainSample]:
    """Compute a group's advantages and make the samples to train on.

    GRPO (arXiv 2402.03300, section 4.1.2): an episode's advantage is its reward, less the mean of
    its group, divided by the group's standard deviation. Every sampled token of the episode gets
    it. Prompts, tool results and the template's own tokens have mask 0 and get nothing.
    """
    rewards = np.array([trajectory.reward for trajectory in group])
    samples = []
    for trajectory, value in zip(group, advantage.grpo(rewards), strict=True):
        mask = np.asarray(trajectory.loss_mask, dtype=bool)
        logprobs = np.asarray(trajectory.logprobs, dtype=np.float64)  # NaN where nothing was sampled
        samples.append(
            TrainSample(
                token_ids=np.asarray(trajectory.token_ids, dtype=np.int64),
                loss_mask=mask,
                old_logprobs=np.where(mask, logprobs, 0.0).astype(np.float32),
                advantages=np.where(mask, value, 0.0).astype(np.float32),
                prompt_length=trajectory.prompt_length,
                group_key=index,  # samples of one group share their prompt: it is computed once
            )
        )
    return samples


async def train_on(workers: WorkerGroup, groups: Sequence[Sequence[TrainSample]]) -> dict[str, float]:
    """Take one optimizer step for each minibatch of groups; return the sums of the first.

    In the first minibatch the trainer's weights are those that sampled, so its logprobs must equal
    the engine's: `logprob_abs_sum / tokens` measures how well the two implementations agree.
    """
    first: dict[str, float] = {}
    size = len(groups) // MINIBATCHES
    for begin in range(0, size * MINIBATCHES, size):
        samples = [sample for group in groups[begin : begin + size] for sample in group]
        sums = await workers.accumulate(samples, temperature=SAMPLING.temperature)
        if sums["normalizer"] > 0:
            await workers.step(sums["normalizer"])
        if begin == 0:
            add_sums(first, sums)
    return first


# -- the loop --------------------------------------------------------------------------------------


async def train(steps: int, prompts: int, seed: int, folder: Path) -> list[float]:
    """Train for some steps; return the mean reward of each.

    Args:
        prompts: groups per step; a multiple of MINIBATCHES.
        folder: for logs and published weights.
    """
    tasks = load_tasks(f"{TASK}/data.py:train_rows", "rows", AGENT)
    order = RowOrder(len(tasks), seed, shuffle=True)
    rewards: list[float] = []

    async with start(folder, steps, seed) as parts:
        for step in range(1, steps + 1):
            begin = time.perf_counter()

            # 1. Sample: one coroutine for each episode, all of them at once.
            indices = range((step - 1) * prompts, step * prompts)
            groups = await asyncio.gather(
                *(sample_group(parts.runner, tasks[order[index]], index, seed) for index in indices)
            )

            # 2. Train: advantages within each group, then the clipped policy gradient.
            batch = [to_samples(group, index) for group, index in zip(groups, indices, strict=True)]
            sums = await train_on(parts.workers, batch)

            # 3. Publish: the server samples the next step from the new policy.
            await parts.publisher.publish(step)

            scored = [trajectory.reward for group in groups for trajectory in group if trajectory.reward is not None]
            rewards.append(statistics.fmean(scored))
            mismatch = sums["logprob_abs_sum"] / max(1.0, sums["tokens"])
            print(
                f"step {step:3}  reward {rewards[-1]:.3f}  episodes {len(scored)}  mismatch {mismatch:.1e}  "
                f"{time.perf_counter() - begin:.1f} s",
                flush=True,
            )
    return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO on one page.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=32, help="per step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rewards = asyncio.run(train(args.steps, args.prompts, args.seed, Path(folder) / "run"))
    print(f"mean reward: first step {rewards[0]:.3f}, last step {rewards[-1]:.3f}")


if __name__ == "__main__":
    main()
