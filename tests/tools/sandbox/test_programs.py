"""What `/run_code` answers: Sandbox Fusion's form, languages, input, files, errors."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from tests.tools.sandbox.support import Sandbox, Serving


def test_an_answer_has_the_form_of_sandbox_fusion(sandbox: Sandbox) -> None:
    found = sandbox.run("print('hello')")
    seconds = found["run_result"].pop("execution_time")
    assert 0 < seconds < 10
    assert found.pop("session_ended") is None
    assert found == {
        "status": "Success",
        "message": "",
        "compile_result": None,
        "run_result": {"status": "Finished", "return_code": 0, "stdout": "hello\n", "stderr": ""},
        "executor_pod_name": None,
        "files": {},
    }


def test_a_request_as_clients_of_sandbox_fusion_send_it(sandbox: Sandbox) -> None:
    body = {
        "code": "print(input())",
        "stdin": "in",
        "compile_timeout": 10,
        "run_timeout": 10,
        "memory_limit_MB": 128,
        "language": "python",
        "files": {},
        "fetch_files": [],
        "a_field_of_tomorrow": 1,
    }
    assert sandbox.post("/run_code", body).json()["run_result"]["stdout"] == "in\n"


@pytest.mark.parametrize(
    ("path", "field", "fix"),
    [
        ("/run_code", "timeout", "did you mean 'run_timeout' or 'compile_timeout'?"),
        ("/run_code", "time_limit", "did you mean 'run_timeout' or 'compile_timeout'?"),
        ("/run_code", "total_timeout", "did you mean 'compile_timeout' or 'run_timeout'?"),
        ("/run_code", "memory_limit_mb", "did you mean 'memory_limit_MB'?"),
        ("/run_code", "max_memory", "did you mean 'memory_limit_MB'?"),
        ("/run_code", "languge", "did you mean 'language'?"),
        ("/run_code", "lease_s", "'lease_s' is a field of /sessions"),
        ("/sessions", "lease", "did you mean 'lease_s'?"),
        ("/sessions", "run_timeout", "'run_timeout' is a field of /run_code"),
        ("/renew_sessions", "session_id", "did you mean 'session_ids'?"),
        ("/close_session", "sessionid", "did you mean 'session_id'?"),
    ],
)
def test_a_field_that_is_like_one_of_the_api_is_refused(sandbox: Sandbox, path: str, field: str, fix: str) -> None:
    """It may be a limit, which would silently not hold."""
    needed = {"/run_code": {"code": "print(1)"}, "/renew_sessions": {"session_ids": []}}
    body = needed.get(path, {"session_id": "a"} if path == "/close_session" else {})
    answer = sandbox.post(path, {**body, field: 5})
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"] == f"the field {field!r} is not known"
    assert answer.json()["fix"].startswith(fix)


@pytest.mark.parametrize("field", ["id", "user_id", "source_code", "kernel", "provided_data", "extra", "tests", "env"])
def test_other_fields_are_those_of_other_clients(sandbox: Sandbox, field: str) -> None:
    assert sandbox.printed("print(1)", **{field: 5}) == "1\n"
    assert sandbox.printed("print(1)", timeout=None) == "1\n"


def test_a_failing_program_shows_its_own_traceback(sandbox: Sandbox) -> None:
    found = sandbox.run("def f():\n    return 1 / 0\n\nprint('before')\nf()")
    assert (found["status"], found["run_result"]["status"], found["run_result"]["return_code"]) == (
        "Failed",
        "Finished",
        1,
    )
    assert found["run_result"]["stdout"] == "before\n"
    lines = found["run_result"]["stderr"].splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == '  File "/home/sandbox/main.py", line 5, in <module>'
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert "init.py" not in found["run_result"]["stderr"]


@pytest.mark.parametrize(
    ("code", "return_code", "stderr"),
    [
        ("def f(:", 1, "SyntaxError"),
        ("import sys; sys.exit(3)", 3, ""),
        ("exit(4)", 4, ""),
        ("raise SystemExit('why')", 1, "why"),
        ("import os; os._exit(5)", 5, ""),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import ctypes; ctypes.string_at(0)", -11, ""),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
        ("x = '\\ud800'; print(x)", 1, "UnicodeEncodeError"),
    ],
)
def test_how_a_program_ends_is_reported(sandbox: Sandbox, code: str, return_code: int, stderr: str) -> None:
    found = sandbox.run(code)["run_result"]
    assert found["return_code"] == return_code
    assert stderr in found["stderr"]


def test_a_program_runs_as_a_main_module(sandbox: Sandbox) -> None:
    code = """
