"""What a receiver's answer confirms, byte by byte; what is sent is checked in `test_export`."""

from __future__ import annotations

import contextlib
import gzip
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

import requests
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from agentloop.config import OtlpConfig
from agentloop.errors import ConfigError, ExportError
from agentloop.trace.exporting import ExportRun, TracedEpisode, episodes_of
from agentloop.trace.otlp import OtlpExporter
from agentloop.trace.otlp.headers import VARIABLES
from agentloop.trace.otlp.session import Session
from tests.agentloop.trace.made_episodes import record
from tests.agentloop.trace.otlp_receiver import Receiver
from tests.agentloop.trace.raw_server import ENDLESS, RawServer, writes

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
BROKEN = "cannot be reached: it closed the connection before the end of its answer"


@pytest.fixture
def run(tmp_path: Path) -> ExportRun:
    return ExportRun("demo", tmp_path, "models/small", rollout_n=2)


@pytest.fixture
def episode(run: ExportRun) -> TracedEpisode:
    return next(episodes_of(run, [record(7, "g3", 1)]))


@pytest.fixture
def start() -> Iterator[Callable[[Callable[[socket.socket], None]], RawServer]]:
    servers: list[RawServer] = []

    def start(answer: Callable[[socket.socket], None]) -> RawServer:
        servers.append(RawServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def exporter(url: str, run: ExportRun, timeout_s: float = 2, **options: Any) -> OtlpExporter:
    return OtlpExporter(OtlpConfig(endpoint=url, timeout_s=timeout_s, **options), run)


def length(content: bytes, *headers: bytes) -> bytes:
    return OK + b"".join(h + b"\r\n" for h in headers) + b"content-length: %d\r\n\r\n" % len(content) + content


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 204 No Content\r\n\r\n",
        OK + b"content-length: 0\r\n\r\n",
        CHUNKED + b"0\r\n\r\n",
        CHUNKED + b"2\r\n{}\r\n0\r\n\r\n",
        OK + b"\r\n{}",  # ended by the connection: JSON shows that it is whole
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"content-length: 0\r\n\r\n",
        length(gzip.compress(b"{}", mtime=0), b"content-encoding: gzip"),
        length(ExportTraceServiceResponse().SerializeToString(), b"content-type: application/x-protobuf"),
        length(b"\x78\x01", b"content-type: application/x-protobuf"),  # a field of a later version
    ],
)
def test_whole_answers_confirm(start: Any, run: ExportRun, episode: TracedEpisode, answer: bytes) -> None:
    server = start(writes(answer))
    exporter(server.url, run).export([episode])
    assert server.requests == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        b"HTTP/1.1 204 No Content",
        b"HTTP/1.1 204 No Content\r\n",
        OK + b"content-le",
        OK + b"content-length: 0",
        OK + b"content-length: 0\r\n",
        OK + b"\r\n",  # nothing says that it is all
        OK + b"content-length: 50\r\n\r\n",
        OK + b"content-length: 50\r\n\r\n{}",
        CHUNKED,
        CHUNKED + b"0",
        CHUNKED + b"0\r\n",
        CHUNKED + b"2\r\n{}\r\n",
        length(gzip.compress(b"{}", mtime=0)[:10], b"content-encoding: gzip"),
    ],
)
def test_a_part_of_an_answer_confirms_nothing(
    start: Any, run: ExportRun, episode: TracedEpisode, answer: bytes
) -> None:
    with pytest.raises(ExportError, match=BROKEN) as caught:
        exporter(start(writes(answer)).url, run, timeout_s=0.5).export([episode])
    assert not caught.value.final


def test_a_connection_whose_answer_was_broken_is_not_used_again(start: Any) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(length(gzip.compress(b"{}", mtime=0)[:10], b"content-encoding: gzip"))
        connection.recv(1)  # it stays open, and a second request would not be answered

    session = Session(2)
    server = start(answer)
    for _ in range(2):
        with pytest.raises(requests.ConnectionError, match="before the end of its answer"):
            session.post(server.url, timeout=2.0)
    assert server.requests == 2


@pytest.mark.parametrize(
    "answer",
    [
        length(content, b"content-type: " + kind)
        for content, kind in (
            (b'{"error": "project not found"}', b"application/json"),
            (b'{"success": false}', b"application/json"),
            (b'{"partialSuccess": []}', b"application/json"),
            (b'{"partialSuccess": null, "error": "no"}', b"application/json"),
            (b'{"partial_success": {"rejected_spans": true}}', b"application/json"),
            (b"[]", b"application/json"),
            (b"null", b"application/json"),
            (b'"please log in"', b"application/json"),
            (b"0", b"application/json"),
            (b"x\x01", b"application/octet-stream"),  # reads as a field that no version has
        )
    ],
)
def test_other_json_confirms_nothing(start: Any, run: ExportRun, episode: TracedEpisode, answer: bytes) -> None:
    with pytest.raises(ExportError, match="not as a receiver of spans") as caught:
        exporter(start(writes(answer)).url, run).export([episode])
    assert not caught.value.final


