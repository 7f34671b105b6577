"""Read a YAML file, apply `key=value` overrides, and validate the result as a recipe.

omegaconf types and interpolates the values; pydantic validates them. Paths in the file are relative
to the file's folder, paths in an override to the working directory.
"""

from __future__ import annotations

import io
import shutil
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from agentloop.config.keys import keys_hint, put_text, written_texts
from agentloop.config.messages import describe_errors, origin_of, value_fault
from agentloop.config.overrides import apply_override
from agentloop.config.run import logger_sections
from agentloop.errors import ConfigError
from agentloop.files import real_path
from agentloop.imports import compose, is_file_reference, read_yaml_text
from agentloop.registry import AGENTS, DATASETS, REWARDS, registered

ConfigT = TypeVar("ConfigT", bound=BaseModel)

LONGEST_NAME = 255
"""Bytes of a file name that file systems accept."""

REFERENCE = ("", AGENTS, REWARDS)
"""Groups whose references are `path.py:name` or a registered name: another path cannot be meant."""

PATH_KEYS: dict[str, str | None] = {
    "model.path": None, "model.chat_template": None, "tools": None, "interactions": None, "run.dir": None,
    "trainer.lora.adapters": None, "lora.adapters": None, "out": None, "rollout.python": None, "prepare": "",
    "data.train": DATASETS, "data.val": DATASETS, "stages.*.data": DATASETS, "eval_data": DATASETS,
    "data.default_agent": AGENTS, "agents.*.class": AGENTS, "reward.function": REWARDS,
}  # fmt: skip
"""Keys whose value names a file, a folder or an object; for an object, its entry-point group."""


