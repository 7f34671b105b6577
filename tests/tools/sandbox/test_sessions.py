"""Sessions: variables between calls, interrupts, leases."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.tools.sandbox.support import Sandbox, Serving
from tools.sandbox.worker import Worker


class Session:
    def __init__(self, sandbox: Sandbox, **fields: Any) -> None:
        self.sandbox = sandbox
        answer = sandbox.post("/sessions", fields)
        assert answer.status_code == 200, answer.text
        self.name = answer.json()["session_id"]

    def cell(self, code: str, **fields: Any) -> dict[str, Any]:
        return self.sandbox.run(code, session_id=self.name, **fields)

    def printed(self, code: str, **fields: Any) -> str:
        found = self.cell(code, **fields)
        assert found["status"] == "Success", found
        assert found["session_ended"] is False
        text: str = found["run_result"]["stdout"]
        return text

    def close(self) -> None:
        assert self.sandbox.post("/close_session", {"session_id": self.name}).json() == {"closed": True}


@pytest.fixture
def session(sandbox: Sandbox) -> Any:
    found = Session(sandbox)
    yield found
    found.close()
    assert sandbox.health()["sessions"] == 0
    assert sandbox.printed("print(1)") == "1\n"


def test_variables_and_files_survive(session: Session) -> None:
    session.cell("import math\ndef f(x): return math.sqrt(x)\nopen('kept', 'w').write('text')")
    assert session.printed("print(f(49), open('kept').read())") == "7.0 text\n"


@pytest.mark.parametrize(
    ("fields", "says", "fix"),
    [
        ({"language": "bash"}, "language 'bash' is not that of a session, which runs python", "leave session_id out"),
        ({"language": "cobol"}, "the language 'cobol' is not installed", "it runs: python"),
        ({"stdin": "text"}, "stdin cannot be given to a cell", "`files`"),
        ({"memory_limit_MB": 64}, "memory_limit_MB 64 is not that of the session (192)", "POST /sessions"),
    ],
)
def test_what_a_cell_cannot_have_is_refused(session: Session, fields: dict[str, Any], says: str, fix: str) -> None:
    body = {"code": "echo hi", "session_id": session.name, **fields}
    answer = session.sandbox.post("/run_code", body)
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"] and fix in answer.json()["fix"]
    assert session.printed("print(1)", language="python3", memory_limit_MB=192, stdin="") == "1\n"


def test_an_error_ends_the_cell_only(session: Session) -> None:
    session.cell("x = 1")
    found = session.cell("x = 2\ny = x / 0")
    assert found["status"] == "Failed"
    assert found["session_ended"] is False
    lines = found["run_result"]["stderr"].splitlines()
    assert lines[1:3] == ['  File "<cell 2>", line 2, in <module>', "    y = x / 0"]
    assert session.printed("print(x)") == "2\n"
    assert session.cell("import sys; sys.exit(1)")["run_result"]["return_code"] == 1
    assert session.printed("print(x)") == "2\n"


@pytest.mark.parametrize("report", ["bytes(200)", "b'x'", "(1).to_bytes(4, 'big') + b'x'"])
def test_a_program_that_reports_the_end_of_its_cell_ends_its_session(sandbox: Sandbox, report: str) -> None:
    """Only the kernel writes to that pipe: a second report would make a later cell count as done while it runs."""
    session = Session(sandbox)
    forge = (
        f"import os\nfor fd in range(3, 64):\n    try: os.write(fd, {report})\n    except OSError: pass\nprint('end')"
    )
    found = session.cell(forge)
    if not found["session_ended"]:  # a report with the right number is one; the kernel's own follows
        found = session.cell("while True: pass", run_timeout=20)
        assert found["run_result"]["execution_time"] < 20  # it is not the time limit that ended it
    assert found["session_ended"] is True and found["status"] == "Failed", found
    assert "no such session" in session.cell("print(1)")["message"]
    assert sandbox.printed("print(1)") == "1\n"


def test_output_belongs_to_its_cell(session: Session) -> None:
    for number in range(5):
        assert session.printed(f"print({number}, end='')") == str(number)


def test_a_cell_past_its_deadline_is_interrupted(session: Session) -> None:
    session.cell("kept = 5")
    found = session.cell("print('before')\nwhile True: pass", run_timeout=0.5)
    assert found["run_result"]["status"] == "TimeLimitExceeded"
    assert found["run_result"]["stdout"] == "before\n"
    assert "the variables are kept" in found["run_result"]["stderr"]
    assert session.printed("print(kept)") == "5\n"


def test_a_cell_that_ignores_the_interrupt_ends_the_session(session: Session) -> None:
    found = session.cell("import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)", run_timeout=0.3)
    assert found["session_ended"] is True
    assert "its variables are gone" in found["run_result"]["stderr"]
    found = session.cell("print(1)")
    assert (found["status"], found["session_ended"]) == ("SandboxError", True)
    assert "no such session" in found["message"]


@pytest.mark.parametrize(
    "code", ["import os; os._exit(3)", "import os; os.kill(os.getpid(), 9)", "import os; os.kill(1, 9); os.abort()"]
)
def test_a_kernel_that_ends_is_the_programs_failure(session: Session, code: str) -> None:
    found = session.cell(code)
    assert found["status"] == "Failed"
    assert found["session_ended"] is True


def test_nothing_runs_between_cells(session: Session) -> None:
    code = """
