"""The program in a model's text, its last expression, and what is shown of its output."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest

from tools.code.shown import shown
from tools.code.source import program_in, with_figures, with_last_expression


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("print(1)", "print(1)"),
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("```\nprint(1)\n```", "print(1)\n"),
        ("```py\nprint(1)", "print(1)"),
        ("First:\n```python\na = 1\n```\nthen\n```python\nprint(a)\n```\ndone", "a = 1\n\nprint(a)\n"),
        ("text = '''\n```python\nx\n```\n'''", "text = '''\n```python\nx\n```\n'''"),
        ("  ```python\n  print(1)\n  ```", "  print(1)\n"),
        ("a ``` b", "a ``` b"),
        ("```c++\nint x;\n```", "int x;\n"),
    ],
)
def test_fences_are_removed(text: str, program: str) -> None:
    assert program_in(text) == program


@pytest.mark.parametrize(
    "text",
    [
        "```" + "a" * 99_000,
        "```" + " " * 99_000,
        "```python" + " print(1)" * 11_000,
        "import a" + ".a" * 49_000,
        "import a\\\n" + ".a\\\n" * 4_000 + ".a",
        "x = 1\n" + "x\n" * 10_000,
    ],
    ids=["word", "spaces", "one line", "long name", "lines of a long name", "long program"],
)
def test_what_takes_long_to_read_is_left_to_the_interpreter(text: str) -> None:
    """These are read on the event loop; each took many seconds, or grows with the square of its length."""
    assert program_in(text) == text
    assert with_last_expression(text) == text


def printed(code: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(with_last_expression(code), "main", "exec"), {})  # noqa: S102
    return out.getvalue()


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("1 + 1", "2\n"),
        ("x = 5\nx", "5\n"),
        ("x = 5\nx  # the value", "5\n"),
        ("x = 5; x", "5\n"),
        ("x = 5\nx;", ""),
        ("x = 5", ""),
        ("None", ""),
        ("print(3)", "3\n"),
        ("[].append(1)", ""),
        ("1, 2", "(1, 2)\n"),
        ("(1,\n 2)", "(1, 2)\n"),
        ("'ä' + 'ö'; 'é' + 'ü'", "éü\n"),
        ("sum(n for n in range(4))", "6\n"),
        ("[n\n for n in range(2)]", "[0, 1]\n"),
        ("(n for n in ())", None),
        ("lambda: 1", None),
        ("'a' if 1 else 'b'", "a\n"),
        ("not 1", "False\n"),
        ("(y := 7)", "7\n"),
        ("'text'", "text\n"),
        ("def f():\n    return 1\nf()", "1\n"),
        ("if 1:\n    5", ""),
        ("'''a\nb'''", "a\nb\n"),
        ("x = 1\r\nx + 1\r\n", "2\n"),
        ("x = r'\\d'\nx", "\\d\n"),
        ("x = 1\n\x0cx", "1\n"),
        ("1\n\n\n", "1\n"),
        ("", ""),
        ("# nothing", ""),
    ],
)
def test_a_last_expression_is_printed(code: str, output: str | None) -> None:
    if output is not None:
        assert printed(code) == output
    else:
        assert printed(code).startswith("<")


@pytest.mark.parametrize("code", ["def f(:", "(" * 5000, "-" * 100_000 + "1", "x = \x00", "await f()", "yield 1\n)"])
def test_code_that_does_not_parse_stays(code: str) -> None:
    assert with_last_expression(code) == code


def test_lines_stay_where_they_are() -> None:
    code = "x = 0\n\n1 / x"
    assert with_last_expression(code).splitlines()[2] == "(lambda value: value is None or print(value))(1 / x)"
    assert with_figures(code).startswith(code + "\n")


def test_figures_are_nothing_without_matplotlib() -> None:
    exec(compile(with_figures("x = 1"), "main", "exec"), {})  # noqa: S102


ENDED = "the program ended with the exit code"


def run(status: str = "Finished", code: int | None = 0, out: str = "", err: str = "") -> dict[str, Any]:
    good = status == "Finished" and code == 0
    result = {"status": status, "return_code": code, "stdout": out, "stderr": err, "execution_time": 0.1}
    return {"status": "Success" if good else "Failed", "run_result": result, "compile_result": None}


@pytest.mark.parametrize(
    ("answer", "text", "error"),
    [
        (run(out="4\n"), "4", None),
        (run(), "(no output)", None),
        (run(out="4\n", err="a warning\n"), "4\na warning", None),
        (run(code=1, err="Traceback\nValueError: x\n"), "Traceback\nValueError: x", "ValueError: x"),
        (
            run(code=3, out="4"),
            "4\nError: the program ended with the exit code 3",
            "the program ended with the exit code 3",
        ),
        (
            run("TimeLimitExceeded", None, "4\n"),
            "4\nError: the program took longer than 5 s and was stopped",
            "the program took longer than 5 s and was stopped",
        ),
        (
            {"status": "Failed", "run_result": None, "compile_result": run(code=1, err="error: ;")["run_result"]},
            "error: ;",
            "error: ;",
        ),
        (
            {"status": "Failed"},
            "Error: the program ended with the exit code None",
            "the program ended with the exit code None",
        ),
    ],
)
def test_what_the_model_reads(answer: dict[str, Any], text: str, error: str | None) -> None:
    assert shown(answer, 100, 5.0) == (text, error)
