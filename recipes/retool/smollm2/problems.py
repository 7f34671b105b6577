"""Problems that a line or a few lines of Python solve, and the head does not.

python -m recipes.retool.smollm2.problems       # prints a problem of each kind with its program
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple


class Made(NamedTuple):
    """A problem, a program that prints its answer, and that answer."""

    text: str
    program: str
    answer: int


def digits_of_a_power(rng: random.Random) -> Made:
    a, b = rng.randint(2, 19), rng.randint(20, 90)
    return Made(
        f"What is the sum of the digits of {a}^{b}?",
        f"print(sum(int(d) for d in str({a} ** {b})))",
        sum(map(int, str(a**b))),
    )


def remainder_of_a_power(rng: random.Random) -> Made:
    a, b, m = rng.randint(2, 99), rng.randint(20, 99), rng.randint(101, 999)
    return Made(f"What is the remainder of {a}^{b} divided by {m}?", f"print({a} ** {b} % {m})", pow(a, b, m))


def sum_of_squares(rng: random.Random) -> Made:
    n = rng.randint(30, 900)
    return Made(
        f"What is the sum of the squares of the numbers from 1 to {n}?",
        f"print(sum(i * i for i in range(1, {n + 1})))",
        sum(i * i for i in range(1, n + 1)),
    )


def sum_of_multiples(rng: random.Random) -> Made:
    k, n = rng.randint(3, 29), rng.randint(300, 4000)
    return Made(
        f"What is the sum of all multiples of {k} below {n}?", f"print(sum(range({k}, {n}, {k})))", sum(range(k, n, k))
    )


def divisible_numbers(rng: random.Random) -> Made:
    (a, b), n = rng.sample(range(3, 20), 2), rng.randint(200, 3000)
    return Made(
        f"How many numbers from 1 to {n} are divisible by {a} or by {b}?",
        f"print(sum(i % {a} == 0 or i % {b} == 0 for i in range(1, {n + 1})))",
        sum(i % a == 0 or i % b == 0 for i in range(1, n + 1)),
    )


def primes(rng: random.Random) -> Made:
    n = rng.randint(60, 1500)
    counting = "    if all(n % d for d in range(2, n)):\n        count += 1"
    return Made(
        f"How many primes are there below {n}?",
        f"count = 0\nfor n in range(2, {n}):\n{counting}\nprint(count)",
        sum(all(i % d for d in range(2, math.isqrt(i) + 1)) for i in range(2, n)),
    )


def collatz(rng: random.Random) -> Made:
    n = rng.randint(20, 9000)
    value, steps = n, 0
    while value != 1:
        value = value // 2 if value % 2 == 0 else 3 * value + 1
        steps += 1
    return Made(
        f"Start with {n}. Halve an even number, and replace an odd number n by 3n + 1. After how many steps is it 1?",
        f"n, steps = {n}, 0\nwhile n != 1:\n    n = n // 2 if n % 2 == 0 else 3 * n + 1\n    steps += 1\nprint(steps)",
        steps,
    )


def fibonacci(rng: random.Random) -> Made:
    n = rng.randint(20, 120)
    a, b = 1, 1
    for _ in range(n - 2):
        a, b = b, a + b
    return Made(
        f"What is the Fibonacci number F({n}), with F(1) = F(2) = 1?",
        f"a, b = 1, 1\nfor _ in range({n} - 2):\n    a, b = b, a + b\nprint(b)",
        b,
    )


KINDS: tuple[Callable[[random.Random], Made], ...] = (
    digits_of_a_power, remainder_of_a_power, sum_of_squares, sum_of_multiples, divisible_numbers, primes, collatz,
    fibonacci,
)  # fmt: skip


def main() -> None:
    for kind in KINDS:
        made = kind(random.Random(0))
        print(f"{made.text}\n  {made.answer}\n\n{made.program}\n")


if __name__ == "__main__":
    main()
