"""Read a YAML file, apply `key=value` overrides, and validate the result as a recipe.

omegaconf loads, merges and interpolates; pydantic validates. Paths in the file are relative to the
file's folder, paths in an override to the working directory.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from agentloop.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=BaseModel)

PATH_KEYS = frozenset(
    {
        "model.path", "model.chat_template", "data.train", "data.val", "tools", "interactions", "reward.function",
        "run.dir", "rollout.python", "prepare", "out", "eval_data",
    }
)  # fmt: skip
"""Keys whose value names a file or folder, except `stages[*].data` of an SFT recipe."""


def load_config(model: type[ConfigT], path: Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read `path`, apply `overrides` (`a.b=value`, YAML values), interpolate and validate.

    Raises:
        ConfigError: the file is missing or not a YAML mapping, an override is malformed, a key is
            unknown (the nearest known key is named), or a value is wrong.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"give an existing file{'; in that folder: ' + ', '.join(near) if near else ''}"
        raise ConfigError(f"config file {path} does not exist", hint)

    try:
        base = OmegaConf.load(path)
    except (OSError, ValueError, OmegaConfBaseException) as exc:
        raise ConfigError(f"{path} cannot be read: {exc}", "give a YAML file") from exc
    except Exception as exc:  # yaml.YAMLError: yaml is omegaconf's dependency, not ours
        if type(exc).__module__.split(".")[0] != "yaml":
            raise
        raise ConfigError(f"{path} is not valid YAML: {exc}", "check its indentation, colons and quotes") from exc
    if not isinstance(base, DictConfig):
        raise ConfigError(f"{path} is not a mapping", "start it with keys such as `run:` and `model:`")

    # Resolve the file's paths first: those of overrides are relative to the working directory.
    _anchor(base, path.resolve().parent)
    for override in overrides:
        _apply_override(base, override, model)
    try:
        data = OmegaConf.to_container(base, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as exc:
        raise ConfigError(
            f"{path}: {str(exc).splitlines()[0]}", "define the interpolated key, or remove the interpolation"
        ) from exc
    assert isinstance(data, dict)
    return validate(model, typing.cast("dict[str, Any]", data), source=str(path))


def validate(
    model: type[ConfigT],
    data: dict[str, Any],
    source: str,
    hint: str = "`agentloop config` prints every key with its meaning and default",
) -> ConfigT:
    """Validate plain data.

    Args:
        source: name of the data, for messages.
        hint: the fix in the error.

    Raises:
        ConfigError: lists every wrong key and the fix.
    """
    try:
        return model.model_validate(data)
    except ValidationError as exc:
        known = list(known_keys(model))
        lines = [_explain(error, known) for error in exc.errors()]
        count = f"{len(lines)} errors" if len(lines) > 1 else "an error"
        raise ConfigError(
            f"{source} has {count}:\n" + "\n".join(f"  - {line}" for line in lines),
            hint,
        ) from exc


def resolve_override_path(value: str, base: Path) -> str:
    """Make `value` an absolute path if it exists under `base` or is written as a path.

    Hub ids (`org/name`, `hub:org/name`) and names of entry points are returned unchanged.
    """
    target, colon, attribute = value.partition(":")
    if not target or Path(target).is_absolute() or "://" in value or value.startswith("hub:"):
        return value
    candidate = base / Path(target).expanduser()
    if Path(target).expanduser().is_absolute():
        return str(Path(target).expanduser()) + colon + attribute
    written_as_path = target.startswith(("./", "../")) or target.endswith(
        (".py", ".jsonl", ".parquet", ".yaml", ".jinja")
    )
    if written_as_path or candidate.exists():
        return str(candidate.resolve()) + colon + attribute
    return value


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a config model, sections included; `*` is any name in a mapping."""
    for name, info in model.model_fields.items():
        yield prefix + name
        section, kind = section_of(info.annotation)
        if section is not None:
            yield from known_keys(section, f"{prefix}{name}{'' if kind == 'one' else '.*'}.")


