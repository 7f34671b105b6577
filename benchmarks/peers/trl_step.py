"""Training steps of TRL's GRPOTrainer on a CPU, timed. Runs in TRL's own environment:

    .venv-trl/bin/python benchmarks/peers/trl_step.py --model recipes/quickstart/model --scenario equal --threads 1

The last line of the output is one JSON object: for each step its seconds, how many of them generation took (with
parsing and tools, and without: `decode_s`), and what was generated. `benchmarks/step.py` starts this script.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from workload import (
    EPISODE_TOKENS,
    GROUP,
    LEARNING_RATE,
    ROWS,
    SCENARIOS,
    TURN_TOKENS,
    Workload,
    uses_tool,
    workload,
)


class ForcedLengths:
    """A logits processor: row i generates exactly `lengths[i]` tokens; below `cap` the last is an end token.

    One or two cheap operations a token: it must not slow down what it measures.
    """

    def __init__(self, lengths: list[int], prompt_length: int, end_ids: list[int], cap: int) -> None:
        import torch

        self._prompt_length = prompt_length
        self._end = torch.tensor(end_ids)
        self._ending: dict[int, torch.Tensor] = {}
        for length in set(lengths) - {cap}:
            rows = [row for row, other in enumerate(lengths) if other == length]
            self._ending[length - 1] = torch.tensor(rows)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores.index_fill_(1, self._end, float("-inf"))
        rows = self._ending.get(input_ids.shape[1] - self._prompt_length)
        if rows is not None:
            scores[rows] = float("-inf")
            scores[rows, self._end[0]] = 0.0
        return scores


def calculator(expression: str) -> str:
    """
    Evaluate an arithmetic expression.

    Args:
        expression: For example 12 * (3 + 4).
    """
    # A call of the quickstart has two or three operands and no precedence; ours parses any expression.
    first, *rest = expression.split()
    value = int(first)
    for sign, operand in zip(rest[::2], rest[1::2], strict=True):
        number = int(operand)
        value = value * number if sign == "*" else value + (number if sign == "+" else -number)
    return str(value)


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Differs inside each group, so that no advantage is zero. The time does not depend on more."""
    return [float(index % 2) for index in range(len(completions))]


class Clock:
    """Seconds and counts of each step, taken around the trainer's own methods."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.steps: list[dict[str, float]] = []
        self._decode_s = 0.0
        self._grad_norms: list[float] = []

    def watch(self, trainer: Any) -> None:
        """Wrap generation, and note when optimizer steps end."""
        from transformers import TrainerCallback

        single, whole, clock = trainer._generate_single_turn, trainer._generate, self

        def timed_single(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = single(*args, **kwargs)
            clock._decode_s += time.perf_counter() - begin
            return result

        def timed_whole(*args: Any, **kwargs: Any) -> Any:
            clock._decode_s, begin = 0.0, time.perf_counter()
            result = whole(*args, **kwargs)
            prompts, completions, mask = result[:3]
            clock.steps.append(
                {
                    "generation_s": time.perf_counter() - begin,
                    "decode_s": clock._decode_s,
                    "prompt_tokens": float(sum(map(len, prompts))),
                    "completion_tokens": float(sum(map(len, completions))),
                    "sampled_tokens": float(sum(map(sum, mask)) if mask else sum(map(len, completions))),
                    "longest": float(max(map(len, completions))),
                    "tool_episodes": float(sum(0 in row for row in mask) if mask else 0),
                }
            )
            return result

        class StepEnds(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clock.ends.append(time.perf_counter())

            on_step_end = on_train_begin

        clip = trainer.accelerator.clip_grad_norm_

        def noted_clip(*args: Any, **kwargs: Any) -> Any:
            norm = clip(*args, **kwargs)
            clock._grad_norms.append(float(norm))
            return norm

        trainer.accelerator.clip_grad_norm_ = noted_clip
        trainer._generate_single_turn, trainer._generate = timed_single, timed_whole
        trainer.add_callback(StepEnds())

    def result(self) -> list[dict[str, float]]:
        """One object a step, from the end of the step before to its own; one optimizer step each."""
        for step, (begin, end), norm in zip(self.steps, pairwise(self.ends), self._grad_norms, strict=True):
            step["grad_norm"] = norm
            step["step_s"] = end - begin
            step["train_s"] = end - begin - step["generation_s"]
        return self.steps


def build_trainer(work: Workload, model_path: Path, folder: str, micro: int, steps: int) -> Any:
    """The trainer as TRL documents it; logging and saving, which cost time and are not measured, are off."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    prompts: list[Any] = work.prompts
    options: dict[str, Any] = {"max_completion_length": max(work.lengths, default=EPISODE_TOKENS)}
    tools = None
    if uses_tool(work.scenario):
        from trl.chat_template_utils import qwen3_template

        tokenizer.response_template = qwen3_template  # the quickstart's template writes calls as Qwen3's does
        prompts = [row["prompt"] for row in work.rows]  # with tools TRL renders the messages itself
        tools = [calculator]
        options |= {"generation_kwargs": {"max_new_tokens": TURN_TOKENS}, "max_tool_calling_iterations": 1}
    else:
        end_ids, generate = model.generation_config.eos_token_id, model.generate
        end_ids = end_ids if isinstance(end_ids, list) else [end_ids]

        def forced(**inputs: Any) -> Any:
            width = inputs["input_ids"].shape[1]
            processor = ForcedLengths(work.lengths, width, end_ids, options["max_completion_length"])
            return generate(**inputs, logits_processor=LogitsProcessorList([processor]))

        model.generate = forced
    return GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        tools=tools,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        args=GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,  # TRL's default trades time for memory
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=ROWS // micro,
            num_generations=GROUP,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            beta=0.0,
            temperature=1.0,
            shuffle_dataset=False,
            report_to="none",
            save_strategy="no",
            logging_steps=100_000,
            disable_tqdm=True,
            seed=0,
            **options,
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with model and tokenizer")
    parser.add_argument("--scenario", choices=SCENARIOS, required=True)
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads")
    parser.add_argument("--micro", type=int, default=64, help="per_device_train_batch_size; the rest is accumulated")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warm-up", type=int, default=1, help="steps that the medians leave out")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)  # before torch is imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(options.threads)
    work = workload(options.scenario, options.model, options.steps)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(work, options.model, folder, options.micro, options.steps)
        clock.watch(trainer)
        trainer.train()
    steps = clock.result()
    counted = steps[options.warm_up :]
    median = {key: statistics.median(step[key] for step in counted) for key in counted[0]}
    print(json.dumps({"threads": options.threads, "micro": options.micro, "median": median, "steps": steps}))


if __name__ == "__main__":
    main()