def load_config(model: type[ConfigT], path: Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read `path`, apply `overrides` (`a.b=value`, YAML values), interpolate and validate.

    Values of keys that hold text are taken as they are written: `run.name: 007` is the name 007.

    Raises:
        ConfigError: the file is missing or not a YAML mapping, an override is malformed, a key is
            unknown (the nearest known key is named), or a value is wrong. No message shows a
            secret.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    data = read_config(path, model)
    _refuse_tools(data, path)
    # Resolve the file's paths first: those of overrides are relative to the working directory.
    folder = real_path(path).parent
    _expand(data)
    _anchor(data, folder)
    given: dict[str, str] = {}
    for override in overrides:
        key, shown = apply_override(data, override, model, lambda key, value: _anchored(key, value, Path.cwd()))
        given.pop(key, None)
        given[key] = shown
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(data), resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as exc:
        source = origin_of(str(getattr(exc, "full_key", None) or ""), str(path), given)
        raise ConfigError(
            f"{source}: {_interpolation_fault(exc)}", "define the interpolated key, or remove the interpolation"
        ) from exc
    assert isinstance(resolved, dict)
    return validate(model, typing.cast("dict[str, Any]", resolved), source=str(path), folder=folder, overrides=given)


def _refuse_tools(data: dict[str, Any], path: Path) -> None:
    """Raise `ConfigError` if the file is a tool YAML, or has its content in place of its path."""
    tools = data.get("tools")
    if not isinstance(tools, list) or not tools or not all(isinstance(entry, dict) for entry in tools):
        return
    if set(data) == {"tools"}:
        raise ConfigError(
            f"{path} is a tool YAML, not a recipe",
            f"give a recipe, which names it: `tools: ./{path.name}`; `agentloop tools` takes it with --tools {path}",
        )
    raise ConfigError(
        f"{path}: tools is a list of tools", "write them into a file of their own, and name it: `tools: ./tools.yaml`"
    )


def read_config(path: Path, model: type[BaseModel] | None = None) -> dict[str, Any]:
    """Read a YAML mapping; interpolations and paths stay as they are written.

    Args:
        model: values of its text keys stay text: `name: 007`, `name: no`.

    Raises:
        ConfigError: the file is missing, or not a YAML mapping.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    hint = f"give an existing file{'; in that folder: ' + ', '.join(near) if near else ''}"
    text = read_yaml_text(path, f"config file {path}", ConfigError, hint)
    node = compose(text, str(path), ConfigError)
    if type(node).__name__ != "MappingNode":
        raise ConfigError(f"{path} is not a mapping", "start it with keys such as `run:` and `model:`")
    try:
        data = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except (OmegaConfBaseException, ValueError, TypeError, AttributeError, LookupError, RecursionError) as exc:
        # yaml itself raises an IndexError for a number without digits, such as `!!float _`.
        raise ConfigError(f"{path} cannot be read: {str(exc).splitlines()[0]}", "give a YAML file") from exc
    except Exception as exc:  # yaml.YAMLError: yaml is omegaconf's dependency, not ours
        if type(exc).__module__.split(".")[0] != "yaml":
            raise
        from agentloop.imports import describe_yaml_error

        raise ConfigError(f"{path} is not valid YAML: {describe_yaml_error(exc)}", "correct that line") from exc
    assert isinstance(data, dict)
    for place, written in written_texts(node, model, ()) if model is not None else ():
        put_text(data, place, written)
    return typing.cast("dict[str, Any]", data)


def validate(
    model: type[ConfigT],
    data: dict[str, Any],
    source: str,
    hint: str | None = None,
    folder: Path | None = None,
    overrides: Mapping[str, str] | None = None,
) -> ConfigT:
    """Validate plain data.

    Args:
        source: name of the data, for messages.
        hint: the fix in the error; None: the command that prints the keys of a recipe.
        folder: base of relative paths in rows; None: the working directory.
        overrides: those in the data, as `describe_errors` takes them.

    Raises:
        ConfigError: lists every wrong key and the fix.
    """
    fault = value_fault(data)
    if fault is not None:
        raise ConfigError(f"{source}: {fault}", "correct that value")
    try:
        return model.model_validate(data, context={"folder": folder})
    except ValidationError as exc:
        text = describe_errors(exc, model, source, overrides or {})
        raise ConfigError(text, keys_hint(model) if hint is None else hint) from exc


def resolve_override_path(value: str, base: Path, group: str | None = None) -> str:
    """Make `value` an absolute path if it exists under `base` or is written as a path.

    Hub ids (`org/name`, `hub:org/name`) and registered names are returned unchanged: a folder that
    happens to have the name of a registered object does not hide it.

    Args:
        group: entry-point group of the names that the key takes; None: it takes only paths.
    """
    target, colon, attribute = value.partition(":")
    if not target or Path(target).is_absolute() or "://" in value or value.startswith("hub:"):
        return value
    if group in REFERENCE and not is_file_reference(value):
        return value
    if group and value in registered(group):
        return value
    if target.startswith("~"):
        return str(Path(target).expanduser()) + colon + attribute
    written_as_path = target.startswith(("./", "../")) or target.endswith(
        (".py", ".jsonl", ".parquet", ".yaml", ".jinja")
    )
    try:
        if written_as_path or (base / target).exists():
            return str(real_path(base / target)) + colon + attribute
    except (OSError, ValueError):  # too long for a file name, or a NUL in it: validation says so
        pass
    return value


def _expand(data: dict[str, Any]) -> None:
    """Write short forms in full, so that an override can set a part: `reward`, `loggers`."""
    if isinstance(data.get("reward"), str):
        data["reward"] = {"function": data["reward"]}
    if "loggers" in data:
        data["loggers"] = logger_sections(data["loggers"])


def _anchor(data: dict[str, Any], folder: Path) -> None:
    """Make the file's relative paths absolute."""
    for pattern in PATH_KEYS:
        if pattern == "run.dir":  # relative to the working directory, like the default outputs/<name>
            continue
        *parents, last = pattern.split(".")
        for section in _sections(data, parents):
            if last in section:
                section[last] = _anchored(pattern, section[last], folder)
    if isinstance(data.get("agents"), dict):
        data["agents"] = _anchored_names(data["agents"], folder)


def _anchored_names(agents: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return limits by agent name, with each `path.py:Class` as rows name it: absolute.

    Raises:
        ConfigError: two names are the same file and class.
    """
    found: dict[str, Any] = {}
    for name, limits in agents.items():
        resolved = resolve_override_path(name, folder, AGENTS) if isinstance(name, str) else name
        if resolved in found:
            raise ConfigError(f"agents: two keys name {resolved}", "give its limits once")
        found[resolved] = limits
    return found


def _sections(data: Any, parents: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the mappings at a path of keys; `*` is every value of a mapping or a list."""
    if not parents:
        if isinstance(data, dict):
            yield data
        return
    first, *rest = parents
    if first == "*":
        for item in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
            yield from _sections(item, rest)
    elif isinstance(data, dict):
        yield from _sections(data.get(first), rest)


def _anchored(key: str, value: Any, folder: Path) -> Any:
    """Return a value with its relative paths made absolute, if `key` holds paths."""
    parts = key.split(".")
    pattern = next(
        (
            pattern
            for pattern in PATH_KEYS
            if len(wanted := pattern.split(".")) == len(parts)
            and all(w in ("*", p) for w, p in zip(wanted, parts, strict=True))
        ),
        None,
    )
    if pattern is None:
        if isinstance(value, dict):  # a whole section as the value of an override
            if key == "agents":
                value = _anchored_names(value, folder)
            return {name: _anchored(f"{key}.{name}", item, folder) for name, item in value.items()}
        if isinstance(value, list):
            return [_anchored(f"{key}.{index}", item, folder) for index, item in enumerate(value)]
        return value
    for path in value if isinstance(value, list) else [value]:
        if isinstance(path, dict | list):  # no path, which the validation says
            return value
        if any(len(part.encode("utf-8", "surrogatepass")) > LONGEST_NAME for part in str(path).split("/")):
            raise ConfigError(f"{key}: a name in the path has more than {LONGEST_NAME} bytes", "give a shorter path")
    if isinstance(value, list):
        return [resolve_override_path(str(item), folder, PATH_KEYS[pattern]) for item in value]
    if not isinstance(value, str) or (pattern == "rollout.python" and shutil.which(value)):
        return value
    return resolve_override_path(value, folder, PATH_KEYS[pattern])


def _interpolation_fault(exc: Exception) -> str:
    """Return the cause without the value, which may be a secret."""
    if isinstance(exc, RecursionError):
        return "an interpolation refers to itself"
    key = getattr(exc, "full_key", None)
    text = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
    if type(exc).__name__ == "GrammarParseError":  # quotes the value
        return f"{key}: the interpolation cannot be read" if key else "an interpolation ${..} cannot be read"
    return f"{key}: {text}" if key and str(key) not in text else text
