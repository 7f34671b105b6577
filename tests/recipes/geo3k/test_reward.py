r"""The reward of geo3k: 0.9 for the value of the last \boxed{} answer, 0.1 for the form."""

from __future__ import annotations

import re
import time

import pytest

from agentloop.reward import mathematics
from agentloop.reward.boxed import last_boxed
from agentloop.types import StepReward, Task, Trajectory, Turn
from recipes.geo3k.reward import accuracy, check, compute_score, has_format, score

RIGHT: list[tuple[str, str]] = [
    # text and LaTeX that differ in form only: no symbolic comparison is needed
    (r"\boxed{12}", "12"),
    (r"The answer is \boxed{12}.", "12"),
    (r"\boxed{ 12 }", "12"),
    (r"\boxed{$12$}", "12"),
    (r"\boxed{12.}", "12"),
    (r"\boxed{12.0}", "12"),
    (r"\boxed{012}", "12"),
    (r"\boxed{+12}", "12"),
    (r"\boxed{-12}", "-12"),
    (r"\boxed{−12}", "-12"),
    (r"\boxed{.5}", "0.5"),
    (r"\boxed{1,000}", "1000"),
    (r"\boxed{12,345,678}", "12345678"),
    (r"\boxed{1000}", "1,000"),
    # units and degrees
    (r"\boxed{120^\circ}", "120"),
    (r"\boxed{120^{\circ}}", "120"),
    (r"\boxed{120°}", "120"),
    (r"\boxed{120 \text{ degrees}}", "120"),
    (r"\boxed{120\ degrees}", "120"),
    (r"\boxed{12 cm}", "12"),
    (r"\boxed{12\text{ cm}^2}", "12"),
    (r"\boxed{12\,\mathrm{m}}", "12"),
    (r"\boxed{12 square units}", "12"),
    (r"\boxed{12 in.}", "12"),
    (r"\boxed{\$12}", "12"),
    (r"\boxed{12\%}", "12"),
    # a name in front
    (r"\boxed{x = 12}", "12"),
    (r"\boxed{AB=12}", "12"),
    (r"\boxed{m\angle ABC = 45}", "45"),
    (r"\boxed{m\angle ABC = 45^\circ}", "45"),
    # fractions and roots
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\frac12}", "0.5"),
    (r"\boxed{1/2}", r"\frac{1}{2}"),
    (r"\boxed{-\frac{1}{2}}", "-0.5"),
    (r"\boxed{0.50}", "1/2"),
    (r"\boxed{5 \sqrt { 3 }}", r"5\sqrt{3}"),
    (r"\boxed{5\sqrt3}", r"5\sqrt{3}"),
    (r"\boxed{5√3}", r"5\sqrt{3}"),
    (r"\boxed{\left( 3, 4 \right)}", "(3,4)"),
    # several answers, nested and unfinished boxes
    (r"\boxed{1} no, \boxed{12}", "12"),
    (r"\boxed{\boxed{12}}", "12"),
    (r"\boxed{12} and then \boxed{13", "12"),
    (r"\fbox{12}", "12"),
    (r"} } {{ \boxed{12} {{", "12"),
    (r"\{ \boxed{12} \}", "12"),
    ("<think>\n\\boxed{3}\n</think>\n\\boxed{12}\n", "12"),
]
SYMBOLIC: list[tuple[str, str]] = [
    (r"\boxed{\sqrt{75}}", r"5\sqrt{3}"),
    (r"\boxed{\frac{3}{\sqrt{2}}}", r"\frac{3\sqrt{2}}{2}"),
    (r"\boxed{1+\sqrt{8}}", r"2\sqrt{2}+1"),
    (r"\boxed{11\frac{1}{2}}", "11.5"),
    (r"\boxed{2 \cdot 18\pi}", r"36\pi"),
    (r"\boxed{10!}", "3628800"),
]
WRONG: list[tuple[str, str]] = [
    ("", "12"),
    ("12", "12"),  # not in a box
    (r"\boxed{}", "12"),
    (r"\boxed{ }", "12"),
    (r"\boxed{12", "12"),
    (r"\boxed 12", "12"),
    (r"boxed{12}", "12"),
    (r"\boxed{13}", "12"),
    (r"\boxed{-12}", "12"),
    (r"\boxed{12} no, \boxed{13}", "12"),
    (r"\boxed{12 or 13}", "12"),
    (r"\boxed{12, 13}", "12"),
    (r"\boxed{1.2}", "12"),
    (r"\boxed{12000}", "12"),
    (r"\boxed{8.66}", r"5\sqrt{3}"),
    (r"\boxed{3.14}", r"\pi"),
    (r"\boxed{5\sqrt{2}}", r"5\sqrt{3}"),
    (r"\boxed{(4, 3)}", "(3, 4)"),
    (r"\boxed{\frac{2}{1}}", r"\frac{1}{2}"),
    (r"\boxed{\frac{1}{0}}", "12"),
    (r"\boxed{\infty}", "12"),
    (r"\boxed{x}", "12"),
    (r"\boxed{12x}", "12"),
    (r"\boxed{\text{the ground truth}}", "12"),
    (r"\boxed{B}", "12"),
    (r"\boxed{" + "1" * 401 + "}", "1" * 401),  # longer than any answer
]


