"""`SearchTool`: the model asks a retrieval server."""

from __future__ import annotations

from typing import Any, ClassVar

from agentloop.errors import RequestRejected, ToolConfigError, ToolError
from agentloop.runtime.pacing import Pacer
from agentloop.tool.base import NOTHING_FROM_ROW, Tool
from agentloop.types import Task, ToolResult
from tools.http import Options, RateLimit, ServiceClient, ShownFailures
from tools.search.text import read_result, show_passages

ARGUMENTS = ("query_list", "queries", "query")
"""Names under which a schema may ask for queries; a text counts as a list of one."""

LONGEST_QUERY = 2_000
"""Characters; the rest of a query is not sent."""

ELSEWHERE = ("enable_global_rate_limit", "name")
"""Keys that other frameworks know and that have no effect here: a rate belongs to one tool."""


class SearchTool(Tool):
    """Search for the queries of a call; the model reads the passages.

    Keys of `config`:
        retrieval_service_url: the server's `/retrieve`, with Search-R1's protocol. Required.
        topk: passages of a query (3).
        num_workers: requests in flight, of all episodes of the run (120).
        rate_limit: requests a second, of all episodes of the run (150).
        timeout: seconds of one attempt (30); `default_timeout` is the same.
        retries: further attempts after a failure (4); 0: nor is a server waited for.
        outage_s: seconds to wait for a server that cannot be reached (300).
        max_queries: queries of one call (8).
        max_tokens: about how many tokens of passages are shown; null: all.
        max_document_tokens: about how many of one passage; null: all.
        headers, token_env: further headers; the environment variable that holds a bearer token.
        on_failure: `fail`: a search that failed for good fails the episode, which is masked and
            never scored 0; `tell`: the model reads an error, and goes on.
    """

    own_time_limit = True  # waiting for a turn, or for the server, is not the model's fault
    takes_from_row = NOTHING_FROM_ROW

    default_schema: ClassVar[dict[str, Any]] = {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Search for passages of an encyclopedia that answer the queries.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query_list": {
                        "type": "array",
                        "items": {"type": "string"},
                        "description": "The queries, each of them complete in itself.",
                    }
                },
                "required": ["query_list"],
            },
        },
    }

    def __init__(self, config: dict[str, Any], schema: dict[str, Any]) -> None:
        super().__init__(config, schema)
        options = Options(self.name, config)
        url = options.text("retrieval_service_url")
        if url is None:
            raise ToolConfigError(
                f"{self.name}: config has no retrieval_service_url",
                "give the address of a retrieval server, e.g. http://127.0.0.1:8000/retrieve",
            )
        workers = options.whole("num_workers", 120, 1, 65_536)
        rate = options.number("rate_limit", 150.0, 0, 1e6)
        default_timeout = options.number("default_timeout", 30.0, 0, 86_400)
        self._topk = options.whole("topk", 3, 1, 1000)
        self._most_queries = options.whole("max_queries", 8, 1, 1024)
        self._most_tokens = options.whole("max_tokens", 0, 0, 10**6) or None
        self._most_document_tokens = options.whole("max_document_tokens", 0, 0, 10**6) or None
        self._tells = options.text("on_failure", "fail", choices=("fail", "tell")) == "tell"
        self._client = ServiceClient(
            self.name,
            url,
            RateLimit(rate, workers, name=self.name),
            timeout_s=options.number("timeout", default_timeout, 0, 86_400),
            retries=options.whole("retries", 4, 0, 1000),
            outage_s=options.number("outage_s", 300.0, 0, 604_800),
            headers=options.headers(),
            token=options.secret("token_env"),
            max_connections=workers,
        )
        self.service = self._client.shown_url
        self._failures = ShownFailures(self.name)
        self._pacer = Pacer()
        options.done(ignored=ELSEWHERE)

        properties = schema["function"].get("parameters", {}).get("properties", {})
        self._argument = next((name for name in ARGUMENTS if name in properties), None)
        if self._argument is None:
            raise ToolConfigError(
                f"{self.name}: its schema has no argument {ARGUMENTS[0]!r}",
                f"name the argument with the queries one of: {', '.join(ARGUMENTS)}; or leave tool_schema out",
            )

    async def open(self, task: Task, **create_kwargs: Any) -> object:
        """Return what names this episode to the rate limit. The rows' arguments are not needed."""
        return object()

    async def execute(
        self, state: Any, arguments: dict[str, Any], topk: int | None = None, **execute_kwargs: Any
    ) -> ToolResult:
        """Search.

        Args:
            topk: passages of a query in this row; None: those of the config.

        Raises:
            ToolError: the search failed for good; names the tool, the URL and the last error.
        """
        queries, fault = self._queries(arguments)
        if fault is not None:
            return _refused(fault)

        body = {"queries": queries, "topk": topk or self._topk, "return_scores": True}
        await self._pacer.turn()  # thousands of episodes may search at the same time
        self._failures.called()
        try:
            found = read_result(await self._client.post(body, state), len(queries))
        except RequestRejected as exc:
            return _refused(exc.message)
        except ToolError as exc:
            if not self._tells:
                raise
            self._failures.failed(exc)
            text = "the search failed; the queries are not the cause"
            return ToolResult(f"Error: {text}.", error=f"{text}: {exc.message}", metrics={"failed": 1.0})

        text, shown = show_passages(
            queries, found, most_tokens=self._most_tokens, most_document_tokens=self._most_document_tokens
        )
        return ToolResult(text, metrics={"queries": float(len(queries)), "documents": float(shown)})

    def shut_down(self) -> None:
        self._failures.report()

    def _queries(self, arguments: dict[str, Any]) -> tuple[list[str], str | None]:
        """Return the queries of a call, and what is wrong with it in words for the model."""
        assert self._argument is not None
        given = arguments.get(self._argument)
        listed = [given] if isinstance(given, str) else given
        if not isinstance(listed, list) or not all(isinstance(query, str) for query in listed):
            return [], f"the argument {self._argument!r} of {self.name} has to be a list of texts"
        # What a model writes may hold a lone surrogate, which JSON cannot.
        queries = [query.strip()[:LONGEST_QUERY].encode("utf-8", "replace").decode() for query in listed]
        queries = [query for query in queries if query]
        if not queries:
            return [], f"{self.name} needs at least one query that is not empty"
        if len(queries) > self._most_queries:
            return [], f"{self.name} takes at most {self._most_queries} queries in one call, not {len(queries)}"
        return queries, None


def _refused(text: str) -> ToolResult:
    return ToolResult(f"Error: {text}", error=text)