def test_spans_left_out_are_counted_under_names_with_underscores(
    start: Any, run: ExportRun, episode: TracedEpisode
) -> None:
    answer = length(b'{"partial_success": {"rejected_spans": 3, "error_message": "too old"}, "more": 1}')
    with pytest.raises(ExportError, match="left out 3 of 9 spans: too old"):
        exporter(start(writes(answer)).url, run).export([episode])


@pytest.mark.parametrize("part", ENDLESS)
def test_an_answer_that_does_not_end_is_an_outage(
    start: Any, run: ExportRun, episode: TracedEpisode, part: str
) -> None:
    sender = exporter(start(ENDLESS[part]).url, run, timeout_s=0.5)
    for _ in range(2):  # the second request has its own time
        with pytest.raises(ExportError) as caught:
            sender.export([episode])
        words = "was reached, but sent no complete answer within 0.5 s (trace.otlp.timeout_s)"
        assert words in caught.value.message and "raise trace.otlp.timeout_s" in str(caught.value.hint)
        assert not caught.value.final and not caught.value.unreachable


def test_a_receiver_that_takes_no_connection_in_time_cannot_be_reached(run: ExportRun, episode: TracedEpisode) -> None:
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # more than wait to be accepted
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        with pytest.raises(
            ExportError, match=r"cannot be reached: no connection within 0\.5 s \(trace\.otlp\.t"
        ) as caught:
            exporter(url, run, timeout_s=0.5).export([episode])
    assert caught.value.unreachable


def test_a_connection_that_is_kept_ends_with_its_request(run: ExportRun, episode: TracedEpisode, start: Any) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(length(b""))
        connection.recv(1)  # the next request
        ENDLESS["header"](connection)

    sender = exporter(start(answer).url, run, timeout_s=0.5)
    sender.export([episode])
    with pytest.raises(ExportError, match=r"no complete answer within 0\.5 s"):
        sender.export([episode])


@pytest.mark.parametrize("value", [" mine-0815", "mine-0815 ", "mine-0815\t", "\nmine-0815"])
def test_a_header_that_begins_or_ends_with_a_space_is_refused_by_its_name(run: ExportRun, value: str) -> None:
    with pytest.raises(ConfigError, match=r"trace\.otlp\.headers\.authorization") as caught:
        exporter("http://127.0.0.1:4318", run, headers={"authorization": value})
    assert "0815" not in str(caught.value)


@pytest.mark.parametrize("name", ["a:b", "a b", "ä", "a\n", "(a)"])
def test_what_is_no_name_of_a_header_is_refused(run: ExportRun, name: str) -> None:
    with pytest.raises(ConfigError, match="not the name of a header"):
        exporter("http://127.0.0.1:4318", run, headers={name: "x"})


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("Bearer very-secret", "part 1 of 1"),
        ("very-secret", "part 1 of 1"),
        ("a=b,very-secret", "part 2 of 2"),
        ("a=b,authorization=Basic very-secret;x", "part 2 of 2"),
        ("Bearer%20very-secret=x", "part 1 of 1"),
        ("authorization=Bearer%0Avery-secret", "the header authorization of"),
        ("authorization=very-secret%C3%A4", "the header authorization of"),
        (" , ", "holds no header"),
    ],
)
def test_a_variable_with_anything_but_headers_is_refused_and_not_shown(
    run: ExportRun, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=words) as caught:
        exporter("http://127.0.0.1:4318", run)
    assert variable in str(caught.value) and "secret" not in str(caught.value)


def test_headers_of_the_variable_are_sent(
    receiver: Receiver, run: ExportRun, episode: TracedEpisode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLES[1], "authorization=Bearer mine, x-a=%20b%2Cc%20,x-b=\n")
    exporter(receiver.url, run).export([episode])
    _, headers, _ = receiver.requests[0]
    assert (headers["authorization"], headers["x-a"], headers["x-b"]) == ("Bearer mine", "b,c", "")


def test_the_library_logs_nothing_that_is_printed(
    receiver: Receiver, run: ExportRun, episode: TracedEpisode, capfd: pytest.CaptureFixture[str]
) -> None:
    exporter(receiver.url, run).export([episode])
    library = logging.getLogger("opentelemetry.util.re")
    root = logging.StreamHandler()
    logging.getLogger().addHandler(root)
    try:
        library.warning("Header format invalid! very-secret")
    finally:
        logging.getLogger().removeHandler(root)
    assert "very-secret" not in "".join(capfd.readouterr())


def test_a_header_that_requests_refuses_is_named_as_the_cause() -> None:
    session = Session(1)
    with pytest.raises(requests.exceptions.InvalidHeader):
        session.post("http://127.0.0.1:9", headers={"authorization": " very-secret"}, timeout=1.0)
    assert session.answer.cause == "a header of the request cannot be sent, correct trace.otlp.headers"
