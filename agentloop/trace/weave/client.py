"""weave's own client, used so that it says whether calls arrived.

It takes 2 s to import. `weave.init` is not called: it would look for a newer version of itself, and
wrap the libraries of other providers. The client's queue is not used either: it drops calls after a
few failures, and only logs that. Here calls are collected and sent in one request; a failure is an
error.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import quote

from agentloop.errors import ConfigError, ExportError
from agentloop.text import clean, hide_secrets, hide_values
from agentloop.trace.deadline import Deadline, DeadlineExceeded
from agentloop.trace.weave.calls import EpisodeCall
from agentloop.trace.weave.connections import check_address, shown, watch_connections
from agentloop.trace.weave.encoding import encoded
from agentloop.trace.weave.keys import missing_key
from agentloop.trace.weave.making import CallMaker
from agentloop.wire import is_local

REQUEST_BYTES = 16 * 2**20
"""Most bytes of calls in one request; weave's server takes 32 MiB."""

REFUSED_CONTENT = frozenset({400, 413, 422})
"""Answers that say that the calls are wrong, not that the server cannot be used."""

FAILURES = ("error", "errors", "error_code", "detail", "message", "reason")
"""Fields of an answer that name a failure."""

NOT_CONNECTED = frozenset({"ConnectError", "ConnectTimeout"})
"""Classes of httpx for requests that had no connection."""

LONGEST_CAUSE = 200

LOCAL_KEY = "local"
"""API key and entity for a server on this machine, which needs neither."""

SETTINGS = {
    # weave reports errors within itself to its makers; a run's data is not for them.
    "WANDB_ERROR_REPORTING": "false",
    # Each call would go through three of its threads, and nothing is sent from them.
    "WEAVE_CLIENT_PARALLELISM": "0",
    # Else it imports wandb, a third of all that it imports, to look for a run of wandb's.
    "WANDB_DISABLE_WEAVE": "true",
}
"""Variables that weave reads when it is imported or used, unless the user has set them."""

_NOWHERE = logging.NullHandler()


