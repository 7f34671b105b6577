"""A service as a tool by YAML alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from agentloop.errors import ToolConfigError, ToolError
from agentloop.tool.loading import load_toolset
from agentloop.tool.session import Toolset
from agentloop.types import Task, ToolCall, ToolResult
from tools.http import HttpTool

PROPERTIES = {"city": {"type": "string"}, "days": {"type": "integer", "default": 2}, "tags": {"type": "array"}}


def load(folder: Path, properties: dict[str, Any] | None = None, **config: Any) -> HttpTool:
    parameters = {"type": "object", "properties": PROPERTIES if properties is None else properties}
    function = {"name": "weather", "description": "d", "parameters": parameters}
    entry = {"class_name": "http", "config": config, "tool_schema": {"type": "function", "function": function}}
    (folder / "tools.yaml").write_text(yaml.safe_dump({"tools": [entry]}))
    tool = load_toolset(folder / "tools.yaml").tools["weather"]
    assert isinstance(tool, HttpTool)
    return tool


async def ask(tool: HttpTool, answer: Any, row: dict[str, Any] | None = None, /, **arguments: Any) -> Any:
    """Return the result, and the request that was sent."""
    sent: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)

    tool._client._given_transport, tool._client._transport = httpx.MockTransport(handle), None
    extra = {"tools_kwargs": {"weather": {"execute_kwargs": row}}} if row else {}
    session = Toolset([tool]).session(Task("0", "a", [], extra_info=extra))
    result = await session.call(ToolCall("weather", arguments), 5)
    return result, sent[-1] if sent else None


@pytest.mark.parametrize(
    ("config", "argument", "said"),
    [
        ({"url": "http://h/{text}"}, "q" * 70_000, "the arguments are too long for a URL: 70,0"),
        (
            {"url": "http://h/x", "query": {"text": "{text}"}},
            "é" * 20_000,
            "the arguments are too long for a URL: 120,0",
        ),
        ({"url": "http://h/x", "json": {"text": "{text}"}}, 2**70, "the arguments cannot be sent as JSON: Integer"),
    ],
)
async def test_an_argument_that_no_request_can_hold_is_told_to_the_model(
    tmp_path: Path, config: dict[str, Any], argument: Any, said: str
) -> None:
    result, request = await ask(load(tmp_path, {"text": {}}, **config), {}, text=argument)
    assert request is None
    assert result.error is not None and result.error.startswith(said), result.error


async def test_a_request_is_made_of_its_templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEATHER_KEY", "s3cret-value")
    tool = load(
        tmp_path,
        {**PROPERTIES, "note": {"type": "string"}},
        url="https://api.example/v1/{city}/forecast?units=metric",
        query={"tag": "{tags}"},
        json={"where": {"city": "{city}", "text": "{{in {city} for {days}}}"}, "days": "{days}", "note": "{note}"},
        headers={"X-Key": "${oc.env:WEATHER_KEY}"},
        result="data.items.*.text",
    )
    items = {"data": {"items": [{"text": "sun"}, {"text": "s3cret-value"}]}}
    result, request = await ask(tool, items, city="São Paulo/..?x=1&y#", days="3", tags=["a b", "c"])
    assert result.text == '["sun", "(hidden)"]' and result.metrics == {"converted_arguments": 1.0}
    assert request.method == "POST" and request.url.host == "api.example"
    assert request.url.raw_path == (b"/v1/S%C3%A3o%20Paulo%2F..%3Fx%3D1%26y%23/forecast?units=metric&tag=a%20b&tag=c")
    assert request.headers["x-key"] == "s3cret-value"
    city = "São Paulo/..?x=1&y#"
    assert json.loads(request.content) == {"where": {"city": city, "text": f"{{in {city} for 3}}"}, "days": 3}


async def test_arguments_without_a_template_are_the_query_or_the_body(tmp_path: Path) -> None:
    result, request = await ask(load(tmp_path, url="http://h/weather/{city}"), "sunny", city="Rome")
    assert result.text == "sunny" and str(request.url) == "http://h/weather/Rome?days=2"
    _, request = await ask(load(tmp_path, url="http://h/w", method="put"), {}, city="Rome", tags=[1])
    assert json.loads(request.content) == {"city": "Rome", "days": 2, "tags": [1]} and request.method == "PUT"


async def test_a_row_gives_what_the_model_does_not_see(tmp_path: Path) -> None:
    tool = load(tmp_path, {"city": {}}, url="http://h/{city}", query={"user": "{user_id}"}, from_row=["user_id"])
    _, request = await ask(tool, {}, {"user_id": 7}, city="Rome")
    assert str(request.url) == "http://h/Rome?user=7"


async def test_an_argument_of_from_row_is_not_in_the_schema_that_the_model_sees(tmp_path: Path) -> None:
    properties = {"city": {}, "days": {"type": "integer", "default": 2}}
    tool = load(tmp_path, properties, url="http://h/{city}", query={"n": "{days}"}, from_row=["days"])
    assert list(tool.schema["function"]["parameters"]["properties"]) == ["city"]
    assert str((await ask(tool, {}, city="Rome"))[1].url) == "http://h/Rome?n=2"
    assert str((await ask(tool, {}, {"days": 7}, city="Rome"))[1].url) == "http://h/Rome?n=7"
    result, request = await ask(tool, {}, city="Rome", days=9)
    assert result.error == "weather has no argument 'days'; its arguments are: city" and request is None


async def test_a_wrong_method_or_key_is_named_with_its_setting(tmp_path: Path) -> None:
    for status, headers, says in (
        (405, {}, "set config.method, which is GET here"),
        (401, {"X-Key": "s3cret-value"}, "correct the key in config.headers (X-Key), or give a token"),
        (403, {"X-Key": "s3cret-value"}, "correct the key in config.headers (X-Key), or give a token"),
        (401, {}, "config.token_env"),
    ):
        with pytest.raises(ToolError) as caught:
            tool = load(tmp_path, {"city": {}}, url="http://h/{city}", headers=headers)
            await ask(tool, httpx.Response(status, headers={"Allow": "POST"}), city="x")
        assert says in (caught.value.hint or "")
        assert ("it takes POST" in caught.value.message) == (status == 405)


async def test_an_error_that_is_cut_within_a_key_shows_no_part_of_it(tmp_path: Path) -> None:
    tool = load(tmp_path, {"city": {}}, url="http://h/{city}", headers={"X-Key": 's3cret/"value"-4711'})
    for text in ("x" * 290 + ' s3cret/"value"-4711', "x" * 285 + " s3cret%2F%22value%22-4711"):
        for answer in (httpx.Response(400, text=text), httpx.Response(400, json={"error": text})):
            result, _ = await ask(tool, answer, city="x")
            assert "s3c" not in result.text and len(result.text) < 400


async def test_answers_are_shown_as_they_are(tmp_path: Path) -> None:
    tool = load(tmp_path, {"city": {}}, url="http://h/{city}")
    assert (await ask(tool, httpx.Response(200, text="plain text"), city="x"))[0].text == "plain text"
    assert (await ask(tool, {"a": 1}, city="x"))[0].text == '{"a": 1}'
    for wrong in ("..", ".", ""):
        result, request = await ask(tool, {}, city=wrong)
        assert isinstance(result, ToolResult) and "cannot be looked up" in result.text and request is None


async def test_a_status_is_told_or_fails(tmp_path: Path) -> None:
    tool = load(tmp_path, {"city": {}}, url="http://h/{city}", tell=[404], retries=0)
    result, _ = await ask(tool, httpx.Response(404, json={"error": "no such city"}), city="x")
    assert result.text == "Error: weather: the service refused the request, 404: no such city"
    for status in (400, 403, 500):
        with pytest.raises(ToolError, match=rf"weather at http://h/.*{status}"):
            await ask(tool, httpx.Response(status), city="x")


async def test_a_404_names_tell_where_the_model_gives_a_part_of_the_url(tmp_path: Path) -> None:
    for url, named in (("http://h/{city}", True), ("http://h/w", False)):
        with pytest.raises(ToolError) as caught:
            await ask(load(tmp_path, {"city": {}}, url=url), httpx.Response(404), city="x")
        assert "correct the path of the URL" in (caught.value.hint or "")
        assert ("`tell: [400, 404, 413, 422]`" in (caught.value.hint or "")) is named


async def test_an_answer_without_the_result_fails_or_shows_what_is_missing(tmp_path: Path) -> None:
    config = {"url": "http://h/{city}", "result": "data.0.text"}
    with pytest.raises(ToolError, match=r"the answer has no '0' of `result: data.0.text`"):
        await ask(load(tmp_path, {"city": {}}, **config), {"data": []}, city="x")
    tool = load(tmp_path, {"city": {}}, **config, missing="nothing was found")
    assert (await ask(tool, {"data": []}, city="x"))[0].text == "nothing was found"
    assert (await ask(tool, {"data": [{"text": 3}]}, city="x"))[0].text == "3"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "config has no url"),
        ({"url": "http://{city}.example/"}, "the model cannot choose the host"),
        ({"url": "nowhere"}, "not the address of a service"),
        ({"url": "http://h", "method": "CONNECT"}, "one of: GET, POST"),
        ({"url": "http://h/{town}"}, "has a place {town}, but its schema has no such argument"),
        ({"url": "http://h", "query": {"c": "{city}"}}, "the argument 'days' has no place in the request"),
        ({"url": "http://h", "query": ["{city}"]}, "config.query is not a mapping"),
        ({"url": "http://h", "tell": ["404"]}, "config.tell is not a list"),
        ({"url": "http://h", "from_row": "x"}, "config.from_row is not a list"),
        (
            {"url": "http://h", "headers": {"X-Key": "näh"}},
            "the value of config.headers.X-Key has '\\xe4' as character 2",
        ),
        (
            {"url": "http://h", "headers": {"X-Key": "a\n"}},
            "config.headers.X-Key has '\\n' as character 2, which no req",
        ),
        ({"url": "http://h", "headers": {"X-Key": "a "}}, "config.headers.X-Key begins or ends with a blank"),
        ({"url": "http://h", "headers": {"X Key": "a"}}, "config.headers has the name 'X Key'"),
        ({"url": "http://h", "retrys": 3}, "did you mean 'retries'"),
    ],
)
def test_a_wrong_config_is_named(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    with pytest.raises(ToolConfigError) as caught:
        load(tmp_path, **config)
    assert says in str(caught.value)
