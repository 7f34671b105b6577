"""`agentloop recipes`: find an installed recipe by name, and copy one to change it."""

from __future__ import annotations

import difflib
import importlib.util
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from agentloop.errors import ConfigError
from agentloop.files import is_dir, is_file
from agentloop.imports import foreign_package
from agentloop.text import clean, hide_override

RECIPE_FILE, SFT_FILE, DATA_FILE = "recipe.yaml", "sft.yaml", "data.py"

NOT_COPIED = shutil.ignore_patterns("__init__.py", "__pycache__", "data", "outputs", ".*")
"""Files of the installed package, and rows or runs that were written into the folder."""

recipes = typer.Typer(
    help="The recipes that come with agentloop: list them, and copy one to change it.", no_args_is_help=True
)


@recipes.command("list")
def list_command() -> None:
    """List the recipes: name, and the first line of each README."""
    for name, folder in installed_recipes().items():
        typer.echo(f"{name:14} {_title(folder)}")
    typer.echo("\nrun one:   agentloop train --config NAME\ncopy one:  agentloop recipes copy NAME DIR")


@recipes.command("copy")
def copy_command(
    name: Annotated[str, typer.Argument(help="a name of `agentloop recipes list`")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the folder to write; it must not exist yet")],
) -> None:
    """Copy a recipe into a folder of your own, with everything that it needs.

    Example:

      agentloop recipes copy quickstart my-recipe

      agentloop train --config my-recipe/recipe.yaml
    """
    copy_recipe(name, folder)
    typer.echo(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    typer.echo(f"{folder / 'README.md'} has the commands, in order")


def installed_recipes() -> dict[str, Path]:
    """Folders of the recipes in the installed package `recipes`, by name.

    Raises:
        ConfigError: another package of that name hides it.
    """
    foreign = foreign_package("recipes")
    if foreign is not None:
        raise ConfigError(
            f"{foreign} hides agentloop's package recipes", "start from another folder, or rename that one"
        )
    spec = importlib.util.find_spec("recipes")
    roots = spec.submodule_search_locations if spec is not None else None
    folders = [folder for root in roots or () for folder in sorted(Path(root).iterdir())]
    return {folder.name: folder for folder in folders if (folder / RECIPE_FILE).is_file()}


def find_recipe(given: str) -> Path:
    """Return the folder of a recipe.

    Args:
        given: a folder, a file in it, or the name of an installed recipe. A recipe in the working
            directory is preferred to an installed one of the same name.

    Raises:
        ConfigError: no such folder or recipe exists.
    """
    path, known = Path(given), installed_recipes()
    # What has the name by chance hides nothing: `prepare gsm8k --source gsm8k --out data`.
    if is_dir(path) and (given not in known or any(is_file(path / file) for file in (RECIPE_FILE, DATA_FILE))):
        return path
    if is_file(path) and given not in known:
        return path.parent

    if given not in known:
        raise ConfigError(
            f"{clean(given, 200)} is neither a folder nor the name of a recipe; known names: "
            f"{', '.join(known) or 'none'}",
            "give the folder of a recipe, or one of these names",
        )
    return known[given]


def find_config(given: Path, file: str = RECIPE_FILE) -> Path:
    """Return the configuration file that a command names.

    Args:
        given: a YAML file, a folder that holds `file`, or the name of an installed recipe. What
            exists under that path is preferred to a name.
        file: `recipe.yaml` or `sft.yaml`.

    Returns:
        The file. A path that looks like a file is returned unchecked: reading it reports the error.

    Raises:
        ConfigError: a bare name that is neither a file nor a recipe.
    """
    if is_file(given / file):
        return given / file
    known = installed_recipes()
    if is_dir(given) and str(given) not in known:
        return given / file
    if str(given) not in known and (is_file(given) or given.suffix or len(given.parts) > 1):
        return given

    if str(given) not in known:
        near = difflib.get_close_matches(str(given), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"give a YAML file, or one of {', '.join(known) or 'none'}"
        raise ConfigError(f"recipe {clean(given, 200)} is neither a file nor the name of a recipe", hint)
    return known[str(given)] / file


def recipe_and_overrides(words: Sequence[str] | None, config: Path | None) -> tuple[Path, list[str]]:
    """Return the recipe and the overrides of a command line.

    Args:
        words: `[RECIPE] [KEY=VALUE]...`. The first word is the recipe if it is not `key=value`, or
            is a file.
        config: value of `--config`.

    Raises:
        ConfigError: no recipe is given, or two are.
    """
    rest = list(words or ())
    given = Path(rest.pop(0)) if rest and ("=" not in rest[0] or is_file(Path(rest[0]))) else None
    if config is not None and given is not None:
        raise ConfigError(
            f"two recipes are given: --config {clean(config, 200)}, and {clean(given, 200)!r}",
            "leave one out; an override is written key=value",
        )
    recipe = config or given
    if recipe is None:
        raise ConfigError(
            "no recipe is given", f"give a YAML file, or one of {', '.join(installed_recipes()) or 'none'}"
        )
    return recipe, rest


def config_words(recipe: Path, overrides: Sequence[str]) -> list[str]:
    """Return `--config RECIPE KEY=VALUE...` for a command to repeat, without secrets."""
    return ["--config", str(recipe), *map(hide_override, overrides)]


def copy_recipe(name: str, folder: Path) -> None:
    """Copy the installed recipe `name` to `folder`, completely or not at all.

    Raises:
        ConfigError: there is no such recipe, or `folder` exists or cannot be written.
    """
    known = installed_recipes()
    if name not in known:
        raise ConfigError(f"there is no recipe {name!r}", f"choose one of {', '.join(known) or 'none'}")
    if is_dir(folder) or is_file(folder):
        raise ConfigError(f"{folder} already exists", "choose a folder that does not exist yet")

    partial: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: two copies to one folder must not write into the same files.
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        shutil.copytree(known[name], partial, ignore=NOT_COPIED, dirs_exist_ok=True)
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException as exc:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(exc, OSError):
            reason = exc.strerror or (str(exc.args[0][0][2]) if isinstance(exc, shutil.Error) else str(exc))
            raise ConfigError(f"{folder} cannot be written: {reason}", "choose another folder") from exc
        raise


def _title(folder: Path) -> str:
    readme = folder / "README.md"
    lines = readme.read_text(encoding="utf-8").splitlines() if readme.is_file() else []
    return next((line.removeprefix("#").strip() for line in lines if line.startswith("# ")), "")
