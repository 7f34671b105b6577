"""Tokens, web pages of other origins, and DNS rebinding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from agentloop.config.server import ServerSettings
from agentloop.errors import ConfigError
from agentloop.wire import bearer
from rollout_server.api.asgi import send_json
from rollout_server.api.auth import Gate

JSON = {"Content-Type": "application/json"}


def gate(token: str | None = None, admin: str | None = None, host: str = "127.0.0.1") -> httpx.AsyncClient:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send_json(send, b"{}")

    served = Gate(app, token, admin, frozenset({"/pause_generation"}), host)
    return httpx.AsyncClient(transport=httpx.ASGITransport(served), base_url="http://127.0.0.1:30000")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:30000"}, 200),
        ({"Host": "LOCALHOST"}, 200),
        ({"Host": "127.0.1.1:30000"}, 200),
        ({"Host": "[::1]:30000"}, 200),
        ({"Host": "evil.example:30000"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "localhost:30000@evil"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:31000"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://evil.example:30000", "Host": "evil.example:30000"}, 403),
        ({"Origin": "http://127.0.0.1:30000"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=json"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Content-Type": "Application/JSON"}, 200),
    ],
)
async def test_a_web_page_cannot_use_a_server_without_a_token(headers: dict[str, str], status: int) -> None:
    async with gate() as http:
        answer = await http.post("/pause_generation", content=b"{}", headers=headers)
        assert answer.status_code == status
        if status != 200:
            assert answer.json()["error"]["field"] in headers
        if status != 415:  # what reads is refused as well
            assert (await http.get("/flush_cache", headers=headers)).status_code == status


async def test_with_a_token_any_name_of_the_host_is_right() -> None:
    async with gate("secret", host="0.0.0.0") as http:  # noqa: S104  # never bound
        headers = {"Authorization": "Bearer secret", "Host": "node7:30000"}
        assert (await http.get("/x", headers=headers)).status_code == 200
        assert (await http.get("/x", headers={**headers, "Origin": "http://evil"})).status_code == 403


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_the_scheme_of_a_token_has_no_case(scheme: str) -> None:
    async with gate("secret") as http:
        assert (await http.get("/x", headers={"Authorization": f"{scheme} secret"})).status_code == 200
        for wrong in (f"{scheme} Secret", f"{scheme}secret", scheme, "Basic secret", "secret", f"{scheme} "):
            assert (await http.get("/x", headers={"Authorization": wrong})).status_code == 401


async def test_an_admin_token_alone_leaves_the_rest_open_to_this_machine() -> None:
    async with gate(None, "secret") as http:
        assert (await http.get("/x")).status_code == 200
        assert (await http.get("/x", headers={"Host": "evil.example"})).status_code == 403
        assert (await http.post("/pause_generation")).status_code == 401


@pytest.mark.parametrize("token", ["se\ncret", "secret\n", "se cret", "sécret", "\x7f", "se\tcret"])
def test_a_token_that_no_header_holds_is_refused_and_not_shown(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", token)
    tries: list[Callable[[], Any]] = [
        lambda: bearer(token),
        lambda: ServerSettings(model="m", token_env="A_TOKEN").check_tokens(),
    ]
    for attempt in tries:
        with pytest.raises(ConfigError, match="cannot be sent in an HTTP header") as error:
            attempt()
        assert token not in str(error.value) and "cret" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("Host", ("evil.example", "127.0.0.1")),
        ("Origin", ("http://evil.example", "http://127.0.0.1:30000")),
        ("Sec-Fetch-Site", ("cross-site", "none")),
        ("Content-Type", ("text/plain", "application/json")),
        ("Authorization", ("Bearer wrong", "Bearer secret")),
    ],
)
async def test_a_header_that_decides_may_not_be_repeated(name: str, values: tuple[str, str]) -> None:
    async with gate("secret") as http:
        right = {"Host": "127.0.0.1:30000", "Content-Type": "application/json", "Authorization": "Bearer secret"}
        others = [(key, value) for key, value in right.items() if key != name]
        assert (await http.post("/x", content=b"{}", headers=[*others, (name, values[1])])).status_code == 200
        for order in (values, values[::-1], (values[1], values[1])):
            answer = await http.post("/x", content=b"{}", headers=[*others, *((name, value) for value in order)])
            assert (answer.status_code, answer.json()["error"]["field"]) == (400, name)
