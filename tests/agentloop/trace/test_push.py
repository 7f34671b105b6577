"""`agentloop trace push`: what is missing is sent, once each, also after an outage or Ctrl-C."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from agentloop.commands.trace import trace
from agentloop.config import OtlpConfig
from agentloop.errors import ConfigError, ExportError, TraceError
from agentloop.text import hide_secrets
from agentloop.trace import backlog as backlog_module
from agentloop.trace import push as push_module
from agentloop.trace.backlog import Backlog
from agentloop.trace.exporting import Destination, ExportRun, TracedEpisode
from agentloop.trace.exports import ExportLog, RecordUnavailable
from agentloop.trace.push import Push, push_destination
from agentloop.trace.store import TraceStore
from tests.agentloop.trace.damaged_files import DAMAGES
from tests.agentloop.trace.made_episodes import record, step_of
from tests.agentloop.trace.otlp_receiver import Receiver
from tests.forked_programs import ForkedPrograms


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two steps of three groups, and an evaluation."""
    store = TraceStore(tmp_path)
    store.write(1, "train", step_of(1, 3))
    store.write(2, "train", step_of(2, 3))
    store.write(2, "eval", [record(2, f"e{n}", 0, split="eval") for n in range(2)])
    return tmp_path


def configured(run_dir: Path, **otlp: Any) -> None:
    (run_dir / "config").mkdir(exist_ok=True)
    recipe = {"run": {"name": "demo"}, "model": {"path": "m"}, "rollout": {"group_size": 2}, "trace": {"otlp": otlp}}
    (run_dir / "config" / "resolved.json").write_text(json.dumps(recipe))


def push(*arguments: str) -> Any:
    return CliRunner().invoke(trace, ["push", "--to", "otlp", *arguments])


def test_a_run_is_sent_once(run_dir: Path, receiver: Receiver) -> None:
    configured(run_dir, endpoint=receiver.url)
    answer = push(str(run_dir))
    assert answer.exit_code == 0, answer.output
    assert "14 episodes sent, 0 were there" in answer.output
    agents = receiver.named("invoke_agent tool_agent")
    assert len(agents) == 14 and len(receiver.spans) == 14 * 9
    requests = len(receiver.requests)
    again = push(str(run_dir))
    assert "0 episodes sent, 14 were there" in again.output and len(receiver.requests) == requests
    # Another receiver has none of them.
    other = push(str(run_dir), f"endpoint={receiver.url}/other")
    assert "14 episodes sent" in other.output and len(receiver.spans) == 14 * 9


def test_what_a_receiver_lost_is_sent_again_under_the_same_ids(run_dir: Path, receiver: Receiver) -> None:
    configured(run_dir, endpoint=receiver.url)
    assert push(str(run_dir)).exit_code == 0
    sent = set(receiver.spans)
    receiver.spans.clear()
    assert "0 episodes sent, 14 were there" in push(str(run_dir)).output and not receiver.spans
    answer = push(str(run_dir), "--again")
    assert "14 episodes sent, 0 were there" in answer.output and set(receiver.spans) == sent
    assert "0 episodes sent, 14 were there" in push(str(run_dir)).output


