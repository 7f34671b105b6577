"""The search tool: established tool YAML, wrong calls, dead servers, many episodes at once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentloop.errors import ToolConfigError, ToolError
from agentloop.tool.loading import load_toolset
from agentloop.tool.session import ToolSession, Toolset
from agentloop.types import Task, ToolCall, ToolResult
from tests.virtual_time import run_virtually
from tools.http import ServiceClient
from tools.search import SearchTool

URL = "http://127.0.0.1:8000/retrieve"

ESTABLISHED = """
tools:
  - class_name: verl.tools.search_tool.SearchTool
    config:
      retrieval_service_url: http://127.0.0.1:8000/retrieve
      num_workers: 120
      rate_limit: 120
      timeout: 30
      type: native
    tool_schema:
      type: function
      function:
        name: search
        description: Searches the web for relevant information based on the given query.
        parameters:
          type: object
          properties:
            query_list:
              type: array
              item:
                type: string
              description: A list of fully-formed semantic queries.
          required:
            - query_list
"""

Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Handler]]:
    """Replaces the network: the handler that a test puts in place answers all requests."""
    handlers: list[Handler] = [answer]
    original = ServiceClient.__init__

    def patched(self: ServiceClient, *args: Any, **options: Any) -> None:
        original(self, *args, **options, transport=httpx.MockTransport(lambda request: handlers[-1](request)))

    monkeypatch.setattr(ServiceClient, "__init__", patched)
    yield handlers


def answer(request: httpx.Request) -> httpx.Response:
    body = json.loads(request.content)
    found = [
        [{"document": {"contents": f'"{query}"\ntext {n}'}, "score": 1.0} for n in range(body["topk"])]
        for query in body["queries"]
    ]
    return httpx.Response(200, json={"result": found})


def tool_of(**config: Any) -> SearchTool:
    return SearchTool({"retrieval_service_url": URL, **config}, SearchTool.default_schema)


def call(tool: SearchTool, arguments: dict[str, Any], task: Task | None = None) -> ToolResult:
    session = Toolset([tool]).session(task or Task("0", "a", []))
    return run_virtually(session.call(ToolCall("search", arguments), 30))


def test_the_established_tool_yaml_and_rows_load_unchanged(tmp_path: Path, served: list[Handler]) -> None:
    (tmp_path / "tools.yaml").write_text(ESTABLISHED)
    toolset = load_toolset(tmp_path / "tools.yaml")
    kwargs = {"create_kwargs": {"ground_truth": {"target": ["x"]}, "question": "q", "data_source": "searchR1_nq"}}
    task = Task("0", "tool_agent", [], extra_info={"need_tools_kwargs": True, "tools_kwargs": {"search": kwargs}})
    toolset.check(task, "row 0")
    session = toolset.session(task)
    result = run_virtually(session.call(ToolCall("search", {"query_list": ["a", "b"]}), 30))
    assert result.error is None
    assert result.text.startswith('Query: a\nDoc 1 (Title: "a")\ntext 0\n\nDoc 2 (Title: "a")\ntext 1')
    assert result.metrics == {"queries": 2.0, "documents": 6.0}


def test_a_registered_name_and_no_schema(tmp_path: Path, served: list[Handler]) -> None:
    (tmp_path / "t.yaml").write_text(
        f"tools: [{{class_name: search, config: {{retrieval_service_url: '{URL}', default_timeout: 20}}}}]"
    )
    tool = load_toolset(tmp_path / "t.yaml").tools["search"]
    assert isinstance(tool, SearchTool)
    assert tool._client._extensions["timeout"]["read"] == 20


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"retrieval_service_url": None}, "has no retrieval_service_url"),
        ({"retrieval_service_url": "localhost"}, "is not the address of a service"),
        ({"num_workers": 0}, "num_workers is 0"),
        ({"rate_limit": -1}, "rate_limit is -1"),
        ({"timeout": "30"}, "timeout is '30'"),
        ({"on_failure": "ignore"}, "one of: fail, tell"),
        ({"rate_limits": 5}, "did you mean 'rate_limit'"),
        ({"token_env": "AGENTLOOP_NOT_SET"}, "AGENTLOOP_NOT_SET, which is not set"),
    ],
)
def test_a_wrong_config_is_named(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ToolConfigError, match=says):
        tool_of(**config)


def test_a_schema_without_queries_is_refused() -> None:
    schema = {"type": "function", "function": {"name": "search", "parameters": {"properties": {"text": {}}}}}
    with pytest.raises(ToolConfigError, match="has no argument 'query_list'"):
        SearchTool({"retrieval_service_url": URL}, schema)


@pytest.mark.parametrize(
    ("queries", "says"),
    [
        ([], "at least one query"),
        (["", "  "], "at least one query"),
        (["a"] * 9, "at most 8 queries"),
        ([1], "of type string"),
        ([["a"]], "'query_list[0]' of search has to be of type string"),
        ("a", "has to be of type array"),
    ],
)
def test_a_wrong_call_is_told_to_the_model(served: list[Handler], queries: Any, says: str) -> None:
    result = call(tool_of(), {"query_list": queries})
    assert result.error is not None and says in result.text


def test_what_a_model_may_write_is_sent_safely(served: list[Handler]) -> None:
    seen = []
    served.append(lambda request: (seen.extend(json.loads(request.content)["queries"]), answer(request))[1])
    result = call(tool_of(), {"query_list": [" \ud800a ", "b" * 100_000, "\x00", ""]})
    assert result.error is None
    assert seen == ["?a", "b" * 2000, "\x00"]


def test_a_row_may_ask_for_more_passages(served: list[Handler]) -> None:
    kwargs = {"search": {"execute_kwargs": {"topk": 5}}}
    result = call(tool_of(), {"query_list": ["a"]}, Task("0", "a", [], extra_info={"tools_kwargs": kwargs}))
    assert "Doc 5" in result.text


def test_a_refused_query_is_told_to_the_model(served: list[Handler]) -> None:
    served.append(lambda _: httpx.Response(422, json={"error": "a query has 99999 characters"}))
    result = call(tool_of(), {"query_list": ["a"]})
    assert result.error is not None and "a query has 99999 characters" in result.text


def test_a_dead_server_fails_the_episode_and_names_tool_url_and_last_error(served: list[Handler]) -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused")

    served.append(refuse)
    begin = time.monotonic()
    with pytest.raises(ToolError) as caught:
        call(tool_of(outage_s=1e-6), {"query_list": ["a"]})
    assert "search at http://127.0.0.1:8000/retrieve has been unavailable" in caught.value.message
    assert "connection refused" in caught.value.message
    assert time.monotonic() - begin < 5

    told = call(tool_of(outage_s=1e-6, on_failure="tell"), {"query_list": ["a"]})
    assert told.text == "Error: the search failed; the queries are not the cause."
    assert told.metrics == {"failed": 1.0} and "connection refused" in str(told.error)


def test_failures_that_only_the_model_reads_are_logged_once_and_counted_at_the_end(
    served: list[Handler], caplog: pytest.LogCaptureFixture
) -> None:
    tool = tool_of(retries=0, on_failure="tell")
    call(tool, {"query_list": ["a"]})
    served.append(lambda _: httpx.Response(500, json={"error": "no disk"}))
    for _ in range(5):
        call(tool, {"query_list": ["a"]})
    Toolset([tool]).close()
    first, last = (record.getMessage() for record in caplog.records if record.name == "tools.http.failures")
    assert first.startswith("a call of search failed, and the model reads an error in its place") and "no disk" in first
    assert last.startswith("5 of 6 calls of search failed, and their episodes were scored all the same")
    assert "no disk" in last


def test_an_answer_that_cannot_be_read_is_not_the_models_fault(served: list[Handler]) -> None:
    served.append(lambda _: httpx.Response(200, json={"results": []}))
    with pytest.raises(ToolError, match="cannot be read"):
        call(tool_of(), {"query_list": ["a"]})


def test_512_episodes_are_never_above_the_rate_and_wait_their_fair_time(served: list[Handler]) -> None:
    """Searches that are sent again count too; some episodes search for many things in one turn."""
    rate, episodes, searches = 150, 512, 3
    arrived: list[float] = []
    waits: list[float] = []

    def handle(request: httpx.Request) -> httpx.Response:
        arrived.append(asyncio.get_running_loop().time())
        return httpx.Response(500) if len(arrived) % 10 == 0 else answer(request)

    served.append(handle)

    async def main() -> None:
        toolset, clock = Toolset([tool_of(rate_limit=rate)]), asyncio.get_running_loop().time

        async def search(session: ToolSession, number: int) -> None:
            begin = clock()
            result = await session.call(ToolCall("search", {"query_list": [str(number)]}), 30)
            assert result.error is None
            waits.append(clock() - begin)

        async def episode(number: int) -> None:
            session = toolset.session(Task(str(number), "a", []))
            if number % 64 == 0:
                await asyncio.gather(*[search(session, number) for _ in range(8)])
            for _ in range(searches):
                await search(session, number)
            await session.close()

        await asyncio.gather(*[episode(number) for number in range(episodes)])

    run_virtually(main())
    for first, beyond in zip(arrived, arrived[rate:], strict=False):
        assert beyond - first >= 1.0 - 1e-9
    fair = episodes / rate
    assert sorted(waits)[len(waits) // 2] <= 1.2 * fair
    # A search that failed once waits for two turns; the eighth of a turn's searches, for eight.
    assert sum(wait > 2 * fair for wait in waits) <= 8 * 7 + len(arrived) - len(waits)
    assert arrived[-1] <= 1.05 * len(arrived) / rate + 1, "the limit is also used"


async def test_4096_episodes_that_search_at_once_do_not_block_the_event_loop(served: list[Handler]) -> None:
    """Calls are spread over many passes of the loop. How long a pass takes is measured by benchmarks/retrieval.py."""
    toolset = Toolset([tool_of(rate_limit=1_000_000, num_workers=120)])
    answered = most_in_a_pass = 0
    running = True

    def count(request: httpx.Request) -> httpx.Response:
        nonlocal answered
        answered += 1
        return answer(request)

    served.append(count)

    async def watch() -> None:
        nonlocal most_in_a_pass
        while running:
            before = answered
            await asyncio.sleep(0)
            most_in_a_pass = max(most_in_a_pass, answered - before)

    async def episode(number: int) -> ToolResult:
        return await toolset.session(Task(str(number), "a", [])).call(ToolCall("search", {"query_list": ["q"]}), 30)

    watcher = asyncio.create_task(watch())
    results = await asyncio.gather(*[episode(number) for number in range(4096)])
    running = False
    await watcher
    assert all(result.error is None for result in results)
    assert most_in_a_pass < 512
