"""A missing key for weave is found before the run, without weave."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from agentloop.config import WeaveConfig
from agentloop.errors import ConfigError
from agentloop.trace.exporting import ExportRun
from agentloop.trace.weave import WeaveExporter
from agentloop.trace.weave.connections import VARIABLES
from agentloop.trace.weave.keys import KEYS

REMOTE = {"WF_TRACE_SERVER_URL": "https://weave.example"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a key."""
    for variable in (*VARIABLES, *KEYS, "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def exporter() -> WeaveExporter:
    return WeaveExporter(WeaveConfig(project="lab/runs"), ExportRun("demo", Path("run")))


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WANDB_API_KEY": ""},
        REMOTE,
        {"WANDB_BASE_URL": "https://wandb.example"},
        {"WANDB_BASE_URL": "http://127.0.0.1:8777", **REMOTE},
    ],
)
def test_a_missing_key_is_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = set(sys.modules)
    with pytest.raises(ConfigError, match=r"weave has no API key[\s\S]*WANDB_API_KEY"):
        exporter()
    assert "weave" not in set(sys.modules) - before


@pytest.mark.parametrize(
    "variables",
    [
        {"WANDB_API_KEY": "k"},
        {"WANDB_IDENTITY_TOKEN_FILE": "token"},
        {"WF_TRACE_SERVER_URL": "http://127.0.0.1:8777"},
        {"WANDB_BASE_URL": "http://localhost:8777"},
        {"WANDB_PUBLIC_BASE_URL": "http://localhost:8777"},
        {"WF_TRACE_SERVER_URL": "https://bob:secret@weave.example"},
    ],
)
def test_a_key_or_a_server_that_needs_none(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    exporter()


@pytest.mark.parametrize("name", [".netrc", "_netrc"])
def test_a_key_of_wandb_login(home: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (home / name).write_text("machine wandb.example login user password k\n")
    with pytest.raises(ConfigError, match="no API key"):
        exporter()  # it is for another machine
    (home / name).write_text("machine api.wandb.ai login user password k\n")
    exporter()
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.example")
    with pytest.raises(ConfigError, match="no API key"):
        exporter()


def test_files_of_settings_name_the_server(home: Path) -> None:
    (home / "wandb").mkdir()
    (home / "wandb" / "settings").write_text("[default]\nbase_url = http://127.0.0.1:9\n")
    exporter()
    (home / "wandb" / "settings").write_text("[default]\nbase_url = https://wandb.example\n")
    with pytest.raises(ConfigError, match="no API key"):
        exporter()


def test_of_a_file_that_cannot_be_read_nothing_is_known(home: Path) -> None:
    (home / ".netrc").write_text("what is this\n")
    exporter()
    (home / ".netrc").unlink()
    (home / "wandb").mkdir()
    (home / "wandb" / "settings").write_text("no section\n")
    exporter()
