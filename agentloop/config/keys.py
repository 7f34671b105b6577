"""The keys of a recipe: what each may hold, and the nearest one to a wrong key."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

NULL_TAG, MERGE_TAG = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"

SYNONYMS = {
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "learning_rate": "lr",
    "num_generations": "group_size",
    "max_completion_length": "max_response_tokens",
    "max_tokens": "max_new_tokens",
    "max_trajectories": "max_bytes_per_step",
    "world_size": "ranks",
}
"""Names that other systems, or earlier versions, have for keys of ours; they are too different to
be found as near."""

GONE = {"trace.queue_mb": "remove it: what is not sent yet waits in the run directory"}
"""Keys of earlier versions that nothing replaces, with the fix."""


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a section by the names that a recipe uses (`class`, not `class_`)."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a config model, sections included; `*` is any name or index."""
    for name, info in fields_of(model).items():
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
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        for argument in arguments:
            section, kind = section_of(argument)
            if section is not None:
                return section, kind
    return None, "one"


def annotation_at(model: type[BaseModel], parts: Sequence[str]) -> Any:
    """Return the type of the value at a dotted key, `Any` in a free mapping; None: unknown key."""
    annotation: Any = model
    for part in parts:
        if annotation is Any:
            return Any
        annotation = next((inner for option in options_of(annotation) if (inner := _inside(option, part))), None)
        if annotation is None:
            return None
    return annotation


def _inside(annotation: Any, part: str) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        info = fields_of(annotation).get(part)
        return info.annotation if info else None
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is list:
        return arguments[0] if part.isdecimal() and part.isascii() else None
    if origin is dict:
        return arguments[1] if part else None
    return None


def options_of(annotation: Any) -> list[Any]:
    """Return the members of a union without None; of another type, the type itself."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [option for member in typing.get_args(annotation) for option in options_of(member)]
    if origin is typing.Annotated:
        return options_of(typing.get_args(annotation)[0])
    return [] if annotation is types.NoneType else [annotation]


def is_text(annotation: Any) -> bool:
    """Whether a plain value of this type can be nothing but text: a name, a path, a choice."""

    def text(option: Any) -> bool:
        if typing.get_origin(option) is typing.Literal:
            return all(isinstance(choice, str) for choice in typing.get_args(option))
        return option in (str, Path)

    options = [option for option in options_of(annotation) if not is_list(option)]
    return bool(options) and all(map(text, options))


def is_list(annotation: Any) -> bool:
    """Whether one of the types is a list or a tuple."""
    return any(typing.get_origin(option) in (list, tuple) for option in options_of(annotation))


def item_of(annotation: Any) -> Any:
    """Return the type of a list's items; None if no list is among the types."""
    for option in options_of(annotation):
        if typing.get_origin(option) in (list, tuple):
            return typing.get_args(option)[0]
    return None


def written_texts(node: Any, model: type[BaseModel], place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (place, text) of the unquoted scalars where the model holds text: YAML may read them as
    numbers, booleans or dates.

    Keys of merged mappings (`<<`) come first: a mapping's own keys win.

    Args:
        node: what `yaml.compose` returned.
        place: keys from the root of the model to the node.
    """
    kind = type(node).__name__
    if kind == "MappingNode":
        pairs = sorted(node.value, key=lambda pair: pair[0].tag != MERGE_TAG)
        for key, value in pairs:
            if key.tag == MERGE_TAG:
                merged = reversed(value.value) if type(value).__name__ == "SequenceNode" else [value]
                for mapping in merged:  # of several, the first wins
                    yield from written_texts(mapping, model, place)
            elif type(key).__name__ == "ScalarNode":
                yield from written_texts(value, model, (*place, key.value))
    elif kind == "SequenceNode":
        for index, item in enumerate(node.value):
            yield from written_texts(item, model, (*place, str(index)))
    # Whatever the tag: a string for PyYAML may be a number for omegaconf, such as 1e3.
    elif node is not None and node.style is None and node.tag != NULL_TAG and is_text(annotation_at(model, place)):
        yield place, node.value


def put_text(data: Any, place: Sequence[str], value: str) -> None:
    """Replace the value at `place`; a place that the data do not have is left alone."""
    for part in place[:-1]:
        data = data[int(part)] if isinstance(data, list) else data.get(part)
        if not isinstance(data, dict | list):
            return
    if isinstance(data, list):
        data[int(place[-1])] = value
    elif place[-1] in data:
        data[place[-1]] = value


MOST_NAMED = 3
"""Known keys that a message names, if several are equally near."""

NEAR, FAR = 0.7, 0.6
"""Similarity of a key that is named, and of further ones that contain the same words."""


def keys_hint(model: type[BaseModel]) -> str:
    """Return the fix of an error in a recipe: the command that prints its keys."""
    return f"`{getattr(model, 'KEYS_COMMAND', 'agentloop config')}` prints every key with its meaning and default"


def nearest(key: str, known: Sequence[str], otherwise: str) -> str:
    """Return the fix for an unknown dotted key: the nearest key, also one of another section, or
    `otherwise` if none is near."""
    if key in GONE:
        return GONE[key]
    section, _, last = key.rpartition(".")
    here = [k for k in known if _fits(k.rpartition(".")[0], section)]
    siblings = {k.rpartition(".")[2]: k for k in here}
    if SYNONYMS.get(last) in siblings:
        return f"did you mean {_shown(siblings[SYNONYMS[last]], key)!r}?"
    # The very name one section deeper is meant rather than a similar one here.
    deeper = [k for k in known if section and k.startswith(f"{section}.") and k.endswith(f".{last}")]
    if deeper:
        return f"did you mean {_shown(deeper[0], key)!r}?"
    near = difflib.get_close_matches(last, siblings, n=MOST_NAMED, cutoff=NEAR) if section else []
    if near:
        # `max_turns` is a part of `max_user_turns` as much as of `max_assistant_turns`.
        words = set(last.split("_"))
        as_near = [
            name
            for name in difflib.get_close_matches(last, siblings, n=MOST_NAMED, cutoff=FAR)
            if len(words) > 1 and words < set(name.split("_"))
        ]
        meant = as_near if near[0] in as_near else near[:1]
        return f"did you mean {' or '.join(repr(_shown(siblings[name], key)) for name in meant)}?"

    matches = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not matches or SYNONYMS.get(last) or last in {k.rpartition(".")[2] for k in known}:
        lasts = [k.rpartition(".")[2] for k in known]
        wanted = SYNONYMS.get(last, last)
        close = [wanted] if wanted in lasts else difflib.get_close_matches(last, lasts, n=1, cutoff=0.6)
        matches = [k for k in known if k.rpartition(".")[2] in close][:1] or matches
    return f"did you mean {_shown(matches[0], key)!r}?" if matches else otherwise


def _fits(pattern: str, section: str) -> bool:
    wanted, parts = pattern.split("."), section.split(".")
    return len(wanted) == len(parts) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=True))


def _shown(pattern: str, key: str) -> str:
    """Return a known key with the names of `key` in place of `*`."""
    wanted, parts = pattern.split("."), key.split(".")
    if len(wanted) != len(parts):
        return pattern.replace("*", "<name>")
    return ".".join(part if want == "*" else want for want, part in zip(wanted, parts, strict=True))
