"""Programs that try to get out: each is held, and the server is well after it."""

from __future__ import annotations

import concurrent.futures
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools.sandbox.support import Sandbox, Serving, descendants, outcome

pytestmark = pytest.mark.usefixtures("well_after")

SECRET = "the-server's-secret"


@pytest.fixture
def listener() -> Iterator[int]:
    """A port of this machine that counts who connects."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


CONNECTIONS = """
def tcp(host, port):
    with socket.create_connection((host, port), timeout=2): pass
def udp():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s: s.sendto(b'x', ('10.0.0.1', 53))
def own():
    with socket.create_server(('127.0.0.1', 0)) as s: tcp(*s.getsockname())
said([tried(tcp, '127.0.0.1', PORT), tried(tcp, '10.0.0.1', 80), tried(tcp, '::1', PORT), tried(udp), tried(own)])
"""


def test_no_connection_leaves_the_sandbox(sandbox: Sandbox, listener: int) -> None:
    found = outcome(sandbox, CONNECTIONS.replace("PORT", str(listener)))
    assert found == ["EAFNOSUPPORT"] * 5


def test_a_loopback_device_is_the_sandboxes_own(serving: Serving, listener: int) -> None:
    server = serving.start(loopback=True, warm=0)
    found = outcome(server, CONNECTIONS.replace("PORT", str(listener)))
    assert found == ["ECONNREFUSED", "ENETUNREACH", "ECONNREFUSED", "ENETUNREACH", "done"]
    assert server.printed("import os; print(os.listdir('/proc/sys/net/ipv4/conf'))").count("'") == 6  # all, default, lo


def test_no_name_is_resolved(sandbox: Sandbox) -> None:
    found = outcome(
        sandbox,
        """
try: said(socket.getaddrinfo('example.com', 80))
except socket.gaierror as exc: said('unresolved')
""",
    )
    assert found == "unresolved"


def test_sockets_of_other_kinds_are_refused(sandbox: Sandbox, serving: Serving) -> None:
    """Network namespaces do not separate vsock, and each further kind is kernel code within reach."""
    kinds = [(socket.AF_PACKET, 3), (socket.AF_NETLINK, 3), (40, 1), (38, 5), (31, 3), (socket.AF_INET, 3)]
    body = f"said([tried(socket.socket, *kind) for kind in {[(int(family), kind) for family, kind in kinds]}])"
    assert outcome(sandbox, body) == ["EAFNOSUPPORT"] * len(kinds)
    assert outcome(serving.start(loopback=True, warm=0), body) == ["EAFNOSUPPORT"] * 5 + ["ENOSYS"]


MACHINE_CODE = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex(CODE))
print('before', flush=True)
print('after', ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="machine code of x86-64")
def test_system_calls_of_other_kinds_are_refused(sandbox: Sandbox) -> None:
    """The numbers of 32-bit programs and of x32 mean other calls."""
    ways = {
        "b814000000cd80c3": "getpid by int 0x80",
        "b82700004048c7c7000000000f05c3": "getpid of x32",
    }
    for code, name in ways.items():
        found = sandbox.run(MACHINE_CODE.replace("CODE", repr(code)))["run_result"]
        assert found["stdout"].startswith("before\n"), name
        assert "after 2" not in found["stdout"], name
        assert found["return_code"] in (-31, 0), name
    plain = sandbox.run(MACHINE_CODE.replace("CODE", repr("b8270000000f05c3")))["run_result"]
    assert "after 2" in plain["stdout"], "the way to try it works"


def test_unix_sockets_of_the_host_cannot_be_reached(sandbox: Sandbox, tmp_path: Path) -> None:
    name = f"\0agentloop-test-{os.getpid()}"
    path = tmp_path / "host.sock"
    with socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_UNIX) as plain:
        abstract.bind(name)
        abstract.listen()
        plain.bind(str(path))
        plain.listen()
        found = outcome(
            sandbox,
            f"said([tried(socket.socket(socket.AF_UNIX).connect, p) for p in ({name!r}, {str(path)!r}, "
            "'/run/docker.sock', '/var/run/dbus/system_bus_socket')])",
        )
    assert found == ["ECONNREFUSED", "ENOENT", "ENOENT", "ENOENT"]


def test_nothing_else_can_be_written(sandbox: Sandbox) -> None:
    found = outcome(
        sandbox,
        """
