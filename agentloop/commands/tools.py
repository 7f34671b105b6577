"""`agentloop tools`: a test bench for the tools of a YAML or a recipe."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentloop.errors import ConfigError

if TYPE_CHECKING:
    from agentloop.config import AgentConfig, Recipe
    from agentloop.tool.base import Tool
    from agentloop.tool.session import Toolset
    from agentloop.types import ToolResult

tools = typer.Typer(help="Look at the tools of a YAML or a recipe, and call them.", no_args_is_help=True)

ToolsFile = Annotated[Path | None, typer.Option("--tools", "-t", help="tool YAML")]
Config = Annotated[Path | None, typer.Option("--config", "-c", help="recipe, for its tools and its limits")]
Name = Annotated[str, typer.Argument(help="name of the tool, as the model calls it")]


GIVEN = "what a row holds is given with --image FILE and --row JSON"
"""How a tool that does not open gets what it may lack."""


@tools.callback()
def _group() -> None:
    """Look at the tools of a YAML or a recipe, and call them."""


@tools.command("list")
def list_command(tools: ToolsFile = None, config: Config = None) -> None:
    """List the tools: name, arguments, description, and the entry that each comes from.

    Examples:

      agentloop tools list --tools tools.yaml
    """
    with _toolset(tools, config) as (toolset, _):
        for tool in toolset.tools.values():
            function = tool.schema["function"]
            names = ", ".join(function.get("parameters", {}).get("properties", {}))
            summary = (str(function.get("description") or "").strip().splitlines() or [""])[0]
            typer.echo(_shown(f"{tool.name}({names})  {summary}\n    {tool.origin}"))


@tools.command("show")
def show_command(name: Name, tools: ToolsFile = None, config: Config = None) -> None:
    """Print the schema of a tool, as the chat template gets it.

    Examples:

      agentloop tools show search --config recipes/search/recipe.yaml
    """
    with _toolset(tools, config) as (toolset, _):
        typer.echo(_shown(json.dumps(_named(toolset, name).schema, indent=2, ensure_ascii=False)))


@tools.command("call")
def call_command(
    name: Name,
    arguments: Annotated[str, typer.Argument(help="JSON object, as a model would write it")] = "{}",
    tools: ToolsFile = None,
    config: Config = None,
    row: Annotated[
        str,
        typer.Option("--row", help='what a row gives to the tool: {"create_kwargs": {..}, "execute_kwargs": {..}}'),
    ] = "{}",
    image: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="FILE", help="image of the row, for tools that work on them; repeatable"),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, max=1000, help="calls in one episode, one after the other")] = 1,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder to which the images of the results are written")
    ] = None,
) -> None:
    """Call a tool as in an episode: opened, checked, limited in time, cut, closed.

    The text for the model goes to stdout; how it went goes to stderr. The exit code is 1 if the
    model would be shown an error, or the episode would fail. With --config the time limit and the
    length of the output are those of the recipe's agent, without it the defaults; the output is cut
    in tokens if the recipe's model is there.

    Examples:

      agentloop tools call calculator '{"expression": "6 * 7"}' -c recipes/quickstart/recipe.yaml

      agentloop tools call image_zoom_in '{"bbox_2d": [0, 0, 9, 9]}' -t tools.yaml --image a.png
    """
    from agentloop.tool.row_kwargs import check_tool_kwargs

    given = _object(arguments, "the arguments", "are")
    kwargs, files = _row_kwargs(row), image or []
    with _toolset(tools, config) as (toolset, recipe):
        check_tool_kwargs(_named(toolset, name), kwargs, "--row, ", "correct it")
        task = _task(name, kwargs, files)
        results = asyncio.run(_call(toolset, task, name, given, recipe, repeat))
    for result in results:
        if images is not None:
            _save(result, images)
    if any(result.error is not None for result in results):
        raise typer.Exit(1)


def _task(name: str, kwargs: dict[str, dict[str, Any]], files: list[str]) -> Any:
    """Return the task of a call. Its prompt is its images, which are given as those of a row are.

    Raises:
        DataError: a file is not an image; it is named.
    """
    from agentloop.errors import ImageError
    from agentloop.images import is_path, read_image
    from agentloop.text import clean
    from agentloop.types import Message, Task

    images = [str(Path.cwd() / file) if is_path(file) else file for file in files]
    for image in images:
        try:
            read_image(image)
        except ImageError as exc:
            raise ImageError(f"--image {clean(image, 200)}: {exc.message}", "give the file of an image") from exc
    shown: Message = {"role": "user", "content": [{"type": "image", "image": image} for image in images]}
    return Task(
        "0", "tool_agent", [shown] if images else [], images=list(images), extra_info={"tools_kwargs": {name: kwargs}}
    )


def _row_kwargs(row: str) -> dict[str, dict[str, Any]]:
    """Return the arguments that --row gives to the tool, checked like those of a row.

    Raises:
        ConfigError, DataError: they have another form.
    """
    from agentloop.data.tasks import read_tool_kwargs
    from agentloop.errors import DataError

    form = 'it takes what a row gives to the tool: \'{"create_kwargs": {..}, "execute_kwargs": {..}}\''
    found = _object(row, "--row", "is", form)
    if "images" in found:
        raise DataError("--row has the key 'images'", "give each image of the row with --image FILE")
    return read_tool_kwargs(found, "--row")


async def _call(
    toolset: Toolset, task: Any, name: str, arguments: dict[str, Any], recipe: Recipe | None, repeat: int
) -> list[ToolResult]:
    from agentloop.episode.calls import cut_output
    from agentloop.text import clean
    from agentloop.trace.spans import Recorder
    from agentloop.types import ToolCall

    limits = _limits(recipe)
    renderer = _renderer(recipe)
    session = toolset.session(task, GIVEN)
    results = []
    with Recorder():
        try:
            for _ in range(repeat):
                begin = time.perf_counter()
                result = await session.call(ToolCall(name, arguments), limits.tool_timeout_s)
                seconds = time.perf_counter() - begin
                text = result.text
                if renderer is not None:
                    text = await cut_output(text, limits.max_tool_response_tokens, renderer)
                typer.echo(_shown(text) if result.error is None else clean(text))
                _report(result, seconds)
                results.append(result)
            for part, value in (await session.rewards()).items():
                typer.echo(f"reward of {part}: {value:g}", err=True)
        finally:
            await session.close()
    return results


def _shown(text: str) -> str:
    """Return a tool's text for stdout: as it is, but a terminal must not do what it says."""
    if sys.stdout.isatty():
        from agentloop.text import clean

        return clean(text)
    return text.encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be written