def section_of(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """Return the config section inside an annotation, and whether it is `one` or `many`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, "one"
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin in (dict, list):
        section, _ = section_of(arguments[-1])
        return section, "many"
    if origin in (typing.Union, types.UnionType):
        for argument in arguments:
            section, kind = section_of(argument)
            if section is not None:
                return section, kind
    return None, "one"


def _anchor(config: Any, folder: Path) -> None:
    """Make the file's relative paths absolute."""
    from omegaconf import DictConfig, ListConfig, OmegaConf

    if isinstance(config.get("reward"), str):  # so that an override can set reward.run_in
        config["reward"] = {"function": config["reward"]}
    for key in PATH_KEYS:
        if key == "run.dir":  # relative to the working directory, like the default outputs/<name>
            continue
        value = OmegaConf.select(config, key, throw_on_resolution_failure=False)
        if isinstance(value, str):
            OmegaConf.update(config, key, resolve_override_path(value, folder))
        elif isinstance(value, ListConfig):
            OmegaConf.update(config, key, [resolve_override_path(str(item), folder) for item in value])
    stages = config.get("stages")
    for stage in stages if isinstance(stages, ListConfig) else []:
        if not isinstance(stage, DictConfig):
            continue  # validation reports it
        if isinstance(stage.get("data"), str):
            stage["data"] = resolve_override_path(stage["data"], folder)
        elif isinstance(stage.get("data"), ListConfig):
            stage["data"] = [resolve_override_path(str(item), folder) for item in stage["data"]]


def _apply_override(config: Any, override: str, model: type[BaseModel]) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, equals, raw = override.partition("=")
    key = key.strip().removeprefix("++").removeprefix("+")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not key=value", "write for example run.steps=10")

    known = list(known_keys(model))
    if not _is_known(key, known):
        raise ConfigError(f"override {override!r}: unknown key {key!r}", _nearest(key, known))

    try:
        parsed = OmegaConf.from_dotlist([f"{key}={raw}"])
        value = OmegaConf.select(parsed, key)
        if key == "reward" and isinstance(value, str):
            key = "reward.function"
        if key in PATH_KEYS:
            if isinstance(value, str):
                value = resolve_override_path(value, Path.cwd())
            elif OmegaConf.is_list(value):
                value = [resolve_override_path(str(item), Path.cwd()) for item in value]
        OmegaConf.update(config, key, value, merge=True, force_add=True)
    except OmegaConfBaseException as exc:
        raise ConfigError(f"override {override!r}: {str(exc).splitlines()[0]}", "quote the value as in YAML") from exc


def _is_known(key: str, known: list[str]) -> bool:
    parts = key.split(".")
    for pattern in known:
        wanted = pattern.split(".")
        if len(wanted) == len(parts) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=True)):
            return True

    # Mappings with free names: an agent under `agents`, anything under `options` of an agent or of
    # the data.
    return (
        (len(parts) == 2 and parts[0] == "agents")
        or (len(parts) > 3 and parts[0] == "agents" and parts[2] == "options")
        or (len(parts) > 2 and parts[:2] == ["data", "options"])
    )


def _nearest(key: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not matches:
        last = key.split(".")[-1]
        matches = [k for k in known if k.split(".")[-1] == last] or difflib.get_close_matches(
            last, [k.split(".")[-1] for k in known], n=1, cutoff=0.6
        )
        matches = [k for k in known if k.split(".")[-1] in [m.split(".")[-1] for m in matches]][:1]
    return f"did you mean {matches[0]!r}?" if matches else "`agentloop config` prints all keys"


def _explain(error: Any, known: list[str]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {_nearest(key, known)}"
    if error["type"] == "missing":
        return f"key {key!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if not key or isinstance(error["input"], dict) else f" (given: {error['input']!r})"
    return f"{key}: {message}{given}" if key else message
