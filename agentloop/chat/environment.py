"""The Jinja environment of chat templates: transformers' settings, with faster lookups.

A chat template reads about thirty dict attributes and writes several JSON values in each rendering.
Both have a fast path here with the same result, which saves a third of the rendering time.

transformers keeps one compiled template for each text and uses it in `apply_chat_template`, so that
object is never changed. Templates are compiled here in an overlay: an environment that starts with
everything transformers sets (the sandbox, the `generation` tag, loop controls, `raise_exception`,
`strftime_now`) and adds filters and lookups.

A template is a program that came with a model. The sandbox keeps it from the machine, but not from
computing without end, so `work.py` bounds what a rendering does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers.utils.chat_template_utils import _compile_jinja_template

from agentloop.chat import work
from agentloop.chat.template import Fixed
from agentloop.errors import ModelError
from agentloop.text import clean


@lru_cache(maxsize=64)
def compile_template(text: str) -> Any:
    """Compile a chat template to a `jinja2.Template`, cached by its text.

    Raises:
        ModelError: the text is not valid Jinja, or is nested too deeply.
    """
    environment = _chat_environment()
    try:
        compiled = environment.from_string(text)
    except TemplateSyntaxError as exc:
        raise ModelError(
            f"the chat template is not valid Jinja: line {exc.lineno}: {exc.message}",
            "fix that line, or set model.chat_template to another file",
        ) from exc
    except Exception as exc:  # Jinja writes a Python program, which may be nested too deeply for Python
        raise ModelError(
            f"the chat template cannot be compiled: {type(exc).__name__}: {clean(exc, 200)}",
            "shorten its expressions and blocks, or set model.chat_template to another file",
        ) from exc

    # Jinja looks globals up through a ChainMap; a plain dict is faster.
    compiled.globals = dict(compiled.globals)
    return compiled


def _chat_environment() -> Any:
    """Return a new environment with transformers' settings and the fast paths below."""
    # The settings do not depend on the template: an empty one gives access to them.
    theirs = _compile_jinja_template("").environment

    # An overlay shares its dicts with the original: replace them, never write into them.
    ours = theirs.overlay()
    ours.globals = dict(theirs.globals)
    ours.filters = {**theirs.filters, "tojson": partial(_tojson, theirs.filters["tojson"])}
    ours.getattr = partial(_getattr, ours.getattr)
    work.bound(ours)
    return ours


_write_json = json.JSONEncoder(ensure_ascii=False).encode


def _tojson(slow: Callable[..., str], value: Any, *args: Any, **options: Any) -> str:
    """transformers' `tojson` filter: the same text, without creating an encoder for each call."""
    if args or options:
        return slow(value, *args, **options)
    if type(value) is not Fixed:
        return _write_json(value)
    if value._text is None:
        value._text = _write_json(value)
    return value._text


def _getattr(slow: Callable[[Any, str], Any], value: Any, name: str) -> Any:
    """Look up `value.name` with Jinja's rules: an attribute first, then an item.

    The fast path returns a dict's item, unless a dict method of that name hides it.
    """
    if type(value) is dict and name in value and name not in _DICT_ATTRIBUTES:
        return value[name]
    return slow(value, name)


_DICT_ATTRIBUTES = frozenset(dir(dict))