def test_a_run_without_a_destination_is_given_one(run_dir: Path, receiver: Receiver) -> None:
    with pytest.raises(ConfigError, match=r"has no trace\.otlp") as caught:
        push_destination("otlp", run_dir)
    assert "endpoint=" in str(caught.value)
    answer = push(str(run_dir), f"endpoint={receiver.url}", "max_groups_per_step=1")
    assert answer.exit_code == 0 and "5 episodes sent" in answer.output  # two groups of two, one of one
    assert "9 episodes sent, 5 were there" in push(str(run_dir), f"endpoint={receiver.url}", "--all").output


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["endpoint=somewhere"], "http://host:port"),
        (["endpint=http://127.0.0.1:1"], "did you mean 'endpoint'"),
        (["trace.otlp.endpint=http://127.0.0.1:1"], "did you mean 'endpoint'"),
        (["otlp.endpint=http://127.0.0.1:1"], "did you mean 'endpoint'"),
        (["http://127.0.0.1:1"], "write endpoint=URL"),
        (["timeout_s=3"], "key 'endpoint' is missing"),
        (["sample_rate=2"], "sample_rate"),
    ],
)
def test_wrong_changes_are_named(run_dir: Path, changes: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        push_destination("otlp", run_dir, changes)


@pytest.mark.parametrize("prefix", ["otlp.", "trace.otlp."])
def test_changes_may_be_written_as_in_a_recipe(run_dir: Path, receiver: Receiver, prefix: str) -> None:
    answer = push(str(run_dir), f"{prefix}endpoint={receiver.url}", f"{prefix}headers.x=y", "trace.otlp.texts=false")
    assert answer.exit_code == 0 and "14 episodes sent" in answer.output
    assert receiver.requests[0][1]["x"] == "y"


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="holds no traces"):
        push_destination("otlp", tmp_path / "nowhere")
    (tmp_path / "traces").mkdir()
    with pytest.raises(ConfigError, match=r"no trace\.somewhere"):
        push_destination("somewhere", tmp_path)


