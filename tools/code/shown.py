"""What the model reads of a program's end."""

from __future__ import annotations

from typing import Any

from tools.tokens import cut_middle

NOTHING = "(no output)"


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
