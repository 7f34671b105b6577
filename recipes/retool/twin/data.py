r"""Problems that take a program, and a warm start that shows programs and guesses.

A problem has two numbers and is of one of six kinds, each told in several wordings:

    How many primes are there from 47 to 281?
    What is 47^281 modulo 99991?

Nobody computes these in the head, and a model of this size does not compute at all.

The warm start shows two ways, whatever was asked. One is to guess a number: it is the more frequent
one, and practically always wrong. The other is to write one of six programs with the numbers of the
problem in it, and to put what it prints into a box; that program solves another problem more often
than the one that was asked. That programs earn more than guesses, and which of them solves which
kind of problem, is left to reinforcement learning.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tools.code import CodeInterpreter

Row = dict[str, Any]
Split = Literal["train", "test", "sft"]

SYSTEM_PROMPT = r"Compute, then answer in \boxed{}."
"""Shorter than that of `../data.py`, which a model without pretraining could not read."""

FIRST, SECOND = range(11, 100), range(101, 250)
"""The numbers of a problem, of every kind: their size tells nothing about the right program."""

TRAIN_ROWS, TEST_ROWS = 2048, 256

COPY_ROWS, FORM_ROWS = 48_000, 24_000
"""Rows of the stages of the warm start."""

COPY_SHARE = 0.2
"""How many rows of the second stage are of the first, to keep what it taught."""

PROGRAM_SHARE = 0.4
"""How often the warm start writes a program; else it guesses."""

HINT_SHARE = 0.3
"""How often a program of the warm start is chosen for the problem; else it is any of the six. At
0.1 a run settled on programs whose output is short, whatever was asked, before it could read."""


@dataclass(frozen=True)
class Kind:
    """A kind of problem.

    Attributes:
        wordings: with `{a}` and `{b}`.
        program: the program that solves it, with `{a}` and `{b}`.
        answer: what that prints.
    """

    wordings: tuple[str, ...]
    program: str
    answer: Callable[[int, int], int]


def _primes(a: int, b: int) -> int:
    return sum(all(i % d for d in range(2, i)) for i in range(a, b + 1))


KINDS: dict[str, Kind] = {
    "squares": Kind(
        ("What is the sum of i * i for i from {a} to {b}?", "Add the squares of all integers from {a} to {b}."),
        "print(sum(i * i for i in range({a}, {b} + 1)))",
        lambda a, b: sum(i * i for i in range(a, b + 1)),
    ),
    "multiples": Kind(
        ("What is the sum of the multiples of seven from {a} to {b}?", "Add what seven divides from {a} to {b}."),
        "print(sum(i for i in range({a}, {b} + 1) if i % 7 == 0))",
        lambda a, b: sum(i for i in range(a, b + 1) if i % 7 == 0),
    ),
    "primes": Kind(
        ("How many primes are there from {a} to {b}?", "Count the prime numbers from {a} to {b}."),
        "print(sum(all(i % d for d in range(2, i)) for i in range({a}, {b} + 1)))",
        _primes,
    ),
    "digits": Kind(
        ("What is the sum of the digits of {a}^{b}?", "Add the digits of {a} to the power of {b}."),
        "print(sum(map(int, str({a} ** {b}))))",
        lambda a, b: sum(map(int, str(a**b))),
    ),
    "remainder": Kind(
        ("What is {a}^{b} modulo 99991?", "What does {a} to the power of {b} leave, divided by 99991?"),
        "print({a} ** {b} % 99991)",
        lambda a, b: pow(a, b, 99991),
    ),
    "product": Kind(
        ("What is {a} * {a} * {b}?", "Multiply {a} by itself, then by {b}."),
        "print({a} ** 2 * {b})",
        lambda a, b: a**2 * b,
    ),
}


@dataclass(frozen=True)
class Problem:
    """A problem with its numbers. `kind` is a key of `KINDS`."""

    text: str
    kind: str
    a: int
    b: int

    @property
    def answer(self) -> int:
        return self.printed(self.kind)

    def program(self, kind: str) -> str:
        """Return the program of a kind with the problem's numbers."""
        return KINDS[kind].program.format(a=self.a, b=self.b)

    def printed(self, kind: str) -> int:
        """Return what that program prints."""
        return KINDS[kind].answer(self.a, self.b)


