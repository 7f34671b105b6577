"""Requests and answers: those of Sandbox Fusion, and those of sessions."""

from __future__ import annotations

import base64
import binascii
import difflib
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

MOST_FILES = 256

LIKE = 0.75
"""Similarity of two names from which on one is taken for the other, misspelled."""


class RunStatus(StrEnum):
    """The outcome of a request. Closed."""

    SUCCESS = "Success"
    FAILED = "Failed"  # the program or its compiler: exit code, signal, limit
    SANDBOX_ERROR = "SandboxError"  # not the program's fault


class CommandStatus(StrEnum):
    """The outcome of one process. Closed."""

    FINISHED = "Finished"
    ERROR = "Error"
    TIME_LIMIT = "TimeLimitExceeded"


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if not name or "\0" in name or path.is_absolute() or ".." in path.parts or path.name in ("", "."):
        raise ValueError(f"{name[:80]!r} is not the name of a file in the program's folder: no leading / and no ..")
    if len(name.encode(errors="replace")) > 1024:
        raise ValueError("a file's name is longer than 1,024 bytes")
    return name


FileName = Annotated[str, AfterValidator(_inside)]


class Request(BaseModel):
    """A request. Fields of other clients are kept aside: see `misnamed_field`."""

    model_config = ConfigDict(extra="allow")


class CellRequest(Request):
    """A cell of a session."""

    code: str
    run_timeout: float = Field(10.0, gt=0, description="seconds; beyond, the cell is interrupted")
    files: dict[FileName, str | None] = Field({}, max_length=MOST_FILES, description="base64 by name, to be written")
    fetch_files: list[FileName] = Field([], max_length=MOST_FILES, description="names of files to be returned")

    @field_validator("files")
    @classmethod
    def _base64(cls, value: dict[str, str | None]) -> dict[str, str | None]:
        for name, content in value.items():
            try:
                base64.b64decode(content or "", validate=True)
            except binascii.Error as exc:
                raise ValueError(f"the file {name!r} is not base64: {exc}") from exc
        return value

    def contents(self) -> list[tuple[str, bytes]]:
        """Return the files' names and contents; those without content are left out, as in Sandbox
        Fusion."""
        return [(name, base64.b64decode(content)) for name, content in self.files.items() if content is not None]


class RunCodeRequest(CellRequest):
    """A program; the fields are those of Sandbox Fusion, and `session_id`."""

    language: str = "python"
    session_id: str | None = Field(None, description="run the code as a cell of this session")
    request_id: str | None = Field(
        None, description="cells only: a cell that is sent again with the id of the last one is answered, not run again"
    )
    compile_timeout: float = Field(10.0, gt=0, description="seconds")
    stdin: str | None = None
    memory_limit_MB: int = Field(-1, description="-1: the server's default")


class SessionRequest(Request):
    """A session to open."""

    language: str = "python"
    memory_limit_MB: int = Field(-1, description="-1: the server's default")
    lease_s: float | None = Field(
        None, gt=0, description="seconds without a call or a renewal after which the session ends; at most, and by "
        "default, --session-idle-s",
    )  # fmt: skip


class RenewRequest(Request):
    """Sessions whose clients still live."""

    session_ids: list[str] = Field(max_length=4096)


class CloseRequest(Request):
    """A session to end."""

    session_id: str


REQUESTS: dict[str, type[Request]] = {
    "/run_code": RunCodeRequest, "/sessions": SessionRequest, "/renew_sessions": RenewRequest,
    "/close_session": CloseRequest,
}  # fmt: skip
"""The request of each path."""

PLAIN_WORDS = frozenset({"id", "s", "sec", "secs", "seconds", "ms", "mb", "gb", "bytes"})
"""Words of a field's name that say nothing about what it is."""

LIMITS = frozenset({"timeout", "memory", "lease"})
"""Words that only a limit has."""


def misnamed_field(request: Request) -> tuple[str, str] | None:
    """Return a field that was not read and was meant to be, and what it is called; None: there is
    none.

    Such a field is written much like one of the API, `timeout` or `memory_limit_mb`: its limit
    would silently not hold. What is like none of them is a field of a later Sandbox Fusion or of a
    client's own, and is ignored.
    """
    own = type(request).model_fields
    places = {name: path for path, model in REQUESTS.items() for name in model.model_fields if name not in own}
    for field, value in (request.model_extra or {}).items():
        near = [name for name in (*own, *places) if value is not None and _alike(field, name)]
        near.sort(key=lambda name: -_similarity(field, name))
        if here := [name for name in near if name in own]:
            return field, f"did you mean {' or '.join(map(repr, here))}?"
        if near:
            return field, f"{near[0]!r} is a field of {places[near[0]]}"
    return None


def _alike(given: str, known: str) -> bool:
    words, of_known = _words(given), _words(known)
    # `timeout` is part of run_timeout. The reverse does not hold: much has a word such as code.
    part = bool(words) and words <= of_known
    return part or bool(words & of_known & LIMITS) or _similarity(given, known) >= LIKE


def _words(name: str) -> set[str]:
    words = set(name[:100].lower().replace("-", "_").split("_")) - PLAIN_WORDS - {""}
    return words - {"time"} | {"timeout"} if "time" in words else words


def _similarity(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first[:100].lower(), second.lower()).ratio()


class SessionAnswer(BaseModel):
    """An open session."""

    session_id: str
    idle_s: float = Field(description="seconds without a call or a renewal after which the session ends")


class CommandResult(BaseModel):
    """How a program or its compiler ended."""

    status: CommandStatus
    execution_time: float | None = Field(None, description="seconds")
    return_code: int | None = Field(None, description="negative: the signal that ended it")
    stdout: str | None = None
    stderr: str | None = None


class RunCodeAnswer(BaseModel):
    """The answer to `/run_code` and to a cell."""

    status: RunStatus
    message: str = ""
    compile_result: CommandResult | None = None
    run_result: CommandResult | None = None
    executor_pod_name: str | None = None
    files: dict[str, str] = Field({}, description="base64 by name; missing files are left out")
    session_ended: bool | None = Field(None, description="cells only: whether the session is gone")