class Client:
    """A connection to one project. The constructor uses the network.

    Raises:
        ConfigError: the key is missing, or the server's address is none.
        ExportError: the server cannot be reached, or refuses the key or the project.
    """

    def __init__(self, entity: str | None, project: str, model: str) -> None:
        self._server_name = "weave"
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        # It logs answers, which may echo the key. What they say is in the errors.
        silenced = logging.getLogger("weave")
        silenced.addHandler(_NOWHERE)
        silenced.propagate = False
        with self._named():
            from weave.trace import weave_client
            from weave.trace.context.weave_client_context import set_weave_client_global
            from weave.trace.env import wandb_base_url, weave_trace_server_url

            server = weave_trace_server_url()
            check_address("the address of weave's server", server)
            self._server_name = clean(shown(server), LONGEST_CAUSE)
            watch_connections()
            known = is_local(server) and not os.environ.get("WANDB_BASE_URL")
            if not known:
                check_address("the address of W&B", wandb_base_url())
            deadline = Deadline()
            with deadline.within(_request_s()):
                self._collector = _collector(_credentials(), deadline)
                if entity is None:
                    entity = LOCAL_KEY if known else _default_entity()
                client = _client_class(weave_client)
                self._client = client(entity, project, self._collector, ensure_project_exists=not known)
            # Without an active client, weave makes no calls, whichever is asked.
            set_weave_client_global(self._client)
            self._maker = CallMaker(self._client, self._collected, model or "policy")
            gc.freeze()  # what it imported stays: 170,000 objects, which need not be looked through

    def send(self, episodes: Sequence[Sequence[EpisodeCall]]) -> None:
        """Send the calls of episodes, each after its parent, and wait for the server's answer.

        Raises:
            ExportError: not all of them arrived.
        """
        self._collector.clear()
        with self._named():
            from weave.trace.settings import override_settings, should_disable_weave

            if should_disable_weave():
                raise ExportError("weave is switched off by WEAVE_DISABLED", "unset that variable, or trace.weave")
            with override_settings(print_call_link=False):
                made = list(map(encoded, self._maker.make(episodes)))
            for batch in _batches(made):
                self._collector.post(self._client.entity, self._client.project, batch)

    def _collected(self, wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
        complete: dict[str, dict[str, Any]] = self._collector.complete()
        missing = [call for call in wanted if call not in complete]
        if missing:
            cause = self._collector.cause or "weave's client made no call of it"
            raise ExportError(f"{self._server_name}: {len(missing)} of {len(wanted)} calls were not made: {cause}")
        if self._collector.lost:
            raise next(iter(self._collector.lost.values()))  # the calls would name files that are not there
        return complete

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (ConfigError, ExportError):
            raise
        except Exception as exc:
            raise _named_error(self._server_name, exc) from exc


def _client_class(weave_client: Any) -> Any:
    """Return a class of weave's client that looks for a run of wandb's only where wandb was
    imported.

    Args:
        weave_client: weave's module of that name.
    """

    class Client(weave_client.WeaveClient):  # type: ignore[misc]  # it has no types
        def _get_current_wb_run_context(self) -> Any:
            return super()._get_current_wb_run_context() if "wandb" in sys.modules else None

    return Client


def _credentials() -> Any:
    """Return the user's key; for a server on this machine any will do.

    Raises:
        ConfigError: there is none.
    """
    from weave.trace.env import weave_trace_server_url
    from weave.wandb_interface.auth import ApiKeyCredentials
    from weave.wandb_interface.context import get_wandb_auth_context

    found = get_wandb_auth_context()
    if found is not None:
        return found
    if is_local(weave_trace_server_url()):
        return ApiKeyCredentials(LOCAL_KEY)
    raise missing_key()


def _default_entity() -> str:
    from weave.compat.wandb.wandb_thin.internal_api import Api

    entity = Api().default_entity_name()
    if entity is None:
        raise ExportError("the account of this API key has no default entity", "set trace.weave.entity")
    return str(entity)


def _request_s() -> float:
    """Return the seconds that a request may take with its retries: weave's own limit is that of
    each read."""
    from weave.trace.settings import http_timeout

    return 2 * float(http_timeout())


def _collector(credentials: Any, deadline: Deadline) -> Any:
    """Return weave's connection to its server, which keeps starts and ends instead of sending
    them. All other requests have a deadline."""
    from weave.trace_server_bindings.remote_http_trace_server import RemoteHTTPTraceServer
    from weave.vendor.weave_server_sdk._base_client import httpx
    from weave.vendor.weave_server_sdk.types import CallStartResponse

    Response = httpx.Response

    class Collector(RemoteHTTPTraceServer):  # type: ignore[misc]  # it has no types
        """All requests but those of calls are sent at once."""

        cause: str | None = None

        def clear(self) -> None:
            self._starts: dict[str, dict[str, Any]] = {}
            self._ends: dict[str, dict[str, Any]] = {}
            self.cause = None
            self.slow: DeadlineExceeded | None = None
            self.lost: dict[tuple[str, int], Exception] = {}

        def call_start(self, req: Any) -> Any:
            start = dict(req["start"])
            self._starts[start["id"]] = start
            return CallStartResponse(id=start["id"], trace_id=start["trace_id"])

        def call_end(self, req: Any) -> Any:
            end = dict(req["end"])
            self._ends[end["id"]] = end
            return {}

        def obj_create(self, req: Any) -> Any:
            return self._noting(super().obj_create, req)

        def file_create(self, req: Any) -> Any:
            name, content = req["file"]
            try:
                answer = self._noting(super().file_create, req)
            except Exception as exc:
                self.lost[name, hash(content)] = exc
                raise
            self.lost.pop((name, hash(content)), None)  # weave sends a file again without its digest
            return answer

        def post(self, entity: str, project: str, batch: Sequence[bytes]) -> None:
            """Send complete calls, which are JSON. weave's own method checks each value by its
            type, which takes longer than all else.

            Raises:
                ExportError: what answered is not weave's server, for instance a login page.
            """
            path = f"/v2/{quote(entity, safe='')}/{quote(project, safe='')}/calls/complete"
            body = b'{"batch":[' + b",".join(batch) + b"]}"
            with deadline.within(_request_s()):
                self._update_client_headers()
                answer = self._stainless_client.post(
                    path, content=body, cast_to=Response, options={"follow_redirects": False}
                )
            check_answer(clean(shown(self.trace_server_url), LONGEST_CAUSE), answer)

        def complete(self) -> dict[str, dict[str, Any]]:
            """Return the calls of which start and end are known, by id."""
            ends = {name: {k: v for k, v in end.items() if k != "is_eval"} for name, end in self._ends.items()}
            return {name: {**start, **ends[name]} for name, start in self._starts.items() if name in ends}

        def _noting(self, send: Any, req: Any) -> Any:
            if self.slow is not None:  # else each of the others would be waited for as long
                raise self.slow
            try:
                with deadline.within(_request_s()):
                    return send(req)
            except Exception as exc:
                self.slow = exc if isinstance(exc, DeadlineExceeded) else None
                self.cause = self.cause or _cause(exc)  # weave's client only logs it
                raise

    server = Collector.from_env(should_batch=False)
    server.clear()
    server.set_auth(credentials)
    return server


def check_answer(server: str, answer: Any) -> None:
    """Check that an `httpx.Response` confirms calls.

    weave's server answers with an empty JSON object. A later version may have fields in it, but
    none that says what failed.

    Raises:
        ExportError: it does not.
    """
    kind = answer.headers.get("content-type", "")
    data = None
    if answer.is_success and "json" in kind.lower():
        with contextlib.suppress(ValueError):
            data = answer.json()
    failed = not isinstance(data, dict) or data.get("success") is False or any(map(data.get, FAILURES))
    if failed:
        text = clean(hide_values(answer.text, _secrets(answer)), LONGEST_CAUSE)
        raise ExportError(
            f"{server} answered {answer.status_code}, but not as weave's server: {text}", "correct WF_TRACE_SERVER_URL"
        )


def _secrets(response: Any) -> list[str]:
    """Return the key with which a request was sent, as `hide_values` takes it."""
    found = [os.environ.get("WANDB_API_KEY", "")]
    with contextlib.suppress(AttributeError, RuntimeError):  # a response may have no request
        for name, value in response.request.headers.items():
            if name.lower() == "authorization":
                found.append(str(value))
    return found


def _batches(calls: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for call in calls:
        if batch and size + len(call) > REQUEST_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(call)
        size += len(call)
    if batch:
        yield batch


def _named_error(server: str, exc: Exception) -> ExportError:
    status = getattr(getattr(exc, "response", None), "status_code", None)
    hint = "set WANDB_API_KEY to a key that may write to this project" if status in (401, 403) else None
    return ExportError(
        f"{server}: {_cause(exc)}", hint, final=status in REFUSED_CONTENT, unreachable=not _connected(exc)
    )


def _connected(exc: BaseException) -> bool:
    """Whether a request that failed had a connection."""
    inner: BaseException | None = exc
    while inner is not None:
        if type(inner).__name__ in NOT_CONNECTED:  # of the httpx in weave, and of that beside it
            return False
        inner = inner.__cause__ or inner.__context__
    return True


def _cause(exc: BaseException) -> str:
    """Return what the server answered, or why it did not."""
    response = getattr(exc, "response", None)
    if response is not None and hasattr(response, "status_code"):
        hidden = _secrets(response)
        if 300 <= response.status_code < 400:
            target = hide_values(response.headers.get("location", ""), hidden)
            return f"it redirects to {clean(shown(target), LONGEST_CAUSE)}: correct WF_TRACE_SERVER_URL"
        text = hide_values(getattr(response, "text", ""), hidden)
        return f"it answered {response.status_code}: {clean(text, LONGEST_CAUSE)}"
    inner: BaseException | None = exc
    while inner is not None:
        if isinstance(inner, DeadlineExceeded):
            return str(inner)
        if isinstance(inner, OSError) and inner.strerror:
            return f"it cannot be reached: {clean(inner.strerror, LONGEST_CAUSE)}"
        inner = inner.__cause__ or inner.__context__
    return clean(hide_secrets(f"{type(exc).__name__}: {exc}"), LONGEST_CAUSE)
