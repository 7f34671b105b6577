"""The `agentloop` program. Packages add commands through entry-point group `agentloop.commands`.

This file imports next to nothing before `main` has started the process that imports torch: the
first step of a run waits for that one longest.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from agentloop.client.open_files import raise_limit
from agentloop.runtime.early import importing
from agentloop.runtime.scan import remember_scans

if TYPE_CHECKING:
    import typer

COMMAND_GROUP = "agentloop.commands"


def build_app() -> typer.Typer:
    """Collect the commands of all installed packages.

    Raises:
        RegistryError: an entry point of the group cannot be loaded; it is named.
    """
    from importlib.metadata import entry_points

    import typer

    from agentloop.errors import RegistryError

    shows_version = typer.Option(False, "--version", help="print the version and exit", callback=_show_version,
                                 is_eager=True)  # fmt: skip

    def options(version: bool = shows_version) -> None:
        pass

    app = typer.Typer(
        name="agentloop",
        help="Reinforcement learning for language-model agents with tools.\n\n"
        "First steps: `agentloop train --config quickstart`, then open outputs/quickstart/report.html. "
        "`agentloop recipes copy quickstart my-recipe` makes a folder of your own to change.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(options)
    for entry in sorted(entry_points(group=COMMAND_GROUP), key=lambda e: e.name):
        try:
            register = entry.load()
        except Exception as exc:  # a third-party module may raise anything at import
            raise RegistryError(
                f"the commands {entry.name!r} ({entry.value}) cannot be loaded: {exc!r}",
                "reinstall that package",
            ) from exc
        register(app)
    return app


def _show_version(wanted: bool) -> None:
    import typer

    from agentloop import __version__

    if wanted:
        typer.echo(f"agentloop {__version__}")
        raise typer.Exit


def check_words(words: Sequence[str]) -> None:
    """Refuse words of the command line that cannot be printed or written to a file.

    Raises:
        ConfigError: one is not UTF-8; its number is named.
    """
    from agentloop.errors import ConfigError

    for number, word in enumerate(words, 1):
        try:
            word.encode()
        except UnicodeEncodeError as exc:
            raise ConfigError(
                f"argument {number} is not UTF-8: {word.encode(errors='backslashreplace').decode()}",
                "rename the file, or write the value in UTF-8",
            ) from exc


def run_program(program: Callable[[], object]) -> None:
    """Call a command-line program. User errors exit with 2, other named errors with 1; no
    traceback."""
    from agentloop.errors import AgentloopError, UserError
    from agentloop.files import disk_error
    from agentloop.text import clean

    try:
        check_words(sys.argv[1:])
        program()
    except AgentloopError as exc:
        # It may quote a model, a tool or a file.
        print(*map(clean, (f"error: {exc}", *getattr(exc, "__notes__", ()))), sep="\n", file=sys.stderr)
        raise SystemExit(2 if isinstance(exc, UserError) else 1) from None
    except OSError as exc:
        if (full := disk_error(exc)) is not None:
            print(f"error: {full}", file=sys.stderr)
            raise SystemExit(1) from None
        # A file that a command did not expect to be unusable: a name that is too long, a folder
        # without permission. Without a file name, only the traceback says what happened.
        if exc.filename is None or os.environ.get("AGENTLOOP_TRACEBACK"):
            raise
        hint = "correct the path or its permissions; AGENTLOOP_TRACEBACK=1 shows where it is used"
        print(f"error: {clean(exc.filename, 300)}: {exc.strerror}\n  fix: {hint}", file=sys.stderr)
        raise SystemExit(1) from None


def main() -> None:
    """Run the console script."""
    # Threads of the tokenizers library would compete with the engine and the trainer for the cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise_limit()
    remember_scans()
    with importing() if _needs_torch(sys.argv[1:]) else contextlib.nullcontext():
        run_program(_program)


def _program() -> None:
    from agentloop.commands.provenance import check_packages
    from agentloop.runtime.event_loop import uncollected

    if sys.argv[1:2] != ["env"]:  # `agentloop env` shows what is wrong
        check_packages()
    with uncollected():
        app = build_app()
    app()


def _needs_torch(words: Sequence[str]) -> bool:
    """Whether this command line starts processes that need torch, as far as one can see at once."""
    return words[:1] in (["train"], ["sft"], ["eval"]) and not {"-h", "--help", "--dry-run"}.intersection(words)


if __name__ == "__main__":
    main()