import atexit, inspect, multiprocessing, pickle, sys, threading
class Thing: pass
def work(n): return n * n
if __name__ == '__main__':
    atexit.register(print, 'at exit')
    assert pickle.loads(pickle.dumps(Thing())).__class__ is Thing
    assert inspect.getsource(Thing) == 'class Thing: pass\\n'
    with multiprocessing.get_context('fork').Pool(2) as pool: print(pool.map(work, [2, 3]))
    threading.Thread(target=print, args=('from a thread',)).start()
    print(sys.argv, __file__)
"""
    assert sandbox.printed(code).splitlines() == [
        "[4, 9]",
        "from a thread",
        "['/home/sandbox/main.py'] /home/sandbox/main.py",
        "at exit",
    ]


def test_packages_of_the_interpreter_are_there(sandbox: Sandbox) -> None:
    code = "import numpy, sympy, subprocess, sys\nprint(numpy.arange(3).sum(), sympy.factorint(91))"
    assert sandbox.printed(code) == "3 {7: 1, 13: 1}\n"
    child = "import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', 'import numpy; print(1)']))"
    assert sandbox.printed(child) == "b'1\\n'\n"


def test_bash_runs(sandbox: Sandbox) -> None:
    found = sandbox.run("read x; echo got $x; exit 7", "bash", stdin="in\n")
    assert (found["run_result"]["stdout"], found["run_result"]["return_code"]) == ("got in\n", 7)


def test_cpp_is_compiled_then_run(sandbox: Sandbox) -> None:
    code = '#include <cstdio>\nint main() { int x; scanf("%d", &x); printf("%d\\n", 2 * x); return 3; }'
    for name in ("cpp", "c++"):
        found = sandbox.run(code, name, stdin="21")
        assert found["compile_result"]["return_code"] == 0
        assert (found["run_result"]["stdout"], found["run_result"]["return_code"]) == ("42\n", 3)


def test_an_error_of_the_compiler_is_its_result(sandbox: Sandbox) -> None:
    found = sandbox.run("int main() { return x; }", "cpp")
    assert found["status"] == "Failed"
    assert found["run_result"] is None
    assert found["compile_result"]["return_code"] == 1
    assert "'x' was not declared" in found["compile_result"]["stderr"].replace("‘", "'").replace("’", "'")


def test_javascript_runs(sandbox: Sandbox) -> None:
    if "javascript" not in sandbox.health()["languages"]:
        pytest.skip("node is not installed: apt-get install nodejs")
    for name in ("javascript", "nodejs"):
        assert sandbox.printed("console.log([1, 2].map(x => x * 2))", name) == "[ 2, 4 ]\n"


def test_other_languages_are_refused_by_name(sandbox: Sandbox) -> None:
    answer = sandbox.post("/run_code", {"code": "", "language": "cobol"})
    assert answer.status_code == 400
    assert "'cobol'" in answer.json()["error"]
    assert "python" in answer.json()["fix"]


def test_files_go_in_and_out(sandbox: Sandbox) -> None:
    code = "data = open('a/in.bin', 'rb').read(); open('a/out.bin', 'wb').write(data[::-1]); print(len(data))"
    content = bytes(range(256)) * 100
    files: dict[str, Any] = {"a/in.bin": base64.b64encode(content).decode(), "none": None}
    found = sandbox.run(code, files=files, fetch_files=["a/out.bin", "missing", "none"])
    assert found["run_result"]["stdout"] == "25600\n"
    assert {name: base64.b64decode(data) for name, data in found["files"].items()} == {"a/out.bin": content[::-1]}


def test_modules_beside_the_program_can_be_imported(sandbox: Sandbox) -> None:
    files = {"helper.py": base64.b64encode(b"value = 5").decode()}
    assert sandbox.printed("from helper import value; print(value)", files=files) == "5\n"


def test_large_input_and_code_arrive_whole(sandbox: Sandbox) -> None:
    text = "x" * 3_000_000
    assert sandbox.printed("import sys; print(len(sys.stdin.read()))", stdin=text) == "3000000\n"
    assert sandbox.printed(f"s = '{text}'\nprint(len(s))") == "3000000\n"


def test_files_that_do_not_fit_are_the_requests_fault(sandbox: Sandbox) -> None:
    found = sandbox.run("print(1)", files={"big": base64.b64encode(bytes(9 * 2**20)).decode()})
    assert found["status"] == "Failed"
    assert "the file big could not be written: No space left on device" in found["run_result"]["stderr"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"run_timeout": 1000}, "run_timeout"),
        ({"compile_timeout": 1000}, "compile_timeout"),
        ({"memory_limit_MB": 10**6}, "memory_limit_MB"),
    ],
)
def test_more_than_is_granted_is_refused(sandbox: Sandbox, fields: dict[str, Any], field: str) -> None:
    answer = sandbox.post("/run_code", {"code": "", "language": "python", **fields})
    assert answer.status_code == 400
    assert field in answer.json()["error"]
    assert "--" in answer.json()["fix"]


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"language": "python"}, "code"),
        ({"code": 5}, "code"),
        ({"code": "", "run_timeout": 0}, "run_timeout"),
        ({"code": "", "run_timeout": "nan"}, "run_timeout"),
        ({"code": "", "files": {"x": "not base64"}}, "files"),
        ({"code": "", "stdin": 1}, "stdin"),
    ],
)
def test_wrong_requests_name_the_field(sandbox: Sandbox, body: dict[str, Any], place: str) -> None:
    answer = sandbox.post("/run_code", body)
    assert answer.status_code == 422
    assert place in answer.json()["error"]


def test_a_body_that_is_too_large_is_refused(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.sandbox.app.MOST_BODY", 1000)
    assert sandbox.post("/run_code", {"code": "x" * 2000}).status_code == 413


def test_smaller_memory_is_held(sandbox: Sandbox) -> None:
    code = "try: bytearray(80 * 2**20)\nexcept MemoryError: print('refused')"
    assert sandbox.printed(code, memory_limit_MB=64) == "refused\n"
    assert sandbox.printed(code) == ""


def test_web_pages_and_strangers_are_refused(sandbox: Sandbox, serving: Serving) -> None:
    page = sandbox.client.post(sandbox.url + "/run_code", json={"code": ""}, headers={"origin": "http://evil.example"})
    assert page.status_code == 403
    rebound = sandbox.client.post(sandbox.url + "/run_code", json={"code": ""}, headers={"host": "evil.example"})
    assert rebound.status_code == 403

    guarded = serving.start(token="token-of-the-test", warm=0)
    assert guarded.printed("print(1)") == "1\n"
    guarded.client.headers.pop("authorization")
    assert guarded.post("/run_code", {"code": ""}).status_code == 401
    assert guarded.client.get(guarded.url + "/health").status_code == 200


def test_metrics_count_programs_by_outcome(serving: Serving) -> None:
    server = serving.start(warm=0)
    server.run("print(1)")
    server.run("1/0", "py")
    server.post("/run_code", {"code": "", "language": "cobol"})
    text = server.client.get(server.url + "/metrics").text
    assert 'sandbox_programs_total{language="python",outcome="Success"} 1.0' in text
    assert 'sandbox_programs_total{language="python",outcome="Failed"} 1.0' in text
    assert 'sandbox_programs_total{language="other",outcome="refused"} 1.0' in text
    assert "sandbox_live 0.0" in text


def test_a_full_queue_asks_to_come_back(serving: Serving) -> None:
    server = serving.start(max_running=1, max_queue=0, warm=1)
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor() as threads:
        running = threads.submit(server.run, "import time; time.sleep(1)")
        server.wait_for("running", 1)
        answer = server.post("/run_code", {"code": "print(1)"})
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert "--max-queue" in answer.json()["fix"]
        assert running.result()["status"] == "Success"


def test_a_waiting_sandbox_may_have_imported_modules(serving: Serving) -> None:
    server = serving.start(preload=["numpy", "not_a_module"])
    assert server.printed("import sys; print('numpy' in sys.modules)") == "True\n"
    assert server.printed("import numpy; print(numpy.ones(3) @ numpy.ones(3))") == "3.0\n"
