"""Programs that use a large library, each in a process of its own that need not import it again.

One process imports the library and forks a child for each program. A child has its own environment,
folder and output and ends as any program does; only what the library reads from the environment while it is
imported is that of the first process.

Run as a program, this module is that first process: it takes the names of modules and then orders from its
input, a line of JSON each, and answers an order with the process id of the child and then with its exit code.
It ends with its input.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

ROOM = 1024
"""Characters for the command line that a program shows in place of this module's."""


class ForkedPrograms:
    """A process that has imported modules, and forks programs off.

    Args:
        modules: to import; none may leave a thread that its users need after a fork.
        environment: the whole environment during the imports.
        folder: for what the programs print.
    """

    def __init__(self, *modules: str, environment: Mapping[str, str], folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve()), " " * ROOM],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**environment, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(modules) + "\n")

    def run(
        self, program: str | Path, *arguments: str, environment: Mapping[str, str], cwd: Path, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a program as `python -c` or `python FILE` would, to its end.

        Args:
            program: Python source, or the path of a file.
            environment: the whole environment.
            timeout: in seconds.

        Raises:
            TimeoutError: it took longer, and was killed.
        """
        printed = [self._folder / name for name in ("stdout", "stderr")]
        source = {"file": str(program)} if isinstance(program, Path) else {"code": program}
        order = {**source, "arguments": arguments, "environment": dict(environment), "cwd": str(cwd)}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({**order, "printed": [str(path) for path in printed]}) + "\n")
        pid = int(self._process.stdout.readline())
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            os.kill(pid, 9)
            self._process.stdout.readline()
            raise TimeoutError(f"{arguments} took longer than {timeout} s")
        code = int(self._process.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, *(path.read_text() for path in printed))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def main() -> None:
    for name in json.loads(sys.stdin.readline()):
        importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run_as_main(order)
            return
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def run_as_main(order: dict[str, Any]) -> None:
    """Run the program of an order in this process, whose main module it becomes."""
    for stream, path in zip((1, 2), order["printed"], strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, stream)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["cwd"])
    if "file" in order:
        sys.argv = [order["file"], *order["arguments"]]
        runpy.run_path(order["file"], run_name="__main__")
        return
    sys.argv = ["-c", *order["arguments"]]
    exec(compile(order["code"], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102  # it is of the test


if __name__ == "__main__":
    main()
