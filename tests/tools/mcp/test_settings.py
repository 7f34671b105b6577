"""Files of servers that other programs have: their variables, and the secrets in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentloop.errors import ToolConfigError
from tools.mcp.settings import ServerSettings, read_settings


def read(folder: Path, server: dict[str, Any]) -> ServerSettings:
    (folder / "mcp.json").write_text(json.dumps({"mcpServers": {"stock": server}}))
    (found,) = read_settings({"servers_file": "mcp.json"}, folder, "tool 1")
    return found


def test_variables_of_other_programs_are_those_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOCK_KEY", "s3cret-${value}")
    monkeypatch.setenv("EMPTY", "")
    for name in ("NOT_SET", "NOR_THIS"):
        monkeypatch.delenv(name, raising=False)
    env = {
        "A": "${STOCK_KEY}", "B": "x ${env:STOCK_KEY}", "C": "${NOT_SET:-plainsecret99}", "D": "${EMPTY:-warning}",
        "E": "${STOCK_KEY:-other}", "F": "${oc.env:STOCK_KEY}", "G": "${NOT_SET:-}",
    }  # fmt: skip
    found = read(tmp_path, {"command": "python", "args": ["--port", "${PORT:-80}"], "env": env})
    assert found.env == {
        "A": "s3cret-${value}", "B": "x s3cret-${value}", "C": "plainsecret99", "D": "warning",
        "E": "s3cret-${value}", "F": "s3cret-${value}", "G": "",
    }  # fmt: skip
    assert found.args == ("--port", "80")
    assert set(found.secrets) == {"s3cret-${value}", "plainsecret99"}


def test_a_variable_that_is_not_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STOCK_KEY", raising=False)
    with pytest.raises(ToolConfigError, match=r"mcp.json, stock: config.env.K names .* STOCK_KEY, which is not set"):
        read(tmp_path, {"command": "python", "env": {"K": "${STOCK_KEY}"}})


def test_what_is_written_below_env_and_headers_is_a_secret(tmp_path: Path) -> None:
    assert read(tmp_path, {"command": "python", "env": {"K": "plainsecret99", "M": "debug-mode"}}).secrets == (
        "plainsecret99",
    )
    headers = {"X-Team": "t0psecret-team", "Accept": "application/json"}
    assert read(tmp_path, {"url": "http://h/mcp", "headers": headers}).secrets == ("t0psecret-team",)
