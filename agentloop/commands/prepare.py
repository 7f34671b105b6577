"""`agentloop prepare`: call a recipe's `data.py` to write its rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from agentloop.errors import ConfigError, UserError


def prepare(
    out: Annotated[Path, typer.Option(help="folder to write the rows to, e.g. data/gsm8k")],
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="folder of a recipe, or the name of one")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config", "-c", help="the same as RECIPE; beside it: settings of its data.py, e.g. a prompt.yaml"
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="where the data set is: a folder, or a hub id; not for data that is generated")
    ] = None,
) -> None:
    """Write a recipe's rows (prompts, tools, ground truth): calls `prepare` of its data.py.

    Examples:

      agentloop prepare gsm8k --source openai/gsm8k --out data/gsm8k

      agentloop prepare my-recipe --source ./downloaded --out my-recipe/data

      agentloop prepare search --config my-prompt.yaml --source hub --out data/search
    """
    from agentloop.commands.recipes import recipe_and_overrides

    settings = None
    if recipe is not None and config is not None and takes_config(recipe):
        settings, config = Path(config), None
    given, _ = recipe_and_overrides(
        [recipe] if recipe is not None else [], Path(config) if config is not None else None
    )
    before = {path.name for path in out.iterdir()} if out.is_dir() else set()
    for name, count in prepare_rows(str(given), source, out, settings).items():
        replaced = " (replaced)" if name in before else ""
        typer.echo(f"{count:8} {'row' if count == 1 else 'rows'} -> {out / name}{replaced}")


def takes_config(recipe: str) -> bool:
    """Return whether `prepare` of a recipe's data.py has an argument `config`.

    Raises:
        ConfigError: unknown recipe, or it has no `prepare`.
    """
    return "config" in inspect.signature(_function(recipe)[0]).parameters


def prepare_rows(recipe: str, source: str | None, out: Path, config: Path | None = None) -> dict[str, int]:
    """Call `prepare(source, out)` of a recipe's data.py, or `prepare(out)` for generated data.

    Args:
        config: passed on, if given.

    Returns:
        Number of rows by file name; empty if `prepare` returns nothing.

    Raises:
        ConfigError: unknown recipe, no `prepare` in it, or `source` is missing or not accepted.
        DataError: what data.py found wrong with the data.
    """
    function, file = _function(recipe)
    takes_source = "source" in inspect.signature(function).parameters
    if takes_source and not source:
        raise ConfigError(
            f"{recipe} needs --source", "give a folder that holds the data set, or its hub id; README.md names it"
        )
    if source and not takes_source:
        raise ConfigError(f"{recipe} generates its rows and takes no --source", "leave --source out")

    arguments: dict[str, Any] = {"source": source} if takes_source else {}
    if config is not None:
        arguments["config"] = config
    try:
        return dict(function(out=out, **arguments) or {})
    except UserError:
        raise
    except OSError as exc:  # the folder cannot be written, or the source cannot be read
        raise ConfigError(f"{recipe}: {file} failed: {exc}", "correct --source or --out") from exc


def _function(recipe: str) -> tuple[Callable[..., Any], Path]:
    """Return `prepare` of a recipe's data.py, and that file."""
    from agentloop.commands.recipes import find_recipe
    from agentloop.imports import load_from_file

    file = find_recipe(recipe) / "data.py"
    if not file.is_file():
        raise ConfigError(f"{recipe}: {file} does not exist", "write it, with a function prepare(source, out)")
    function = load_from_file(f"{file}:prepare", "prepare")
    if not callable(function):
        raise ConfigError(f"{recipe}: `prepare` in {file} is not a function", "write prepare(source, out)")
    return function, file
