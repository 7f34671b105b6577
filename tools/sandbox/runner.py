"""`Runner`: from a request to its answer, by one sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from agentloop.errors import ConfigError, ToolError
from tools.sandbox.isolation.bubblewrap import Bubblewrap
from tools.sandbox.isolation.cgroup import find_cgroups
from tools.sandbox.languages import PYTHON, Language, installed
from tools.sandbox.messages import (
    CellRequest,
    CommandResult,
    CommandStatus,
    RunCodeAnswer,
    RunCodeRequest,
    RunStatus,
)
from tools.sandbox.pool import Pool
from tools.sandbox.settings import MB, SandboxSettings
from tools.sandbox.usage import UsageWatch
from tools.sandbox.worker import Died, Event, Stopped, Worker

log = logging.getLogger(__name__)

KILLED = -9
"""The return code of a program that was stopped at a limit."""

COMPILER_MB = 1024
SPARE_ADDRESS_SPACE = 1024 * MB
"""Address space beyond the memory: libraries are mapped, and reserve some of it."""

INTERRUPT_S = 1.0
"""Seconds that a cell has after its interrupt."""


class WrongRequest(Exception):
    """The request cannot be served by this server; the text says why.

    Args:
        fix: what to do.
    """

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


class Runner:
    """Runs programs and cells. Made and closed on the event loop.

    Attributes:
        pool: the sandboxes.
        languages: what can be run, by each name.
    """

    def __init__(self, settings: SandboxSettings, launcher: Bubblewrap) -> None:
        self.settings = settings
        self.languages = installed()
        self._launcher = launcher
        self._cgroups = find_cgroups(settings) if launcher.sandboxed else None
        self._watch = UsageWatch(settings.max_files, settings.max_processes) if launcher.sandboxed else None
        self.pool = Pool(settings, launcher, self._cgroups)

    @property
    def sandboxed(self) -> bool:
        return self._launcher.sandboxed

    @property
    def limited_by_cgroups(self) -> bool:
        return self._cgroups is not None

    async def close(self) -> None:
        """End everything that runs."""
        await self.pool.close()
        if self._watch is not None:
            await asyncio.to_thread(self._watch.close)
        if self._cgroups is not None:
            self._cgroups.close()

    def language(self, name: str) -> Language:
        """Return a language by name.

        Raises:
            WrongRequest: it is unknown or not installed.
        """
        if name not in self.languages:
            known = ", ".join(dict.fromkeys(language.name for language in self.languages.values()))
            raise WrongRequest(f"the language {name[:40]!r} is not installed on this server", f"it runs: {known}")
        return self.languages[name]

    def check_limits(self, memory_mb: int, **seconds: float) -> None:
        """Refuse more than this server grants.

        Raises:
            WrongRequest: names the field and the option.
        """
        if memory_mb > self.settings.memory_mb:
            raise WrongRequest(
                f"memory_limit_MB {memory_mb} is more than this server grants ({self.settings.memory_mb})",
                "ask for less, or start the server with a larger --memory-mb",
            )
        for name, value in seconds.items():
            if value > self.settings.max_run_timeout_s:
                raise WrongRequest(
                    f"{name} {value:g} is more than this server grants ({self.settings.max_run_timeout_s:g})",
                    "ask for less, or start the server with a larger --max-run-timeout-s",
                )

    async def run(self, request: RunCodeRequest) -> RunCodeAnswer:
        """Run one program.

        Raises:
            WrongRequest: unknown language, or more than is granted.
            QueueFull: too many programs wait.
            ToolError: a sandbox could not be started.
        """
        language = self.language(request.language)
        self.check_limits(
            request.memory_limit_MB, run_timeout=request.run_timeout, compile_timeout=request.compile_timeout
        )
        async with self.pool.place():
            memory = self.settings.given_memory(request.memory_limit_MB)
            worker = await self.pool.begin(lambda worker: self._job(worker, language, request), memory)
            try:
                with self.watched(worker, memory):
                    return await self._result(worker, language, request)
            finally:
                await self.pool.end(worker)

    @contextmanager
    def watched(self, worker: Worker, memory: int) -> Iterator[None]:
        """Hold a running sandbox to the limits of its processes together."""
        if self._watch is not None:
            self._watch.add(worker, memory)
        try:
            yield
        finally:
            if self._watch is not None:
                self._watch.remove(worker)

    def limits(self, language: Language, memory_mb: int, seconds: float | None) -> dict[str, int | None]:
        """Return the resource limits of each process."""
        memory = self.settings.given_memory(memory_mb)
        return {
            "cpu_s": None if seconds is None else int(seconds) + 2,
            "data": memory,
            "address_space": None if language.reserves else memory + SPARE_ADDRESS_SPACE,
            # Without a namespace, all processes of the user count.
            "processes": self.settings.max_processes if self.sandboxed else None,
            "file_size": self.settings.disk_mb * MB,
            "open_files": self.settings.max_open_files,
        }

    def _job(self, worker: Worker, language: Language, request: RunCodeRequest) -> dict[str, Any]:
        return {
            "op": "run",
            "sandboxed": self.sandboxed,
            "folder": worker.folder,
            "path": f"{worker.folder}/{language.file}",
            "files": [(language.file, _encoded(request.code)), *request.contents()],
            "stdin": _encoded(request.stdin or ""),
            "compile": list(language.compiler),
            "compile_limits": self.limits(language, COMPILER_MB, request.compile_timeout),
            "command": list(language.command),
            "limits": self.limits(language, request.memory_limit_MB, request.run_timeout),
            "fetch": list(request.fetch_files),
        }

    async def _result(self, worker: Worker, language: Language, request: RunCodeRequest) -> RunCodeAnswer:
        compiled = None
        if language.compiler:
            compiled, event = await self.observed(worker, "compiled", request.compile_timeout)
            if compiled.status is not CommandStatus.FINISHED or compiled.return_code != 0 or event is None:
                return RunCodeAnswer(status=RunStatus.FAILED, compile_result=compiled)
            worker.send({"op": "go on"})

        result, event = await self.observed(worker, "done", request.run_timeout)
        return answer(result, event, request, compiled)

    async def observed(self, worker: Worker, name: str, timeout_s: float) -> tuple[CommandResult, Event | None]:
        """Wait for the end of what was sent; return how it ended, and its message.

        A sandbox that breaks counts as a program that failed: whatever reaches this place came from
        inside, and a program that could make its runs count as failures of the sandbox would not be
        scored for them.
        """
        started = time.monotonic()
        status, code, note, event = CommandStatus.FINISHED, KILLED, "", None
        try:
            event = await worker.event(timeout_s)
            if event.name not in (name, "ended"):
                raise Died(event.name)
            code = event.return_code if event.return_code is not None else 1
            note = event.fault or ""
        except TimeoutError:
            status = CommandStatus.TIME_LIMIT
        except Stopped as exc:
            note = self._limit_text(str(exc))
        except Died:
            note = self._limit_text("memory") if worker.out_of_memory else "the program ended its sandbox"
        seconds = time.monotonic() - started
        stdout, stderr = worker.stdout.take(), worker.stderr.take()
        if note:
            stderr += f"{(stderr and not stderr.endswith(chr(10)) and chr(10)) or ''}[sandbox: {note}]\n"
        return_code = None if status is CommandStatus.TIME_LIMIT else code
        return (
            CommandResult(
                status=status, execution_time=seconds, return_code=return_code, stdout=stdout, stderr=stderr
            ),
            event,
        )  # fmt: skip

    def _limit_text(self, reason: str) -> str:
        settings = self.settings
        text = {
            "memory": "more memory than its limit",
            "output": f"more output than {settings.max_output_mb:g} MB",
            "files": f"more than {settings.max_files} files",
            "processes": f"more than {settings.max_processes} processes",
        }[reason]
        return f"the program was stopped: {text}"


def answer(
    result: CommandResult, event: Event | None, request: CellRequest, compiled: CommandResult | None = None
) -> RunCodeAnswer:
    """Return the answer to a request from how its program ended."""
    good = result.status is CommandStatus.FINISHED and result.return_code == 0
    names = request.fetch_files
    files = {names[number]: content for number, content in (event.files if event else ()) if 0 <= number < len(names)}
    return RunCodeAnswer(
        status=RunStatus.SUCCESS if good else RunStatus.FAILED, compile_result=compiled, run_result=result, files=files
    )


async def check(settings: SandboxSettings, launcher: Bubblewrap) -> None:
    """Run one program, as a test of this machine.

    Raises:
        ConfigError: it did not run, or a module of `preload` cannot be imported; says what to
            change.
    """
    from tools.sandbox.isolation.diagnosis import what_to_change

    runner = Runner(settings.model_copy(update={"warm": 0}), launcher)
    try:
        found = await runner.run(RunCodeRequest(code="print(6 * 7)", language=PYTHON.name))
        said = found.run_result
        if said is None or said.stdout != "42\n":
            raise ConfigError(f"a test program did not run: {said}", "see docs/sandbox.md")
        for name in settings.preload:
            await _check_import(runner, name)
    except ToolError as exc:
        raise ConfigError(f"no program can be run: {exc.message}", what_to_change(exc.message)) from exc
    finally:
        with contextlib.suppress(ToolError):
            await runner.close()


async def _check_import(runner: Runner, name: str) -> None:
    code = f"import importlib\nimportlib.import_module({name!r})"
    said = (await runner.run(RunCodeRequest(code=code, language=PYTHON.name))).run_result
    if said is None or said.return_code != 0:
        lines = ((said.stderr if said is not None else "") or "it did not end in time").strip().splitlines()
        raise ConfigError(
            f"--preload: programs cannot import {name!r}: {lines[-1]}",
            "install it for the interpreter that programs see (--python), or leave it out",
        )


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
