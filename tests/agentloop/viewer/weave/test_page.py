"""The links that weave's client prints open the call in the viewer."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.agentloop.viewer.trace_server import TraceServer
from tests.chromium import Page, chromium, find_program

pytestmark = pytest.mark.browser

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked=2'> \x1b[31mred \u202eevil"


def call(name: str, parent: str | None, **changes: Any) -> dict[str, Any]:
    return {
        "project_id": "lab/x", "id": name, "trace_id": "root", "parent_id": parent,
        "op_name": f"weave:///lab/x/op/{name}:1", "started_at": "2026-01-02T03:04:05Z",
        "ended_at": "2026-01-02T03:04:06.25Z", "attributes": {"step": 3}, "inputs": {"question": HOSTILE},
        "output": "done", "summary": {}, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TraceServer]:
    started = TraceServer(tmp_path_factory.mktemp("runs"))
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(picture, "PNG")
    form = {"data": {"project_id": "lab/x"}, "files": {"file": ("image.png", picture.getvalue())}}
    digest = httpx.post(f"{started.url}/file/create", **form).json()["digest"]  # type: ignore[arg-type]
    image = {"_type": "CustomWeaveType", "weave_type": {"type": "PIL.Image.Image"}, "files": {"image.png": digest}}
    batch = [
        call("root", None, output={"answer": HOSTILE, "picture": image}),
        call("plan", "root"),
        call("look", "plan", exception="ValueError: " + HOSTILE),
    ]
    assert httpx.post(f"{started.url}/v2/lab/x/calls/complete", json={"batch": batch}).status_code == 200
    feedback = {"project_id": "lab/x", "weave_ref": "weave:///lab/x/call/root", "feedback_type": "wandb.note.1"}
    httpx.post(f"{started.url}/feedback/create", json={**feedback, "payload": {"note": "well done"}})
    yield started
    started.stop()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(find_program(), tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_the_link_of_a_call_opens_it(page: Page, server: TraceServer, tmp_path: Path) -> None:
    page.events.clear()
    page.open(f"{server.url}/lab/x/r/call/root", width=1440)
    page.wait("document.querySelector('.images img')?.naturalWidth === 40", "the image of the call was not shown")
    shown = page.run("document.querySelector('main').textContent")
    for text in ("root", "plan", "look", "well done", "<script>window.hacked = 1</script>"):
        assert text in shown
    assert "\u202e" not in shown and "\x1b" not in shown
    assert page.run("window.hacked === undefined")
    assert page.problems() == []
    page.screenshot(tmp_path / "call.png")


def test_a_search_shows_the_root_and_the_hit_and_the_way_back_keeps_it(page: Page, server: TraceServer) -> None:
    page.events.clear()
    page.open(f"{server.url}/#/calls?q=ValueError&project=lab%2Fx", width=1440)
    page.wait("document.querySelector('tbody .preview a')", "the hit was not shown")
    row = page.text("tr[data-index='0']")
    assert row.startswith("rooterror inside") and "lookValueError" in row.replace(" ", "")
    page.run("document.querySelector('tbody .preview a').click()")
    page.wait("document.querySelector('h1')?.textContent.startsWith('look')")
    page.press("k")
    page.wait("document.querySelector('h1')?.textContent.startsWith('plan')")
    page.press("u")
    page.wait("document.querySelector('tbody .preview a')")
    assert page.run("location.hash") == "#/calls?q=ValueError&project=lab%2Fx"
    assert page.problems() == []


def test_an_unknown_project_is_named(page: Page, server: TraceServer) -> None:
    page.open(f"{server.url}/#/calls?project=x", width=1440)
    page.wait("document.querySelector('.table-note .empty')")
    assert page.text(".table-note").startswith("No project x has sent calls here.")
    assert page.text(".table-note a") == "lab/x"
    page.run("document.querySelector('.table-note a').click()")
    page.wait("document.querySelector('tbody tr a')", "the project that was meant was not shown")


def test_the_link_of_an_object_shows_it_and_other_pages_of_weave_say_what_they_are(
    page: Page, server: TraceServer
) -> None:
    body = {"obj": {"project_id": "lab/x", "object_id": "settings", "val": {"turns": 4, "text": HOSTILE}}}
    digest = httpx.post(f"{server.url}/obj/create", json=body).json()["digest"]
    page.events.clear()
    page.open(f"{server.url}/lab/x/weave/objects/settings/versions/{digest}", width=1440)
    page.wait("document.querySelector('.part-card .values')", "the object was not shown")
    shown = page.text("main")
    assert shown.startswith("settings") and "turns4" in shown and "⟨U+202E⟩" in shown
    assert page.run("window.hacked === undefined") and page.problems() == []
    form = {"data": {"project_id": "lab/x"}, "files": {"file": ("obj.py", b"def plan(): ...")}}
    code = httpx.post(f"{server.url}/file/create", **form).json()["digest"]  # type: ignore[arg-type]
    op = {"_type": "CustomWeaveType", "weave_type": {"type": "Op"}, "files": {"obj.py": code}}
    body = {"obj": {"project_id": "lab/x", "object_id": "plan", "val": op}}
    digest = httpx.post(f"{server.url}/obj/create", json=body).json()["digest"]
    page.open(f"{server.url}/lab/x/weave/ops/plan/versions/{digest}", width=1440)
    page.wait("document.querySelector('.v-block')?.textContent === 'def plan(): ...'", "the code was not shown")
    page.open(f"{server.url}/lab/x/weave/leaderboards/best", width=1440)
    page.wait("document.querySelector('tbody tr a')")
    assert "Weave's page of leaderboards is not part of this viewer" in page.text(".episodes-main")


def test_the_link_of_a_project_lists_its_calls(page: Page, server: TraceServer) -> None:
    page.events.clear()
    page.open(f"{server.url}/lab/x/weave", width=1440)
    page.wait("document.querySelector('tbody tr a')", "the calls were not listed")
    assert page.run("document.querySelectorAll('tbody tr a').length") == 1, "the roots of traces"
    assert page.run("window.hacked === undefined") and page.problems() == []
    batch = {"batch": [call("later", None)]}
    httpx.post(f"{server.url}/v2/lab/x/calls/complete", json=batch)
    page.wait("document.querySelector('button.fresh')?.hidden === false", "new calls were not told")
