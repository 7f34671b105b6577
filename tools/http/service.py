"""`ServiceClient`: JSON to a service behind a tool, and its JSON answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Hashable, Mapping
from types import MappingProxyType
from typing import Any

import httpx
import orjson

from agentloop.client.connections import MOST_BYTES as MOST_BYTES_KEY
from agentloop.client.connections import AnswerTooLarge, ConnectionPool
from agentloop.client.rate_limit import RateLimit
from agentloop.client.retry import LONGEST_POLL_S, Outage, Retries, retry_after
from agentloop.client.time_limit import not_counted
from agentloop.errors import RequestRejected, ToolConfigError, ToolError, ToolUnavailable
from agentloop.runtime.pacing import Pacer
from agentloop.text import hide_values
from agentloop.tool.secrets import hide
from agentloop.trace.spans import trace_headers
from agentloop.wire import bearer

log = logging.getLogger(__name__)

CONNECT_S = 10.0

WRONG_REQUEST = frozenset({400, 413, 422})
"""Statuses that blame what was asked: the model can be shown them. Other 4xx blame the address, the
token or the service."""

AWAY = frozenset({502, 503})
"""Statuses with which a proxy answers for a service that is away."""

UNPACKED = {"accept-encoding": "gzip, deflate"}
LONGEST_MESSAGE = 300
MOST_BYTES = 2**25
"""Bytes of an answer."""


class ServiceClient:
    """Sends requests to one URL, in turns and with retries; infrastructure failures are ToolErrors.

    Sent again, with growing pauses and jitter, are requests that met a status of 5xx, 408 or 429, a
    broken connection, or the time limit: at most `retries` times. While the service accepts no
    connection, or answers 502, 503 or with Retry-After, the requests wait for it: at most
    `outage_s`, all of them together; an outage's begin and end are logged. Each attempt counts
    against the rate. Of all this, only the attempt that was answered counts against the time limit
    of the episode.

    Args:
        name: the tool's, for messages.
        url: where requests are posted.
        limit: rate and requests in flight.
        timeout_s: time limit of one attempt.
        retries: further attempts after a failure.
        outage_s: how long to wait for a service that cannot be reached.
        headers: further headers; their values never enter a message.
        token: bearer token.
        transport: replaces the connections, in tests.
        clock: seconds, in tests.

    Raises:
        ToolConfigError: the URL is not an HTTP address, or no header can hold the token.
    """

    def __init__(
        self,
        name: str,
        url: str,
        limit: RateLimit,
        *,
        timeout_s: float = 30.0,
        retries: int = 4,
        outage_s: float = 120.0,
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
        max_connections: int = 128,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        try:
            self._url = httpx.URL(url)
        except (httpx.InvalidURL, TypeError) as exc:
            raise ToolConfigError(f"{name}: {url!r} is not a URL: {exc}", "write it as http://host:port/path") from exc
        if self._url.scheme not in ("http", "https") or not self._url.host:
            raise ToolConfigError(f"{name}: {url!r} is not the address of a service", "write it as http://host:port")
        self.name = name
        self._limit = limit
        self._retries, self._outage_s = retries, outage_s
        given = {name.lower(): value for name, value in (headers or {}).items()}
        self._headers = {"content-type": "application/json", "accept": "application/json", **UNPACKED, **given}
        given_values = [*(headers or {}).values(), *([token] if token else [])]
        self._secrets = sorted(given_values, key=len, reverse=True)
        self._key_hint = "give the token that the service was started with: config.token_env names its variable"
        if token:
            self._headers["authorization"] = bearer(token)
        elif headers:
            self._key_hint = (
                f"correct the key in config.headers ({', '.join(headers)}), or give a token with config.token_env"
            )
        self._extensions = {
            "timeout": httpx.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s)).as_dict(),
            MOST_BYTES_KEY: MOST_BYTES,
        }
        self._max_connections = max_connections
        self._given_transport = transport
        self._transport: httpx.AsyncBaseTransport | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outage, self._refusals = Outage(clock), Outage(clock)
        self._away_since: float | None = None
        self._pacer = Pacer()

    async def post(self, body: Any, caller: Hashable) -> Any:
        """Send `body` as JSON; return the answer's JSON.

        Args:
            caller: the episode, for fairness.

        Raises:
            RequestRejected: the service says that the request is wrong (400, 413, 422); the hint is
                its own `fix`, if it gives one.
            ToolError: final; the message names the tool, the URL and the last error.
        """
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        return await self.request("POST", self._url, data, caller)

    async def request(
        self,
        method: str,
        url: httpx.URL,
        data: bytes | None,
        caller: Hashable,
        *,
        read: Callable[[bytes], Any] = orjson.loads,
        wrong: Collection[int] = WRONG_REQUEST,
        hints: Mapping[int, str] = MappingProxyType({}),
    ) -> Any:
        """Send a request; return what `read` makes of the answer.

        Args:
            method, url, data: the request; `url` is on the service's host.
            caller: the episode, for fairness.
            read: raises ValueError for an answer that is not one: the request is sent again.
            wrong: statuses that blame the request.
            hints: fixes of other statuses, in place of those that blame the set-up.

        Raises:
            RequestRejected, ToolError: as `post`.
        """
        retries = _ToolRetries(self._retries, self._outage_s, self._outage, self.name, self.shown_url)
        clock = asyncio.get_running_loop().time
        with not_counted() as wait:
            while True:
                try:
                    async with self._limit.slot(caller):
                        await self._pacer.turn()  # a hundred connections may open in the same moment
                        begin = clock()
                        answer = await self._send(method, url, data)
                except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
                    failure = self._hidden(f"{type(exc).__name__}: {exc}")
                    pause = retries.after_outage(failure)
                    self._note_away(failure)
                except AnswerTooLarge as exc:
                    text = f"the answer has more than {MOST_BYTES >> 20} MB"
                    raise self._fault(text, "have the service answer less") from exc
                except httpx.LocalProtocolError as exc:
                    raise self._fault(str(exc), "correct the tool's headers or URL") from exc
                except httpx.TransportError as exc:
                    pause = retries.after_failure(self._hidden(f"{type(exc).__name__}: {exc}"))
                else:
                    self._outage.over()
                    if answer.status_code not in AWAY:
                        self._refusals.over()
                        self._note_back()
                    if answer.status_code < 300:
                        try:
                            found = read(answer.content)
                        except ValueError as exc:
                            pause = retries.after_failure(self._hidden(f"the answer cannot be read: {exc}"[:500]))
                        else:
                            wait.count(clock() - begin)
                            return found
                    else:
                        pause = self._pause(answer, retries, wrong, hints)
                await asyncio.sleep(pause)

    async def close(self) -> None:
        """Close the connections; the next request opens others."""
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.aclose()

    @property
    def shown_url(self) -> str:
        """The URL without credentials."""
        return str(self._url.copy_with(userinfo=b"", query=None, fragment=None))

    def _note_away(self, failure: str) -> None:
        """Say once that calls wait: else a run that stands still for minutes does not say why."""
        if self._away_since is None:
            self._away_since = self._outage.clock()
            log.warning(
                "%s at %s is away (%s): its calls wait for it, %g s at most",
                self.name, self.shown_url, failure, self._outage_s,
            )  # fmt: skip

    def _note_back(self) -> None:
        if self._away_since is not None:
            lasted, self._away_since = self._outage.clock() - self._away_since, None
            log.warning("%s at %s answers again, after %.0f s", self.name, self.shown_url, lasted)

    def _pause(
        self, answer: httpx.Response, retries: _ToolRetries, wrong: Collection[int], hints: Mapping[int, str]
    ) -> float:
        """Return the seconds to wait before the request is sent again.

        Raises:
            RequestRejected, ToolError: as `post`.
        """
        status = answer.status_code
        failure = f"{status}: {_message(answer, self._hidden)}"
        if status in (408, 429) or (status >= 500 and status not in wrong):
            wanted = retry_after(answer.headers, self._outage_s)
            if wanted is not None:
                return retries.after_outage(failure, wanted)
            if status not in AWAY:
                return retries.after_failure(failure)
            pause = retries.after_refusal(failure, self._refusals)
            self._note_away(failure)
            return pause
        if status in wrong:
            fix = _fix(answer, self._hidden)
            raise RequestRejected(f"{self.name}: the service refused the request, {failure}", fix)
        allowed = answer.headers.get("allow", "")
        if status == 405 and allowed.isascii() and allowed.isprintable():
            failure += f"; it takes {allowed[:60]}" if allowed else ""
        hint = {
            401: self._key_hint,
            403: f"{self._key_hint}, or call it by the name it was bound to",
            404: "correct the path of the URL",
            405: "correct the path of the URL",
            **hints,
        }.get(status, "correct the URL: redirects are not followed" if status < 400 else "see the service's log")
        raise self._fault(f"the service answered {failure}", hint)

    async def _send(self, method: str, url: httpx.URL, data: bytes | None) -> httpx.Response:
        headers = {**self._headers, **trace_headers()}
        request = httpx.Request(method, url, headers=headers, content=data, extensions=self._extensions)
        answer = await self._connections().handle_async_request(request)
        await answer.aread()
        return answer

    def _connections(self) -> httpx.AsyncBaseTransport:
        """Return the pool of the running event loop: connections belong to one."""
        loop = asyncio.get_running_loop()
        if self._transport is None or loop is not self._loop:
            self._loop = loop
            self._transport = self._given_transport or ConnectionPool(self._max_connections)
        return self._transport

    def _fault(self, text: str, hint: str) -> ToolError:
        return ToolError(f"{self.name} at {self.shown_url}: {self._hidden(text)}", hint, final=True)

    def _hidden(self, text: str) -> str:
        return hide(hide_values(text, self._secrets), self._secrets)


class _ToolRetries(Retries):
    def __init__(self, retries: int, outage_s: float, outage: Outage, name: str, url: str) -> None:
        super().__init__(retries, outage_s, outage)
        self._where = f"{name} at {url}"

    def after_refusal(self, failure: str, refusals: Outage) -> float:
        """Return the seconds to wait after a proxy's answer for a service that is away.

        How long this request has waited counts as well: others may be answered meanwhile.

        Raises:
            ToolUnavailable: that has lasted too long.
        """
        pause = self.after_outage(failure, LONGEST_POLL_S)
        lasted = refusals.lasted()
        if lasted >= self._outage_s:
            raise self._unavailable(lasted, failure)
        return pause

    def _gave_up(self, failures: int, failure: str) -> ToolError:
        return ToolError(
            f"{self._where} failed {failures} times; last error: {failure}",
            "see the log of that service; the tool's config `retries` sets the number of retries",
            final=True,
        )

    def _unavailable(self, lasted: float, failure: str) -> ToolError:
        return ToolUnavailable(
            f"{self._where} has been unavailable for {lasted:.0f} s; last error: {failure}",
            "start that service, or correct the URL; the tool's config `outage_s` says how long to wait for it",
            final=True,
        )


def _fix(answer: httpx.Response, hidden: Callable[[str], str]) -> str:
    """Return the fix in the error of a service of this project; empty: it gives none."""
    try:
        found = orjson.loads(answer.content)
    except ValueError:
        return ""
    fix = found.get("fix") if isinstance(found, dict) else None
    return hidden(fix[: 16 * LONGEST_MESSAGE])[:LONGEST_MESSAGE] if isinstance(fix, str) else ""


def _message(answer: httpx.Response, hidden: Callable[[str], str]) -> str:
    """Return the service's error text, briefly; cut behind the hiding, or a part of a key stays."""
    # Not by the answer's own charset: Python has codecs that are not of text, or take long.
    try:
        found = orjson.loads(answer.content)
    except ValueError:
        return hidden(answer.content[: 16 * LONGEST_MESSAGE].decode("utf-8", "replace"))[:LONGEST_MESSAGE]
    for key in ("error", "detail", "message"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    text = found if isinstance(found, str) else orjson.dumps(found).decode()
    return hidden(text[: 16 * LONGEST_MESSAGE])[:LONGEST_MESSAGE]
