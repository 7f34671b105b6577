"""Servers behind tools are tried before a run."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from agentloop.tool.base import Tool
from agentloop.tool.services import unreachable
from agentloop.types import ToolResult
from tools.code import CodeInterpreter
from tools.search import SearchTool


class Plain(Tool):
    async def execute(self, state: Any, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        return ToolResult("")


def plain(name: str, service: str | None) -> Plain:
    tool = Plain({}, {"type": "function", "function": {"name": name}})
    tool.service = service
    return tool


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_those_that_do_not_answer_are_named_once_with_their_tools(listening: int) -> None:
    dead = f"http://127.0.0.1:{free_port()}/x"
    tools = [
        plain("local", None), plain("alive", f"http://127.0.0.1:{listening}/x"), plain("one", dead),
        plain("two", dead), plain("nowhere", "http://host.invalid"), plain("odd", "http://127.0.0.1:99999/"),
    ]  # fmt: skip
    first, second, third = unreachable(tools)
    assert first.startswith(f"one, two: {dead} cannot be reached (") and "start that server" in first
    assert second.startswith("nowhere: http://host.invalid cannot be reached (")
    assert third.startswith("odd: http://127.0.0.1:99999/ cannot be reached (")


def test_the_tools_in_front_of_a_server_name_it_without_credentials() -> None:
    assert SearchTool.default_schema is not None and CodeInterpreter.default_schema is not None
    search = SearchTool({"retrieval_service_url": "http://u:p@127.0.0.1:9/retrieve"}, SearchTool.default_schema)
    code = CodeInterpreter({"sandbox_url": "http://127.0.0.1:9"}, CodeInterpreter.default_schema)
    assert (search.service, code.service) == ("http://127.0.0.1:9/retrieve", "http://127.0.0.1:9/run_code")
