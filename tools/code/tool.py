"""`CodeInterpreter`: the model runs programs in a sandbox."""

from __future__ import annotations

import asyncio
import base64
import binascii
import copy
import re
import secrets
from dataclasses import dataclass, field
from typing import Any, ClassVar

from agentloop.errors import AgentloopError, ImageError, RequestRejected, ToolConfigError, ToolError
from agentloop.images import ImageFile, read_image
from agentloop.runtime.pacing import Pacer
from agentloop.tool.base import NOTHING_FROM_ROW, Tool
from agentloop.types import Task, ToolResult
from tools.code.leases import LEASE_S, RENEW_S, Leases
from tools.code.shown import shown
from tools.code.source import FIGURE_FILES, LONGEST_CODE, as_written, program_in, with_figures, with_last_expression
from tools.http import Options, RateLimit, ServiceClient, ShownFailures
from tools.sandbox.languages import ALIASES, PYTHON

ELSEWHERE = ("enable_global_rate_limit", "name")
"""Keys that other frameworks know and that have no effect here: a rate belongs to one tool."""

RUN_PATH = "/run_code"

_FIELD = re.compile(r"\b(run_timeout|compile_timeout|memory_limit_MB|files|language)\b")
"""Fields of a request that a sandbox's error may name."""

CONFIG_KEYS: dict[str | None, tuple[str, ...]] = {
    "run_timeout": ("default_timeout", "timeout"), "compile_timeout": ("default_timeout", "timeout"),
    "memory_limit_MB": ("memory_limit_mb",), "language": ("default_language",),
}  # fmt: skip
"""Where a field comes from; the last one that is written counts."""

SHOWN_NAMES = {"sh": "bash", "cpp": "C++", "c++": "C++"} | dict.fromkeys(("javascript", "nodejs", "js"), "JavaScript")
"""Languages whose name for a model is not that of the config."""

PAUSE_S = 0.5
"""Before a program runs again that a Sandbox Fusion server could not run."""

CLOSE_S = 5.0


