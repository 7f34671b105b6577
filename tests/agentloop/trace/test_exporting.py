"""What destinations get: whole groups, the same ones again, with the attributes of their step."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentloop.config import OtlpConfig, SpanSampling, TraceConfig, WeaveConfig
from agentloop.errors import ConfigError, RegistryError
from agentloop.trace.backlog import address_of
from agentloop.trace.exporting import ExportRun, chosen_groups, episodes_of, load_destinations, sampled_text
from tests.agentloop.trace.made_episodes import record


@pytest.fixture
def run(tmp_path: Path) -> ExportRun:
    return ExportRun("demo", tmp_path, "m", rollout_n=2)


def test_sampling_takes_whole_groups_and_is_the_same_again() -> None:
    groups = {step: [f"{step}-{number}" for number in range(200)] for step in (1, 2)}

    def chosen(sampling: SpanSampling) -> dict[int, set[str]]:
        return {step: chosen_groups("train", step, names, sampling) for step, names in groups.items()}

    half = chosen(SpanSampling(sample_rate=0.5))
    assert half == chosen(SpanSampling(sample_rate=0.5))
    assert 150 < sum(map(len, half.values())) < 250
    few = chosen(SpanSampling(sample_rate=0.5, max_groups_per_step=3))
    assert [len(names) for names in few.values()] == [3, 3]
    assert all(few[step] <= half[step] for step in (1, 2))
    assert chosen(SpanSampling(sample_rate=0.0)) == {1: set(), 2: set()}
    assert chosen(SpanSampling()) == {step: set(names) for step, names in groups.items()}
    # A part of a step is sampled as the whole was, where only the rate counts; an evaluation is another step.
    part = groups[1][:100]
    assert chosen_groups("train", 1, part, SpanSampling(sample_rate=0.5)) == half[1] & set(part)
    assert chosen_groups("eval", 1, groups[1], SpanSampling(sample_rate=0.5)) != half[1]


def test_the_attributes_are_those_of_the_step(run: ExportRun) -> None:
    train, evaluated = episodes_of(run, [record(7, "g", 1), record(7, "e0", 0, split="eval")])
    assert train.attributes() == {
        "step": 7,
        "version": 6,
        "sample_index": 1,
        "rollout_n": 2,
        "group_id": "g",
        "validate": False,
        "experiment_name": "demo",
        "agent_name": "tool_agent",
        "task_id": "task g",
        "status": "ok",
    }
    assert evaluated.attributes()["validate"] is True and evaluated.attributes()["rollout_n"] == 1
    assert train.key == "train/7/g/1" and len(train.trace_id) == 32


def test_what_of_a_step_is_sent_is_said() -> None:
    assert sampled_text(OtlpConfig(endpoint="http://h:1")) == ""
    assert sampled_text(WeaveConfig(project="p")) == " (at most 16 groups of a step)"
    part = OtlpConfig(endpoint="http://h:1", sample_rate=0.25, max_groups_per_step=1)
    assert sampled_text(part) == " (0.25 of the groups, at most 1 group of a step)"


def test_unknown_and_missing_exporters_are_refused(run: ExportRun, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RegistryError, match="nowhere"):
        load_destinations(TraceConfig(exporters=[{"name": "nowhere"}]), run)  # type: ignore[list-item]
    config = TraceConfig(otlp={"endpoint": "http://127.0.0.1:4318"})  # type: ignore[arg-type]
    (destination,) = load_destinations(config, run)
    assert address_of(destination) == "otlp http://127.0.0.1:4318/v1/traces"
    assert load_destinations(config, run, only="weave") == []
    monkeypatch.setattr("agentloop.trace.otlp.OtlpExporter.library", "not_installed.at_all")
    with pytest.raises(ConfigError, match=r"pip install 'agentloop-rl\[otlp\]'"):
        load_destinations(config, run)
