"""The viewer's files: plain modules that load nothing from elsewhere and never make HTML from data."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from agentloop import viewer

STATIC = Path(viewer.__file__).parent / "static"
MODULES = sorted(STATIC.rglob("*.js"))
ROOT = Path(__file__).parents[3]

PARSES_HTML = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|srcdoc|setHTMLUnsafe"
    r"|\beval\(|new Function|setTimeout\(\s*[\"'`]|setAttribute\(\s*[\"'`](on|style)"
)


def test_there_are_modules_to_look_at() -> None:
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(STATIC)))
def test_no_module_parses_html_or_code(path: Path) -> None:
    assert PARSES_HTML.findall(path.read_text()) == []


def test_the_check_finds_each_way_to_parse_html() -> None:
    for line in ("a.innerHTML = b", "x.insertAdjacentHTML('afterend', t)", "eval(x)", "setTimeout('x', 1)"):
        assert PARSES_HTML.search(line)


@pytest.mark.parametrize("path", sorted(p for p in STATIC.rglob("*") if p.is_file()), ids=lambda p: p.name)
def test_no_file_names_another_host(path: Path) -> None:
    hosts = re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}[^\s\"']*", path.read_text())
    assert [host for host in hosts if not host.startswith("http://www.w3.org/")] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(STATIC)))
def test_imports_name_files_that_are_there(path: Path) -> None:
    for name in re.findall(r"^import .*?from \"(.+?)\";$|^import \"(.+?)\";$", path.read_text(), re.M):
        assert (path.parent / (name[0] or name[1])).resolve().is_file(), name


def test_the_page_holds_no_inline_script_or_style() -> None:
    page = (STATIC / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\bon\w+=|\bstyle=", page) == []
    for name in re.findall(r"(?:src|href)=\"/static/(.+?)\"", page):
        assert (STATIC / name).is_file(), name


def test_the_wheel_ships_every_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["agentloop"]
    shipped = {path for pattern in patterns for path in (ROOT / "agentloop").glob(pattern)}
    assert [path for path in STATIC.rglob("*") if path.is_file() and path not in shipped] == []
