"""One-step word problems: names, things, quantities and prices, in many wordings, all generated.

A problem is a situation (what is asked) told in one of several wordings. The last wordings of each
situation are held out: training never shows them, and evaluation shows nothing else. So an
evaluation measures whether the model understands the problem, not whether it knows the sentence.

    python -m recipes.smollm2.words          # prints a few problems of both kinds
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from tools.calculator import evaluate, format_number

from .data import SYSTEM_PROMPT, TOOLS

Row = dict[str, Any]
Split = Literal["train", "val"]

NAMES = (
    "Amira", "Ben", "Carla", "Dmytro", "Elena", "Farid", "Grace", "Hana", "Ivan", "Julia", "Kofi", "Lena",
    "Marco", "Nadia", "Omar", "Petra", "Quinn", "Rosa", "Samuel", "Tara", "Umar", "Vera", "Wanda", "Xenia",
    "Yusuf", "Zoe", "Anton", "Bea", "Chidi", "Dana",
)  # fmt: skip
THINGS = (
    "apples", "pencils", "stamps", "marbles", "books", "eggs", "tickets", "buttons", "candles", "cookies",
    "shells", "postcards", "bricks", "tiles", "bottles", "oranges", "coins", "beads", "flowers", "chairs",
)  # fmt: skip
PRICED = (
    "notebook", "ticket", "sandwich", "pen", "mug", "scarf", "ball", "lamp", "poster", "plant", "cable",
    "towel",
)  # fmt: skip
BOXES = (
    "boxes", "bags", "crates", "shelves", "baskets", "rows", "jars", "drawers",
)  # fmt: skip
WORK = (
    ("reads", "pages"), ("writes", "words"), ("walks", "steps"), ("types", "lines"), ("packs", "parcels"),
    ("picks", "berries"),
)  # fmt: skip

HELD_OUT = 2
"""Wordings of each situation that only the evaluation uses: the last ones."""


@dataclass(frozen=True)
class Situation:
    """One kind of problem.

    Attributes:
        operation: `+ - * /` between the quantities a and b.
        wordings: texts with {a}, {b} and words; `HELD_OUT` of them at the end are for evaluation.
        prices: a is an amount of money.
    """

    name: str
    operation: Literal["+", "-", "*", "/"]
    wordings: tuple[str, ...]
    prices: bool = False


SITUATIONS = (
    Situation(
        "gain", "+",
        (
            "{name} has {a} {thing}. {other} gives {name} {b} more. How many {thing} does {name} have now?",
            "There are {a} {thing} on the table. {name} puts {b} more {thing} there. How many are there in all?",
            "{name} collected {a} {thing} in spring and {b} in summer. How many {thing} is that together?",
            "A shop sold {a} {thing} on Monday and {b} on Tuesday. How many did it sell on both days?",
            "{name} owns {a} {thing}, and {other} owns {b}. What is the total number of {thing}?",
            "After {name} had found {a} {thing}, {other} found another {b}. How many {thing} did they find in all?",
            "In one room there are {a} {thing}, in the next {b}. Count the {thing} of both rooms.",
        ),
    ),
    Situation(
        "loss", "-",
        (
            "{name} had {a} {thing} and gave {b} of them to {other}. How many {thing} are left?",
            "A store had {a} {thing} and sold {b}. How many {thing} does it still have?",
            "Of {a} {thing}, {b} were broken. How many were whole?",
            "{name} needs {a} {thing} and already has {b}. How many {thing} are missing?",
            "{name} has {a} {thing}. {other} has {b}. How many more {thing} does {name} have than {other}?",
            "There were {a} {thing} in the garden until {name} took {b} away. How many stayed there?",
            "{other} counted {b} {thing}, {name} counted {a}. By how many is the count of {name} larger?",
        ),
    ),
    Situation(
        "groups", "*",
        (
            "{name} has {a} {box} with {b} {thing} in each. How many {thing} does {name} have?",
            "Each of {a} {box} holds {b} {thing}. How many {thing} are there?",
            "There are {b} {thing} in every one of the {a} {box}. How many {thing} is that in total?",
            "{name} fills {a} {box} and puts {b} {thing} into each. How many {thing} are needed?",
            "A truck brings {a} {box}. Every one contains {b} {thing}. How many {thing} arrive?",
            "With {b} {thing} per container, how many {thing} are in {a} {box}?",
            "{other} stacks {a} {box}, {b} {thing} in each one. What is the number of {thing}?",
        ),
    ),
    Situation(
        "rate", "*",
        (
            "{name} {verb} {a} {unit} every day. How many {unit} is that in {b} days?",
            "Every hour {name} {verb} {a} {unit}. How many {unit} is that in {b} hours?",
            "{name} {verb} {a} {unit} a week. How many {unit} does that make in {b} weeks?",
            "In one day {name} {verb} {a} {unit}. At that pace, how many in {b} days?",
            "For {b} days {name} {verb} {a} {unit} each day. How many {unit} in all?",
            "{name} {verb} {a} {unit} per day. What is the number of {unit} after {b} days?",
        ),
    ),
    Situation(
        "share", "/",
        (
            "{name} shares {a} {thing} equally among {b} friends. How many {thing} does each friend get?",
            "{a} {thing} are packed into {b} {box}, the same number in each. How many {thing} are in one?",
            "{b} children divide {a} {thing} evenly. How many {thing} does each child have?",
            "{name} puts {a} {thing} into {b} equal piles. How many {thing} are in a pile?",
            "A teacher hands out {a} {thing} to {b} students, as many to each. How many does a student get?",
            "If {a} {thing} are split fairly between {b} people, what does one person receive?",
            "{b} {box} hold {a} {thing} altogether, all of them equally many. How many {thing} does one hold?",
        ),
    ),
    Situation(
        "cost", "*",
        (
            "One {good} costs ${a}. How many dollars do {b} cost?",
            "{name} buys {b} {good}s for ${a} each. How much does {name} pay, in dollars?",
            "A {good} has a price of ${a}. What is the price of {b} of them, in dollars?",
            "The price of a {good} is ${a}. {name} takes {b}. How many dollars is that?",
            "{name} sells {b} {good}s at ${a} apiece. How many dollars does {name} earn?",
            "At ${a} per {good}, what do {b} {good}s cost in dollars?",
            "{other} pays ${a} for every {good} and wants {b}. How many dollars does {other} need?",
        ),
        prices=True,
    ),
    Situation(
        "change", "-",
        (
            "{name} has ${a} and buys a {good} for ${b}. How many dollars are left?",
            "A {good} costs ${b}. {name} pays with ${a}. How much change does {name} get, in dollars?",
            "{name} saved ${a} and spends ${b} on a {good}. How many dollars remain?",
            "With ${a} in the purse, {name} pays ${b} for a {good}. How many dollars does {name} have then?",
            "The {good} was ${a} before the sale and is ${b} cheaper now. What does it cost now, in dollars?",
            "From ${a}, {other} takes ${b} to buy a {good}. What remains, in dollars?",
            "A {good} for ${b} is bought out of ${a}. How many dollars does {name} keep?",
        ),
        prices=True,
    ),
)  # fmt: skip


def wordings_of(situation: Situation, split: Split) -> tuple[str, ...]:
    """Return the wordings of a split: evaluation has its own."""
    return situation.wordings[-HELD_OUT:] if split == "val" else situation.wordings[:-HELD_OUT]


def problem(rng: random.Random, split: Split) -> tuple[str, str, str, str]:
    """Return a problem of `split`: question, expression, exact result, name of the situation."""
    # Each operation is asked for equally often: three of the seven situations multiply, and a model
    # that always does would be right too often.
    operation = rng.choice("+-*/")
    situation = rng.choice([each for each in SITUATIONS if each.operation == operation])
    left, right, result = quantities(rng, situation)
    name, other = rng.sample(NAMES, 2)
    verb, unit = rng.choice(WORK)
    words = {
        "a": left, "b": right, "name": name, "other": other, "thing": rng.choice(THINGS), "box": rng.choice(BOXES),
        "good": rng.choice(PRICED), "verb": verb, "unit": unit,
    }  # fmt: skip
    question = rng.choice(wordings_of(situation, split)).format(**words)
    return question, f"{left} {situation.operation} {right}", result, situation.name


def quantities(rng: random.Random, situation: Situation) -> tuple[str, str, str]:
    """Return two quantities and the exact result, as they are written.

    They are too large to work out in the head, a difference is positive, and a division has no
    remainder.
    """
    large, small = rng.randint(120, 999), rng.randint(12, 99)
    if situation.prices:
        cents = Decimal(rng.randint(101, 9999)) / 100
        if situation.operation == "*":
            return f"{cents:.2f}", str(small), f"{cents * small:.2f}"
        whole = Decimal(rng.randint(100, 500))
        return str(whole), f"{cents:.2f}", f"{whole - cents:.2f}"
    if situation.operation == "/":
        return str(large * small), str(small), str(large)
    if situation.operation == "*":
        return str(large), str(small), str(large * small)
    if situation.operation == "-":
        rest = rng.randint(11, 998)
        return str(large + rest), str(large), str(rest)
    second = rng.randint(120, 999)
    return str(large), str(second), str(large + second)


def rows(split: Split, n: int, seed: int = 0) -> Iterator[Row]:
    """Yield `n` distinct problems in the framework's dataset schema."""
    rng = random.Random(f"words/{split}/{seed}")
    seen: set[str] = set()
    while len(seen) < n:
        question, expression, result, situation = problem(rng, split)
        if question in seen:
            continue
        yield {
            "data_source": f"smollm2/{situation}",
            "agent_name": "tool_agent",
            "prompt": [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": result},
            "extra_info": {"split": split, "index": len(seen), "expression": expression},
        }
        seen.add(question)


def warm_start_rows() -> list[Row]:
    """Return the conversations of `words_sft.yaml`: both quantities in a call, under any operation.

    They teach to find the quantities of a story and to write them as an expression. They do not
    teach what a story means: every operation follows every story equally often, so that one answer
    in four is right. RL finds out which.
    """
    rng = random.Random("words/sft/0")
    return [warm_start_conversation(rng) for _ in range(1024)]


def warm_start_conversation(rng: random.Random) -> Row:
    question, expression, _, _ = problem(rng, "train")
    left, _, right = expression.split()
    guessed = f"{left} {rng.choice('+-*/')} {right}"
    result = format_number(evaluate(guessed))
    call = {"name": "calculator", "arguments": {"expression": guessed}}
    messages: list[Row] = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": f"#### {result}"},
    ]
    return {"messages": messages, "tools": TOOLS}


def train_rows() -> list[Row]:
    """Return the training rows of `words.yaml`: more than 60 steps of 16 prompts use."""
    return list(rows("train", 2048))


def val_rows() -> list[Row]:
    """Return the evaluation rows of `words.yaml`: 140 problems in held-out wordings."""
    return list(rows("val", 140))


def main() -> None:
    for split in ("train", "val"):
        for row in rows(split, 4):
            print(f"{split:5}  {row['prompt'][1]['content']}  ->  {row['reward_model']['ground_truth']}")


if __name__ == "__main__":
    main()
