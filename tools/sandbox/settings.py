"""Every option of the sandbox server, each in one place."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from agentloop.config.section import Seconds, Section

MB = 2**20

NO_SANDBOX_OPTION = "--run-programs-without-a-sandbox"


class SandboxSettings(Section):
    """All settings of one server. A field is an option of `agentloop sandbox serve`."""

    model_config = ConfigDict(frozen=True)

    host: str = Field("127.0.0.1", description="address to bind; any but loopback needs a token")
    port: int = Field(8080, ge=0, le=65535, description="0: a free one")
    token_file: Path | None = Field(
        None, description="file with the bearer token; null: none on loopback, a new one elsewhere"
    )
    max_running: int = Field(16, ge=1, le=500, description="programs that run at once; others wait")
    warm: int = Field(8, ge=0, le=500, description="sandboxes that wait for a program")
    max_queue: int = Field(4096, ge=0, description="programs that may wait; beyond, 503 with Retry-After")
    max_sessions: int = Field(64, ge=0, le=500, description="sessions at once; beyond, 503 with Retry-After")
    session_idle_s: Seconds = Field(600.0, description="a session ends when it was not used for so long")
    max_run_timeout_s: Seconds = Field(120.0, description="longest run_timeout and compile_timeout that are granted")
    memory_mb: int = Field(
        1024, ge=64, le=2**20, description="memory of a program, if it asks for none; the most that is granted"
    )
    disk_mb: int = Field(64, ge=1, le=2**20, description="size of each of its folders: home, /tmp, /dev/shm")
    max_files: int = Field(16384, ge=64, description="files that a program may create")
    max_processes: int = Field(64, ge=4, le=4096, description="processes and threads of a program")
    max_open_files: int = Field(256, ge=32, le=65536, description="open files of each of its processes")
    max_output_mb: float = Field(1.0, gt=0, le=64, description="stdout and stderr, each; a program that writes more "
        "is stopped")  # fmt: skip
    loopback: bool = Field(False, description="let programs use TCP and UDP on a loopback device of their own")
    cpus: float = Field(1.0, gt=0, le=256, description="cores of a program; needs cgroups")
    cgroup: str = Field(
        "auto", description="auto: limits by cgroup v2 if the server may make them; off; or a folder that it may use"
    )
    python: Path = Field(
        Path(sys.executable), description="interpreter that programs see, with its site-packages; null: this one"
    )
    preload: tuple[str, ...] = Field(
        (), description="module that a waiting sandbox has imported already, such as numpy"
    )
    run_programs_without_a_sandbox: bool = Field(
        False, description="start although programs then have all rights of this user: for machines that hold nothing"
    )

    @property
    def output_bytes(self) -> int:
        return int(self.max_output_mb * MB)

    def given_memory(self, asked_mb: int) -> int:
        """Return a program's memory in bytes; `asked_mb` of 0 or less: the default."""
        return (asked_mb if asked_mb > 0 else self.memory_mb) * MB

    def plain(self) -> dict[str, Any]:
        return super().plain() | {"cores": os.cpu_count()}
