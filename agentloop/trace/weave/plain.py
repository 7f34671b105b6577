"""Lets weave's client pass on values that are JSON already, instead of looking inside them.

For each call, weave walks through the inputs and the output several times: to save objects and ops,
to replace them by references, to turn them into JSON. The values of an episode's call are JSON but
for its images, and the walks took half of all the time. What is not `Plain` takes weave's own way.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Plain(dict[str, Any]):
    """An object of JSON that holds nothing else, at any depth: no image, object, op or table."""


def pass_plain(weave_client: Any) -> None:
    """Let the client take a `Plain` as it is where it would look for what is not JSON.

    weave still hides the values of sensitive keys, and personal data if its settings say so.

    Args:
        weave_client: weave's module of that name.
    """
    if hasattr(weave_client, _MARK):
        return
    setattr(weave_client, _MARK, True)
    weave_client.is_op = _plain_first(weave_client.is_op)
    for name in ("map_to_refs", "to_json", "to_jsonable_python"):
        setattr(weave_client, name, _unless_plain(getattr(weave_client, name)))
    weave_client.redact_sensitive_keys = _kept_plain(weave_client.redact_sensitive_keys)


def client_class(weave_client: Any) -> Any:
    """Return a class of weave's client that saves no objects of a `Plain`, and looks for a run of
    wandb's only where wandb was imported. Its executor, where it has no threads, only calls what it
    is given.

    Args:
        weave_client: weave's module of that name.
    """
    from weave.trace.concurrent.futures import FutureExecutor

    class Executor(FutureExecutor):  # type: ignore[misc]  # it has no types
        def _safe_submit(self, f: Callable[..., Any], *args: Any, **options: Any) -> Future[Any]:
            future: Future[Any] = Future()
            try:
                future.set_result(f(*args, **options))
            except Exception as exc:  # noqa: BLE001  # whoever asks for the result gets it
                future.set_exception(exc)
            return future

    class Client(weave_client.WeaveClient):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            if weave_client.get_parallelism_settings()[0] == 0:
                self.future_executor = Executor(max_workers=0)

        def _save_nested_objects(self, obj: Any, name: str | None = None) -> Any:
            return None if type(obj) is Plain else super()._save_nested_objects(obj, name)

        def _get_current_wb_run_context(self) -> Any:
            return super()._get_current_wb_run_context() if "wandb" in sys.modules else None

    return Client


_MARK = "_agentloop_plain"

_TYPES = frozenset({str, int, float, bool, type(None), dict, list})
"""Types that weave never decorates as ops: the check is skipped for them."""


def _plain_first(is_op: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return weave's `is_op`, asked only of values that may be one.

    weave asks it of every value inside a call. On Python 3.11 it looks up the attributes of a
    protocol each time.
    """

    def asked(value: Any) -> bool:
        return type(value) not in _TYPES and is_op(value)

    return asked


def _unless_plain(convert: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(convert)
    def converted(value: Any, *args: Any, **options: Any) -> Any:
        return value if type(value) is Plain else convert(value, *args, **options)

    return converted


def _kept_plain(redact: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(redact)
    def redacted(value: Any) -> Any:
        found = redact(value)
        return Plain(found) if type(value) is Plain else found

    return redacted
