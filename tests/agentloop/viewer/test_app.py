"""Who may use the trace server, and what it answers before any run exists."""

from __future__ import annotations

import base64
import gzip
import json
import threading
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request

from agentloop.errors import ConfigError
from agentloop.viewer import create_app
from agentloop.viewer.app import data_folder
from agentloop.web.auth import Gate
from agentloop.web.bodies import read_body, read_object
from agentloop.web.refusals import Refusal, answer
from agentloop.web.token import read_token
from agentloop.wire import bind


def client(app: object, base_url: str = "http://127.0.0.1:8777") -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=base_url)  # type: ignore[arg-type]


async def test_a_folder_without_runs_is_served(tmp_path: Path) -> None:
    async with client(create_app([tmp_path / "missing"])) as http:
        answer = await http.get("/health")
    assert answer.json() == {"ok": True}
    assert "script-src 'self'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:8777"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, 200),
    ],
)
async def test_web_pages_of_others_are_refused(tmp_path: Path, headers: dict[str, str], status: int) -> None:
    async with client(create_app([tmp_path])) as http:
        answer = await http.get("/health", headers=headers)
    assert answer.status_code == status
    if status != 200:
        assert answer.json()["error"]


async def test_a_token_opens_as_bearer_as_basic_password_and_as_cookie(tmp_path: Path) -> None:
    basic = base64.b64encode(b"api:secret").decode()
    async with client(create_app([tmp_path], token="secret"), "http://10.0.0.5:8777") as http:
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/nothing")).status_code == 401
        assert (await http.get("/nothing", headers={"Authorization": "Bearer wrong"})).status_code == 401
        assert (await http.get("/nothing", headers={"Authorization": "Bearer secret"})).status_code == 404
        assert (await http.get("/nothing", headers={"Authorization": f"Basic {basic}"})).status_code == 404
        foreign = {"Authorization": b"Basic \xff\xfe"}
        assert (await http.get("/nothing", headers=foreign)).status_code == 401
        moved = await http.get("http://10.0.0.5:8777//evil.example/x?token=secret&step=3")
        assert (moved.status_code, moved.headers["location"]) == (303, "/evil.example/x?step=3")
        assert "HttpOnly" in moved.headers["set-cookie"]
        assert (await http.get("/nothing")).status_code == 404, "the cookie opens it"


async def test_paths_that_do_not_exist_are_no_page_to_programs(tmp_path: Path) -> None:
    browser = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    async with client(create_app([tmp_path])) as http:
        for path in ("/traces/nothing", "/call/nothing", "/calls/query", "/obj/weave", "/v1/nothing"):
            refused = await http.get(path)
            assert (refused.status_code, refused.json()["error"]) == (404, f"{path} does not exist")
        for path in ("/lab/x", "/lab/x/weave", "/lab/x/r/call/1", "/calls/x"):
            page = await http.get(path, headers=browser)
            assert (page.status_code, page.headers["content-type"].partition(";")[0]) == (200, "text/html")
        assert (await http.get("/traces/nothing", headers=browser)).status_code == 404
        assert (await http.get("/")).headers["content-type"].startswith("text/html")


async def test_text_from_a_form_is_refused(tmp_path: Path) -> None:
    async with client(create_app([tmp_path])) as http:
        answer = await http.post("/health", content=b"{}", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415


def bodies() -> Gate:
    app = FastAPI()
    app.add_exception_handler(Refusal, answer)

    @app.post("/raw")
    async def raw(request: Request) -> int:
        return len(await read_body(request, 1000))

    @app.post("/object")
    async def parsed(request: Request) -> dict[str, object]:
        return await read_object(request, 1000)

    return Gate(app, None)


async def test_bodies_are_bounded_as_sent_and_as_unpacked() -> None:
    packed = {"Content-Encoding": "gzip"}
    async with client(bodies()) as http:
        assert (await http.post("/raw", content=gzip.compress(b"x" * 1000), headers=packed)).json() == 1000
        assert (await http.post("/raw", content=gzip.compress(b"x" * 1001), headers=packed)).status_code == 413
        assert (await http.post("/raw", content=b"x" * 1001)).status_code == 413
        cut = await http.post("/raw", content=gzip.compress(b"x" * 1000)[:-9], headers=packed)
        assert (cut.status_code, "cut off" in cut.json()["error"]) == (400, True)
        assert (await http.post("/raw", content=b"x", headers={"Content-Encoding": "br"})).status_code == 415
        two = await http.post("/raw", content=gzip.compress(b"x") + gzip.compress(b"y"), headers=packed)
        assert (two.status_code, "goes on after its end" in two.json()["error"]) == (400, True)


async def test_large_bodies_are_parsed_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    def noting(body: bytes) -> object:
        threads.append(threading.get_ident())
        return json.loads(body)

    monkeypatch.setattr("agentloop.web.bodies.read_json", noting)
    monkeypatch.setattr("agentloop.web.bodies.LARGE", 100)
    async with client(bodies()) as http:
        for size in (1, 200):
            assert (await http.post("/object", json={"a": "x" * size})).status_code == 200
    assert threads[0] == threading.get_ident() != threads[1]


@pytest.mark.parametrize("body", [b"[1]", b"{", b"\xff", b"[" * 900])
async def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    async with client(bodies()) as http:
        refused = await http.post("/object", content=body)
    assert refused.status_code == 400 and refused.json()["error"].startswith("the body ")


def test_a_taken_port_is_named() -> None:
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        sock.listen()
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is taken"):
            bind("127.0.0.1", port)


def test_a_token_file_must_hold_a_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("abc\n")
    assert read_token(tmp_path / "token") == "abc"
    (tmp_path / "empty").write_text("\n")
    for name, message in (("empty", "is empty"), ("missing", "cannot be read")):
        with pytest.raises(ConfigError, match=message):
            read_token(tmp_path / name)


def test_received_traces_lie_beside_the_runs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    assert data_folder([tmp_path]) == data_folder([run]) == tmp_path / ".agentloop-traces"
