"""docs/traces.md names the paths and parameters that there are, and its code runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest

from agentloop.trace.index import CHOICES, RANGES
from agentloop.trace.store import TraceStore
from agentloop.viewer.api import build_router
from tests.agentloop.trace.store.support import step_records
from tests.agentloop.viewer.api.conftest import Get

DOCUMENTATION = (Path(__file__).parents[4] / "docs" / "traces.md").read_text(encoding="utf-8")
SECTION = DOCUMENTATION.split("## HTTP API of the viewer")[1].split("\n## ")[0]


def test_the_paths_are_those_of_the_documentation() -> None:
    named = re.findall(r"^\| `(/api[^`?]*)", SECTION, re.MULTILINE)
    routes = [getattr(route, "path", "") for route in build_router([]).routes]
    assert sorted(named) == sorted(path.replace("{digest}", "{sha256}") for path in routes)


def test_the_filters_are_those_of_the_documentation() -> None:
    for name in (*CHOICES, "tool"):
        assert f"`{name}`" in SECTION
    bounded = set(re.findall(r"`(\w+)`", SECTION.split("`max_` of")[1].split(". `q`")[0]))
    assert bounded <= set(RANGES)


async def test_the_example_of_the_documentation_is_answered(get: Get) -> None:
    (url,) = re.findall(r"curl -s '([^']+)'", SECTION)
    parameters = dict(parse_qsl(urlsplit(url).query))
    answer = await get("/api/runs/sums/episodes", **parameters)
    assert answer.status_code == 200


def test_the_example_of_the_index_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    records = step_records(3, failed={(1, 0)})
    records[2].trajectory.error = "TimeoutError: timeout"
    TraceStore(Path("outputs/run")).write(3, "train", records)
    (code,) = [text for text in re.findall(r"```python\n(.*?)```", DOCUMENTATION, re.DOTALL) if "TraceIndex" in text]
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown == "1 ['train/3/g1/0/0']\n"
