"""What a run was configured with: its recipe, its tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agentloop.errors import TraceError, UserError
from agentloop.text import clean


def read_config(run: Path) -> dict[str, Any]:
    """Return the resolved recipe of a run; empty if it is missing or damaged."""
    import orjson

    try:
        data = orjson.loads((run / "config" / "resolved.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return data if isinstance(data, dict) else {}


def setting(config: dict[str, Any], dotted: str) -> Any:
    """Return a value of the recipe, such as `model.path`; None if it has none."""
    value: Any = config
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def tool_schemas(config: dict[str, Any], given: Path | None) -> list[dict[str, Any]]:
    """Return the schemas of a run's tools, as the chat template showed them.

    Args:
        given: a tool YAML in place of the run's own.

    Raises:
        TraceError: the tools cannot be loaded.
    """
    path = given if given is not None else setting(config, "tools")
    if path is None:
        return []
    from agentloop.tool.loading import load_toolset

    try:
        return list(load_toolset(Path(path)).schemas)
    except UserError as exc:
        raise TraceError(
            f"the tools of the run, {clean(path, 300)}, cannot be loaded: {exc.message}",
            "name their YAML with --tools, or leave the schemas out with --no-tools",
        ) from exc