def _report(result: ToolResult, seconds: float) -> None:
    from agentloop.text import counted

    found = [f"{seconds:.3f} s", "error" if result.error is not None else "ok"]
    if result.images:
        found.append(counted(len(result.images), "image"))
    if result.reward is not None:
        found.append(f"reward {result.reward:g}")
    found += [f"{name} {value:g}" for name, value in result.metrics.items()]
    typer.echo(f"[{', '.join(found)}]", err=True)


def _save(result: ToolResult, folder: Path) -> None:
    from agentloop.images import read_image

    folder.mkdir(parents=True, exist_ok=True)
    for image in result.images:
        file = read_image(image)
        kind = "jpg" if file.data[:2] == b"\xff\xd8" else "png"
        path = folder / f"{file.digest[:12]}.{kind}"
        path.write_bytes(file.data)
        typer.echo(f"{path}: {file.width} x {file.height}", err=True)


@contextmanager
def _toolset(tools: Path | None, config: Path | None) -> Iterator[tuple[Toolset, Recipe | None]]:
    """Yield the tools and the recipe, if one was given; release them afterwards."""
    from agentloop.commands.recipes import find_config
    from agentloop.config import Recipe
    from agentloop.config.loading import load_config
    from agentloop.tool.loading import load_toolset

    if (tools is None) == (config is None):
        raise ConfigError("give either --tools or --config", "--tools tools.yaml, or --config recipe.yaml")
    recipe = load_config(Recipe, find_config(config)) if config is not None else None
    path = tools if recipe is None else recipe.tools
    if path is None:
        raise ConfigError(f"{config} has no tools", "set `tools` to a tool YAML")
    toolset = load_toolset(Path(path))
    try:
        yield toolset, recipe
    finally:
        toolset.close()


def _named(toolset: Toolset, name: str) -> Tool:
    from agentloop.text import did_you_mean

    tool = toolset.tools.get(name)
    if tool is None:
        known = list(toolset.tools)
        raise ConfigError(
            f"the tool {name!r} does not exist", did_you_mean(name, known, f"the tools are: {', '.join(known)}")
        )
    return tool


def _limits(recipe: Recipe | None) -> AgentConfig:
    from agentloop.config import AgentConfig

    return (recipe.agents.get(recipe.data.default_agent) if recipe is not None else None) or AgentConfig()


def _renderer(recipe: Recipe | None) -> Any:
    """Return the renderer of the recipe's model, for lengths in tokens; None: it is not there."""
    if recipe is None or not Path(recipe.model.path).is_dir():
        return None
    from agentloop.chat import ChatRenderer, load_tokenizer
    from agentloop.chat.template import read_template

    return ChatRenderer(
        load_tokenizer(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code),
        chat_template=read_template(recipe.model.chat_template, "model.chat_template"),
        tool_format=recipe.model.tool_format,
        chat_template_kwargs=recipe.model.chat_template_kwargs,
        tool_role=recipe.model.tool_role,
    )


def _object(text: str, what: str, verb: str, form: str = "write '{\"name\": value}'") -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{what} {verb} not JSON: {exc}", form) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{what} {verb} not a JSON object", form)
    return found