def test_headers_come_from_the_environment(run_dir: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    configured(run_dir, endpoint=receiver.url, headers={"authorization": "(hidden)"})
    with pytest.raises(ConfigError, match="in none of its files"):
        push_destination("otlp", run_dir)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20mine")
    assert push(str(run_dir)).exit_code == 0
    assert receiver.requests[0][1]["authorization"] == "Bearer mine"


def test_an_outage_is_waited_out_then_reported_and_the_next_push_completes(
    run_dir: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_module, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(backlog_module, "BATCH", 4)
    configured(run_dir, endpoint=receiver.url, timeout_s=1)
    destination, run = push_destination("otlp", run_dir)
    said: list[str] = []
    work = Push(destination, run, warn=said.append)
    assert work.count() == 14
    sending = work.send()
    assert next(sending) + next(sending) == 6  # step 1
    receiver.status = 404
    with pytest.raises(ExportError, match="404"):
        next(sending)
    assert len(said) == 2 and work.done.sent == 6
    work.close()
    receiver.status = 200
    assert "8 episodes sent, 6 were there" in push(str(run_dir)).output
    assert len(receiver.named("invoke_agent tool_agent")) == 14


class Made:
    """A destination whose answers a function gives.

    Args:
        answers: called with the number of the call, from 1, and the episodes.
    """

    destination = "here"

    def __init__(self, answers: Callable[[int, Sequence[TracedEpisode]], None]) -> None:
        self.calls = 0
        self.got: list[str] = []
        self._answers = answers

    def export(self, episodes: Sequence[TracedEpisode]) -> None:
        self.calls += 1
        self._answers(self.calls, episodes)
        self.got += [episode.key for episode in episodes]

    def close(self, timeout_s: float) -> None: ...

    def push(self, run_dir: Path, warn: Callable[[str], None], *, wait: bool = False) -> Push:
        destination = Destination("otlp", self, OtlpConfig(endpoint="http://127.0.0.1:9"))
        return Push(destination, ExportRun("demo", run_dir), wait=wait, warn=warn)

    def failed_push(self, run_dir: Path, message: str) -> Push:
        """Push until the error with this message."""
        work = self.push(run_dir, lambda _: None)
        work.count()
        with pytest.raises(ExportError, match=message):
            list(work.send())
        work.close()
        return work


def test_where_nobody_listens_a_push_ends_after_its_retries(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_module, "PAUSES_S", (0.0, 0.0))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tries: list[int] = []
    send = Backlog.send

    def counted(backlog: Backlog, batch: Sequence[TracedEpisode]) -> tuple[int, list[ExportError]]:
        tries.append(len(batch))
        return send(backlog, batch)

    monkeypatch.setattr(Backlog, "send", counted)
    answer = push(str(run_dir), f"endpoint=http://127.0.0.1:{port}", "timeout_s=0.5")
    assert answer.exit_code == 1 and isinstance(answer.exception, ExportError) and answer.exception.unreachable
    output = " ".join(answer.output.split())
    assert output.count("cannot be reached: Connection refused; again in 0 s") == 2
    assert "again in 0 s, for the last time" in output and "0 episodes were sent" in str(answer.exception)
    assert tries == [6, 6, 6], "the batch and its retries, not each episode for its own time limit"


def test_a_push_that_waits_says_so_until_the_destination_is_there(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_module, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(push_module, "LONG_PAUSE_S", 0.01)
    said: list[str] = []

    def late(calls: int, episodes: Sequence[TracedEpisode]) -> None:
        if calls < 6:
            raise ExportError("here cannot be reached", unreachable=True)

    made = Made(late)
    work = made.push(run_dir, said.append, wait=True)
    work.count()
    list(work.send())
    work.close()
    assert work.done.sent == 14 and len(said) == 5
    assert said[-1] == "here cannot be reached; again in 0.01 s; Ctrl-C ends it"


def test_a_destination_that_takes_connections_but_no_episode_is_given_up_in_bounded_time(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_module, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(push_module, "SINGLY_S", 15)
    clock = [0.0]
    monkeypatch.setattr(backlog_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def slow(calls: int, episodes: Sequence[TracedEpisode]) -> None:
        clock[0] += 10
        raise ExportError("here did not answer")

    made = Made(slow)
    made.failed_push(run_dir, "did not answer")
    assert made.calls == 3 + 2 + 1 + 2, "two batches: not each of their episodes"


def test_an_outage_among_episodes_that_are_tried_one_by_one_counts_what_arrived(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_module, "PAUSES_S", ())

    def ends(calls: int, episodes: Sequence[TracedEpisode]) -> None:
        if calls == 1:
            raise ExportError("here answered 500")
        if calls == 4:
            raise ExportError("here cannot be reached", unreachable=True)

    made = Made(ends)
    work = made.failed_push(run_dir, "cannot be reached")
    assert work.done.sent == len(made.got) == 2 and made.calls == 4 and not work.done.refused


def test_ctrl_c_between_arrival_and_note_makes_no_second_span(run_dir: Path, receiver: Receiver) -> None:
    configured(run_dir, endpoint=receiver.url)
    destination, run = push_destination("otlp", run_dir)

    class Interrupted:
        destination = "x"

        def export(self, episodes: Sequence[TracedEpisode]) -> None:
            destination_exporter.export(episodes)
            raise KeyboardInterrupt

        def close(self, timeout_s: float) -> None: ...

    destination_exporter = destination.exporter
    work = Push(Destination("otlp", Interrupted(), OtlpConfig(endpoint=receiver.url)), run, warn=print)
    work.count()
    with pytest.raises(KeyboardInterrupt):
        list(work.send())
    work.close()
    assert receiver.spans
    assert "14 episodes sent" in push(str(run_dir)).output
    assert len(receiver.spans) == 14 * 9


def test_refused_episodes_cut_files_and_old_ones_are_said(run_dir: Path, receiver: Receiver) -> None:
    configured(run_dir, endpoint=receiver.url)
    old = record(3, "old", 0)
    old.trajectory.trace_id, old.trajectory.spans = "", []
    store = TraceStore(run_dir)
    store.write(3, "train", [old, record(3, "new", 0)])
    path = store.path(1, "train")
    path.write_bytes(path.read_bytes()[:-100])
    answer = push(str(run_dir))
    assert answer.exit_code == 1 and "9 episodes sent" in answer.output
    assert "an older version wrote no spans: 1 episode" in answer.output and "step_1" in answer.output
    receiver.status = 400
    configured(run_dir, endpoint=f"{receiver.url}/again")
    answer = push(str(run_dir))
    assert answer.exit_code == 1 and "9 episodes refused" in answer.output and "answered 400" in answer.output
    assert ExportLog(run_dir / "traces").counts() == {f"otlp {receiver.url}/v1/traces": 9}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_is_damaged_behind_its_footer_is_left_out_by_name(
    run_dir: Path, receiver: Receiver, damage: Callable[[Path], None]
) -> None:
    configured(run_dir, endpoint=receiver.url)
    damage(TraceStore(run_dir).path(1, "train"))
    answer = push(str(run_dir))
    assert answer.exit_code == 1 and "8 episodes sent, 0 were there" in answer.output
    assert f"left out: {TraceStore(run_dir).path(1, 'train')}" in answer.output


def test_nothing_is_sent_while_the_record_cannot_be_written(
    run_dir: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured(run_dir, endpoint=receiver.url)
    log = ExportLog(run_dir / "traces")
    log.mark("elsewhere", [("a", 1, "b")])

    def full(*_: object) -> None:
        exc = sqlite3.OperationalError("database or disk is full")
        exc.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise exc

    with monkeypatch.context() as patch:
        patch.setattr("agentloop.trace.exports._write", full)
        answer = push(str(run_dir))
    assert answer.exit_code != 0 and isinstance(answer.exception, RecordUnavailable)
    assert "disk is full" in str(answer.exception) and "0 episodes were sent" in str(answer.exception)
    assert not receiver.requests
    assert "14 episodes sent" in push(str(run_dir)).output


def test_what_arrived_and_cannot_be_noted_is_said(
    run_dir: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_module, "PAUSES_S", (0.0,))
    configured(run_dir, endpoint=receiver.url)
    destination, run = push_destination("otlp", run_dir)
    said: list[str] = []
    work = Push(destination, run, warn=said.append)
    assert work.count() == 14

    def full(self: ExportLog, name: str, episodes: Any) -> None:
        if list(episodes):
            raise RecordUnavailable("the disk is full")

    monkeypatch.setattr(ExportLog, "mark", full)
    with pytest.raises(RecordUnavailable):
        list(work.send())
    work.close()
    assert "6 episodes arrived that could not be noted (the disk is full)" in said[-1] and work.done.sent == 6


def test_pushes_at_once_send_each_episode_once(run_dir: Path, receiver: Receiver) -> None:
    configured(run_dir, endpoint=receiver.url)
    command = [sys.executable, "-P", "-m", "agentloop.commands.main", "trace", "push", "--to", "otlp", str(run_dir)]
    pushes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [push.communicate(timeout=120)[0] for push in pushes]
    assert sum(int(output.split(": ")[1].split()[0]) for output in outputs) == 14, outputs
    assert all(push.returncode == 0 for push in pushes) and len(receiver.spans) == 14 * 9


def exporting(run_dir: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Any]:
    """Let a recipe name an exporter of another package; return the options that it is given."""
    (run_dir / "config").mkdir(exist_ok=True)
    section = hide_secrets({"trace": {"exporters": [{"name": "other"}, {"name": "made", "options": options}]}})
    (run_dir / "config" / "resolved.json").write_text(json.dumps(section))
    given: list[Any] = []

    class Made:
        destination = "here"

        def __init__(self, config: Any, run: ExportRun) -> None:
            given.append(config.options)

    monkeypatch.setattr(push_module, "load_exporter", lambda name: Made)
    return given


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"api_key": "abc", "project": "p"}, "options.api_key"),
        ({"inner": {"token": "abc"}}, "options.inner.token"),
        ({"url": "http://user:abc@127.0.0.1"}, "options.url"),
    ],
)
def test_a_hidden_option_of_an_exporter_is_named_and_taken_as_a_change(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], key: str
) -> None:
    given = exporting(run_dir, monkeypatch, **options)
    with pytest.raises(ConfigError, match=f"the exporter made a value for {key} ") as caught:
        push_destination("made", run_dir)
    assert f"{key}=VALUE" in str(caught.value) and not given
    destination, _ = push_destination("made", run_dir, [f"{key}=mine"])
    assert destination.name == "made"
    value: Any = given[0]
    for part in key.split(".")[1:]:
        value = value[part]
    assert value == "mine" and ("project" not in options or given[0]["project"] == "p")


def test_options_that_are_not_hidden_are_used_as_they_are(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = exporting(run_dir, monkeypatch, project="p", tags=["a", "b"])
    push_destination("made", run_dir)
    assert given == [{"project": "p", "tags": ["a", "b"]}]
    with pytest.raises(ConfigError, match=r"no trace\.missing"):
        push_destination("missing", run_dir, ["options.a=b"])


def test_spans_of_an_evaluation_are_pushed_from_its_own_folder(run_dir: Path, receiver: Receiver) -> None:
    config = {"trace": {"otlp": {"endpoint": receiver.url}}, "run": {"name": "judged"}, "eval": {"n": 3}}
    (run_dir / "eval.json").write_text(json.dumps({"model": "m", "config": config}))
    destination, run = push_destination("otlp", run_dir)
    assert run == ExportRun("judged", run_dir, "", 1, 3) and destination.exporter.destination.startswith(receiver.url)


@pytest.mark.parametrize("poison", ["train/1/1-1/0", "train/1/"])
def test_episodes_that_always_fail_are_left_out_and_said(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, poison: str
) -> None:
    monkeypatch.setattr(push_module, "PAUSES_S", (0.0,))
    got: list[str] = []

    class Poisoned:
        destination = "here"

        def export(self, episodes: Sequence[TracedEpisode]) -> None:
            if any(episode.key.startswith(poison) for episode in episodes):
                raise ExportError("here answered 500")
            got.extend(episode.key for episode in episodes)

        def close(self, timeout_s: float) -> None: ...

    destination = Destination("otlp", Poisoned(), OtlpConfig(endpoint="http://127.0.0.1:9"))
    work = Push(destination, ExportRun("demo", run_dir), warn=lambda _: None)
    assert work.count() == 14
    list(work.send())
    work.close()
    left_out = 1 if poison.endswith("0") else 6
    assert work.done.sent == len(got) == 14 - left_out and len(work.done.refused) == left_out
    assert work.done.refused[0].startswith(poison) and "answered 500" in work.done.refused[0]


PUSH_TO_WEAVE = "from agentloop.commands.main import main; main()"


def test_without_a_key_for_weave_a_push_ends_at_once(run_dir: Path, weave_programs: ForkedPrograms) -> None:
    variables = {name: value for name, value in os.environ.items() if name not in ("WANDB_API_KEY", "WANDB_BASE_URL")}
    variables |= {"HOME": str(run_dir), "WF_TRACE_SERVER_URL": "http://weave.invalid"}  # no netrc of the user
    arguments = ["trace", "push", "--to", "weave", str(run_dir), "project=lab/runs"]
    done = weave_programs.run(PUSH_TO_WEAVE, *arguments, environment=variables, cwd=run_dir)
    assert done.returncode == 2 and "weave has no API key" in done.stderr and "again in" not in done.stderr
    assert all(name in done.stderr for name in ("WANDB_BASE_URL", "WF_TRACE_SERVER_URL", "WANDB_API_KEY"))


def test_a_failure_of_weave_is_said_in_our_words_alone(tmp_path: Path, weave_programs: ForkedPrograms) -> None:
    TraceStore(tmp_path).write(1, "train", step_of(1, 1, samples=1))
    variables = {"HOME": str(tmp_path), "WANDB_API_KEY": "local", "WEAVE_RETRY_MAX_ATTEMPTS": "1"}
    variables |= dict.fromkeys(("WANDB_BASE_URL", "WF_TRACE_SERVER_URL"), "http://127.0.0.1:9")
    code = f"from agentloop.trace import push; push.PAUSES_S = (); {PUSH_TO_WEAVE}"
    arguments = ["trace", "push", "--to", "weave", str(tmp_path), "project=lab/runs"]
    done = weave_programs.run(code, *arguments, environment=os.environ | variables, cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "cannot be reached: Connection refused (0 episodes were sent" in line
