"""`OtlpExporter` against a receiver that decodes its protobuf."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from opentelemetry import trace as global_trace

from agentloop.config import OtlpConfig, Recipe
from agentloop.errors import ConfigError, ExportError
from agentloop.trace.exporting import ExportRun, TracedEpisode, episodes_of
from agentloop.trace.otlp import OtlpExporter, session
from agentloop.trace.otlp import exporter as exporter_module
from agentloop.trace.otlp.answer import ANSWER_BYTES
from tests.agentloop.trace.made_episodes import record
from tests.agentloop.trace.otlp_receiver import Receiver, plain

SECRET = "Bearer very-secret"


@pytest.fixture
def run(tmp_path: Path) -> ExportRun:
    return ExportRun("demo", tmp_path, "models/small", rollout_n=2)


def exporter(url: str, run: ExportRun, **options: Any) -> OtlpExporter:
    return OtlpExporter(OtlpConfig(endpoint=url, timeout_s=2, **options), run)


def one(run: ExportRun, **options: Any) -> TracedEpisode:
    return next(episodes_of(run, [record(7, "g3", 1, **options)]))


def test_spans_arrive_under_the_names_of_the_genai_conventions(receiver: Receiver, run: ExportRun) -> None:
    sender = exporter(receiver.url, run, headers={"Authorization": SECRET})
    episode = one(run)
    sender.export([episode])
    path, headers, _ = receiver.requests[0]
    assert path == "/v1/traces" and headers["authorization"] == SECRET
    assert "content-encoding" not in headers, "not packed on the way to this machine"
    assert headers["content-type"] == "application/x-protobuf"
    assert len(receiver.spans) == len(episode.spans) == 9
    assert {trace_id for trace_id, _ in receiver.spans} == {episode.trace_id}

    (agent,) = receiver.named("invoke_agent tool_agent")
    assert not agent.parent_span_id and agent.status.code == agent.status.STATUS_CODE_OK
    assert agent.start_time_unix_nano == episode.spans[0].start_ns
    kept = plain(agent)
    for key, value in {
        "step": 7,
        "version": 6,
        "sample_index": 1,
        "rollout_n": 2,
        "group_id": "g3",
        "validate": False,
        "experiment_name": "demo",
        "agent_name": "tool_agent",
        "task_id": "task g3",
        "status": "ok",
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.name": "tool_agent",
        "gen_ai.conversation.id": "train/7/g3/1",
        "gen_ai.request.model": "models/small",
        "reward": 1.0,
        "reward_parts.format": 0.5,
        "stop_reason": "stop",
        "turns": 2,
        "answer": "408",
    }.items():
        assert kept[key] == value, key
    assert [m["role"] for m in json.loads(kept["gen_ai.input.messages"])] == ["system", "user"]

    first, second = sorted(receiver.named("chat models/small"), key=lambda span: span.start_time_unix_nano)
    assert first.kind == first.SPAN_KIND_CLIENT
    kept = plain(first)
    assert kept["gen_ai.usage.input_tokens"] == 5 and kept["gen_ai.usage.output_tokens"] == 6
    assert kept["gen_ai.response.finish_reasons"] == ["tool_call"] and kept["gen_ai.response.id"] == "r0"
    assert json.loads(kept["gen_ai.output.messages"]) == [
        {
            "role": "assistant",
            "parts": [
                {"type": "tool_call", "id": "call_0_0", "name": "calculator", "arguments": {"expression": "12 * 34"}}
            ],
            "finish_reason": "tool_call",
        }
    ]
    kept = plain(second)
    (asked,) = json.loads(kept["gen_ai.input.messages"])  # what came since the first answer, not all again
    assert asked == {"role": "tool", "parts": [{"type": "tool_call_response", "id": "call_0_0", "response": "408"}]}
    (told,) = json.loads(kept["gen_ai.output.messages"])
    assert told["parts"] == [{"type": "reasoning", "content": "easy"}, {"type": "text", "content": "408"}]
    assert told["finish_reason"] == "stop"

    (tool,) = receiver.named("execute_tool calculator")
    kept = plain(tool)
    assert json.loads(kept["gen_ai.tool.call.arguments"]) == {"expression": "12 * 34"}
    assert kept["gen_ai.tool.call.result"] == "408" and kept["gen_ai.tool.call.id"] == "call_0_0"
    assert "tool" not in kept and kept["step"] == 7  # a slow tool is found by step without its parent
    (turn, _), (reward,) = receiver.named("turn"), receiver.named("reward")
    assert turn.parent_span_id == agent.span_id and (plain(reward)["score"], plain(reward)["reward_name"]) == (
        1.0,
        "reward",
    )
    parents = {span.span_id: span.parent_span_id for span in receiver.spans.values()}
    assert parents[first.span_id] == turn.span_id and parents[tool.span_id] == agent.span_id


def test_without_texts_there_are_names_and_numbers_only(receiver: Receiver, run: ExportRun) -> None:
    exporter(receiver.url, run, texts=False).export([one(run, text="a secret answer")])
    body = "".join(str(span) for span in receiver.spans.values())
    assert "secret" not in body and "12 * 34" not in body and "gen_ai.usage.output_tokens" in body


def test_a_second_time_makes_no_second_span(receiver: Receiver, run: ExportRun) -> None:
    episode = one(run)
    exporter(receiver.url, run).export([episode])
    before = {key: span.SerializeToString() for key, span in receiver.spans.items()}
    exporter(receiver.url, run).export([episode])
    assert {key: span.SerializeToString() for key, span in receiver.spans.items()} == before
    assert len(receiver.requests) == 2


def test_errors_and_cancelled_spans_are_errors_there(receiver: Receiver, run: ExportRun) -> None:
    episode = one(run)
    turn, tool = episode.spans[1], next(span for span in episode.spans if span.name == "tool")
    turn.status = "cancelled"
    tool.status, tool.error = "error", "KeyError: 'orders'"
    exporter(receiver.url, run).export([episode])
    (sent,) = receiver.named("execute_tool calculator")
    assert sent.status.code == sent.status.STATUS_CODE_ERROR and sent.status.message == "KeyError: 'orders'"
    assert plain(sent)["error.type"] == "KeyError"
    cancelled = receiver.spans[episode.trace_id, turn.span_id]
    assert cancelled.status.message == "cancelled"


def test_long_and_strange_texts_are_sent_cut_and_clean(receiver: Receiver, run: ExportRun) -> None:
    exporter(receiver.url, run).export([one(run, text="\ud800" + "x" * 100_000)])
    (agent,) = receiver.named("invoke_agent tool_agent")
    (answer,) = json.loads(plain(agent)["gen_ai.output.messages"])
    text = answer["parts"][-1]["content"]
    assert text.startswith("?xxx") and len(text) < 21_000 and "[cut: 100,001 characters" in text


def test_large_episodes_go_in_several_requests(
    receiver: Receiver, run: ExportRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter_module, "REQUEST_CHARACTERS", 50_000)
    episodes = list(episodes_of(run, [record(1, "g", n, text="x" * 15_000) for n in range(4)]))
    exporter(receiver.url, run).export(episodes)
    assert len(receiver.requests) == 4 and len(receiver.named("invoke_agent tool_agent")) == 4


def test_spans_without_texts_go_in_several_requests_too(
    receiver: Receiver, run: ExportRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter_module, "REQUEST_CHARACTERS", 50_000)
    numbers = {f"m{number}": number for number in range(60)}
    records = [record(1, "g", n) for n in range(16)]
    for span in (span for made in records for span in made.trajectory.spans):
        span.attributes.update(numbers)
    exporter(receiver.url, run, texts=False).export(list(episodes_of(run, records)))
    assert len(receiver.named("invoke_agent tool_agent")) == 16
    assert 20_000 < max(length for _, _, length in receiver.requests) < 50_000


@pytest.mark.parametrize(
    ("status", "final", "words"), [(400, True, "answered 400: no ␛"), (401, False, "headers"), (404, False, "404")]
)
def test_refusals_say_why(receiver: Receiver, run: ExportRun, status: int, final: bool, words: str) -> None:
    receiver.status = status
    with pytest.raises(ExportError) as caught:
        exporter(receiver.url, run, headers={"Authorization": SECRET}).export([one(run)])
    assert caught.value.final is final and words in str(caught.value) and "very-secret" not in str(caught.value)


def test_spans_that_the_receiver_leaves_out_are_not_taken_as_sent(receiver: Receiver, run: ExportRun) -> None:
    receiver.rejects = 2
    with pytest.raises(ExportError, match=r"left out 2 of 9 spans: too old"):
        exporter(receiver.url, run).export([one(run)])


def test_an_unreachable_receiver_is_named_without_its_password(run: ExportRun) -> None:
    sender = exporter("http://127.0.0.1:9/otlp/", run)
    assert sender.destination == "http://127.0.0.1:9/otlp/v1/traces"
    with pytest.raises(ExportError, match="cannot be reached: Connection refused") as caught:
        sender.export([one(run)])
    assert not caught.value.final


def test_a_fault_of_the_client_is_named(receiver: Receiver, run: ExportRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(response: Any) -> bytes:
        raise AttributeError("lines")

    monkeypatch.setattr(session, "read_answer", fails)
    with pytest.raises(ExportError, match="cannot be reached: AttributeError"):
        exporter(receiver.url, run).export([one(run)])


@pytest.mark.parametrize("part", ["user:very-secret@127.0.0.1:9", "very-secret@x", "127.0.0.1:9/?x=very-secret"])
def test_an_endpoint_that_holds_a_key_is_refused_and_not_shown(repo: Path, part: str) -> None:
    from agentloop.config.loading import load_config

    config = repo / "recipes" / "quickstart" / "recipe.yaml"
    with pytest.raises(ConfigError, match="headers") as caught:
        load_config(Recipe, config, [f"trace.otlp.endpoint=http://{part}"])
    assert "very-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "headers", "answer", "words"),
    [
        (302, {"location": "https://login.example/?next=very-secret"}, b"", "redirects to https://login.example/"),
        (304, {}, b"", "redirects to an address that it does not name"),
        (200, {"content-type": "text/html"}, b"\n<html>log in</html>", "not as a receiver of spans"),
        (200, {}, b"hello", "not as a receiver of spans: hello"),
        (200, {}, b"{}" + b" " * ANSWER_BYTES, "not as a receiver of spans"),
        (200, {}, b'{"partialSuccess": {"rejectedSpans": -1}}', "not as a receiver of spans"),
        (200, {}, b'{"partialSuccess": {"rejectedSpans": 1e300}}', "not as a receiver of spans"),
        (200, {}, b'{"partialSuccess": {"rejectedSpans": "few"}}', "not as a receiver of spans"),
    ],
)
def test_what_is_no_receivers_answer_confirms_nothing(
    receiver: Receiver, run: ExportRun, status: int, headers: dict[str, str], answer: bytes, words: str
) -> None:
    receiver.status, receiver.answer_headers, receiver.answer = status, headers, answer
    with pytest.raises(ExportError, match=words) as caught:
        exporter(receiver.url, run).export([one(run)])
    assert not caught.value.final and "very-secret" not in str(caught.value)
    assert "endpoint" in str(caught.value.hint)


@pytest.mark.parametrize(
    "answer",
    [b"", b"{}", b'{"partialSuccess": {}}', b'{"partialSuccess": null}', b'{"partial_success": {}, "more": 1}'],
)
def test_answers_in_json_and_empty_ones_confirm(receiver: Receiver, run: ExportRun, answer: bytes) -> None:
    receiver.answer, receiver.answer_headers = answer, {"content-type": "application/json"}
    exporter(receiver.url, run).export([one(run)])


def test_spans_left_out_are_counted_in_json_too(receiver: Receiver, run: ExportRun) -> None:
    receiver.answer = b'{"partialSuccess": {"rejectedSpans": "2", "errorMessage": "too old"}}'
    with pytest.raises(ExportError, match=r"left out 2 of 9 spans: too old"):
        exporter(receiver.url, run).export([one(run)])


def test_an_answer_without_end_is_cut_off(receiver: Receiver, run: ExportRun) -> None:
    receiver.endless = True
    with pytest.raises(ExportError, match="not as a receiver of spans") as caught:
        exporter(receiver.url, run).export([one(run)])
    assert not caught.value.final


@pytest.mark.parametrize("status", [200, 302, 400])
def test_a_receiver_that_echoes_headers_shows_no_secret(receiver: Receiver, run: ExportRun, status: int) -> None:
    receiver.status, receiver.answer = status, f"you sent {SECRET}, in part very-secret".encode()
    receiver.answer_headers = {"content-type": "text/plain", "location": "http://very-secret/"}
    with pytest.raises(ExportError) as caught:
        exporter(receiver.url, run, headers={"Authorization": SECRET}).export([one(run)])
    assert "very-secret" not in str(caught.value) and "(hidden)" in str(caught.value)


def test_a_receiver_that_echoes_a_password_shows_none(receiver: Receiver, run: ExportRun) -> None:
    receiver.status, receiver.answer = 401, b"wrong password: very-secret"
    header = "Basic " + base64.b64encode(b"someone:very-secret").decode()
    with pytest.raises(ExportError, match=r"wrong password: \(hidden\)"):
        exporter(receiver.url, run, headers={"Authorization": header}).export([one(run)])


def test_the_users_own_tracer_is_not_touched(receiver: Receiver, run: ExportRun) -> None:
    before = global_trace.get_tracer_provider()
    exporter(receiver.url, run).export([one(run)])
    assert global_trace.get_tracer_provider() is before


@pytest.mark.parametrize("headers", [{"a b": "x"}, {"": "x"}, {"authorization": "mine-0815\n"}, {"authorization": "é"}])
def test_headers_that_cannot_be_sent_are_refused_before_the_run(run: ExportRun, headers: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"trace\.otlp\.headers") as caught:
        exporter("http://127.0.0.1:4318", run, headers=headers)
    assert "0815" not in str(caught.value)


def test_headers_are_in_no_file_and_no_message(repo: Path) -> None:
    from agentloop.config.loading import load_config
    from agentloop.text import hide_override

    config = repo / "recipes" / "quickstart" / "recipe.yaml"
    endpoint = "trace.otlp.endpoint=http://127.0.0.1:4318"
    recipe = load_config(Recipe, config, [endpoint, "trace.otlp.headers.authorization=very-secret"])
    assert recipe.trace.otlp is not None and recipe.trace.otlp.headers == {"authorization": "very-secret"}
    assert recipe.plain()["trace"]["otlp"]["headers"] == {"authorization": "(hidden)"}
    assert "very-secret" not in hide_override("trace.otlp.headers.authorization=very-secret")
    assert "very-secret" not in hide_override("trace.otlp.headers={x: very-secret}")
    for wrong in ("trace.otlp.headers=very-secret", "trace.otlp.headers.authorization=[very-secret]"):
        with pytest.raises(ConfigError) as caught:
            load_config(Recipe, config, [endpoint, wrong])
        assert "very-secret" not in str(caught.value)
