r"""Problems that take a line of Python, in the columns of the published sets: for a first try.

Nothing is downloaded. The rows go the way of the published ones, the hundredfold repetition and
the directions around each text included.
"""

from __future__ import annotations

import random
from typing import Any, Literal, NamedTuple

Row = dict[str, Any]
Split = Literal["sft", "dapo", "aime_2024", "aime_2025"]

SIZES: dict[Split, int] = {"sft": 96, "dapo": 64, "aime_2024": 16, "aime_2025": 16}

REPEATS = 3
"""How often each problem is in the generated DAPO rows; a hundred times in the published ones."""

DIRECTIONS = (
    "Python code between <code> and </code> is run, and its output follows between <interpreter> and </interpreter>. "
    "End with the answer between <answer> and </answer>."
)


class Made(NamedTuple):
    """A problem, the program that solves it, and what that prints."""

    text: str
    program: str
    answer: str


def product(rng: random.Random) -> Made:
    a, b = rng.randint(1000, 9999), rng.randint(100, 999)
    return Made(f"What is {a} * {b}?", f"print({a} * {b})", str(a * b))


def power(rng: random.Random) -> Made:
    base, exponent, modulus = rng.randint(2, 9), rng.randint(20, 60), rng.randint(11, 99)
    return Made(
        f"What is {base}^{exponent} modulo {modulus}?",
        f"print({base}**{exponent} % {modulus})",
        str(pow(base, exponent, modulus)),
    )


def squares(rng: random.Random) -> Made:
    last = rng.randint(20, 999)
    return Made(
        f"What is the sum of the squares from 1 to {last}?",
        f"print(sum(n * n for n in range(1, {last + 1})))",
        str(sum(n * n for n in range(1, last + 1))),
    )


KINDS = (product, power, squares)


def problems(split: Split) -> list[Made]:
    """Return the problems of a split. None is in two splits: each has a remainder of its own."""
    rng = random.Random(f"retool/{split}")
    own = list(SIZES).index(split)
    found: dict[str, Made] = {}
    while len(found) < SIZES[split]:
        made = KINDS[len(found) % len(KINDS)](rng)
        if sum(map(ord, made.text)) % len(SIZES) == own:
            found[made.text] = made
    return list(found.values())


def sets() -> dict[str, list[Row]]:
    """Return rows with the columns of each published set."""
    asked = [row for made in problems("dapo") for row in [_dapo(made)] * REPEATS]
    random.Random("order").shuffle(asked)
    return {
        "sft": [_conversation(made) for made in problems("sft")],
        "dapo": asked,
        "aime_2024": [
            {"ID": made.text, "Problem": made.text, "Answer": int(made.answer)} for made in problems("aime_2024")
        ],
        "aime_2025": [{"problem": made.text, "answer": made.answer} for made in problems("aime_2025")],
    }


def _dapo(made: Made) -> Row:
    text = f'The last line is of the form Answer: $Answer.\n\n{made.text}\n\nThe last line begins with "Answer:".'
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": text}],
        "ability": "MATH",
        "reward_model": {"style": "rule", "ground_truth": made.answer},
    }


def _conversation(made: Made) -> Row:
    boxed = f"\\boxed{{{made.answer}}}"
    form = "<answer>\n\\boxed{x}\n</answer>"
    question = f"{DIRECTIONS}\n\n*user question:*\n{made.text}\n\nGive the answer in this form:\n{form}"
    solution = (
        f"<code>\n```python\n{made.program}\n```\n</code>\n<interpreter>\n{made.answer}\n</interpreter>\n"
        f"<answer>\n{boxed}\n</answer>"
    )
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]}
