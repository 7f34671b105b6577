"""One training step of TRL's GRPOTrainer, timed. Runs in an environment of its own; `benchmarks/step.py` starts it.

Prints one JSON object: seconds of each step, and how many of them were generation (tool calls included).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class ForcedLength(LogitsProcessor):
    """Row i generates exactly `lengths[i]` tokens: no end token before, the end token there."""

    def __init__(self, lengths: list[int], prompt_length: int, end: list[int]) -> None:
        self._lengths = torch.tensor(lengths)
        self._prompt_length = prompt_length
        self._end = end

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        position = input_ids.shape[1] - self._prompt_length
        last = position >= self._lengths[: len(scores)] - 1
        scores[:, self._end] = float("-inf")
        scores[last] = float("-inf")
        scores[last, self._end[0]] = 0.0
        return scores


class StepTimes(TrainerCallback):
    """Notes when steps end."""

    def __init__(self) -> None:
        self.ends = [time.perf_counter()]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def calculator(expression: str) -> str:
    """
    Evaluate an arithmetic expression.

    Args:
        expression: For example 12 * (3 + 4).
    """
    first, operator, second, *rest = expression.split()
    value = {"+": int(first) + int(second), "-": int(first) - int(second), "*": int(first) * int(second)}[operator]
    return str(value - int(rest[1]) if rest else value)


def reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Any reward with variance inside a group will do: the time does not depend on it."""
    return [float(index % 2) for index in range(len(completions))]


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--spec", type=Path, required=True, help="JSON written by benchmarks/step.py")
    arguments.add_argument("--micro", type=int, required=True, help="rows of one forward and backward")
    options = arguments.parse_args()
    spec = json.loads(options.spec.read_text())
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    rows = spec["group_size"] * spec["batch_size"]
    tools = None
    if spec["scenario"] == "tool":
        from trl.chat_template_utils import qwen3_template

        # The quickstart's template writes calls as Qwen's does, so TRL's parser for those reads them.
        tokenizer.response_template = qwen3_template
        tools = [calculator]
    else:
        generate = model.generate

        def forced(**inputs: Any) -> Any:
            processor = ForcedLength(spec["lengths"], inputs["input_ids"].shape[1], spec["end_ids"])
            return generate(**inputs, logits_processor=LogitsProcessorList([processor]))

        model.generate = forced
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=reward,
            tools=tools,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in spec["prompts"]]),
            callbacks=[times],
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=options.micro,
                gradient_accumulation_steps=rows // options.micro,
                num_generations=spec["group_size"],
                max_completion_length=spec["max_new_tokens"],
                max_tool_calling_iterations=1 if tools else None,
                max_steps=spec["steps"],
                learning_rate=2e-4,
                beta=0.0,
                temperature=1.0,
                report_to="none",
                save_strategy="no",
                logging_steps=10_000,
                disable_tqdm=True,
                seed=0,
            ),
        )
        generated = [0.0]
        calls = [0]
        inner = trainer._generate

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = inner(*args, **kwargs)
            generated.append(time.perf_counter() - begin)
            return result

        trainer._generate = timed
        if tools:
            loop = trainer._tool_call_loop

            def counted(prompts: Any, prompt_ids: Any, completion_ids: Any, completions: Any, *rest: Any) -> Any:
                calls.append(sum(bool(c[0].get("tool_calls")) for c in completions))
                return loop(prompts, prompt_ids, completion_ids, completions, *rest)

            trainer._tool_call_loop = counted
        times.ends = [time.perf_counter()]
        trainer.train()
    steps = [after - before for before, after in zip(times.ends, times.ends[1:], strict=False)]
    print(json.dumps({"steps": steps, "generation": generated[1:], "tool_calls": calls[1:], "micro": options.micro}))


if __name__ == "__main__":
    main()
