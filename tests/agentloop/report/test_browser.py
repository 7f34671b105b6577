"""The page in a real browser: no script error, no request, nothing of the model's text executed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentloop.report import write_report
from tests.chromium import Page, chromium, find_program

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(find_program(), tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (375, "light")])
def test_the_page_runs_without_errors_requests_or_sideways_scrolling(
    page: Page, hostile_run: Path, width: int, scheme: str
) -> None:
    page.events.clear()
    page.open(write_report(hostile_run), width=width, scheme=scheme)
    assert page.run("document.querySelectorAll('.plot svg path').length") > 15
    assert page.run("document.querySelectorAll('.traj').length") >= 10
    assert page.run("document.querySelector('#tip').hidden")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("typeof window.hacked") == "undefined"
    assert page.run("document.images.length") == 0
    assert page.run("document.querySelectorAll('script').length") == 2
    problems = [e for e in page.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert problems == []
    asked = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_pointing_at_a_plot_shows_the_values_of_the_nearest_step(page: Page, hostile_run: Path) -> None:
    page.open(write_report(hostile_run))
    page.point_at("[data-plot='0']")
    assert page.run("document.querySelector('#tip .head').textContent") == "step 15"
    assert "training" in page.run("document.querySelector('#tip').textContent")
    assert page.run("[...document.querySelectorAll('.cursor')].every(cursor => !cursor.hidden)")


def test_arrow_keys_walk_along_a_plot(page: Page, hostile_run: Path) -> None:
    page.open(write_report(hostile_run))
    page.run("document.querySelector('[data-plot]').focus()")
    for _ in range(3):
        page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", code="ArrowRight")
    assert page.run("document.querySelector('#tip .head').textContent") == "step 2"


def test_pointing_at_a_sampled_token_shows_its_id_logprob_and_version(page: Page, hostile_run: Path) -> None:
    page.open(write_report(hostile_run))
    page.point_at(".tokens .sampled .text > i")
    tip = page.run("document.querySelector('#tip').textContent")
    assert "sampled by the model" in tip
    data = json.loads(page.run("document.querySelector('#data').textContent"))["trajectories"][0]
    first = data["v"].index(next(v for v in data["v"] if v is not None))
    for fact in (f"token id{data['ids'][first]}", f"position{first}", f"logprob{data['lp'][first]:.4f}"):
        assert fact in tip
    page.point_at(".tokens .prompt .text > i")
    assert "shown to the model" in page.run("document.querySelector('#tip').textContent")
