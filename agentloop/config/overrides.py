"""Overrides of a recipe: `a.b=value`, put into the plain data of its file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel

from agentloop.config.keys import (
    annotation_at,
    is_list,
    is_text,
    item_of,
    keys_hint,
    known_keys,
    nearest,
    put_text,
    written_texts,
)
from agentloop.config.messages import value_fault
from agentloop.config.run import logger_sections
from agentloop.errors import ConfigError
from agentloop.imports import compose, describe_yaml_error
from agentloop.text import clean, hide_override

Anchor = Callable[[str, Any], Any]
"""(key, value) -> the value with its relative paths made absolute."""

NULLS = ("", "~", "null", "Null", "NULL")


def apply_override(data: dict[str, Any], override: str, model: type[BaseModel], anchor: Anchor) -> tuple[str, str]:
    """Set one `key=value` in the data of a recipe, in place.

    The value is YAML, but where the model holds text it is taken as it stands: `run.name=123`. A
    mapping is merged into the existing one; an index one above the last extends a list.

    Returns:
        Its key, and the override as messages name it.

    Raises:
        ConfigError: it is not `key=value`, the key is unknown, or the value is not YAML or one that
            no key takes. The value of a secret is not shown.
    """
    key, equals, raw = override.partition("=")
    key = key.strip().removeprefix("++").removeprefix("+")
    shown = clean(hide_override(override), 200)
    if not equals or not key:
        raise ConfigError(f"override {shown!r} is not key=value", "write for example run.steps=10")

    parts = key.split(".")
    if not all(parts) or annotation_at(model, parts) is None:
        # The value is not shown: a misspelt `rollout.tokn=..` holds a secret too.
        raise ConfigError(
            f"unknown key {clean(key, 200)!r} in an override", nearest(key, list(known_keys(model)), keys_hint(model))
        )

    value = _value(raw, parts, model, f"override {shown!r}")
    fault = value_fault(value, key)
    if fault is not None:
        raise ConfigError(f"override {shown!r}: {fault}", "correct that value")
    if key == "reward" and isinstance(value, str):
        value = {"function": value}
    elif key == "loggers":
        value = logger_sections(value)
    _set(data, parts, anchor(".".join(parts), value), model, shown)
    return ".".join(parts), f"override {shown!r}"


def _value(raw: str, parts: Sequence[str], model: type[BaseModel], where: str) -> Any:
    """Read the text behind `=`."""
    text, annotation = raw.strip(), annotation_at(model, parts)
    if text not in NULLS and text[0] not in "'\"{[":
        if is_text(annotation):
            return text
        if is_text(item_of(annotation)):
            return [text]  # the only item of a list

    node = compose(text, where, ConfigError)  # also bounds depth and aliases
    holder = {"value": _yaml(text, where)}
    for place, written in written_texts(node, model, tuple(parts)):
        put_text(holder, ("value", *place[len(parts) :]), written)
    return holder["value"]


def _yaml(text: str, where: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        container = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except OmegaConfBaseException as exc:
        raise ConfigError(f"{where}: the value cannot be read", "quote the value as in YAML") from exc
    except (ValueError, TypeError, AttributeError, RecursionError) as exc:
        raise ConfigError(f"{where}: the value is not YAML", "quote the value as in YAML") from exc
    except Exception as exc:  # yaml.YAMLError: yaml is omegaconf's dependency, not ours
        if type(exc).__module__.split(".")[0] != "yaml":
            raise
        raise ConfigError(f"{where}: the value is not YAML: {describe_yaml_error(exc)}", "quote the value") from exc
    assert isinstance(container, dict)
    return container["value"]


def _set(data: Any, parts: Sequence[str], value: Any, model: type[BaseModel], shown: str) -> None:
    """Put a value at a dotted key; sections and lists on the way are created."""
    root = data
    for depth in range(1, len(parts)):
        part, inside = parts[depth - 1], annotation_at(model, parts[:depth])
        child = _get(data, part, parts[: depth - 1], shown)
        if isinstance(child, str) and "${" in child:
            child = _interpolated(root, parts[:depth], shown)
        if not isinstance(child, dict | list):
            child = [] if is_list(inside) else {}
        _assign(data, part, child)
        data = child
    last = parts[-1]
    old = _get(data, last, parts[:-1], shown)
    if isinstance(old, dict) and isinstance(value, dict):
        value = _merged(old, value)
    _assign(data, last, value)


def _get(data: Any, part: str, place: Sequence[str], shown: str) -> Any:
    if isinstance(data, dict):
        return data.get(part, data.get(int(part)) if part.isdecimal() and len(part) < 19 else None)
    index = int(part) if part.isdecimal() and part.isascii() and len(part) < 19 else None
    if index is None or index > len(data):
        name = ".".join(place)
        raise ConfigError(
            f"override {shown!r}: {name} is a list of {len(data)}", f"the next entry is {name}.{len(data)}"
        )
    return data[index] if index < len(data) else None


def _assign(data: Any, part: str, value: Any) -> None:
    if isinstance(data, dict):
        data[int(part) if part.isdecimal() and len(part) < 19 and int(part) in data else part] = value
    elif int(part) == len(data):
        data.append(value)
    else:
        data[int(part)] = value


def _merged(old: dict[Any, Any], new: dict[Any, Any]) -> dict[Any, Any]:
    both = dict(old)
    for key, value in new.items():
        before = both.get(key)
        both[key] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return both


def _interpolated(root: Any, place: Sequence[str], shown: str) -> Any:
    """Return a section that the file takes from elsewhere, so that the override changes a copy."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        found = OmegaConf.select(OmegaConf.create(root), ".".join(place))
        return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as exc:
        raise ConfigError(
            f"override {shown!r}: {'.'.join(place)} is an interpolation that cannot be read", "correct it in the file"
        ) from exc
