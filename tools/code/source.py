"""From what a model writes to the program that runs."""

from __future__ import annotations

import ast
import re
import warnings

from tools.parsing import parse

LONGEST_CODE = 100_000
"""Characters of a program."""

FIGURES = 4
"""Figures of one program that are returned."""

FIGURE_FILES = [f"agentloop-figure-{number}.png" for number in range(FIGURES)]

LONGEST_PARSED, MOST_DOTS = 20_000, 2_000
"""Characters of a program that is parsed here, and dots in it. Parsing holds up everything else in
this process, and the time for a long dotted name grows with the square of its length."""

# One repeat a line: with two that take the same characters, a line without an end takes the square
# of its length.
_FENCE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)

_SHOW = "(lambda value: value is None or print(value))("

_MARKS = re.compile(r" {4} *[~^][~^ ]*")
"""The line of a traceback that marks what failed in the one above."""

# One line, so that line numbers stay: it runs after a program that has drawn, and closes what it
# saves, so that the next cell of a session shows only its own.
_SAVE = (
    "import sys\\nplt = sys.modules.get('matplotlib.pyplot')\\n"
    f"for n, number in enumerate(plt.get_fignums()[:{FIGURES}] if plt else ()):\\n"
    "    plt.figure(number).savefig(f'agentloop-figure-{n}.png', bbox_inches='tight')\\n"
    "if plt: plt.close('all')\\n"
)


def program_in(text: str) -> str:
    """Return the program in a model's text: what is in its fences, or all of it.

    Several fenced blocks are one program. A fence that is not closed ends with the text.

    >>> program_in("Let me see.\\n```python\\nprint(1)\\n```\\nThat prints 1.")
    'print(1)\\n'
    """
    if "```" not in text or _parsed(text) is not None:
        return text
    blocks = [match[1] for match in _FENCE.finditer(text)]
    return "\n".join(blocks) if blocks else text


def with_last_expression(code: str) -> str:
    """Return a Python program that also prints the value of its last line, as a notebook does.

    The line stays where it is. A value of None is not printed, nor is one that a `;` follows. Code
    that does not parse is returned as it is: the interpreter explains it best. So is what is very
    long.

    >>> with_last_expression("x = 2\\nx + 1")
    'x = 2\\n(lambda value: value is None or print(value))(x + 1)'
    """
    tree = _parsed(code)
    last = tree.body[-1] if tree is not None and tree.body else None
    if not isinstance(last, ast.Expr):
        return code
    value = last.value
    if isinstance(value, ast.Await | ast.Yield | ast.YieldFrom):
        return code  # wrong at this place, which the interpreter says
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "print":
        return code

    # Columns count bytes of UTF-8. Parentheses around the value are not part of it, so that the
    # statement's own place is taken.
    assert last.end_lineno is not None and last.end_col_offset is not None
    lines = [line.encode() for line in _lines(code)]
    start = sum(map(len, lines[: last.lineno - 1])) + last.col_offset
    end = sum(map(len, lines[: last.end_lineno - 1])) + last.end_col_offset
    data = b"".join(lines)
    if data[end:].lstrip(b" \t").startswith(b";"):
        return code
    inner = b"(" + data[start:end] + b")" if isinstance(value, ast.Tuple | ast.GeneratorExp) else data[start:end]
    return (data[:start] + _SHOW.encode() + inner + b")" + data[end:]).decode()


def as_written(stderr: str, program: str, sent: str) -> str:
    """Return what a program wrote to stderr, with the lines of tracebacks as the model wrote them.

    Args:
        program: the model's.
        sent: what ran: `with_last_expression`, and `with_figures`.
    """
    if _SHOW not in sent or 'File "' not in stderr:
        return stderr
    changed = {
        ran.strip(): written.strip()
        for written, ran in zip(_lines(program), _lines(sent), strict=False)
        if ran != written and ran.strip()
    }
    lines, found = stderr.split("\n"), []
    place = 0
    while place < len(lines):
        ran = lines[place].strip()
        place += 1
        if ran not in changed:
            found.append(lines[place - 1])
            continue
        written = changed[ran]
        marks = lines[place][4:] if place < len(lines) and _MARKS.fullmatch(lines[place]) else ""
        place += bool(marks)
        begin = ran.find(_SHOW)
        if begin >= 0 and marks:
            first, last = len(marks) - len(marks.lstrip()), len(marks.rstrip())
            if begin <= first and last < begin + len(_SHOW):
                found[-1:] = []  # the frame that prints the value, which failed below
                continue
            added = len(_SHOW) + (not ran[begin + len(_SHOW) :].startswith(written[begin:]))
            marks = marks[:begin] + marks[begin + added :]
        found.append(f"    {written}")
        marks = marks[: len(written)].rstrip()
        if marks and (len(marks.lstrip()) < len(written) or "~" in marks):  # Python marks no call that is all of a line
            found.append(f"    {marks}")
    return "\n".join(found)


def with_figures(code: str) -> str:
    """Return a program that leaves the figures of matplotlib that are open at its end as files."""
    end = "" if code.endswith("\n") else "\n"
    return f'{code}{end}exec("{_SAVE}", {{}})\n'


def _parsed(code: str) -> ast.Module | None:
    if len(code) > LONGEST_PARSED or code.count(".") > MOST_DOTS:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in the model's strings
        try:
            return parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def _lines(code: str) -> list[str]:
    """Return the lines as Python counts them: form feeds and the like do not end one."""
    return re.findall(r"[^\n\r]*(?:\r\n|\n|\r)|[^\n\r]+$", code)
