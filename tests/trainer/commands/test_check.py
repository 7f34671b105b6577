"""`agentloop check` refuses what `agentloop train` refuses before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentloop.errors import ConfigError
from trainer.commands.check import check_command


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trace.weave.project=a/b/c", "not the name of a project"),
        ("trace.weave.project=lab/runs", "weave has no API key"),
        ("trace.otlp.endpoint=http://127.0.0.1:4318", r"trace\.otlp needs the library"),
    ],
)
@pytest.mark.parametrize("offline", [False, True])
def test_destinations_of_spans(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, words: str, offline: bool
) -> None:
    monkeypatch.setattr("agentloop.trace.otlp.OtlpExporter.library", "not_installed.at_all")
    monkeypatch.setattr("agentloop.trace.weave.WeaveExporter.library", "json")
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("WANDB_API_KEY", "WANDB_BASE_URL", "WF_TRACE_SERVER_URL"):
        monkeypatch.delenv(variable, raising=False)
    recipe = repo / "recipes" / "quickstart" / "recipe.yaml"
    with pytest.raises(ConfigError, match=words):
        check_command(recipe, [override], conversations=2, offline=offline)