import threading, time
count = 0
def run():
    global count
    while True: count += 1; time.sleep(0.001)
threading.Thread(target=run, daemon=True).start()
time.sleep(0.05)
"""
    session.cell(code)
    first = int(session.printed("print(count)"))
    time.sleep(0.5)
    assert int(session.printed("print(count)")) - first < 100


def test_limits_hold_in_sessions(session: Session) -> None:
    assert session.printed("try: bytearray(10**9)\nexcept MemoryError: print('refused')") == "refused\n"
    found = session.cell("while True: print('x' * 1000)")
    assert found["session_ended"] is True
    assert "more output" in found["run_result"]["stderr"]


def test_cells_read_and_fetch_files(session: Session) -> None:
    found = session.cell("open('out', 'w').write(open('in').read() * 2)", files={"in": "eA=="}, fetch_files=["out"])
    assert found["files"] == {"out": "eHg="}
    session.cell("import os; os.symlink('/proc/self/environ', 'link')")
    found = session.cell("pass", files={"link": "eA=="})
    assert "could not be written" in found["run_result"]["stderr"]


def test_a_session_ends_when_it_is_idle(serving: Serving) -> None:
    server = serving.start(session_idle_s=0.4, warm=0)
    name = Session(server).name
    deadline = time.monotonic() + 10
    while server.health()["sessions"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.run("print(1)", session_id=name)["status"] == "SandboxError"
    assert server.app.state.runner.pool.live == 0


def test_a_lease_is_as_short_as_its_client_wants_and_lasts_while_it_is_renewed(serving: Serving) -> None:
    server = serving.start(session_idle_s=60.0, warm=0)
    kept, left = Session(server, lease_s=1.5), Session(server, lease_s=1.5)
    assert server.post("/sessions", {"lease_s": 900}).json()["idle_s"] == 60
    deadline = time.monotonic() + 60
    while server.health()["sessions"] == 3 and time.monotonic() < deadline:
        answer = server.post("/renew_sessions", {"session_ids": [kept.name, "missing"]})
        assert answer.json() == {"renewed": [kept.name]}
        time.sleep(0.1)
    assert server.run("print(1)", session_id=left.name)["status"] == "SandboxError"
    assert kept.printed("print(1)") == "1\n"
    assert server.post("/sessions", {"lease_s": -1}).status_code == 422


def test_sessions_are_counted(sandbox: Sandbox) -> None:
    open_ones = [Session(sandbox) for _ in range(3)]
    answer = sandbox.post("/sessions", {})
    assert answer.status_code == 503
    assert "--max-sessions" in answer.json()["fix"]
    for each in open_ones:
        each.close()
    each.close()


def test_cells_that_wait_for_another_one_count_among_the_waiting(serving: Serving) -> None:
    server = serving.start(max_running=4, max_queue=1, warm=1)
    session = Session(server)
    with ThreadPoolExecutor() as threads:
        cells = [threads.submit(session.printed, "import time; time.sleep(1); print(1)")]
        server.wait_for("running", 1)
        cells.append(threads.submit(session.printed, "print(2)"))
        server.wait_for("queued", 1)
        answer = server.post("/run_code", {"code": "print(3)", "session_id": session.name})
        assert answer.status_code == 503
        assert "--max-queue" in answer.json()["fix"]
        assert server.printed("print(4)") == "4\n"  # another program need not wait
        assert [cell.result() for cell in cells] == ["1\n", "2\n"]
    assert server.health()["queued"] == 0


def test_sessions_of_other_languages_are_refused(sandbox: Sandbox) -> None:
    answer = sandbox.post("/sessions", {"language": "bash"})
    assert answer.status_code == 400
    assert "'bash'" in answer.json()["error"]


def test_a_client_that_goes_away_while_a_session_is_opened_leaves_none(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else knows its name: it would take a place until its lease has run out."""
    begins, begin = threading.Event(), Worker.begin

    async def slow(worker: Worker, job: dict[str, Any], memory: int) -> None:
        begins.set()
        await asyncio.sleep(1)
        await begin(worker, job, memory)

    sandbox = serving.start()
    monkeypatch.setattr(Worker, "begin", slow)
    with socket.create_connection(("127.0.0.1", int(sandbox.url.rpartition(":")[2]))) as connection:
        connection.sendall(b"POST /sessions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
        assert begins.wait(30)
    monkeypatch.undo()
    assert sandbox.printed("import time; time.sleep(1.5); print(1)") == "1\n"
    assert sandbox.health()["sessions"] == 0
    assert Session(sandbox).cell("1")["status"] == "Success"