@dataclass(slots=True, eq=False)
class _Episode:
    """One episode's state.

    Attributes:
        files: base64 by name, written before each program.
        session: id of its session; None: none is open.
        cells: how many cells the session has run.
        lost: whether a session was lost since the model last heard of it.
    """

    files: dict[str, str] = field(default_factory=dict)
    session: str | None = None
    cells: int = 0
    lost: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class CodeInterpreter(Tool):
    """Run the program in the argument `code`; the model reads what it prints.

    Keys of `config`:
        sandbox_url: the sandbox, this project's or Sandbox Fusion's; `sandbox_fusion_url` is the
            same. Required.
        default_language: of a call without the argument `language` (python).
        timeout: seconds of a program (30); `default_timeout` is the same.
        memory_limit_mb: memory of a program; null: what the sandbox gives.
        stateful: whether variables survive between an episode's calls (false); needs this
            project's sandbox, and Python: a call in another language runs on its own. If the
            sandbox loses them, the episode fails.
        images: whether open figures of matplotlib come back as images (false): for models that
            see.
        print_last: whether the value of a last expression is printed (true).
        max_output_tokens: about how many tokens of output, and of errors, are shown (1024).
        num_workers: requests in flight, of all episodes of the run (64).
        rate_limit: requests a second, of all episodes of the run (100).
        queue_s: seconds that a request may wait for its turn in the sandbox (300).
        retries: further attempts after a failure (4).
        outage_s: seconds to wait for a sandbox that cannot be reached (300).
        headers, token_env: further headers; the environment variable that holds a bearer token.
        on_failure: `fail`: a sandbox that failed for good fails the episode, which is masked and
            never scored 0; `tell`: the model reads an error, and goes on.

    A row's `create_kwargs` may hold `files`, base64 by name: they are there in each program.
    """

    own_time_limit = True  # waiting for a turn, or for the sandbox, is not the model's fault

    takes_from_row = NOTHING_FROM_ROW
    default_schema: ClassVar[dict[str, Any]] = {
        "type": "function",
        "function": {
            "name": "code_interpreter",
            "description": "Run a Python program, and return what it prints. Use it to compute and to check.",
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string", "description": "The program. Print what you want to see."}},
                "required": ["code"],
            },
        },
    }

    def __init__(self, config: dict[str, Any], schema: dict[str, Any]) -> None:
        super().__init__(config, schema)
        options = Options(self.name, config)
        url = options.text("sandbox_url", options.text("sandbox_fusion_url"))
        if url is None:
            raise ToolConfigError(
                f"{self.name}: config has no sandbox_url",
                "give the address of a sandbox, e.g. http://127.0.0.1:8080 of `agentloop sandbox serve`",
            )
        base = url.rstrip("/").removesuffix(RUN_PATH)
        self._language = options.text("default_language", "python") or "python"
        default_timeout = options.number("default_timeout", 30.0, 0, 86_400)
        self._timeout_s = options.number("timeout", default_timeout, 0, 86_400)
        self._memory_mb = options.whole("memory_limit_mb", -1, -1, 2**20)
        self._stateful = options.flag("stateful", False)
        self._images = options.flag("images", False)
        self._print_last = options.flag("print_last", True)
        self._most_tokens = options.whole("max_output_tokens", 1024, 2, 10**6)
        self._tells = options.text("on_failure", "fail", choices=("fail", "tell")) == "tell"
        workers = options.whole("num_workers", 64, 1, 65_536)
        limit = RateLimit(options.number("rate_limit", 100.0, 0, 1e6), workers, name=self.name)
        self._retries = options.whole("retries", 4, 0, 1000)
        waiting = options.number("queue_s", 300.0, 0, 604_800)
        further: dict[str, Any] = {
            "retries": self._retries,
            "outage_s": options.number("outage_s", 300.0, 0, 604_800),
            "headers": options.headers(),
            "token": options.secret("token_env"),
            "max_connections": workers,
        }
        options.done(ignored=ELSEWHERE)
        if self._stateful and not _is_python(self._language):
            raise ToolConfigError(
                f"{self.name}: config.stateful is true and config.default_language is {self._language!r}: sessions "
                "are Python",
                "leave out one of the two",
            )
        if schema == self.default_schema and not _is_python(self._language):
            self.schema = copy.deepcopy(schema)
            shown_name = SHOWN_NAMES.get(self._language, self._language)
            function = self.schema["function"]
            function["description"] = function["description"].replace("Python", shown_name)

        def client(path: str, timeout_s: float) -> ServiceClient:
            return ServiceClient(self.name, base + path, limit, timeout_s=timeout_s, **further)

        self._run = client(RUN_PATH, self._timeout_s + waiting)
        self.service = self._run.shown_url
        self._open = client("/sessions", waiting)
        self._close = client("/close_session", waiting)
        renew = ServiceClient(
            self.name, base + "/renew_sessions", limit, timeout_s=RENEW_S, **{**further, "retries": 0}
        )
        self._leases = Leases(renew)
        self._pacer = Pacer()
        self._failures = ShownFailures(self.name)

        properties = schema["function"].get("parameters", {}).get("properties", {})
        if "code" not in properties:
            raise ToolConfigError(
                f"{self.name}: its schema has no argument 'code'", "name the program's argument code, or leave it out"
            )

    async def open(self, task: Task, files: dict[str, str] | None = None, **create_kwargs: Any) -> _Episode:
        """Begin an episode. A session is opened by its first call."""
        return _Episode(dict(files or {}))

    async def execute(self, state: _Episode, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        """Run a program.

        Raises:
            ToolError: the sandbox failed for good, or refuses what the config asks for; names the
                tool, the URL and the last error.
        """
        code, language = arguments["code"], arguments.get("language") or self._language
        if not isinstance(code, str) or not code.strip():
            return _refused(f"{self.name} needs a program in the argument 'code'")
        if len(code) > LONGEST_CODE:
            return _refused(f"the program has {len(code):,} characters; {LONGEST_CODE:,} are the most")

        await self._pacer.turn()  # thousands of episodes may call at the same time
        body = self._request(code, str(language), state)
        self._failures.called()
        try:
            if self._stateful and _is_python(str(language)):
                async with state.lock:  # cells of one episode run in the order of its calls
                    answer = await self._cell(body, state)
            else:
                answer = await self._program(body, state)
        except RequestRejected as exc:
            field = next(iter(_FIELD.findall(exc.message)), None)
            if "language" in arguments and field in (None, "language"):
                return _refused(exc.message)
            # All else in the request comes from the config and the row: no model can correct it.
            raise ToolError(exc.message, self._fix(field, exc.hint), final=True) from exc
        except ToolError as exc:
            if not self._tells:
                raise
            self._failures.failed(exc)
            text = "the sandbox failed; the program is not the cause"
            return ToolResult(f"Error: {text}.", error=f"{text}: {exc.message}", metrics={"failed": 1.0})
        run = answer.get("run_result")
        if isinstance(run, dict) and isinstance(run.get("stderr"), str):
            run["stderr"] = as_written(run["stderr"], program_in(code), body["code"])
        return await self._result(answer, state)

    async def close(self, state: _Episode, **release_kwargs: Any) -> None:
        """End the episode's session; one that cannot be reached ends by its lease."""
        session, state.session = state.session, None
        if session is not None:
            self._leases.drop(session)
            try:
                async with asyncio.timeout(CLOSE_S):
                    await self._close.post({"session_id": session}, state)
            except (AgentloopError, TimeoutError):
                pass

    def shut_down(self) -> None:
        self._failures.report()

    def _fix(self, field: str | None, advice: str | None) -> str:
        """Return how to correct what the sandbox refused.

        Args:
            field: of the request, if its error names one.
            advice: the sandbox's own, for who runs it.
        """
        keys = CONFIG_KEYS.get(field)
        if field == "files":
            text = "correct `files` in the row's create_kwargs"
        elif keys is None:
            text = f"correct the config of {self.name}, or the row"
        else:
            written = [key for key in keys if self.config.get(key) is not None] or [keys[-1]]
            text = f"correct the config of {self.name}: `{written[-1]}`"
        return f"{text}; the sandbox says: {advice}" if advice else text

    def _request(self, code: str, language: str, state: _Episode) -> dict[str, Any]:
        fetch = []
        program = program_in(code)
        if _is_python(language):
            draws = any(name in program for name in ("matplotlib", "seaborn", "pylab"))
            if self._print_last:
                program = with_last_expression(program)
            if self._images and draws:
                program, fetch = with_figures(program), FIGURE_FILES
        return {
            # What a model writes may hold a lone surrogate, which JSON cannot.
            "code": program.encode("utf-8", "replace").decode(),
            "language": language,
            "run_timeout": self._timeout_s,
            "compile_timeout": self._timeout_s,
            "memory_limit_MB": self._memory_mb,
            "files": state.files,
            "fetch_files": fetch,
        }

    async def _program(self, body: dict[str, Any], state: _Episode) -> dict[str, Any]:
        """Run a program on its own; a failure of the sandbox is tried again.

        Raises:
            RequestRejected, ToolError: as `execute`.
        """
        for attempt in range(self._retries + 1):
            answer = _checked(self._run, await self._run.post(body, state))
            if answer.get("status") != "SandboxError":
                return answer
            if attempt < self._retries:
                await asyncio.sleep(PAUSE_S * 2**attempt)
        raise ToolError(
            f"{self.name} at {self._run.shown_url} failed {self._retries + 1} times; last error: "
            f"{str(answer.get('message'))[:300]}",
            "see the log of that service",
            final=True,
        )

    async def _cell(self, body: dict[str, Any], state: _Episode) -> dict[str, Any]:
        """Run a cell in the episode's session.

        One that the program itself has ended is replaced, and the model told. One that is gone for
        another reason, as after a restart of the sandbox, had variables that the model relies on.

        Raises:
            RequestRejected, ToolError: as `execute`.
        """
        for _ in range(self._retries + 1):
            if state.session is None:
                wanted = {"language": "python", "memory_limit_MB": self._memory_mb, "lease_s": LEASE_S}
                opened = _checked(self._open, await self._open.post(wanted, state))
                state.session, state.cells = str(opened.get("session_id")), 0
                self._leases.add(state.session, float(opened.get("idle_s") or LEASE_S))
            # A cell that is sent twice, because its answer was lost, runs once.
            once = {"session_id": state.session, "request_id": secrets.token_urlsafe(12)}
            answer = _checked(self._run, await self._run.post(body | once, state))
            if answer.get("status") != "SandboxError":
                state.cells += 1
                if answer.get("session_ended"):
                    self._leases.drop(state.session)
                    state.session, state.lost = None, True
                return answer
            self._leases.drop(state.session)
            state.session = None
            if state.cells:
                state.lost = True
                lost = ToolError(
                    f"{self.name} at {self._run.shown_url} has lost the variables of an episode: "
                    f"{str(answer.get('message'))[:300]}",
                    "see the log of that service, and its --session-idle-s; with `on_failure: tell` the "
                    "episode goes on without them, and the model reads so",
                    final=True,
                )
                if not self._tells:
                    raise lost
                self._failures.failed(lost)
        raise ToolError(
            f"{self.name} at {self._run.shown_url} loses its sessions: {str(answer.get('message'))[:300]}",
            "see the log of that service, and its --session-idle-s and --max-sessions",
            final=True,
        )

    async def _result(self, answer: dict[str, Any], state: _Episode) -> ToolResult:
        text, error = shown(answer, self._most_tokens, self._timeout_s)
        if state.lost:
            state.lost = False
            text = f"[the interpreter was restarted: variables of earlier calls are gone]\n{text}"
        run = answer.get("run_result") or {}
        metrics = {"failed": float(error is not None)}
        if isinstance(run.get("execution_time"), int | float):
            metrics["run_s"] = float(run["execution_time"])
        files = answer.get("files") or {}
        images = [image for name in FIGURE_FILES if name in files and (image := await _image(files[name])) is not None]
        return ToolResult(text, error=error, metrics=metrics, images=images)


def _is_python(language: str) -> bool:
    return ALIASES.get(language, language) == PYTHON.name


async def _image(content: Any) -> ImageFile | None:
    """Return an image; None: a program has written something else."""
    try:
        return await asyncio.to_thread(read_image, base64.b64decode(content, validate=True))
    except (ImageError, binascii.Error, TypeError, ValueError):
        return None


def _checked(client: ServiceClient, answer: Any) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise ToolError(
            f"{client.name} at {client.shown_url}: the answer is not an object but {str(answer)[:80]!r}",
            "correct the URL: it has to be that of a sandbox",
            final=True,
        )
    return answer


def _refused(text: str) -> ToolResult:
    return ToolResult(f"Error: {text}", error=text)
