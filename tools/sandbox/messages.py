"""Requests and answers: those of Sandbox Fusion, and those of sessions."""

from __future__ import annotations

import base64
import binascii
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

MOST_FILES = 256


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


class CellRequest(BaseModel):
    """A cell of a session."""

    model_config = ConfigDict(extra="ignore")

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


class SessionRequest(BaseModel):
    """A session to open."""

    model_config = ConfigDict(extra="ignore")

    language: str = "python"
    memory_limit_MB: int = Field(-1, description="-1: the server's default")
    lease_s: float | None = Field(
        None, gt=0, description="seconds without a call or a renewal after which the session ends; at most, and by "
        "default, --session-idle-s",
    )  # fmt: skip


class RenewRequest(BaseModel):
    """Sessions whose clients still live."""

    model_config = ConfigDict(extra="ignore")

    session_ids: list[str] = Field(max_length=4096)


class CloseRequest(BaseModel):
    """A session to end."""

    model_config = ConfigDict(extra="ignore")

    session_id: str


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
