"""A stream that a run can lose: a closed terminal, a reader that went away, a full disk."""

from __future__ import annotations

from typing import Any, TextIO


class LossyStream:
    """Pass text on to a stream until it fails; drop it from then on.

    A run does not end because nobody can read its output any more: a closed terminal sends SIGHUP,
    and the run then still has a checkpoint to write.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lost = False

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        if not self._lost:
            try:
                return self._stream.write(text)
            except OSError:
                self._lost = True
        return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        if not self._lost:
            try:
                self._stream.flush()
            except OSError:
                self._lost = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
