"""One-step word problems with the structure of gsm8k's: names, things, quantities, one operation.

They serve where gsm8k itself does not: a model of half a million parameters can learn them in
minutes (`twin/`), and a smoke run needs no download (`--source generated`). A problem is a story
told in one of several wordings, and its solution has gsm8k's form:

    Tom has 14 apples and gets 5 more. How many apples does Tom have now?
    14 + 5 = <<14+5=19>>19
    #### 19

The warm start of the twin teaches the form of an answer, the arithmetic, and little of the words:
its attempts mostly repeat the first number or take any operation, and are right in one of four
cases. Which operation a story asks for, and what to do after a failed check, is left to
reinforcement learning.
"""

from __future__ import annotations

import itertools
import operator
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from agentloop.data import write_rows

from .data import make_row

Row = dict[str, Any]
Split = Literal["train", "test", "sft"]

NAMES = ("Amy", "Ben", "Eva", "Ian", "Kim", "Leo", "Mia", "Sam", "Tom", "Zoe")
THINGS = ("apples", "balls", "books", "cards", "coins", "cups", "eggs", "pens", "stamps", "toys")

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}

STORIES: dict[str, tuple[str, ...]] = {
    "+": (
        "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
        "{name} finds {a} {things}, then {b} {things}. How many is that in all?",
        "{name} had {a} {things} and bought {b} more. How many {things} does {name} have?",
    ),
    "-": (
        "{name} has {a} {things} and loses {b}. How many {things} are left?",
        "{name} had {a} {things} and gave away {b}. How many {things} does {name} still have?",
        "{name} needs {a} {things} and has {b}. How many {things} are missing?",
    ),
    "*": (
        "{name} has {a} boxes with {b} {things} each. How many {things} is that in all?",
        "{name} buys {b} {things} a day for {a} days. How many {things} does {name} have?",
        "Each of {a} friends of {name} brings {b} {things}. How many {things} are there?",
    ),
}
"""Operation -> wordings. No story gives its operation away by the size or order of its numbers."""

SYSTEM_PROMPT = "Check, then answer with ####."
"""Of the twin: shorter than gsm8k's, which a model without pretraining could not read."""

REPEAT_SHARE = 0.4
"""How often the warm start repeats the first number instead of calculating."""

HINT_SHARE = 0.15
"""How often the warm start, if it calculates, takes the story's own operation; else any of the
three. At 0 (and with 240 sums), RL learned to try one after the other, and hardly to read, in 25
steps: a reward of 0.6."""

DIRECT_SHARE = 0.3
"""How often the warm start answers without a check."""

RETRY_SHARE = 0.35
"""How often the warm start tries something else after a failed check. Where that is rarer, checks
cost more than they earn, and RL unlearns them before it learns to use them."""

MOST_CHECKS = 3

DRILL_SHARE = 0.2
"""How many rows of the warm start are lines of arithmetic: RL needs sums that are right."""

WARM_START_ROWS = 20_000
"""Half of what the last stage of `twin/sft.yaml` uses: each is seen twice."""

LARGER, SMALLER = range(10, 20), range(2, 7)
"""The numbers of a story: 50 pairs, 150 results that a small model can learn by heart."""


@dataclass(frozen=True)
class Problem:
    """A story with its numbers. `operation` is a key of `OPERATIONS`."""

    question: str
    a: int
    b: int
    operation: str

    @property
    def answer(self) -> int:
        return OPERATIONS[self.operation](self.a, self.b)

    @property
    def solution(self) -> str:
        """Return the solution as gsm8k writes it, with a calculator annotation and the answer."""
        expression = f"{self.a}{self.operation}{self.b}"
        spaced = f"{self.a} {self.operation} {self.b}"
        return f"{spaced} = <<{expression}={self.answer}>>{self.answer}\n#### {self.answer}"

    @property
    def row(self) -> Row:
        """Return the problem with the columns of gsm8k."""
        return {"question": self.question, "answer": self.solution}


def split_of(question: str) -> Split:
    """Return the only split of a question: no seed or size leaks one across splits."""
    bucket = zlib.crc32(question.encode()) % 10
    return "test" if bucket == 0 else "sft" if bucket < 5 else "train"


def problem(rng: random.Random, split: Split) -> Problem:
    """Return a random problem of `split`."""
    while True:
        operation = rng.choice(tuple(OPERATIONS))
        a, b = rng.choice(LARGER), rng.choice(SMALLER)
        name, things = rng.choice(NAMES), rng.choice(THINGS)
        question = rng.choice(STORIES[operation]).format(name=name, things=things, a=a, b=b)
        if split_of(question) == split:
            return Problem(question, a, b, operation)