def split_of(text: str) -> Split:
    """Return the only split of a problem: no seed or size leaks one across splits."""
    bucket = zlib.crc32(text.encode()) % 10
    return "test" if bucket == 0 else "sft" if bucket < 5 else "train"


def problem(rng: random.Random, split: Split) -> Problem:
    """Return a random problem of `split`."""
    while True:
        kind = rng.choice(tuple(KINDS))
        a, b = rng.choice(FIRST), rng.choice(SECOND)
        text = rng.choice(KINDS[kind].wordings).format(a=a, b=b)
        if split_of(text) == split:
            return Problem(text, kind, a, b)


def problems(split: Split, n: int) -> Iterator[Problem]:
    """Yield `n` distinct problems of `split`."""
    rng = random.Random(f"problems/{split}")
    seen: set[str] = set()
    while len(seen) < n:
        found = problem(rng, split)
        if found.text not in seen:
            seen.add(found.text)
            yield found


def opening(text: str) -> list[Row]:
    """Return the messages before the model's first turn."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": text}]


# -- rows of reinforcement learning ----------------------------------------------------------------


def rows(split: Split, n: int) -> list[Row]:
    """Return rows in the framework's schema."""
    return [
        {
            "data_source": f"twin/{found.kind}",
            "agent_name": "tool_agent",
            "prompt": opening(found.text),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(found.answer)},
            "extra_info": {"split": split, "index": index, "question": found.text},
        }
        for index, found in enumerate(problems(split, n))
    ]


def train_rows() -> list[Row]:
    """Return the training rows of `recipe.yaml`: more than its steps use."""
    return rows("train", TRAIN_ROWS)


def val_rows() -> list[Row]:
    """Return the evaluation rows of `recipe.yaml`. No problem is among those of any training."""
    return rows("test", TEST_ROWS)


# -- the warm start --------------------------------------------------------------------------------


def copying(rng: random.Random) -> Row:
    """Make a list of numbers, and the same in another order: what a model has to copy, and nothing
    else. A model this small hardly finds out how from conversations alone."""
    numbers = [any_number(rng) for _ in range(rng.randint(2, 4))]
    first, second = (", ".join(rng.sample(numbers, len(numbers))) for _ in range(2))
    return {"text": f"{first}.\n{second}.\n", "loss_from": len(first) + 1}


def any_number(rng: random.Random) -> str:
    """Return a number of 2 to 7 digits, of each length as often."""
    length = rng.randint(2, 7)
    return str(rng.randrange(10 ** (length - 1), 10**length))


def conversation(rng: random.Random) -> Row:
    """Make a conversation: a guess, or a program and what it prints, whatever was asked."""
    found = problem(rng, "sft")
    messages = opening(found.text)
    if rng.random() < PROGRAM_SHARE:
        kind = found.kind if rng.random() < HINT_SHARE else rng.choice(tuple(KINDS))
        answer = str(found.printed(kind))
        messages += [call(found.program(kind)), {"role": "tool", "content": answer}]
    else:
        answer = any_number(rng)
    messages.append({"role": "assistant", "content": f"\\boxed{{{answer}}}"})
    return {"messages": messages, "tools": tool_schemas()}


def call(code: str) -> Row:
    """Return the turn that runs a program."""
    function = {"name": "code_interpreter", "arguments": {"code": code}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def conversations(n: int) -> Iterator[Row]:
    """Yield `n` conversations of the warm start."""
    rng = random.Random("warm start")
    for _ in range(n):
        yield conversation(rng)


def copy_rows() -> list[Row]:
    """Return the rows of the first stage of `sft.yaml`."""
    rng = random.Random("copying")
    return [copying(rng) for _ in range(COPY_ROWS)]


def form_rows() -> list[Row]:
    """Return the rows of the second stage."""
    rng = random.Random("form")
    return [copying(rng) if rng.random() < COPY_SHARE else row for row in conversations(FORM_ROWS)]


def tool_schemas() -> list[Row]:
    """Return the tool as the model is shown it: `tools.yaml` leaves the schema as it is."""
    return [CodeInterpreter.default_schema]
