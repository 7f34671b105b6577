"""Loggers live in threads of their own: nothing that they wait for or raise holds up or ends a run."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agentloop.config import LoggerConfig, Recipe
from agentloop.errors import ConfigError, RegistryError
from trainer.loggers import LoggerRun, check_loggers
from trainer.loggers.base import flat
from trainer.loggers.threads import Loggers, LoggerThread


class Recorder:
    """Keeps what it is given; `steps` that fail raise."""

    def __init__(self, *, fail: tuple[int, ...] = ()) -> None:
        self.fail = fail
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.closed: bool | None = None
        self.threads: set[str] = set()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.threads.add(threading.current_thread().name)
        if step in self.fail:
            raise ConnectionError("the service\nis gone")
        self.lines.append((step, dict(metrics)))

    def close(self, *, failed: bool) -> None:
        self.closed = failed


def test_everything_is_written_before_close_returns() -> None:
    recorder, told = Recorder(), []
    thread = LoggerThread("own", lambda: recorder, told.append)
    thread.wait_open(5)
    for step in range(200):
        thread.put(step, {"a": step / 2})
    thread.close(failed=False, timeout_s=5)
    assert [step for step, _ in recorder.lines] == list(range(200)) and recorder.closed is False
    assert recorder.threads == {"logger own"} and not told


def test_a_logger_that_fails_is_told_of_once_and_tried_again() -> None:
    recorder, told = Recorder(fail=(1, 2)), []
    thread = LoggerThread("own", lambda: recorder, told.append)
    for step in range(4):
        thread.put(step, {})
    thread.close(failed=True, timeout_s=5)
    assert [step for step, _ in recorder.lines] == [0, 3] and recorder.closed is True
    assert told == ["logger own failed; the run continues without it: ConnectionError: the service"]


def test_a_logger_that_hangs_holds_nobody_up() -> None:
    free, began, told = threading.Event(), threading.Event(), []

    class Hangs(Recorder):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            began.set()
            free.wait(20)

    thread = LoggerThread("own", Hangs, told.append, queued=3)
    thread.put(0, {})
    assert began.wait(5)
    for step in range(1, 8):
        thread.put(step, {})
    thread.close(failed=False, timeout_s=0.01)
    free.set()
    assert told == [
        "logger own is too slow or hangs: steps from 4 on are missing there",
        "logger own did not finish writing within 0 s",
    ]


def test_a_logger_that_cannot_be_opened_stops_the_start() -> None:
    def broken() -> Recorder:
        raise PermissionError("no API key")

    with pytest.raises(ConfigError, match=r"loggers: own cannot be opened: PermissionError: no API key"):
        LoggerThread("own", broken, print).wait_open(5)
    free = threading.Event()

    def slow() -> Recorder:
        free.wait(20)
        return Recorder()

    with pytest.raises(ConfigError, match="own was not ready after 0 s"):
        LoggerThread("own", slow, print).wait_open(0.01)
    free.set()


def test_the_recipe_names_loggers_in_three_ways() -> None:
    recipe = Recipe.model_validate(
        {
            "run": {"steps": 1}, "model": {"path": "m"}, "data": {"train": "d"},
            "loggers": ["tensorboard", {"wandb": {"mode": "x"}}, {"mlflow": None}, {"name": "a", "options": {"b": 1}}],
        }
    )  # fmt: skip
    assert [(logger.name, logger.options) for logger in recipe.loggers] == [
        ("tensorboard", {}),
        ("wandb", {"mode": "x"}),
        ("mlflow", {}),
        ("a", {"b": 1}),
    ]
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_what_is_wrong_with_a_logger_is_found_before_the_run() -> None:
    with pytest.raises(RegistryError, match=r"'nowhere' is not registered in agentloop.loggers; known: mlflow, tensor"):
        check_loggers([LoggerConfig(name="nowhere")])


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "wandb", "mlflow", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=rf"{name} needs the library '{name}'[\s\S]*pip install {name}"):
            check_loggers([LoggerConfig(name=name)])


RECORDER = """
class Recorder:
    def __init__(self, run):
        self.file = run.folder / "lines.txt"
        self.say("run", run.name, run.resumed_at)
    def say(self, *words):
        with self.file.open("a") as file:
            print(*words, file=file)
    def log(self, step, metrics):
        self.say(step, metrics)
    def close(self, *, failed):
        self.say("closed", failed)

class Broken(Recorder):
    def log(self, step, metrics):
        raise OSError("no room")
"""


@pytest.fixture
def example_loggers(install: Any) -> None:
    """A package that registers two loggers."""
    entries = "recorder = recorder_of_lines:Recorder\nbroken_recorder = recorder_of_lines:Broken\n"
    install("recorder_of_lines", RECORDER, f"[agentloop.loggers]\n{entries}")


@pytest.mark.usefixtures("example_loggers")
def test_finite_numbers_reach_the_loggers_and_warnings_the_caller(tmp_path: Path) -> None:
    warned: list[str] = []
    loggers = open_all(tmp_path, warned, None, {"name": "broken_recorder"}, {"name": "recorder"}, {"name": "recorder"})
    loggers.log({"step": 3, "a": 1, "b": 2.5, "c": None, "d": "text", "e": float("nan"), "f": True})
    loggers.close(failed=False)
    written = [(tmp_path / "loggers" / name / "lines.txt").read_text() for name in ("recorder", "recorder-2")]
    assert written == ["run run None\n3 {'a': 1.0, 'b': 2.5, 'f': 1.0}\nclosed False\n"] * 2
    assert warned == ["logger broken_recorder failed; the run continues without it: OSError: no room"]


@pytest.mark.usefixtures("example_loggers")
def test_a_new_run_forgets_what_an_old_one_remembered_and_a_resumed_one_does_not(tmp_path: Path) -> None:
    open_all(tmp_path, [], None, {"name": "recorder"}).close(failed=True)
    run = LoggerRun("run", {}, tmp_path / "loggers" / "recorder")
    run.remember(id="abc")
    run.remember(other="d")
    open_all(tmp_path, [], 7, {"name": "recorder"}).close(failed=True)
    assert run.remembered == {"id": "abc", "other": "d"}
    assert (run.folder / "lines.txt").read_text().splitlines()[-2:] == ["run run 7", "closed True"]
    open_all(tmp_path, [], None, {"name": "recorder"}).close(failed=True)
    assert run.remembered == {}


@pytest.mark.usefixtures("example_loggers")
def test_options_that_a_logger_does_not_know_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loggers: recorder: .*'colour'"):
        open_all(tmp_path, [], None, {"name": "recorder", "options": {"colour": "red"}})


def open_all(root: Path, warned: list[str], resumed_at: int | None, *configs: dict[str, Any]) -> Loggers:
    return Loggers(
        [LoggerConfig(**config) for config in configs], name="run", config={"seed": 1}, root=root,
        resumed_at=resumed_at, warn=warned.append,
    )  # fmt: skip


def test_a_nested_config_becomes_dotted_keys() -> None:
    assert flat({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}
