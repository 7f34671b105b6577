"""Where an exception of user code was raised: its frames, without the framework's own around them.

Agents, tools, interactions, rewards and row functions are user code. An exception of theirs fails
an episode, or is shown to the model, and the run goes on: without these frames nobody would see the
line that has to be corrected.
"""

from __future__ import annotations

import asyncio
import contextlib
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import agentloop.errors
from agentloop.errors import AgentloopError, CodeEnded
from agentloop.files import disk_error

Frame = tuple[str, int, str, str]
"""File, line number, function, and the text of the line."""

FIRST_FRAMES, LAST_FRAMES = 4, 12
"""Frames that are kept at both ends of a long traceback; a recursion has a thousand."""

LONGEST_LINE = 200
LONGEST_ERROR = 2_000
"""Characters of a source line, and of an exception's text, that are kept."""

_PARENT = Path(__file__).resolve().parents[1]
_FRAMEWORK = tuple(str(_PARENT / name) + "/" for name in ("agentloop", "rollout_server", "trainer"))
_PATHS = sysconfig.get_paths()
_LIBRARIES = (_PATHS["purelib"] + "/", _PATHS["platlib"] + "/")
_STANDARD = (_PATHS["stdlib"] + "/", _PATHS["platstdlib"] + "/")


@dataclass(frozen=True, slots=True)
class Fault:
    """An exception of user code in an episode.

    Attributes:
        source: what raised it: `the reward`, `the tool calculator`.
        error: `Type: text`, cut at `LONGEST_ERROR` characters.
        where: `file:line` in the user's own code; empty if unknown.
        traceback: its frames as Python prints them, outermost first.
    """

    source: str
    error: str
    where: str
    traceback: str

    @property
    def kind(self) -> str:
        """Equal for exceptions of one type from one line."""
        return f"{self.error.split(':', 1)[0]} at {self.where}"


def make_fault(source: str, error: str, frames: Sequence[Frame]) -> Fault:
    """Return a fault from frames, which `user_frames` found here or in another process."""
    where = place_of(frames)
    return Fault(source, error[:LONGEST_ERROR], where, _format(frames))


def user_frames(exc: BaseException) -> list[Frame]:
    """Return an exception's frames from the first of user code on; empty if there is none."""
    frames = [
        (frame.filename, frame.lineno or 0, frame.name, (frame.line or "")[:LONGEST_LINE])
        for frame in traceback.extract_tb(exc.__traceback__)
    ]
    for number, (file, *_) in enumerate(frames):
        if not is_framework(file) and not _is_standard(file):
            return frames[number:]
    return []


def place_of(frames: Sequence[Frame]) -> str:
    """Return `file:line` of the innermost frame of the user's own code; empty without frames."""
    own = [frame for frame in frames if not is_framework(frame[0]) and not _is_standard(frame[0])]
    mine = [frame for frame in own if not frame[0].startswith(_LIBRARIES)] or own
    return f"{mine[-1][0]}:{mine[-1][1]}" if mine else ""


def is_framework(file: str) -> bool:
    """Whether a file belongs to agentloop, rollout_server or trainer."""
    return file.startswith(_FRAMEWORK)


def _is_standard(file: str) -> bool:
    return file.startswith("<frozen ") or (file.startswith(_STANDARD) and not file.startswith(_LIBRARIES))


def _format(frames: Sequence[Frame]) -> str:
    left_out = len(frames) - FIRST_FRAMES - LAST_FRAMES
    lines = []
    for number, (file, line, function, text) in enumerate(frames):
        if left_out > 0 and FIRST_FRAMES <= number < FIRST_FRAMES + left_out:
            if number == FIRST_FRAMES:
                lines.append(f"  ... {left_out} frames left out")
            continue
        lines.append(f'  File "{file}", line {line}, in {function}')
        if text:
            lines.append(f"    {text}")
    return "\n".join(lines)


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Let what user code raises in the block be an `Exception`; a cancellation from outside is
    passed on.

    Raises:
        CodeEnded: the code called `sys.exit()`, or cancelled itself.
    """
    try:
        yield
    except SystemExit as exc:
        raise CodeEnded(f"sys.exit({exc.code!r}) was called", "raise an exception instead") from exc
    except asyncio.CancelledError as exc:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise CodeEnded(
            "CancelledError was raised, though nothing was cancelled", "see the line that raised it"
        ) from exc


# -- errors of another process --------------------------------------------------------------------


def error_to_json(exc: Exception) -> dict[str, Any]:
    """Describe an exception as data: errors of `agentloop.errors` by name, others by their text."""
    if isinstance(exc, OSError):
        exc = disk_error(exc) or exc
    if isinstance(exc, AgentloopError):
        return {"error": type(exc).__name__, "message": exc.message, "hint": exc.hint}
    return {"error": None, "message": f"{type(exc).__name__}: {exc}", "hint": None}


def error_from_json(data: dict[str, Any], otherwise: Callable[[str], AgentloopError]) -> AgentloopError:
    """Rebuild an exception that `error_to_json` described.

    Args:
        otherwise: makes the error from a message, if its type is not one of `agentloop.errors`.
    """
    kind = getattr(agentloop.errors, data["error"] or "", None)
    if isinstance(kind, type) and issubclass(kind, AgentloopError):
        return kind(data["message"], data["hint"])
    return otherwise(data["message"])
