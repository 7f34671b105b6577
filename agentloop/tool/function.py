"""`FunctionTool`: a plain function as a tool, in a thread, a process or on the event loop."""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agentloop.errors import ToolConfigError, ToolError
from agentloop.registry import TOOLS
from agentloop.runtime.isolation import Caller, close, isolate
from agentloop.runtime.processes import ProcessWorkers
from agentloop.text import did_you_mean
from agentloop.tool.base import COPIED_COLUMNS, Tool
from agentloop.types import ToolResult, result_text

DOCSTRING = (
    "write a docstring whose first line says what the tool does, with a section `Args:` that has a line "
    "`name: description` for each argument; types are those of JSON, such as str, int, float, bool, list[str], dict"
)

ISOLATION_KEYS = ("run_in", "workers", "memory_mb")

_torch_left_out = threading.Lock()


class FunctionTool(Tool):
    """A plain typed function with a docstring as a tool.

    `config.run_in` says where it runs: `thread` (the default), `process` (killed when a call takes
    too long, and isolated from the run) or `inline` (on the event loop: only for functions that
    return at once). `workers` is the number of calls at once, `memory_mb` the address space of a
    process.

    Args:
        function: plain or async; in a process, arguments and result must be JSON.
        config: the `config` mapping of the tool YAML.
        reference: name of the function, by which a process loads it; relative to `folder`.

    Raises:
        ToolConfigError: the config is wrong.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        config: dict[str, Any] | None = None,
        reference: str | None = None,
        folder: Path = Path(),
    ) -> None:
        super().__init__(dict(config or {}), function_schema(function))
        arguments = self.schema["function"].get("parameters", {}).get("properties", {})
        self.takes_from_row = {"open": COPIED_COLUMNS, "execute": tuple(arguments)}
        unknown = [key for key in self.config if key not in (*ISOLATION_KEYS, "type")]
        if unknown:
            raise ToolConfigError(
                f"{self.name}: config has the unknown key {unknown[0]!r}",
                did_you_mean(str(unknown[0]), ISOLATION_KEYS, f"known keys: {', '.join(ISOLATION_KEYS)}"),
            )

        run_in = self.config.get("run_in", "thread")
        workers, memory = self.config.get("workers"), self.config.get("memory_mb")
        if run_in not in ("thread", "process", "inline"):
            raise ToolConfigError(f"{self.name}: config.run_in is {run_in!r}", "one of: thread, process, inline")
        for key, value, most in (("workers", workers, 4096), ("memory_mb", memory, 2**40)):
            if value is not None and (type(value) is not int or not 1 <= value <= most):
                raise ToolConfigError(f"{self.name}: config.{key} is {value!r}", f"give an integer from 1 to {most}")
        if run_in == "inline" and inspect.iscoroutinefunction(function):
            run_in = "thread"  # an async function runs on the event loop anyway

        self._in_process = run_in == "process"

        def process(count: int) -> Caller:
            if reference is None:
                raise ToolConfigError(f"{self.name} cannot run in a process: it has no reference", "name it in a YAML")
            return ProcessWorkers(
                reference, folder, TOOLS, form="tool", workers=count, memory_mb=memory, name=self.name
            )

        self._call = isolate(function, run_in, workers=workers, name=self.name, process=process)

    async def execute(self, state: Any, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        if self._in_process:
            return ToolResult(**await self._call({"arguments": {**arguments, **execute_kwargs}}))
        result = await self._call(**{**arguments, **execute_kwargs})  # the row's win, as in a process
        if isinstance(result, ToolResult):
            return result
        try:
            return ToolResult(result_text(result))
        except TypeError as exc:
            raise ToolError(f"the tool {self.name} cannot be read by a model: {exc}") from None

    def shut_down(self) -> None:
        close(self._call)


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the tool schema of a function, from its type hints and its docstring.

    Raises:
        ToolConfigError: an argument has no name, no type hint or no description, or a type cannot
            be written as JSON schema.
    """
    from transformers.utils import get_json_schema

    name = function.__name__
    if not name.isidentifier():
        raise ToolConfigError(f"the function {name} has no name of its own", "write it with def")
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as exc:
        raise ToolConfigError(f"{name}: its arguments cannot be read: {exc}", "wrap it in a function") from exc
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ToolConfigError(
                f"{name}: argument {parameter} cannot be filled by a model, which gives each argument by its name",
                "write every argument with a name and a type hint, e.g. city: str",
            )
        if parameter.annotation is inspect.Parameter.empty:
            raise ToolConfigError(
                f"{name}: argument {parameter.name} has no type hint", f"write {parameter.name}: str, or another type"
            )
    try:
        with _no_import_of_torch():
            return dict(get_json_schema(function))
    except Exception as exc:  # exceptions of transformers, and those of evaluating the hints
        reason = str(exc).replace("Cannot generate JSON schema for " + name + " because ", "").strip()
        reason = reason.replace("it has no docstring!", "it has no docstring, which would describe it to the model")
        raise ToolConfigError(f"{name} cannot become a tool: {reason}", DOCSTRING) from exc


@contextlib.contextmanager
def _no_import_of_torch() -> Iterator[None]:
    """Keep transformers from importing torch, 2 s of CPU, to see whether a type hint is a tensor.

    It is one only where torch is imported already.
    """
    from transformers.utils import chat_template_utils

    with _torch_left_out:
        was = chat_template_utils.is_torch_available
        chat_template_utils.is_torch_available = lambda: "torch" in sys.modules and was()
        try:
            yield
        finally:
            chat_template_utils.is_torch_available = was