def write(path): os.write(os.open(path, os.O_WRONLY | os.O_CREAT), b'x')
said({path: tried(write, path) for path in ('/x', '/usr/x', '/etc/x', '/etc/passwd', '/dev/x', '/opt/x',
      '/opt/sandbox/init.pyc', '/opt/packages/0/x.py', sys.prefix + '/x', '/home/x', '/bin/sh')})
""",
    )
    assert set(found.values()) <= {"EROFS", "EACCES", "EPERM", "EBUSY", "ETXTBSY"}, found


def test_files_of_the_host_cannot_be_read(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o644)
    home = Path.home()
    found = outcome(
        sandbox,
        f"""
def read(path): open(path).read()
said([tried(read, {str(secret)!r}), tried(read, '/etc/shadow'), tried(read, '/etc/machine-id'),
      tried(os.listdir, '/var'), tried(os.listdir, '/sys'), tried(read, '/dev/mem'), tried(read, '/dev/kmsg'),
      tried(read, '/proc/1/root' + {str(secret)!r}), tried(os.listdir, {str(home / ".ssh")!r}),
      tried(os.listdir, '/run')])
""",
    )
    assert set(found) <= {"ENOENT", "EACCES", "EPERM"}, found
    assert "x:0:0" not in sandbox.printed("cat /etc/passwd", "bash").replace("root:x:0:0:root", "")


def test_the_servers_environment_cannot_be_read(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTLOOP_TEST_SECRET", SECRET)
    server = serving.start()
    code = """
import os
text = repr(dict(os.environ))
for name in os.listdir('/proc'):
    for file in ('environ', 'cmdline', 'mountinfo', 'maps') if name.isdigit() else ():
        try: text += open(f'/proc/{name}/{file}', 'rb').read().decode(errors='replace')
        except OSError as exc: text += repr(exc)
print(text)
"""
    text = server.printed(code)
    assert "PATH=" in text
    assert SECRET not in text
    assert "AGENTLOOP" not in text
    assert "bwrap" not in text


def test_other_runs_cannot_be_seen(sandbox: Sandbox) -> None:
    wait = "open('/tmp/mine', 'w').write('x'); open('/dev/shm/mine', 'w'); import time; time.sleep(1.5)"
    with concurrent.futures.ThreadPoolExecutor() as threads:
        other = threads.submit(sandbox.run, wait)
        time.sleep(0.3)
        found = outcome(
            sandbox,
            "said([os.listdir('/tmp'), os.listdir('/dev/shm'), os.listdir(os.getcwd()), "
            "sorted(int(n) for n in os.listdir('/proc') if n.isdigit())])",
        )
        assert other.result()["status"] == "Success"
    assert found[:3] == [[], [], ["main.py"]]
    assert len(found[3]) == 2, "its first process and itself"


def test_nothing_of_a_run_reaches_the_next(sandbox: Sandbox) -> None:
    sandbox.run("open('/tmp/left', 'w').write('x'); open('/home/sandbox/left', 'w').write('x')")
    for _ in range(4):
        assert sandbox.printed("import os; print(os.listdir('/tmp'), os.listdir('.'))") == "[] ['main.py']\n"


def test_settings_of_the_kernel_cannot_be_changed(sandbox: Sandbox) -> None:
    found = outcome(
        sandbox,
        """
def write(path): os.write(os.open(path, os.O_WRONLY), b'1')
said({path: tried(write, path) for path in ('/proc/sys/kernel/core_pattern', '/proc/sys/vm/drop_caches',
      '/proc/sys/kernel/hostname', '/proc/sysrq-trigger', '/proc/sys/net/ipv4/ip_forward', '/proc/pressure/cpu',
      '/proc/self/uid_map', '/proc/sys/user/max_user_namespaces', '/proc/sys/kernel/ns_last_pid', '/proc/irq/0/x')})
