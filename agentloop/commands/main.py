"""The `agentloop` program. Packages add commands through entry-point group `agentloop.commands`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Annotated

import typer

from agentloop import __version__
from agentloop.client.open_files import raise_limit
from agentloop.commands.provenance import check_packages
from agentloop.errors import AgentloopError, ConfigError, RegistryError, UserError
from agentloop.files import disk_error
from agentloop.runtime.early import importing
from agentloop.runtime.scan import remember_scans
from agentloop.text import clean

COMMAND_GROUP = "agentloop.commands"


def build_app() -> typer.Typer:
    """Collect the commands of all installed packages.

    Raises:
        RegistryError: an entry point of the group cannot be loaded; it is named.
    """
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
    app.callback()(_options)
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
    if wanted:
        typer.echo(f"agentloop {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def check_words(words: Sequence[str]) -> None:
    """Refuse words of the command line that cannot be printed or written to a file.

    Raises:
        ConfigError: one is not UTF-8; its number is named.
    """
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
    try:
        check_words(sys.argv[1:])
        program()
    except AgentloopError as exc:
        print(f"error: {exc}", *getattr(exc, "__notes__", ()), sep="\n", file=sys.stderr)
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

    def program() -> None:
        if sys.argv[1:2] != ["env"]:  # `agentloop env` shows what is wrong
            check_packages()
        with importing() if _needs_torch(sys.argv[1:]) else contextlib.nullcontext():
            build_app()()

    run_program(program)


def _needs_torch(words: Sequence[str]) -> bool:
    """Whether this command line starts processes that need torch, as far as one can see at once."""
    return words[:1] in (["train"], ["sft"], ["eval"]) and not {"-h", "--help", "--dry-run"}.intersection(words)


if __name__ == "__main__":
    main()