@pytest.mark.parametrize(("text", "truth"), RIGHT)
def test_an_answer_of_another_form_is_right(text: str, truth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "_limited", lambda compare: pytest.fail("no symbolic comparison is needed"))
    assert accuracy(text, truth) == 1.0


@pytest.mark.parametrize(("text", "truth"), SYMBOLIC)
def test_an_answer_of_the_same_value_is_right(text: str, truth: str) -> None:
    assert accuracy(text, truth) == 1.0


@pytest.mark.parametrize(("text", "truth"), WRONG)
def test_any_other_answer_is_wrong(text: str, truth: str) -> None:
    assert accuracy(text, truth) == 0.0


def test_the_tables_are_long_enough() -> None:
    assert len(RIGHT) + len(SYMBOLIC) + len(WRONG) >= 60


def test_an_answer_that_never_ends_is_killed_and_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "TIME_LIMIT_S", 0.5)
    accuracy(r"\boxed{\sqrt{75}}", "1")  # math-verify is loaded before the clock starts
    begin = time.perf_counter()
    assert accuracy(r"\boxed{9^{9^{9^{9}}}}", "12") == 0.0
    assert time.perf_counter() - begin < 60  # sympy would compute for ever


FORMS = {
    "<think>so</think>\\boxed{1}": True,
    "<think></think>\\boxed{}": True,
    "<think>a</think> b </think> \\boxed{1} and more": True,
    "\n<think>a</think>\n\\boxed{1}": True,
    "<think>a\n\nb</think>\n\n\\boxed{\\frac{1}{2}}\n": True,
    "<think>\\boxed{1}</think>": False,
    "<think>a</think> 1": False,
    "<think>a</think> \\boxed{1": False,
    "<think>a \\boxed{1}": False,
    "a</think>\\boxed{1}": False,
    "x <think>a</think>\\boxed{1}": False,
    "\\boxed{1}": False,
    "": False,
}


@pytest.mark.parametrize("text", FORMS)
def test_the_form_of_the_whole_text(text: str) -> None:
    published = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)
    assert has_format(text) == FORMS[text] == bool(published.fullmatch(text.lstrip()))


def test_the_score_is_nine_parts_answer_and_one_part_form() -> None:
    good = r"<think>3 * 4</think> \boxed{12}"
    assert [compute_score(text, "12") for text in (good, r"\boxed{12}", good.replace("12", "13"), "")] == [
        1.0,
        0.9,
        0.1,
        0.0,
    ]


def trajectory(**fields: object) -> Trajectory:
    return Trajectory([1], [0], [None], [None], 1, **fields)  # type: ignore[arg-type]


def test_the_episodes_score_has_parts_and_a_vote() -> None:
    task = Task("0", "a", [], ground_truth="12")
    found = score(task, r"<think>so</think>\boxed{x = 12}", trajectory())
    assert found == {"score": 1.0, "accuracy": 1.0, "format": 1.0, "answer": "12"}
    turn = Turn(0, 1, r"\boxed{12}", "stop", reasoning="so")  # type: ignore[arg-type]
    assert score(task, turn.text, trajectory(turns=[turn]))["format"] == 1.0, "reasoning is put back"
    idle = [StepReward("calc_geo3k_reward", -0.05, 0, 1)] * 2
    assert score(task, r"\boxed{12}", trajectory(step_rewards=idle))["score"] == pytest.approx(0.8)
    with pytest.raises(ValueError, match="the ground truth is missing"):
        score(Task("0", "a", []), "x", trajectory())


@pytest.mark.parametrize(
    "text",
    [
        "x" * 100_000,
        r"\boxed{" * 14_000,
        r"\boxed{1}" * 11_000,
        r"\boxed{" + "{" * 99_000,
        "<think>" + "</think>" * 12_000,
        "<think></think>" + r"\boxed{" * 14_000,
        "<think>" * 14_000 + r"</think>\boxed{13}",
        r"\boxed{" + "1" * 100_000 + "}",
        r"\boxed{" * 7000 + "12" + "}" * 7000,
        "\\" * 100_000,
        r"\boxed{\frac{" * 7_000,
    ],
)
def test_the_time_of_100_000_characters_is_linear_in_them(text: str) -> None:
    """It is under 100 ms. The bound tells that from a quadratic time, which is minutes, on any machine."""
    begin = time.process_time()
    score(Task("0", "a", [], ground_truth="12"), text, trajectory())
    assert time.process_time() - begin < 2


def test_the_last_complete_box() -> None:
    assert last_boxed(r"\boxed{a} \boxed{\frac{1}{2}} \boxed{c") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{1 + \boxed{2}}") == "2"
    assert last_boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert last_boxed(r"\boxed{1\\} 2\}") == r"1\\"  # the line break of LaTeX escapes nothing
    assert last_boxed("none") is None and last_boxed(r"\boxed{}") == ""


def test_the_tools_verdict_takes_an_answer_with_and_without_its_box() -> None:
    assert [check(answer, "12") for answer in ("12", r"\boxed{12}", "x = 12", "13", "")] == ["1", "1", "1", "0", "0"]