""",
    )
    assert set(found.values()) <= {"EROFS", "EACCES", "EPERM", "ENOENT"}, found
    found = outcome(sandbox, "said([open('/proc/cmdline').read(), os.listdir('/dev/pts'), os.path.exists('/sys')])")
    assert found == ["", [], False]


DENIED = ("EPERM", "ENOSYS", "EINVAL", "EACCES")

RIGHTS = [
    "called('ptrace', 16, 1, 0, 0)",
    "called('mount', b'none', b'/tmp', b'tmpfs', 0, 0)",
    "called('umount2', b'/tmp', 2)",
    "called('unshare', 0x10000000)",
    "called('setns', 0, 0)",
    "called('chroot', b'/tmp')",
    "called('sethostname', b'x', 1)",
    "called('syscall', 321, 0, 0, 0)",  # bpf
    "called('syscall', 425, 0, 0)",  # io_uring_setup
    "called('syscall', 323, 0)",  # userfaultfd
    "called('syscall', 250, 0, 0)",  # keyctl
    "called('syscall', 298, 0, 0, 0, 0, 0)",  # perf_event_open
    "called('syscall', 310, 1, 0, 0, 0, 0, 0)",  # process_vm_readv
    "called('syscall', 304, 0, 0)",  # open_by_handle_at
    "called('syscall', 56, 0x10000000 | 17, 0, 0, 0, 0)",  # clone with a new user namespace
    "called('syscall', 435, 0, 0)",  # clone3
    "called('reboot', 0x1234567)",
    "called('iopl', 3)",
    "called('setuid', 0)",
    "called('setgroups', 1, (ctypes.c_int * 1)(0))",
    "tried(os.mknod, '/tmp/device', 0o20666, os.makedev(1, 1))",
    "tried(os.chown, '/tmp', 0, 0)",
    "tried(os.nice, -5)",
]


def test_rights_cannot_be_gained(sandbox: Sandbox) -> None:
    body = "".join(f"try: results.append({call})\nexcept OverflowError: results.append('?')\n" for call in RIGHTS)
    found = outcome(sandbox, f"results = []\n{body}said(results)")
    wrong = {call: result for call, result in zip(RIGHTS, found, strict=True) if result not in DENIED}
    assert not wrong


def test_a_program_has_no_capability_and_cannot_get_one(sandbox: Sandbox) -> None:
    status = sandbox.printed("print(open('/proc/self/status').read())")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(fields[name], 16) == 0, name
    assert fields["NoNewPrivs"].strip() == "1"
    assert fields["Seccomp"].strip() == "2"


def test_setuid_files_give_nothing(sandbox: Sandbox) -> None:
    code = "cp /usr/bin/id ./id; chmod 6755 ./id; ./id -u; su -c id </dev/null; sudo id </dev/null"
    found = sandbox.run(code, "bash")
    assert found["run_result"]["stdout"].splitlines()[0] == "1000"
    assert "uid=0" not in found["run_result"]["stdout"]


def test_the_server_cannot_be_killed(sandbox: Sandbox) -> None:
    found = outcome(
        sandbox,
        f"""
import signal
results = [tried(os.kill, {os.getpid()}, 9), tried(os.kill, 1, 9), tried(os.kill, 1, 19), tried(os.kill, 1, 2)]
said(results)
""",
    )
    assert found[0] == "ESRCH"
    assert found[1:] == ["done"] * 3, "its first process does not hear these"
    assert sandbox.health()["status"] == "ok"


@pytest.mark.parametrize(
    "code",
    [
        "os.kill(0, 9)",
        "os.fork()\ntry: os.kill(-1, 9)\nexcept ProcessLookupError: pass",
        "os.killpg(os.getpgid(0), 15)",
    ],
)
def test_signals_to_the_group_stay_inside(sandbox: Sandbox, code: str) -> None:
    found = sandbox.run(f"import os\n{code}")
    assert found["run_result"]["status"] == "Finished"
    assert found["run_result"]["return_code"] in (0, -9, -15)


def test_a_daemon_ends_with_its_program(sandbox: Sandbox) -> None:
    code = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3): os.close(fd)
        while True: time.sleep(60)
    os._exit(0)
print('parent ends')
"""
    started = time.monotonic()
    assert sandbox.printed(code) == "parent ends\n"
    assert sandbox.printed("nohup sleep 60 & disown; setsid sleep 61 &\necho ends", "bash") == "ends\n"
    assert time.monotonic() - started < 8


