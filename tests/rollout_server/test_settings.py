"""The server's settings: one model behind command-line options, settings file and recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from agentloop.config import ModelConfig, RolloutConfig
from agentloop.config.server import EngineOptions, ServerSettings
from agentloop.errors import ConfigError
from rollout_server import commands
from rollout_server.commands import serve_command
from rollout_server.replica.starting.torch import REPLICA_TOKEN, replica_settings
from rollout_server.settings import load_settings
from trainer.publishing.server_process import ServerProcess

OPTIONS = {
    "--model", "--engine", "--replicas", "--replica-url", "--host", "--port", "--device", "--dtype", "--max-running",
    "--max-kv-tokens", "--context-length", "--threads", "--python", "--engine-arg", "--gpus-per-replica", "--max-queue",
    "--stream-tokens", "--weights-root", "--weight-version", "--weights", "--ready-file", "--token-env",
    "--admin-token-env", "--log-dir", "--probe-timeout", "--start-timeout", "--drain", "--incremental-streaming-output",
    "--deterministic", "--parent-pid", "--seed", "--fast-path", "--update-timeout", "--probe-every",
    "--clip-new-tokens", "--in-place-updates", "--max-connections", "--read-timeout", "--trust-remote-code",
    "--replica-token-env", "--memory-saver", "--first-gpu",
}  # fmt: skip


class Extended(ServerSettings):
    """The settings after a field was added."""

    new_limit_s: float = Field(2.5, gt=0, description="a limit that was added")


def run(arguments: list[str], model: type[ServerSettings], monkeypatch: pytest.MonkeyPatch) -> ServerSettings:
    """The settings with which the command would serve."""
    served: list[ServerSettings] = []

    def serve(settings: ServerSettings) -> int:
        served.append(settings)
        return 0

    monkeypatch.setattr(commands, "_serve", serve)
    app = typer.Typer()
    app.command()(serve_command(model))
    result = CliRunner().invoke(app, arguments, catch_exceptions=False, standalone_mode=True)
    assert result.exit_code == 0, result.output
    return served[0]


def test_every_field_is_an_option_under_its_known_name() -> None:
    assert {ServerSettings.option(field) for field in ServerSettings.model_fields} == OPTIONS


def test_every_field_has_a_help_text() -> None:
    assert [name for name, field in ServerSettings.model_fields.items() if not field.description] == []


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = run(
        ["--model", "m", "--weights-root", "/a", "--weights-root", "/b", "--engine-arg=--tp=2", "--no-fast-path",
         "--drain", "3", "--max-queue", "0", "--deterministic", "auto"],
        ServerSettings, monkeypatch,
    )  # fmt: skip
    expected = ServerSettings(
        model="m", weights_roots=(Path("/a"), Path("/b")), engine_args=["--tp=2"], fast_path=False, drain_s=3.0,
        max_queue=0, deterministic="auto",
    )  # fmt: skip
    assert settings == expected


def test_an_option_wins_over_the_settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ServerSettings(model="m", threads=3, max_running=5).save(tmp_path / "server.json")
    settings = run(["--settings", str(file), "--threads", "1"], ServerSettings, monkeypatch)
    assert settings == ServerSettings(model="m", threads=1, max_running=5)


def test_settings_survive_their_file(tmp_path: Path) -> None:
    settings = ServerSettings(
        model="m", weights_roots=(tmp_path,), replica_urls=("http://a",), weights=tmp_path, token_env="A_TOKEN"
    )
    assert load_settings(ServerSettings, settings.save(tmp_path / "server.json"), {}) == settings


def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    file = tmp_path / "server.json"
    file.write_text(json.dumps({"model": "m", "max_runing": 4}))
    with pytest.raises(ConfigError, match="unknown key 'max_runing'; did you mean 'max_running'") as error:
        load_settings(ServerSettings, file, {})
    assert "server.json" in error.value.message and "serve --help" in (error.value.hint or "")


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_file_without_settings_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "server.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="settings file"):
        load_settings(ServerSettings, file, {})


def test_a_wrong_option_is_named_as_it_was_given() -> None:
    with pytest.raises(ConfigError, match="--probe-timeout: "):
        load_settings(ServerSettings, None, {"model": "m", "probe_timeout_s": -1.0})
    with pytest.raises(ConfigError, match="--model is missing"):
        load_settings(ServerSettings, None, {})


def test_tokens_are_read_from_the_environment_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServerSettings(model="m", host="0.0.0.0", token_env="A_TOKEN")  # noqa: S104  # never bound
    with pytest.raises(ConfigError, match="--token-env A_TOKEN: that variable is not set"):
        settings.check_tokens()
    monkeypatch.setenv("A_TOKEN", "hunter2")
    settings.check_tokens()
    assert settings.token == "hunter2" and settings.admin_token is None
    assert "hunter2" not in settings.save(tmp_path / "server.json").read_text() + repr(settings)


def test_a_field_that_is_added_is_an_option_a_key_and_reaches_replicas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = run(["--model", "m", "--new-limit", "7"], Extended, monkeypatch)
    assert isinstance(settings, Extended) and settings.new_limit_s == 7.0
    again = load_settings(Extended, settings.save(tmp_path / "server.json"), {})
    assert again == settings
    replica = replica_settings(again, 1, tmp_path / "ready.json")
    assert isinstance(replica, Extended) and replica.new_limit_s == 7.0


def test_a_replica_keeps_the_settings_but_for_what_belongs_to_one_process(tmp_path: Path) -> None:
    settings = ServerSettings(
        model="m", replicas=4, device="cuda", seed=10, weights=tmp_path, weight_version="7", max_queue=3, threads=2,
        fast_path=False, token_env="A_TOKEN", parent_pid=1,
    )  # fmt: skip
    replica = replica_settings(settings, 2, tmp_path / "ready.json")
    assert (replica.replicas, replica.device, replica.seed, replica.token_env) == (1, "cuda:2", 12, REPLICA_TOKEN)
    assert (replica.weights, replica.weight_version, replica.max_queue, replica.parent_pid) == (
        None,
        "initial",
        None,
        None,
    )
    assert (replica.threads, replica.fast_path) == (2, False)


def test_the_run_hands_every_shared_option_to_its_server(tmp_path: Path) -> None:
    rollout = RolloutConfig(
        engine="sglang", replicas=3, python="/py", engine_args=["--a"], gpus_per_replica=2, device="cuda", threads=2,
        max_running=7, max_queue=1, stream_tokens=5, probe_timeout_s=3.0, max_kv_tokens=512, context_length=64,
        port=1234, token="hunter2",
    )  # fmt: skip
    process = ServerProcess(
        model_path="m", model=ModelConfig(path="m", dtype="bfloat16"), rollout=rollout, seed=9,
        log_file=tmp_path / "server.log", weights_roots=[tmp_path], on_restart=lambda text: None,
    )  # fmt: skip
    settings = process.settings
    assert {n: getattr(settings, n) for n in EngineOptions.model_fields} == rollout.engine_options()
    assert (settings.model, settings.dtype, settings.seed, settings.weights_roots) == ("m", "bfloat16", 9, (tmp_path,))
    assert "hunter2" not in settings.model_dump_json()
    assert settings.max_connections == 8192


def test_the_server_of_a_run_takes_the_connections_of_all_its_episodes(tmp_path: Path) -> None:
    process = ServerProcess(
        model_path="m", model=ModelConfig(path="m"), rollout=RolloutConfig(max_concurrent=16_384), seed=9,
        log_file=tmp_path / "server.log", weights_roots=[], on_restart=lambda text: None, connections=16_384,
    )  # fmt: skip
    assert process.settings.max_connections > 16_384
