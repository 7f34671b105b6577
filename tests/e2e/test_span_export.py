"""A whole run whose receiver of spans fails: the run does not mind, and `trace push` completes the record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from tests.agentloop.trace.otlp_receiver import Receiver, plain

SECRET = "Bearer my-own-secret-4711"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


def test_an_outage_during_a_run_loses_nothing(
    quickstart: Any, agentloop: Any, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver.status = 404
    otlp = [f"trace.otlp.endpoint={receiver.url}", f"trace.otlp.headers.authorization={SECRET}"]
    run = quickstart("run.steps=2", "eval.every=2", *otlp)
    assert run.code == 0, run.err
    assert not receiver.spans and receiver.requests[0][1]["authorization"] == SECRET
    told = run.out + run.err
    assert "answered 404" in told and "episodes were not sent" in told and "agentloop trace push --to otlp" in told
    assert "my-own-secret" not in told
    for path in run.dir.rglob("*"):
        assert not path.is_file() or b"my-own-secret" not in path.read_bytes(), path

    receiver.status = 200
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization={SECRET.replace(' ', '%20')}")
    pushed = agentloop("trace", "push", "--to", "otlp", str(run.dir))
    assert pushed.code == 0, pushed.err
    records = [record for split in ("train", "eval") for step in (0, 1, 2) for record in stored(run, step, split)]
    main = [record for record in records if record.is_main]
    agents = [span for span in receiver.spans.values() if span.name.startswith("invoke_agent")]
    assert len(agents) == len(main) and f"{len(main)} episodes sent" in pushed.out
    assert {trace_id for trace_id, _ in receiver.spans} == {record.trajectory.trace_id for record in main}
    assert len(receiver.spans) == sum(len(record.trajectory.spans) for record in main)

    first = [plain(span) for span in agents if plain(span)["step"] == 1 and not plain(span)["validate"]]
    assert len(first) == 16 and {kept["experiment_name"] for kept in first} == {"run"}
    assert {kept["rollout_n"] for kept in first} == {4} and {kept["sample_index"] for kept in first} == {0, 1, 2, 3}
    again = agentloop("trace", "push", "--to", "otlp", str(run.dir))
    assert "0 episodes sent" in again.out


def test_a_resumed_run_sends_what_an_outage_kept_back(quickstart: Any, receiver: Receiver) -> None:
    otlp = f"trace.otlp.endpoint={receiver.url}"
    receiver.status = 404
    assert quickstart("run.steps=1", otlp).code == 0 and not receiver.spans
    receiver.status = 200
    run = quickstart("run.steps=2", otlp, "--resume")
    assert run.code == 0, run.err
    records = [record for split in ("train", "eval") for step in (0, 1, 2) for record in stored(run, step, split)]
    assert {record.step for record in records} >= {1, 2}
    assert {trace_id for trace_id, _ in receiver.spans} == {
        record.trajectory.trace_id for record in records if record.is_main
    }
    assert "not sent" not in run.out + run.err


def stored(run: Any, step: int, split: str) -> list[Any]:
    return run.records(step, split) if (run.dir / "traces" / f"step_{step}" / f"{split}.parquet").exists() else []


def test_a_run_without_the_library_is_refused_before_it_starts(quickstart: Any, tmp_path: Path) -> None:
    blocker = tmp_path / "blocked"
    (blocker / "opentelemetry").mkdir(parents=True)
    (blocker / "opentelemetry" / "__init__.py").write_text("")
    run = quickstart("trace.otlp.endpoint=http://127.0.0.1:4318", env={"PYTHONPATH": str(blocker)})
    assert run.code != 0 and "pip install 'agentloop-rl[otlp]'" in run.err
    assert not (run.dir / "metrics.jsonl").exists()
