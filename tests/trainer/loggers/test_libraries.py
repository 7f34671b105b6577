"""The four libraries themselves, offline: what is written is read back. Each is skipped where it is missing."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agentloop.config import LoggerConfig
from trainer.loggers import Loggers

CONFIG = {"seed": 3, "run": {"name": "tiny"}, "loggers": [{"name": "x", "options": {}}]}


def run(root: Path, name: str, steps: list[tuple[int, dict[str, Any]]], resumed_at: int | None, **options: Any) -> None:
    """One start of a run, and its end; a warning is a failure."""
    warned: list[str] = []
    loggers = Loggers(
        [LoggerConfig(name=name, options=options)], name="tiny", config=CONFIG, root=root, resumed_at=resumed_at,
        warn=warned.append,
    )  # fmt: skip
    (destination,) = loggers.destinations
    assert destination.startswith(f"{name}: ")
    if name == "tensorboard":
        assert destination == f"tensorboard: {root / 'loggers' / 'tensorboard'}"
    for step, metrics in steps:
        loggers.log({"step": step, **metrics})
    loggers.close(failed=False)
    assert not warned


FIRST = [(1, {"reward/mean": 0.1, "eval/pass@2": 0.5}), (2, {"reward/mean": 0.2}), (3, {"reward/mean": 0.3})]
AGAIN = [(2, {"reward/mean": 0.25}), (3, {"reward/mean": 0.35}), (1, {"eval/late": 1.0})]


def test_tensorboard_shows_a_resumed_run_as_one_never_stopped(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, "tensorboard", FIRST, None)
    run(tmp_path, "tensorboard", AGAIN, 1)
    shown = EventAccumulator(str(tmp_path / "loggers" / "tensorboard"))
    shown.Reload()
    scalars = [(event.step, round(event.value, 6)) for event in shown.Scalars("reward/mean")]
    assert scalars == [(1, 0.1), (2, 0.25), (3, 0.35)]
    assert [event.step for event in shown.Scalars("eval/late")] == [1]
    (text,) = shown.Tensors("config")
    assert b'"seed": 3' in text.tensor_proto.string_val[0]


def test_tensorboard_needs_no_torch(tmp_path: Path) -> None:
    """The run's main process imports none."""
    pytest.importorskip("tensorboard")
    import subprocess

    code = (
        "import sys; from pathlib import Path; from trainer.loggers import LoggerRun\n"
        "from trainer.loggers.tensorboard import TensorboardLogger\n"
        "logger = TensorboardLogger(LoggerRun('r', {}, Path(sys.argv[1]))); logger.log(1, {'a': 1.0})\n"
        "logger.close(failed=False); sys.exit('torch' in sys.modules or 'tensorflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_mlflow_goes_on_with_the_run_that_it_began(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run(tmp_path, "mlflow", FIRST, None, experiment="e", tracking_uri=uri)
    run(tmp_path, "mlflow", AGAIN, 1, experiment="e", tracking_uri=uri)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (found,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert (found.info.run_name, found.info.status) == ("tiny", "FINISHED")
    assert found.data.params["seed"] == "3" and found.data.params["run.name"] == "tiny"
    assert found.data.metrics["reward/mean"] == 0.35 and found.data.metrics["eval/pass_2"] == 0.5
    history = [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, "reward/mean")]
    assert sorted(history) == [(1, 0.1), (2, 0.2), (2, 0.25), (3, 0.3), (3, 0.35)]


@pytest.mark.slow
def test_wandb_offline_goes_on_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path, "wandb", FIRST, None, project="p", mode="offline")
    run(tmp_path, "wandb", AGAIN, 1, project="p", mode="offline")
    folder = tmp_path / "loggers" / "wandb"
    known = json.loads((folder / "state.json").read_text())["id"]
    files = list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) >= 1 and {file.stem for file in files} == {f"run-{known}"}
    deadline = time.monotonic() + 30  # its service still writes when `finish` has returned
    while not all(key in (data := b"".join(f.read_bytes() for f in files)) for key in (b"reward/mean", b"eval/late")):
        assert time.monotonic() < deadline, data
        time.sleep(0.05)


@pytest.mark.slow
def test_trackio_goes_on_with_the_run_that_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("trackio")
    run(tmp_path, "trackio", FIRST, None, project="p")
    run(tmp_path, "trackio", AGAIN, 1, project="p")
    from trackio.sqlite_storage import SQLiteStorage

    lines = SQLiteStorage.get_logs("p", "tiny")
    assert [(line["step"], line["reward/mean"]) for line in lines if "reward/mean" in line] == [
        (1, 0.1), (2, 0.2), (3, 0.3), (2, 0.25), (3, 0.35),
    ]  # fmt: skip
