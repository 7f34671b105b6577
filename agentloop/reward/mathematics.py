"""Compare mathematical answers: as text, as numbers, then symbolically with math-verify.

math-verify computes with sympy, which an answer such as `9^{9^{9}}` keeps busy for ever, in code
that no signal interrupts. It therefore runs in a forked process with limits of time and memory, and
an answer that exceeds them is wrong. Call `same_answer` in a process of its own, as
`run_in: process` does: a program with threads should not fork.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import resource
import select
import signal
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from agentloop.errors import RewardError
from agentloop.reward.boxed import last_boxed

TIME_LIMIT_S = 3.0
MEMORY_LIMIT = 2**30
"""Bytes that a comparison may take beyond what the process has already."""

LONGEST_ANSWER = 400
"""Characters of an answer; a longer one is wrong, however it would be read."""

LONGEST_VOTE = 200
"""Characters of an answer that counts as a vote in maj@n."""

WARM = ((r"\frac{1}{2}+\sqrt{3}", "x"), (r"2\pi", "6.28"), ("(1,2)", r"\{1,2\}"), (r"12\frac{1}{2}", "12.5"))
"""Comparisons that use most of the parser."""

_SPACES = re.compile(r"\\[,;:!> ]|~|\s+")
_UNITS = re.compile(
    r"(?:square|cubic|sq\.?|cu\.?)?(?:units?|inch(?:es)?|in|feet|foot|ft|yards?|yd|miles?|mi|meters?|metres?|m|"
    r"centimeters?|cm|millimeters?|mm|kilometers?|km|degrees?|deg|radians?)\.?(?:\^?\{?[23]\}?)?$"
)
_DEGREES = re.compile(r"\^?\{?\\circ\}?|°|\\degree")
_TEXT = re.compile(r"\\(?:text|mathrm|textrm|textbf|mathbf|mbox|operatorname)\{([^{}]*)\}")
_NAME = re.compile(r"^(?:m?\\?(?:angle|overline|overarc|widehat|arc)?\{?[A-Za-z]{1,4}\}?)=(?=.)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")
_FRACTION = re.compile(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}$|(-?)(\d+)/(\d+)$")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)$")


def normalized(answer: str) -> str:
    r"""Return an answer without what does not change its value.

    Removed are dollar signs, spaces, `\left` and `\right`, units and degrees, separators of
    thousands, a name in front (`x =`), and a final period; `\dfrac` becomes `\frac`.
    """
    text = answer.strip().replace("\\$", "").replace("$", "").replace("\\(", "").replace("\\)", "")
    text = text.replace("\\left", "").replace("\\right", "").replace("−", "-").replace("\\%", "").replace("%", "")
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"√\s*\(?(\d+)\)?", r"\\sqrt{\1}", text)
    text = _DEGREES.sub("", _TEXT.sub(r"\1", text))
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", text))
    text = _SPACES.sub("", text).rstrip(".")
    without = _UNITS.sub("", text)
    text = without if without and without[-1] in "0123456789})" else text
    return _THOUSANDS.sub("", _NAME.sub("", text)).rstrip(".")


def same_answer(answer: str, truth: str) -> bool:
    """Whether an answer has the value of the ground truth.

    Raises:
        RewardError: math-verify is needed and not installed.
        ValueError: the ground truth is missing.
    """
    if not truth.strip():
        raise ValueError("the ground truth is missing")
    if len(answer) > LONGEST_ANSWER:
        return False
    given, wanted = normalized(answer), normalized(truth)
    if not given:
        return False
    if given == wanted:
        return True
    numbers = _rational(given), _rational(wanted)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0] == numbers[1]
    return _limited(lambda: _verify(given, wanted))


def boxed_correct(text: str, ground_truth: object) -> bool:
    r"""Whether the last complete `\boxed{}` of a text has the value of the ground truth.

    Args:
        ground_truth: text, or a number.

    Raises:
        RewardError, ValueError: as `same_answer`.
    """
    return same_answer(last_boxed(text) or "", "" if ground_truth is None else str(ground_truth))


def boxed_vote(text: str) -> str:
    r"""Return the last complete `\boxed{}` of a text as a vote for maj@n: normalized; or ""."""
    return normalized((last_boxed(text) or "")[:LONGEST_VOTE])


def _rational(text: str) -> Fraction | None:
    """Return the value of a plain number or fraction, else None."""
    if _NUMBER.match(text):
        return Fraction(text)
    match = _FRACTION.match(text)
    if match is None:
        return None
    sign, above, below = match.group(1, 2, 3) if match.group(2) else match.group(4, 5, 6)
    return None if not int(below) else Fraction(int(above), int(below)) * (-1 if sign else 1)


def _verify(given: str, wanted: str) -> bool:
    """Compare with math-verify, which sets no limits of its own: its caller does."""
    from math_verify import parse, verify

    found = [parse(f"${text}$", parsing_timeout=None, raise_on_error=False) for text in (wanted, given)]
    return all(found) and bool(verify(*found, timeout_seconds=None, raise_on_error=False))


def _limited(compare: Callable[[], bool]) -> bool:
    """Call a comparison in a forked process; one that is killed or raises found no equality."""
    _warm()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(compare, writing)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], TIME_LIMIT_S)
        return bool(ready) and os.read(reading, 1) == b"1"
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@lru_cache(maxsize=1)
def _warm() -> None:
    """Import and use math-verify once, so that its parser's tables are there in each fork.

    Raises:
        RewardError: it is not installed.
    """
    try:
        import math_verify  # noqa: F401
    except ImportError as exc:
        raise RewardError("math-verify is not installed", "pip install 'agentloop-rl[math]'") from exc

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of limits, which are ours
    for one, other in WARM:
        _verify(one, other)


def _answer(compare: Callable[[], bool], writing: int) -> None:
    """Be the forked process: write `1` if the comparison finds equality, and end."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_LIMIT, taken + MEMORY_LIMIT))
    except (OSError, ValueError):
        pass  # not Linux: the time limit remains
    try:
        os.write(writing, b"1" if compare() else b"0")
    except BaseException:  # noqa: BLE001  # sympy raises anything, also RecursionError and MemoryError
        os.write(writing, b"0")
    finally:
        os._exit(0)
