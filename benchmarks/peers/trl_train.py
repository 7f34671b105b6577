"""TRL's GRPOTrainer on trajectories that exist already: its time and memory for training alone. In TRL's environment:

    .venv-trl/bin/python benchmarks/peers/trl_train.py --model recipes/quickstart/model --scenario equal --prompts 32

The last line of the output is one JSON object: seconds and gradient norm of each step, resident memory before the
first step and at the peak. `benchmarks/train.py` starts this script.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trajectories import Row, trajectories
from workload import GROUP, LEARNING_RATE


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


class Clock:
    """When steps ended, and what of them was not training: taken around the trainer's own methods."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.generation_s: list[float] = []
        self.grad_norms: list[float] = []

    def watch(self, trainer: Any) -> None:
        from transformers import TrainerCallback

        clock, generate, clip = self, trainer._generate, trainer.accelerator.clip_grad_norm_

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = generate(*args, **kwargs)
            clock.generation_s.append(time.perf_counter() - begin)
            return result

        def noted(*args: Any, **kwargs: Any) -> Any:
            norm = clip(*args, **kwargs)
            clock.grad_norms.append(float(norm))
            return norm

        class StepEnds(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clock.ends.append(time.perf_counter())

            on_step_end = on_train_begin

        trainer._generate, trainer.accelerator.clip_grad_norm_ = timed, noted
        trainer.add_callback(StepEnds())

    def steps(self) -> list[dict[str, float]]:
        between = pairwise(self.ends)
        return [
            {"train_s": end - begin - generation, "grad_norm": norm}
            for (begin, end), generation, norm in zip(between, self.generation_s, self.grad_norms, strict=True)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with model and tokenizer")
    parser.add_argument("--scenario", choices=("equal", "longtail"), required=True)
    parser.add_argument("--prompts", type=int, required=True, help="groups of a step")
    parser.add_argument("--micro", type=int, default=64, help="per_device_train_batch_size; the rest is accumulated")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before torch is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    rows: list[Row] = []
    waiting = [trajectories(options.scenario, options.prompts, step) for step in range(options.steps)]

    def rollout(prompts: list[Any], _: Any) -> dict[str, Any]:
        rows[:] = waiting.pop(0)
        return {
            "prompt_ids": [row.prompt for row in rows],
            "completion_ids": [row.completion for row in rows],
            # Not read: with one optimizer step a batch TRL takes the ratio to its own logprobs.
            "logprobs": [[0.0] * len(row.completion) for row in rows],
        }

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [row.reward for row in rows]

    count = options.prompts * GROUP
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(options.model),
            reward_funcs=reward,
            rollout_func=rollout,
            train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(options.prompts * options.steps)]),
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,  # TRL's default trades time for memory
                per_device_train_batch_size=options.micro,
                gradient_accumulation_steps=count // options.micro,
                num_generations=GROUP,
                max_completion_length=512,
                max_steps=options.steps,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                beta=0.0,
                temperature=1.0,
                loss_type="dapo",  # the mean over all sampled tokens of a step, as our `token_mean`
                epsilon=0.2,
                max_grad_norm=1.0,
                shuffle_dataset=False,
                report_to="none",
                save_strategy="no",
                logging_steps=100_000,
                disable_tqdm=True,
                seed=0,
            ),
        )
        clock = Clock()
        clock.watch(trainer)
        before = resident_bytes("VmRSS")
        trainer.train()
    steps = clock.steps()
    print(json.dumps({"steps": steps, "before_bytes": before, "peak_bytes": resident_bytes("VmHWM")}))


if __name__ == "__main__":
    main()