def test_names_that_lead_elsewhere_are_refused(sandbox: Sandbox) -> None:
    for name in ("../x", "/etc/x", "a/../../x", "", ".", "..", "a/..", "\0", "x" * 2000):
        for field, value in (("files", {name: "eA=="}), ("fetch_files", [name])):
            answer = sandbox.post("/run_code", {"code": "", "language": "python", field: value})
            assert answer.status_code == 422, name
            assert field in answer.json()["error"]


def test_links_are_not_followed(sandbox: Sandbox) -> None:
    code = """
import os
os.symlink('/etc/passwd', 'link'); os.symlink('/', 'root'); os.mkfifo('pipe'); os.mkdir('folder')
open('plain', 'w').write('x'); os.link('plain', 'hard')
os.symlink('plain', 'inner')
"""
    names = ["link", "root/etc/passwd", "pipe", "folder", "plain", "hard", "inner", "missing"]
    found = sandbox.run(code, fetch_files=names)
    assert found["status"] == "Success"
    # `root/etc/passwd` is the sandbox's own file, which the program could print as well.
    assert set(found["files"]) <= {"root/etc/passwd"}


def test_a_forged_answer_counts_as_the_programs_own(sandbox: Sandbox) -> None:
    """A program can talk to the socket of its first process. It gains nothing that it could not do itself."""
    code = """
import os
forged = b'{"event": "done", "return_code": 0, "files": [[5, "eA=="], [-1, "eA=="]]}'
for fd in range(3, 64):
    try: os.write(fd, len(forged).to_bytes(4, 'big') + forged)
    except OSError: pass
try:
    with open('/proc/1/mem', 'r+b', buffering=0) as memory:
        for line in open('/proc/1/maps'):
            start, end = (int(x, 16) for x in line.split()[0].split('-'))
            if 'w' in line.split()[1]:
                memory.seek(start); memory.write(bytes(end - start))
except OSError: pass
os._exit(3)
"""
    found = sandbox.run(code, fetch_files=["a"])
    assert found["status"] == "Failed"
    assert found["files"] == {}


def test_a_client_that_goes_away_leaves_nothing(sandbox: Sandbox) -> None:
    with socket.create_connection(("127.0.0.1", int(sandbox.url.rpartition(":")[2]))) as connection:
        body = json.dumps({"code": "import time; time.sleep(60)", "language": "python", "run_timeout": 1}).encode()
        head = f"POST /run_code HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        time.sleep(0.2)


SERVER = """
import asyncio, sys
from tools.sandbox.isolation.bubblewrap import Bubblewrap
from tools.sandbox.messages import RunCodeRequest
from tools.sandbox.runner import Runner
from tools.sandbox.settings import SandboxSettings

async def main():
    settings = SandboxSettings(warm=1)
    runner = Runner(settings, Bubblewrap(settings))
    runner.pool.fill()
    await runner.pool.filled()
    print("ready", flush=True)
    code = "import time, os\\nif os.fork() == 0: os.setsid()\\nwhile True: time.sleep(1)"
    await runner.run(RunCodeRequest(code=code, language="python", run_timeout=60))

asyncio.run(main())
"""


def test_sandboxes_die_with_their_server(sandbox: Sandbox, tmp_path: Path) -> None:
    """The kernel ends them when the server is killed: those that wait, and those that run."""
    others = set(descendants())
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # a killed server leaves its folder
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, env=environment) as server:
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 20
        while len(mine := set(descendants()) - others) < 6 and time.monotonic() < deadline:
            time.sleep(0.05)
        server.kill()
    assert len(mine) >= 6, "the server, two of bubblewrap, a waiting process, and three of the program"
    folders = [Path(f"/proc/{pid}") for pid in mine]
    while any(folder.exists() for folder in folders) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [folder for folder in folders if folder.exists()]
