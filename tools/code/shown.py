"""What the model reads of a program's end."""

from __future__ import annotations

import re
from typing import Any

_TOKEN = re.compile(r"[A-Za-z]{1,7}|[0-9]{1,3}|\s*\n|[^\sA-Za-z0-9]")

NOTHING = "(no output)"


def cut_middle(text: str, most: int) -> str:
    """Return a text of about `most` tokens: its beginning and its end, with a mark between them.

    A program's last lines matter as much as its first: the result, or the error. The tool knows no
    tokenizer; the estimate is rather too large, and the agent's `max_tool_response_tokens` is
    exact.
    """
    ends = [match.end() for match in _TOKEN.finditer(text)]
    if len(ends) <= most:
        return text
    head = text[: ends[most // 2 - 1]] if most > 1 else ""
    tail = text[ends[len(ends) - (most - most // 2) - 1] :]
    return f"{head}\n[cut: about {len(ends) - most} tokens]\n{tail}"


def shown(answer: dict[str, Any], most_tokens: int, seconds: float) -> tuple[str, str | None]:
    """Return the text that the model reads, and the error in short if the program failed.

    Args:
        answer: of `/run_code`.
        most_tokens: of stdout, and of stderr.
        seconds: the time limit, to be named.
    """
    run = answer.get("run_result") or answer.get("compile_result") or {}
    stdout, stderr = (cut_middle(str(run.get(key) or ""), most_tokens) for key in ("stdout", "stderr"))
    text = stdout
    if stderr.strip():
        text += ("\n" if text and not text.endswith("\n") else "") + stderr

    error = None
    if run.get("status") == "TimeLimitExceeded":
        error = f"the program took longer than {seconds:g} s and was stopped"
    elif answer.get("status") != "Success":
        lines = stderr.strip().splitlines()
        code = run.get("return_code")
        error = lines[-1][:300] if lines else f"the program ended with the exit code {code}"
    if error is not None and error not in text:
        text += ("\n" if text and not text.endswith("\n") else "") + f"Error: {error}"
    return text.rstrip("\n") or NOTHING, error
