"""Programs that take more than is theirs: each is stopped, and the server is well after it."""

from __future__ import annotations

import concurrent.futures
import time

import pytest

from tests.tools.sandbox.support import Sandbox, outcome

pytestmark = pytest.mark.usefixtures("well_after")


def test_a_fork_bomb_is_held(sandbox: Sandbox) -> None:
    started = time.monotonic()
    found = sandbox.run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", run_timeout=1.5)
    assert found["run_result"]["status"] == "TimeLimitExceeded"
    assert time.monotonic() - started < 15
    found = sandbox.run(":(){ :|:& };:\nsleep 5", "bash", run_timeout=1.5)
    assert found["status"] in ("Failed", "Success")


def test_a_thread_bomb_is_held(sandbox: Sandbox) -> None:
    found = outcome(
        sandbox,
        """
import threading, time
started = 0
try:
    while started < 1000:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); started += 1
except RuntimeError: pass
said(started)
os._exit(0)
""",
    )
    assert 4 < found < 24


def test_a_memory_bomb_is_held(sandbox: Sandbox) -> None:
    found = outcome(sandbox, "try: bytearray(10**9)\nexcept MemoryError: said('refused')")
    assert found == "refused"


@pytest.mark.parametrize(
    "take",
    [
        "b = bytearray(60 * 2**20)\nfor i in range(0, len(b), 4096): b[i] = 1",
        "import mmap\nb = mmap.mmap(-1, 60 * 2**20)\nfor i in range(0, len(b), 4096): b[i] = 1",
    ],
    ids=["private", "shared"],
)
def test_processes_cannot_take_the_memory_of_many_together(sandbox: Sandbox, take: str) -> None:
    found = sandbox.run(
        "import os, time\nfor _ in range(10):\n    if os.fork() == 0:\n        "
        + take.replace("\n", "\n        ")
        + "\n        time.sleep(30)\ntime.sleep(30)",
        run_timeout=15,
    )
    assert found["run_result"]["return_code"] == -9
    assert "more memory than its limit" in found["run_result"]["stderr"]


def test_pages_that_processes_share_count_once(sandbox: Sandbox) -> None:
    code = """
import os, time
b = bytearray(60 * 2**20)
for i in range(0, len(b), 4096): b[i] = 1
children = []
for _ in range(8):
    pid = os.fork()
    if pid == 0:
        time.sleep(0.5); os._exit(0)
    children.append(pid)
for pid in children: os.waitpid(pid, 0)
print('fine')
"""
    assert sandbox.printed(code) == "fine\n"


def test_memory_that_belongs_to_no_process_is_refused(sandbox: Sandbox) -> None:
    found = outcome(
        sandbox,
        "said([called('memfd_create', b'x', 0), called('shmget', 0, 1 << 20, 0o1600), called('memfd_secret', 0) "
        "if hasattr(libc, 'memfd_secret') else 'ENOSYS'])",
    )
    assert found == ["ENOSYS"] * 3


@pytest.mark.parametrize("folder", ["/home/sandbox", "/tmp", "/dev/shm"])
def test_the_disk_cannot_be_filled(sandbox: Sandbox, folder: str) -> None:
    found = outcome(
        sandbox,
        f"""
written, number, why = 0, 0, ''
while not why and written < 64 * 2**20:
    number += 1
    try:
        with open(f'{folder}/f{{number}}', 'wb') as file:
            for _ in range(4): written += file.write(bytes(2**20))
    except OSError as exc: why = errno.errorcode[exc.errno]
said([written, why])
""",
    )
    assert found[0] <= 8 * 2**20
    assert found[1] in ("ENOSPC", "EFBIG")


def test_inodes_cannot_be_filled(sandbox: Sandbox) -> None:
    found = sandbox.run("n = 0\nwhile True:\n    open(f'/tmp/{n}', 'w').close(); n += 1", run_timeout=15)
    assert found["run_result"]["return_code"] == -9
    assert "more than 2000 files" in found["run_result"]["stderr"]


@pytest.mark.parametrize(
    "code",
    [
        "while True: print('x' * 100)",
        "import os\nwhile True: os.write(1, b'x' * 65536)",
        "import os\nwhile True: os.write(2, b'\\n' * 65536)",
    ],
    ids=["lines", "without line ends", "stderr"],
)
def test_endless_output_stops_the_program(sandbox: Sandbox, code: str) -> None:
    found = sandbox.run(code)
    result = found["run_result"]
    assert result["return_code"] == -9
    assert "more output than 0.25 MB" in result["stderr"]
    assert max(len(result["stdout"]), len(result["stderr"])) < 0.26 * 2**20 + 100


def test_output_that_is_not_text_is_replaced(sandbox: Sandbox) -> None:
    text = sandbox.printed(r"import os; os.write(1, b'a\xff\xfe\x00b\xc3')")
    assert text == "a��\x00b�"


def test_sleeping_past_the_deadline_is_killed(sandbox: Sandbox) -> None:
    code = """
import signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
print('before', flush=True)
time.sleep(100)
"""
    started = time.monotonic()
    found = sandbox.run(code, run_timeout=1)
    assert time.monotonic() - started < 5
    assert found["run_result"]["status"] == "TimeLimitExceeded"
    assert found["run_result"]["stdout"] == "before\n"
    assert found["status"] == "Failed"


def test_busy_programs_are_killed(sandbox: Sandbox) -> None:
    found = sandbox.run("while True: pass", run_timeout=1)
    assert found["run_result"]["status"] == "TimeLimitExceeded"


def test_a_pool_of_hanging_programs_serves_the_next(sandbox: Sandbox) -> None:
    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        hanging = [threads.submit(sandbox.run, "import time; time.sleep(60)", run_timeout=1) for _ in range(8)]
        time.sleep(0.2)
        assert threads.submit(sandbox.printed, "print('served')").result() == "served\n"
        assert {each.result()["run_result"]["status"] for each in hanging} == {"TimeLimitExceeded"}


def test_a_large_file_is_not_fetched(sandbox: Sandbox) -> None:
    found = sandbox.run("open('a', 'wb').write(bytes(4 * 2**20)); open('b', 'w').write('x')", fetch_files=["a", "b"])
    assert sorted(found["files"]) == ["a", "b"]
    found = sandbox.run("import os; os.truncate(os.open('s', 66), 8 * 2**20)", fetch_files=["s"] * 3)
    assert found["status"] == "Success"


def test_compilers_are_held_too(sandbox: Sandbox) -> None:
    deep = "template<int n> struct A { A<n+1> a; }; A<0> x; int main() {}"
    found = sandbox.run(deep, "cpp", compile_timeout=5)
    assert found["status"] == "Failed"
    assert found["run_result"] is None
    found = sandbox.run('#include "/dev/zero"\nint main() {}', "cpp", compile_timeout=3)
    assert found["status"] == "Failed"
