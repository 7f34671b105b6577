"""The size limits of CONTRIBUTING: a folder that grows over them has two nouns, and so has a file."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("agentloop", "recipes", "rollout_server", "tools", "trainer")
MOST_FILES = 14
MOST_LINES = 450


def product_files() -> list[Path]:
    return [
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != "py.typed"
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_folder_holds_too_many_files(package: str) -> None:
    folders: dict[str, int] = {}
    for path in product_files():
        if path.is_relative_to(ROOT / package):
            name = str(path.parent.relative_to(ROOT))
            folders[name] = folders.get(name, 0) + 1
    assert folders and {name: count for name, count in folders.items() if count > MOST_FILES} == {}


def test_no_file_is_too_long() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in product_files()
        if path.suffix == ".py"
    }
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}
