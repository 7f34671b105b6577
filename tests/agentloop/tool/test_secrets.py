"""Secrets of a tool YAML reach the tool, and neither the model nor an error."""

from __future__ import annotations

import base64
import html
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest

from agentloop.errors import ToolConfigError, ToolError
from agentloop.tool.loading import load_toolset
from agentloop.tool.secrets import hide, resolved
from agentloop.types import Task, ToolCall

TOOL = """
from agentloop import Tool, ToolResult
from agentloop.errors import ToolError

class Mine(Tool):
    async def execute(self, state, arguments):
        key = self.config["headers"]["Authorization"]
        if arguments["how"] == "tool error":
            raise ToolError(f"refused {key}", "not " + key, final=True)
        if arguments["how"] == "exception":
            raise ValueError(key)
        return ToolResult(f"you sent {key}", error=key if arguments["how"] == "error" else None)
"""
YAML = """
tools:
  - class_name: ./mine.py:Mine
    config: {headers: {Authorization: "Bearer ${oc.env:MY_SERVICE}"}, place: "${oc.env:PLACE,here}", n: 3}
    tool_schema: {type: function, function: {name: t, parameters: {properties: {how: {type: string}}}}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(TOOL)
    (tmp_path / "tools.yaml").write_text(YAML)
    return tmp_path


@pytest.mark.parametrize("key", ["Authorization", "X-Api-Key", "api_key", "service.apikey", "X-Token"])
def test_a_value_that_stands_in_the_file_is_a_secret_by_its_key(key: str) -> None:
    config = {"headers": {key: "s3cret-value", "Accept": "application/json"}}
    assert resolved(config, "tool 1") == (config, ("s3cret-value",))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("headers", "X-Key", "sk-Topsecret-4711"),
        ("headers", "X-Key", "hunterhunter"),
        ("headers", "Cookie", "session=0a1b2c3d4e"),
        ("headers", "X-Team", "plainsecret99"),
        ("env", "K", "plainsecret99"),
        ("env", "DATABASE", "postgres://me:hunter2@db/x"),
        ("env", "HOOK", "https://hooks.example.com/services/T0001/B0002/XyZ12345678"),
        ("env", "K", "correct horse battery staple-9"),
        ("env", "PIN", "123456789012"),
        ("env", "K", "qWeRtYuIoP"),
        ("env", "K", "/9j4AAQSkZJRgABAQ=="),
        ("env", "K", "${oc.env:NOT_SET_HERE,plainsecret99}"),
        ("env", "MY_PASSWORD", "${oc.env:NOT_SET_HERE,warning}"),
    ],
)
def test_a_literal_below_headers_or_env_is_a_secret(part: str, key: str, value: str) -> None:
    _, secrets = resolved({part: {key: value}}, "tool 1")
    literal = value.rpartition(",")[2].rstrip("}")
    assert literal in secrets


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("headers", "Content-Type", "application/vnd.api+json; charset=utf-8"),
        ("headers", "X-Accept", "application/json, text/*"),
        ("headers", "User-Agent", "agent-7/1.0"),
        ("headers", "X-Team", "platform"),
        ("headers", "X-Version", "2025-03-26"),
        ("env", "LOG_LEVEL", "WARNING"),
        ("env", "TZ", "Europe/Berlin"),
        ("env", "MODE", "development"),
        ("env", "DEBUG", "true"),
        ("env", "LC_X", "en_US.UTF-8"),
        ("env", "DATA", "/data/my_files/v2/db.sqlite"),
        ("env", "BASE", "https://api.example.com/v1"),
        ("env", "ADDRESS", "127.0.0.1:8080"),
        ("env", "LIMIT", "1000000"),
    ],
)
def test_ordinary_values_are_not_hidden(part: str, key: str, value: str) -> None:
    assert resolved({part: {key: value}}, "tool 1")[1] == ()


def test_the_token_that_token_env_names_is_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE", "s3cret-value")
    assert resolved({"token_env": "MY_SERVICE"}, "tool 1")[1] == ("s3cret-value",)


async def test_no_answer_and_no_error_shows_a_secret(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE", "s3cret-value")
    toolset = load_toolset(folder / "tools.yaml")
    config: dict[str, Any] = toolset.tools["t"].config
    assert config == {"headers": {"Authorization": "Bearer s3cret-value"}, "place": "here", "n": 3}

    session = toolset.session(Task("0", "a", []))
    assert (await session.call(ToolCall("t", {"how": "text"}), 5)).text == "you sent Bearer (hidden)"
    assert (await session.call(ToolCall("t", {"how": "error"}), 5)).error == "Bearer (hidden)"
    assert (await session.call(ToolCall("t", {"how": "exception"}), 5)).text == "Error: ValueError: Bearer (hidden)"
    assert not session.faults  # they would keep the text of the exception
    with pytest.raises(ToolError, match=r"refused Bearer \(hidden\)") as caught:
        await session.call(ToolCall("t", {"how": "tool error"}), 5)
    assert "s3cret" not in str(caught.value) and caught.value.__cause__ is None and caught.value.__suppress_context__


def test_a_variable_that_is_not_set_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_SERVICE", raising=False)
    with pytest.raises(ToolConfigError, match=r"tool 1: config.headers.Authorization names .* MY_SERVICE, which"):
        load_toolset(folder / "tools.yaml")


def test_an_error_of_the_config_hides_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE", "s3cret-value")
    text = YAML.replace("./mine.py:Mine", "tools.search.SearchTool").replace("n: 3", "retrieval_service_url: '$u'")
    (folder / "tools.yaml").write_text(text.replace("$u", "x ${oc.env:MY_SERVICE}"))
    with pytest.raises(ToolConfigError) as caught:
        load_toolset(folder / "tools.yaml")
    assert "s3cret" not in str(caught.value) and "(hidden)" in str(caught.value)


def _json_twice(secret: str) -> str:
    return json.dumps(json.dumps({"t": secret}))


SPELLINGS: list[Callable[[str], str]] = [
    lambda secret: secret,
    lambda secret: json.dumps({"t": secret}),
    lambda secret: json.dumps({"t": secret}, ensure_ascii=False),
    lambda secret: json.dumps(secret).replace("/", "\\/"),
    _json_twice,
    lambda secret: f"http://h/x?api_key={quote(secret)}&b=1",
    lambda secret: f"http://h/x?api_key={quote(secret, safe='')}&b=1",
    lambda secret: f"http://h/x?api_key={quote(quote(secret, safe=''))}&b=1",
    lambda secret: re.sub("%..", lambda found: found[0].lower(), quote_plus(secret)),
    html.escape,
    repr,
    lambda secret: base64.b64encode(secret.encode()).decode(),
    lambda secret: base64.urlsafe_b64encode(secret.encode()).decode(),
    *(
        lambda secret, user=user: "Basic " + base64.b64encode(f"{user}:{secret}".encode()).decode()
        for user in ("a", "bo", "eve")
    ),
    lambda secret: base64.b64encode(f"x{secret} and more".encode()).decode(),
]


@pytest.mark.parametrize("spelled", SPELLINGS)
@pytest.mark.parametrize("secret", ["s3cret-value", 'tok/en+"x"=&<\\é \n🙂z', "p@ss word", "it's '''", "#!$%/?&"])
def test_a_secret_is_hidden_in_every_spelling(secret: str, spelled: Callable[[str], str]) -> None:
    written = spelled(secret)
    shown = hide(f"before {written} after", [secret])
    assert "(hidden)" in shown and shown.startswith("before ") and shown.endswith(" after")
    for part in re.findall(r"[\w+/-]{8,}", written):
        assert part in ("api_key",) or part not in shown, shown


def test_the_password_of_a_basic_header_is_hidden_in_plain_text_too() -> None:
    basic = base64.b64encode(b"admin:correct-horse").decode()
    text = f"admin:correct-horse, correct-horse, {basic}, admin"
    assert hide(text, [f"Basic {basic}", basic]) == "(hidden), (hidden), (hidden), admin"


def test_hiding_takes_time_by_the_length_of_the_text_only() -> None:
    secrets = ['a"' * 200, "\\" * 300, "s3cret-value", "%25" * 50]
    for text in ("\\" * 100_000, "a" * 1_000_000, "%25" * 300_000, 'a\\"' * 200_000, "ab/" * 300_000):
        hide("warm", secrets)
        begin = time.process_time()
        hide(text, secrets)
        assert time.process_time() - begin < 2
