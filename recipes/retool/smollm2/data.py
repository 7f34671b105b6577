r"""Problems and warm-start conversations, generated from a seed. Nothing is downloaded.

As in recipes/smollm2, the warm start shows both ways to answer, a guess and a program, and the
model prefers the guess. RL has it find out which of the two is rewarded.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from .problems import KINDS, Made

Row = dict[str, Any]
Split = Literal["train", "val", "sft"]

SYSTEM_PROMPT = r"Give the answer in \boxed{}."

PROGRAM_SHARE = 0.6
"""Share of the warm start's conversations that write a program. The choice is one of about 70
trained tokens of such a conversation and one of about 10 of a guess, and every sequence has the
same weight: the odds that the model learns are 0.6 / 0.4 / 7, a program in about every sixth
answer."""

TRAIN_ROWS, VAL_ROWS, SFT_ROWS = 1024, 64, 1024


def split_of(text: str) -> Split:
    """Return the only split of a problem: no seed or size leaks it across splits."""
    bucket = zlib.crc32(text.encode()) % 10
    return "val" if bucket == 0 else "sft" if bucket < 5 else "train"


def problem(rng: random.Random, split: Split) -> Made:
    """Return a problem of `split`."""
    while True:
        made = rng.choice(KINDS)(rng)
        if split_of(made.text) == split:
            return made


def opening(made: Made) -> list[Row]:
    """The messages before the model's first turn."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": made.text}]


def rows(split: Literal["train", "val"], n: int) -> Iterator[Row]:
    """Yield `n` distinct rows for RL or evaluation, in the framework's dataset schema."""
    rng = random.Random(split)
    seen: set[str] = set()
    while len(seen) < n:
        made = problem(rng, split)
        if made.text in seen:
            continue
        yield {
            "data_source": "retool/generated",
            "agent_name": "tool_agent",
            "prompt": opening(made),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(made.answer)},
            "extra_info": {"split": split, "index": len(seen)},
        }
        seen.add(made.text)


def train_rows() -> list[Row]:
    """Return the training rows of `recipe.yaml`."""
    return list(rows("train", TRAIN_ROWS))


def val_rows() -> list[Row]:
    """Return the evaluation rows of `recipe.yaml`, which no training sees."""
    return list(rows("val", VAL_ROWS))


def sft_rows() -> list[Row]:
    """Return the conversations of the warm start, both kinds mixed."""
    rng = random.Random("sft")
    tools = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[1] / "tools.yaml"), resolve=False)
    schemas = [tool["tool_schema"] for tool in tools["tools"]]
    makers = rng.choices([program_conversation, guess_conversation], [PROGRAM_SHARE, 1 - PROGRAM_SHARE], k=SFT_ROWS)
    return [{"messages": make(rng), "tools": schemas} for make in makers]


def guess_conversation(rng: random.Random) -> list[Row]:
    """The bad habit: a number of about the right size, and never the answer."""
    made = problem(rng, "sft")
    guessed = made.answer
    while guessed == made.answer:
        guessed = round(made.answer * rng.uniform(0.6, 1.5)) + rng.randint(-2, 2)
    return [*opening(made), {"role": "assistant", "content": f"\\boxed{{{guessed}}}"}]


def program_conversation(rng: random.Random) -> list[Row]:
    """The good habit: a program, and what it prints in the answer."""
    made = problem(rng, "sft")
    call = {"name": "code_interpreter", "arguments": {"code": made.program}}
    return [
        *opening(made),
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": str(made.answer)},
        {"role": "assistant", "content": f"\\boxed{{{made.answer}}}"},
    ]
