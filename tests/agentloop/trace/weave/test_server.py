"""The exporter against servers that answer wrongly, slowly, or under an address with a password."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentloop.config import WeaveConfig
from agentloop.errors import ConfigError
from agentloop.trace.exporting import ExportRun
from agentloop.trace.weave import WeaveExporter
from agentloop.trace.weave.connections import VARIABLES
from tests.agentloop.trace.raw_server import ENDLESS
from tests.agentloop.trace.weave.fake_server import Server


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("/graphql", "header"),
        ("/file/create", "body"),
        ("/obj/create", "continue"),
        ("/calls/complete", "size of a chunk"),
    ],
)
def test_an_answer_that_does_not_end_is_an_outage(fake_server: Server, tmp_path: Path, path: str, part: str) -> None:
    fake_server.drips, fake_server.end = path, ENDLESS[part]
    tries = fake_server.send(tmp_path, WEAVE_HTTP_TIMEOUT="1")
    assert len(tries) == 2 and fake_server.asked
    for line in tries:  # also the second try has its own time
        assert line.startswith("ExportError") and line.endswith("no complete answer within 2 s"), line


def test_the_answer_of_weaves_server_confirms(fake_server: Server, tmp_path: Path) -> None:
    fake_server.answer = b'{"ids": ["a"]}'  # as a later version may answer
    assert fake_server.send(tmp_path) == ["confirmed"] * 2


def test_json_that_names_an_error_confirms_nothing(fake_server: Server, tmp_path: Path) -> None:
    fake_server.answer = b'{"error": "project not found"}'
    for line in fake_server.send(tmp_path):
        assert "not as weave's server" in line and "project not found" in line


def test_no_message_shows_the_password_of_an_address(fake_server: Server, tmp_path: Path) -> None:
    address = fake_server.url.replace("//", "//bob:very-secret@")
    fake_server.answer = b'{"error": "bob may not, very-secret"}'
    tries = fake_server.send(tmp_path, WF_TRACE_SERVER_URL=address, WANDB_BASE_URL=address)  # checks what is printed
    assert len(tries) == 2 and "//(hidden)@127.0.0.1" in tries[0] and fake_server.asked


def test_calls_whose_files_were_not_taken_are_not_confirmed_and_no_log_shows_the_key(
    fake_server: Server, tmp_path: Path
) -> None:
    fake_server.refuses = "/file/create"
    first, _ = fake_server.send(tmp_path, WANDB_API_KEY="very-secret")  # checks what is printed, log included
    assert "it answered 413: too large: (hidden)" in first


@pytest.mark.parametrize("address", ["http://very-secret@h:1/?key=very-secret", "http://bob:very-secret@h:1"])
def test_the_destination_names_no_password(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("WF_TRACE_SERVER_URL", address)
    exporter = WeaveExporter(WeaveConfig(project="lab/runs"), ExportRun("demo", Path("run")))
    assert exporter.destination == "http://(hidden)@h:1 lab/runs"


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize(
    "address", ["http://bob:very-secret/x@h", "http://bob:very?secret@h", "very-secret@h", "http://["]
)
def test_what_is_no_address_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, variable: str, address: str
) -> None:
    monkeypatch.setenv(variable, address)
    with pytest.raises(ConfigError, match=f"{variable} is not an address") as caught:
        WeaveExporter(WeaveConfig(project="lab/runs"), ExportRun("demo", Path("run")))
    assert "very" not in str(caught.value)


def test_an_address_of_wandbs_settings_that_is_none_is_refused(fake_server: Server, tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nbase_url = http://bob:very-secret/@127.0.0.1:9\n")
    tries = fake_server.send(tmp_path, WANDB_BASE_URL=None, WF_TRACE_SERVER_URL=None)
    assert tries == ["ConfigError the address of weave's server is not an address"] * 2
