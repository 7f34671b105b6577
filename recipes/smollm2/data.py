"""Questions and warm-start conversations, generated from a seed. Nothing is downloaded.

The task is the quickstart's: arithmetic with operands too large to work out in the head, and a
calculator. SmolLM2 writes good English, but it was not trained to call tools. The warm start
(`sft.yaml`) shows it both ways to answer, a rounded guess and a call, and it prefers the guess; RL
(`recipe.yaml`) has it find out which of the two is rewarded.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from typing import Any, Literal

Row = dict[str, Any]
Split = Literal["train", "val", "sft"]

SYSTEM_PROMPT = "Answer with #### and the number."
TOOLS: list[Row] = [
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "Evaluate an arithmetic expression.",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string", "description": "For example 12 * (3 + 4)."}},
                "required": ["expression"],
            },
        },
    }
]

TOOL_SHARE = 0.6
"""Share of the warm start's conversations that call the tool. The choice is one of about 36 trained
tokens of a tool conversation and one of about 8 of a guess, and every sequence has the same weight:
the odds that the model learns are 0.6 / 0.4 / 4.5, a call in about every fourth answer."""


def split_of(expression: str) -> Split:
    """Return the only split of an expression: no seed or size leaks a question across splits."""
    bucket = zlib.crc32(expression.encode()) % 10
    return "val" if bucket == 0 else "sft" if bucket < 5 else "train"


def question(rng: random.Random, split: Split) -> tuple[str, int]:
    """Return an expression of `split` and its exact value."""
    while True:
        a, b, c = (rng.randint(10, 99) if rng.random() < 0.5 else rng.randint(100, 999) for _ in range(3))
        forms = [
            (f"{a} * {b}", a * b),
            (f"{a} + {b}", a + b),
            (f"{a} - {b}", a - b),
            (f"{a} + {b} - {c}", a + b - c),
        ]
        [(expression, value)] = rng.choices(forms, [3, 3, 3, 1])
        if split_of(expression) == split:
            return expression, value


def opening(expression: str) -> list[Row]:
    """The messages before the model's first turn."""
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": f"What is {expression}?"},
    ]


def rows(split: Literal["train", "val"], n: int, seed: int = 0) -> Iterator[Row]:
    """Yield `n` distinct rows for RL or evaluation, in the framework's dataset schema."""
    rng = random.Random(f"{split}/{seed}")
    seen: set[str] = set()
    while len(seen) < n:
        expression, value = question(rng, split)
        if expression in seen:
            continue
        yield {
            "data_source": "smollm2/arithmetic",
            "agent_name": "tool_agent",
            "prompt": opening(expression),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(value)},
            "extra_info": {"split": split, "index": len(seen), "expression": expression},
        }
        seen.add(expression)


def train_rows() -> list[Row]:
    """Return the training rows of `recipe.yaml`."""
    return list(rows("train", 1024))


def val_rows() -> list[Row]:
    """Return the 64 evaluation rows of `recipe.yaml`, which no training sees."""
    return list(rows("val", 64))


def guess(value: int) -> int:
    """Round `value` to one significant digit: a guess without calculating."""
    magnitude = int(10 ** (len(str(abs(value))) - 1))
    return (abs(value) + magnitude // 2) // magnitude * magnitude * (1 if value >= 0 else -1)


def direct_conversation(rng: random.Random) -> Row:
    """The bad habit: answer directly with a round number, which is never the exact answer."""
    while True:
        expression, value = question(rng, "sft")
        if guess(value) != value:
            answer = {"role": "assistant", "content": f"#### {guess(value)}"}
            return {"messages": [*opening(expression), answer], "tools": TOOLS}


def tool_conversation(rng: random.Random) -> Row:
    """The good habit: write the expression into a call, and the result into the answer."""
    expression, value = question(rng, "sft")
    call = {"name": "calculator", "arguments": {"expression": expression}}
    messages = [
        *opening(expression),
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": str(value)},
        {"role": "assistant", "content": f"#### {value}"},
    ]
    return {"messages": messages, "tools": TOOLS}


def sft_rows() -> list[Row]:
    """Return the conversations of the warm start, both kinds mixed."""
    rng = random.Random("sft/0")
    makers = rng.choices([tool_conversation, direct_conversation], weights=[TOOL_SHARE, 1 - TOOL_SHARE], k=1024)
    return [maker(rng) for maker in makers]
