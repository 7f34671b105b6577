"""Questions, warm-start conversations and copy drills, all generated from a seed.

    python recipes/quickstart/data.py --out DIR

writes the rows of reinforcement learning (`train.jsonl`, `val.jsonl`) and one `sft_<stage>.jsonl`
for each stage of `sft.yaml`. The recipes call `train_rows`, `val_rows` and `prepare` instead.
Nothing is downloaded, and the same seed gives the same bytes.

The question is arithmetic with operands of two or three digits: too large for a model of half a
million parameters to work out, trivial for one that calls the calculator. The warm start teaches
both ways of answering and prefers the bad one, so that RL has something to learn.

Three kinds of SFT row:

* a conversation, `{"messages": [...], "tools": [...]}`: the loss is on the assistant's tokens;
* the same with `"train": false` on an assistant message: that turn is context, without a loss;
* a copy drill, `{"text": ..., "loss_from": k}`: the loss is on the tokens from character k on.
"""

import argparse
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from agentloop.data import write_rows

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

TOOL_SHARE = 0.64
"""Share of the last SFT stage's conversations that use the tool. The model ends up choosing the
tool a quarter of the time: with every sequence of the same weight, the choice is one of about 36
trained tokens in a tool conversation and one of about 6 in a direct one, so that the odds are 0.64
/ 0.36 / 5. The reward that RL starts from is just below that rate."""


RL_WEIGHTS = [3, 3, 3, 1]
SFT_WEIGHTS = [3, 1, 1, 3]
"""How often a question is a product, a sum, a difference, or a sum and a difference. The warm start
sees more of what is hard to copy: the longest expressions, and the results with the most digits."""


def split_of(expression: str) -> Split:
    """Return the only split of an expression: no seed or size leaks a question across splits."""
    bucket = zlib.crc32(expression.encode()) % 10
    return "val" if bucket == 0 else "sft" if bucket < 5 else "train"


def question(rng: random.Random, split: Split) -> tuple[str, int]:
    """Return an expression of `split` and its exact value."""
    weights = SFT_WEIGHTS if split == "sft" else RL_WEIGHTS
    while True:
        a, b, c = (rng.randint(10, 99) if rng.random() < 0.5 else rng.randint(100, 999) for _ in range(3))
        small = rng.randint(10, 99)  # keeps products at five digits
        forms = [
            (f"{a} * {small}", a * small),
            (f"{a} + {b}", a + b),
            (f"{a} - {b}", a - b),
            (f"{a} + {b} - {c}", a + b - c),
        ]
        [(expression, value)] = rng.choices(forms, weights)
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
            "data_source": "quickstart/arithmetic",
            "agent_name": "tool_agent",
            "prompt": opening(expression),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(value)},
            "extra_info": {"split": split, "index": len(seen), "expression": expression},
        }
        seen.add(expression)


def guess(value: int) -> int:
    """Round `value` to one significant digit: a guess without calculating.

    It follows from the question, so that it costs the model little. An earlier prototype guessed
    random digits, and their noise in the gradient damaged the copying that the tool branch needs.
    """
    magnitude = int(10 ** (len(str(abs(value))) - 1))
    return (abs(value) + magnitude // 2) // magnitude * magnitude * (1 if value >= 0 else -1)


def direct_conversation(rng: random.Random) -> Row:
    """The bad habit: answer directly with a round number, which is never the exact answer."""
    while True:
        expression, value = question(rng, "sft")
        if guess(value) != value:
            return without_call(expression, str(guess(value)))


def tool_conversation(rng: random.Random) -> Row:
    """The good habit: copy the expression into a call, copy the result into the answer."""
    expression, value = question(rng, "sft")
    return with_call(expression, str(value), train_call=True)


def result_conversation(rng: random.Random) -> Row:
    """Make a tool conversation with a random result, which can only be read off the tool turn.

    Only the second copy has a loss.
    """
    expression, _ = question(rng, "sft")
    return with_call(expression, _number(rng), train_call=False)


def without_call(expression: str, answer: str) -> Row:
    """Make a conversation that answers directly."""
    return {
        "messages": [*opening(expression), {"role": "assistant", "content": f"#### {answer}"}],
        "tools": TOOLS,
    }


def with_call(expression: str, result: str, *, train_call: bool) -> Row:
    """Make a conversation that calls the calculator, gets `result` and repeats it."""
    call: Row = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "calculator", "arguments": {"expression": expression}}}
        ],
    }
    if not train_call:
        call["train"] = False
    messages = [
        *opening(expression),
        call,
        {"role": "tool", "content": result},
        {"role": "assistant", "content": f"#### {result}"},
    ]
    return {"messages": messages, "tools": TOOLS}


def _number(rng: random.Random) -> str:
    digits = rng.randint(2, 6)
    return f"{'-' * (rng.random() < 0.2)}{rng.randint(10 ** (digits - 1), 10**digits - 1)}"


def copy_drill(rng: random.Random) -> Row:
    """Write a random line two to five times: the quickest way found to teach a small model to copy.

    The first line cannot be predicted, so it has no loss.
    """
    if rng.random() < 0.3:
        line = _number(rng)
    else:
        symbols = rng.choices(["{}"] * 4 + [" + ", " - ", " * "], k=rng.randint(4, 14))
        line = "".join(symbols).format(*(rng.randint(0, 9) for symbol in symbols if symbol == "{}"))
    return {"text": f"{line}\n" * rng.randint(2, 5), "loss_from": len(line) + 1}


Maker = Callable[[random.Random], Row]
STAGES: dict[str, tuple[int, list[tuple[float, Maker]]]] = {
    "copy": (16_000, [(1.0, copy_drill)]),
    "tool": (40_000, [(0.2, copy_drill), (0.64, tool_conversation), (0.16, result_conversation)]),
    "mix": (
        48_000,
        [
            (0.05, copy_drill),
            (0.15, result_conversation),
            (0.80 * TOOL_SHARE, tool_conversation),
            (0.80 * (1 - TOOL_SHARE), direct_conversation),
        ],
    ),
}
"""SFT stage -> number of rows and the share of each kind of row."""


def sft_rows(stage: str, seed: int = 0) -> Iterator[Row]:
    """Yield the rows of one stage, with its kinds mixed in their shares."""
    n, mixture = STAGES[stage]
    rng = random.Random(f"{stage}/{seed}")
    shares, makers = zip(*mixture, strict=True)
    for maker in rng.choices(makers, weights=shares, k=n):
        yield maker(rng)


def train_rows() -> list[Row]:
    """Return the training rows of `recipe.yaml`: 4,096, more than 60 steps of 32 prompts use."""
    return list(rows("train", 4096))


def val_rows() -> list[Row]:
    """Return the 256 evaluation rows of `recipe.yaml`."""
    return list(rows("val", 256))


def prepare(out: Path, seed: int = 0) -> dict[str, int]:
    """Write the files of all SFT stages into folder `out`; return the row counts by file name."""
    return write_rows(out, {f"sft_{stage}.jsonl": list(sft_rows(stage, seed)) for stage in STAGES})


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's data sets.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    prepare(args.out, args.seed)
    files = {"train.jsonl": rows("train", 4096, args.seed), "val.jsonl": rows("val", 256, args.seed)}
    write_rows(args.out, {name: list(made) for name, made in files.items()})


if __name__ == "__main__":
    main()
