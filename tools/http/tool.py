"""`HttpTool`: a service as a tool by YAML alone."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import orjson

from agentloop.client.rate_limit import RateLimit
from agentloop.errors import RequestRejected, ToolConfigError, ToolError
from agentloop.text import did_you_mean
from agentloop.tool.base import COPIED_COLUMNS, Tool
from agentloop.types import Task, ToolResult, result_text
from tools.http.options import Options
from tools.http.service import WRONG_REQUEST, ServiceClient
from tools.http.template import NotGiven, Unusable, encodable, fill, fill_url, follow, places

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


class HttpTool(Tool):
    """One request to a service for each call, its answer for the model.

    Keys of `config`:
        url: with places for arguments in path and query: `https://host/city/{city}`. Required.
        method: GET (the default without `json`), POST (with it), PUT, PATCH or DELETE.
        query: parameters of the URL, by name. A text may have places; an argument that is not given
            is left out.
        json: the body, any JSON with places. Without `query` and `json`, the arguments that the URL
            does not use are the query of a GET or DELETE and the body of the others.
        headers, token_env: further headers; the environment variable that holds a bearer token.
        result: path of what is shown in a JSON answer, `data.items.*.text`; null: all of it.
        missing: what is shown if an answer has no such part; null: the call fails.
        tell: statuses whose message the model reads: the call was wrong ([400, 413, 422]).
        from_row: names of arguments that rows give (`execute_kwargs`) and the model does not see.
        timeout, retries, outage_s, rate_limit, num_workers: as those of the search tool.
    """

    own_time_limit = True  # waiting for a turn, or for the service, is not the model's fault

    def __init__(self, config: dict[str, Any], schema: dict[str, Any]) -> None:
        super().__init__(config, schema)
        options = Options(self.name, config)
        url = options.text("url")
        if url is None:
            raise ToolConfigError(f"{self.name}: config has no url", "give the address of the service")
        host = url.partition("://")[2].partition("/")[0].partition("?")[0]
        if "{" in host or "{" in url.partition("://")[0]:
            raise ToolConfigError(
                f"{self.name}: config.url has a place for an argument in its host", "the model cannot choose the host"
            )
        self._url = url
        self._query, self._json = self._part(options, "query"), self._part(options, "json")
        default = "POST" if self._json is not None else "GET"
        method = options.text("method", default)
        if method is None or method.upper() not in METHODS:
            raise ToolConfigError(f"{self.name}: config.method is {method!r}", f"one of: {', '.join(METHODS)}")
        self._method = method.upper()
        self._result, self._missing = options.text("result"), options.text("missing")
        self._tell = frozenset(self._statuses(options))
        told = ", ".join(map(str, sorted({*self._tell, 404})))
        # A value of the model in the path may name what the service does not have.
        chosen = "correct the path of the URL; if a 404 means that the model's value is unknown to the service, "
        self._hints = {405: f"set config.method, which is {self._method} here, or correct the path of the URL"}
        if any(places(url)):
            self._hints[404] = f"{chosen}let the model read it: `tell: [{told}]`"
        properties = schema["function"].get("parameters", {}).get("properties", {})
        self._defaults = {
            name: each["default"] for name, each in properties.items() if isinstance(each, dict) and "default" in each
        }
        self._place_arguments(options, list(properties))
        row = config.get("from_row") or ()
        self.takes_from_row = {"open": COPIED_COLUMNS, "execute": (*row, *properties)}
        self.schema = _without(schema, row)
        workers = options.whole("num_workers", 32, 1, 65_536)
        rate = options.number("rate_limit", 1.0, 0, 1e6) if options.has("rate_limit") else None
        self._client = ServiceClient(
            self.name,
            url.partition("{")[0] if "{" in url else url,
            RateLimit(rate, workers, name=self.name),
            timeout_s=options.number("timeout", 30.0, 0, 86_400),
            retries=options.whole("retries", 4, 0, 1000),
            outage_s=options.number("outage_s", 120.0, 0, 604_800),
            headers=options.headers(),
            token=_token(self.name, options.text("token_env")),
            max_connections=workers,
        )
        self.service = self._client.shown_url
        options.done()

    async def open(self, task: Task, **create_kwargs: Any) -> object:
        """Return what names this episode to the rate limit. The rows' arguments are not needed."""
        return object()

    async def execute(self, state: Any, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        """Send the request of a call; arguments of the row win over the model's.

        Raises:
            ToolError: the service failed for good, or its answer has no `result`.
        """
        values = {**self._defaults, **arguments, **execute_kwargs}
        try:
            url = fill_url(self._url, values, self._query)
        except Unusable as exc:
            return ToolResult(f"Error: {exc}", error=str(exc))
        data = None
        if self._json is not None:
            try:
                data = orjson.dumps(encodable(fill(self._json, values)))
            except NotGiven:
                pass
            except (TypeError, RecursionError) as exc:  # an integer of more than 64 bits, more levels than it writes
                text = f"the arguments cannot be sent as JSON: {exc}"
                return ToolResult(f"Error: {text}", error=text)
        try:
            answer = await self._client.request(
                self._method,
                url,
                data,
                state,
                read=orjson.loads if self._result else _read,
                wrong=self._tell,
                hints=self._hints,
            )
        except RequestRejected as exc:
            return ToolResult(f"Error: {exc.message}", error=exc.message)
        if self._result is not None:
            try:
                answer = follow(self._result, answer)
            except KeyError as exc:
                if self._missing is not None:
                    return ToolResult(self._missing)
                raise ToolError(
                    f"{self.name} at {self._client.shown_url}: the answer has no {exc.args[0]!r} of "
                    f"`result: {self._result}`: {repr(answer)[:200]}",
                    "correct config.result, or say with `missing` what is shown instead",
                    final=True,
                ) from None
        return ToolResult(result_text(answer))

    def _part(self, options: Options, key: str) -> Any:
        part = self.config[key] if options.has(key) else None
        if key == "query" and part is not None and not isinstance(part, dict):
            raise ToolConfigError(f"{self.name}: config.query is not a mapping", "write query: {name: '{argument}'}")
        return part

    def _statuses(self, options: Options) -> list[int]:
        found = self.config["tell"] if options.has("tell") else sorted(WRONG_REQUEST)
        if not isinstance(found, list) or not all(type(each) is int and 400 <= each < 600 for each in found):
            raise ToolConfigError(f"{self.name}: config.tell is not a list of statuses", "write tell: [400, 404]")
        return found

    def _place_arguments(self, options: Options, known: list[str]) -> None:
        """Check that places have arguments, and arguments places."""
        row = self.config["from_row"] if options.has("from_row") else []
        if not isinstance(row, list) or not all(isinstance(name, str) for name in row):
            raise ToolConfigError(f"{self.name}: config.from_row is not a list of names", "write from_row: [user_id]")
        used = {name for part in (self._url, self._query, self._json) for name in places(part)}
        for name in sorted(used):
            if name not in known and name not in row:
                raise ToolConfigError(
                    f"{self.name}: config has a place {{{name}}}, but its schema has no such argument",
                    did_you_mean(name, known, "add it to tool_schema or to from_row; a brace itself is written twice"),
                )
        left = [name for name in (*known, *row) if name not in used]
        if not left:
            return
        if self._query is not None or self._json is not None:
            raise ToolConfigError(
                f"{self.name}: the argument {left[0]!r} has no place in the request",
                f"write {{{left[0]}}} where it belongs, in url, query or json",
            )
        template = {name: f"{{{name}}}" for name in left}
        if self._method in ("GET", "DELETE"):
            self._query = template
        else:
            self._json = template


def _without(schema: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return a schema without some of its arguments, which the model does not give."""
    function = schema["function"]
    parameters = function.get("parameters") or {}
    if not any(name in parameters.get("properties", {}) for name in names):
        return schema
    left = {name: each for name, each in parameters["properties"].items() if name not in names}
    parameters = {**parameters, "properties": left}
    if "required" in parameters:
        parameters["required"] = [name for name in parameters["required"] if name not in names]
    return {**schema, "function": {**function, "parameters": parameters}}


def _read(content: bytes) -> Any:
    """Return an answer's JSON, or its text if it is none."""
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        return content.decode("utf-8", "replace")


def _token(name: str, variable: str | None) -> str | None:
    if variable is None:
        return None
    token = os.environ.get(variable)
    if not token:
        raise ToolConfigError(f"{name}: config.token_env names {variable}, which is not set", f"export {variable}=...")
    return token