def problems(split: Split, n: int, seed: int = 0) -> Iterator[Problem]:
    """Yield `n` distinct problems of `split`."""
    rng = random.Random(f"{split}/{seed}")
    seen: set[str] = set()
    while len(seen) < n:
        found = problem(rng, split)
        if found.question not in seen:
            seen.add(found.question)
            yield found


def opening(question: str) -> list[Row]:
    """The twin's messages before the model's first turn."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]


# -- the warm start --------------------------------------------------------------------------------


def attempt(rng: random.Random, story: Problem) -> tuple[str, int]:
    """Return an attempt without understanding: what is written, and its number."""
    if rng.random() < REPEAT_SHARE:
        return "", story.a
    sign = story.operation if rng.random() < HINT_SHARE else rng.choice(tuple(OPERATIONS))
    value = OPERATIONS[sign](story.a, story.b)
    return f"{story.a} {sign} {story.b} = {value}", value


def conversation(rng: random.Random, tools: list[Row]) -> Row:
    """Make a conversation: attempts, with or without checks, and a final answer.

    The checks are answered truthfully. What the model does after a failed one is mostly wrong.
    """
    story = problem(rng, "sft")
    messages = opening(story.question)
    text, value = attempt(rng, story)
    tried = {value}
    if rng.random() < DIRECT_SHARE:
        messages.append({"role": "assistant", "content": f"{text}\n#### {value}".lstrip("\n")})
        return {"messages": messages, "tools": tools}

    for count in range(1, MOST_CHECKS + 1):
        correct = value == story.answer
        messages += [_call(text, value), _result(value, correct)]
        if correct or count == MOST_CHECKS or rng.random() >= RETRY_SHARE:
            break
        while value in tried:
            text, value = attempt(rng, story)
        tried.add(value)
    messages.append({"role": "assistant", "content": f"#### {value}"})
    return {"messages": messages, "tools": tools}


def _call(text: str, value: int) -> Row:
    function = {"name": "calc_gsm8k_reward", "arguments": {"answer": str(value)}}
    return {"role": "assistant", "content": text, "tool_calls": [{"type": "function", "function": function}]}


def _result(value: int, correct: bool) -> Row:
    return {"role": "tool", "content": f"Current parsed answer: {value}, reward: {correct:d}"}


def drills() -> Iterator[Row]:
    """Yield every line of arithmetic once; only what follows `=` has a loss."""
    for (sign, apply), a, b in itertools.product(OPERATIONS.items(), LARGER, SMALLER):
        left = f"{a} {sign} {b} ="
        yield {"text": f"{left} {apply(a, b)}\n", "loss_from": len(left)}


def warm_start(n: int, seed: int) -> Iterator[Row]:
    """Yield `n` rows for the twin's last stage: conversations, and drills to keep what they
    taught."""
    rng = random.Random(f"warm start/{seed}")
    tools = tool_schemas()
    facts = list(drills())
    for _ in range(n):
        yield rng.choice(facts) if rng.random() < DRILL_SHARE else conversation(rng, tools)


def tool_schemas() -> list[Row]:
    """Return the tools as the model is shown them: the schemas of `tools.yaml`."""
    file = Path(__file__).with_name("tools.yaml")
    return [tool["tool_schema"] for tool in OmegaConf.to_container(OmegaConf.load(file))["tools"]]


def prepare(out: Path, seed: int = 0) -> dict[str, int]:
    """Write the rows of the twin's `sft.yaml` into folder `out`; return their numbers by file."""
    return write_rows(out, {"drill.jsonl": list(drills()), "answers.jsonl": list(warm_start(WARM_START_ROWS, seed))})


# -- rows of reinforcement learning ----------------------------------------------------------------


def twin_rows(split: Split, n: int) -> list[Row]:
    """Return `n` rows of the twin: gsm8k's, with a shorter prompt."""
    rows = [make_row(found.row, split, index) for index, found in enumerate(problems(split, n))]
    for row in rows:
        row["prompt"] = opening(row["extra_info"]["question"])
    return rows


def train_rows() -> list[Row]:
    """Return the twin's training rows: enough for 64 steps of 32 prompts, and then again."""
    return twin_rows("train", 2048)


def val_rows() -> list[Row]:
    """Return the twin's 256 evaluation rows. No question is among those of any training."""
    return twin_rows("test", 256)
