"""The first process of a sandbox: it waits for one job, runs it, and reports how it ended.

File descriptor 0 is a socket to the server; 1 and 2 are pipes that the server reads. As process 1
of its PID namespace, it cannot be killed from inside, and everything ends with it.

    server -> here    length (4 bytes) + a marshalled dict
    here -> server    length (4 bytes) + JSON: {"event": ...}

    ready, started      imports are done, a job may come; it has come
    compiled            the compiler has ended: return_code
    done, ended         the program, the kernel of a session has ended: return_code, files

The job `session` starts a kernel: a process that runs cells in one namespace. Between two cells all
processes of the sandbox are stopped.

Only modules that cost nothing are imported: every sandbox pays for them.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the module `signal` imports enum
import binascii
import fcntl
import marshal
import os
import resource
import select
import sys

TYPE_CHECKING = False  # without importing typing
if TYPE_CHECKING:
    from typing import Any

KILL, STOP, CONTINUE, INTERRUPT, HEARD = 9, 19, 18, 2, 29

LIMITS = {  # by their names in a job
    "cpu_s": resource.RLIMIT_CPU,
    "data": resource.RLIMIT_DATA,
    "address_space": resource.RLIMIT_AS,
    "processes": resource.RLIMIT_NPROC,
    "file_size": resource.RLIMIT_FSIZE,
    "open_files": resource.RLIMIT_NOFILE,
}

FIXED_LIMITS = {
    resource.RLIMIT_CORE: 1,  # 0 would still start a handler of the host, if core_pattern is a pipe
    resource.RLIMIT_MEMLOCK: 65536,
    resource.RLIMIT_MSGQUEUE: 0,
    resource.RLIMIT_SIGPENDING: 256,
    resource.RLIMIT_RTPRIO: 0,
    resource.RLIMIT_STACK: 8 * 2**20,
}

STDIN = ".stdin"
NICE = 10
"""Programs give way to the server, which has to stop them in time."""


def main() -> None:
    _set_dumpable(0)  # a program of the same user could write into this process by /proc/1/mem
    _signal.signal(INTERRUPT, _signal.SIG_IGN)  # the only one that Python handles by itself
    control = _moved_control()
    sys.path.extend(filter(None, sys.argv[1].split(":")))
    for name in sys.argv[2:]:
        try:
            __import__(name)
        except Exception:  # noqa: S110  # the server's own check at its start names it
            pass
    _send(control, '"event": "ready"')
    job = _receive(control)
    if job is None:
        return
    _send(control, '"event": "started"')
    os.chdir(job["folder"])
    if job["op"] == "session":
        _session(control, job)
    else:
        _run(control, job)


def _moved_control() -> int:
    """Move the socket away from file descriptor 0, which will be the program's input.

    When the server dies, however that happens, the socket says so, and the sandbox ends: the signal
    of a parent's death does not come across a change of users.
    """
    control = os.dup(0)
    os.set_inheritable(control, False)

    def heard(*_: object) -> None:
        watch = select.poll()  # another each time: this function may interrupt itself
        watch.register(control, 0)
        if watch.poll(0):  # nothing but the other end's being closed
            os._exit(1)

    _signal.signal(HEARD, heard)
    fcntl.fcntl(control, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(control, fcntl.F_SETFL, fcntl.fcntl(control, fcntl.F_GETFL) | os.O_ASYNC)
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return control


def _run(control: int, job: dict[str, Any]) -> None:
    if job["stdin"]:
        job["files"].append((STDIN, job["stdin"]))
    if not _write_files(control, job):
        return

    if job["compile"]:
        compiler = _start(control, job | {"stdin": b""}, job["compile"], job["compile_limits"])
        code = _wait(compiler, job["sandboxed"])
        _send(control, f'"event": "compiled", "return_code": {code}')
        if code != 0:
            return
        if _receive(control) is None:
            return

    child = _start(control, job, job["command"], job["limits"])
    code = _wait(child, job["sandboxed"])
    _report(control, "done", code, job["fetch"])


def _start(control: int, job: dict[str, Any], command: list[str], limits: dict[str, int | None]) -> int:
    """Start the program or its compiler; return the process's number."""
    child = os.fork()
    if child:
        return child

    try:
        os.close(control)
        _become_program(limits, STDIN if job["stdin"] else "/dev/null", job["sandboxed"])
        if job["stdin"]:
            os.unlink(STDIN)
        if command:
            try:
                os.execvpe(command[0], command, os.environ)  # noqa: S606
            except OSError as exc:
                os.write(2, f"{command[0]}: {exc.strerror}\n".encode())
                os._exit(126)
    except BaseException as exc:
        os.write(2, f"the sandbox could not start the program: {exc!r}\n".encode())
        os._exit(125)
    _run_python(job["path"])
    raise AssertionError("unreachable")


def _become_program(limits: dict[str, int | None], stdin: str, sandboxed: bool) -> None:
    _signal.signal(INTERRUPT, _signal.default_int_handler)
    _signal.signal(HEARD, _signal.SIG_DFL)
    _set_dumpable(1)
    os.setsid()
    source = os.open(stdin, os.O_RDONLY)
    os.dup2(source, 0)
    os.close(source)
    if sandboxed:
        try:
            os.nice(NICE)
            _write("/proc/self/oom_score_adj", b"1000")
        except OSError:
            pass
    for which, value in FIXED_LIMITS.items():
        _limit(which, value)
    for name, given in limits.items():
        if given is not None:
            _limit(LIMITS[name], given)


def _set_dumpable(value: int) -> None:
    """Say whether processes of the same user may look into this one; a fork inherits it."""
    try:
        import _ctypes  # `ctypes` takes ten times as long
    except ImportError:
        return
    prctl = _ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl")  # type: ignore[arg-type]
    _ctypes.call_function(prctl, (4, value, 0, 0, 0))  # PR_SET_DUMPABLE


def _limit(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def _run_python(path: str) -> None:
    """Run a Python file in this process as `python FILE` would, and exit."""
    namespace = _main_module(path)
    try:
        with open(path, "rb") as file:
            source = file.read()
        exec(compile(source, path, "exec", dont_inherit=True), namespace)
    except SystemExit:
        raise
    except BaseException as exc:
        _show(exc)
        raise SystemExit(130 if isinstance(exc, KeyboardInterrupt) else 1) from None
    raise SystemExit(0)


def _main_module(path: str) -> dict[str, Any]:
    """Make a fresh `__main__`, and the built-in names that the module `site` would add."""
    import site

    site.setquit()
    site.sethelper()
    main = type(sys)("__main__")
    main.__file__ = path
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    sys.argv = [path]
    sys.path.insert(0, os.path.dirname(path))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # what was printed survives a kill
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    return main.__dict__


def _show(exc: BaseException) -> None:
    """Print a traceback without the frames of this file."""
    trace = exc.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == _show.__code__.co_filename:
        trace = trace.tb_next
    sys.excepthook(type(exc), exc.with_traceback(trace), trace)


def _wait(child: int, sandboxed: bool) -> int:
    """Wait for the program, then end whatever it has left; return its code, negative: a signal."""
    pid, status = 0, 0
    while pid != child:
        pid, status = os.wait()
    _kill_all(child, sandboxed)
    return os.waitstatus_to_exitcode(status)


def _kill_all(child: int, sandboxed: bool) -> None:
    while True:
        try:
            # Without a PID namespace, -1 would be everything of this user.
            os.kill(-1 if sandboxed else -child, KILL)
        except ProcessLookupError:
            pass
        try:
            if os.waitpid(-1, 0 if sandboxed else os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def _session(control: int, job: dict[str, Any]) -> None:
    cells_out, cells_in = os.pipe()
    done_out, done_in = os.pipe()
    kernel = os.fork()
    if kernel == 0:
        os.close(control)
        os.close(cells_in)
        os.close(done_out)
        _become_program(job["limits"], "/dev/null", job["sandboxed"])
        _kernel(cells_out, done_in)
        raise SystemExit(0)
    os.close(cells_out)
    os.close(done_in)
    cell: dict[str, Any] = {"fetch": ()}
    running, number = False, 0
    while True:
        ready = select.select([control, done_out], [], [], 1.0)[0]
        if not ready:
            _reap(kernel)
            continue
        if done_out in ready:
            said = os.read(done_out, 1 << 16)
            # One report a cell, with its number. After any other, a program has written here, and
            # later cells would be taken for done while they run; after none, the kernel has ended.
            if not running or said[:-1] != number.to_bytes(4, "big"):
                if said:
                    os.kill(kernel, KILL)
                _report(control, "ended", _wait(kernel, job["sandboxed"]), cell["fetch"])
                return
            # Stopped until the next cell: threads and children of this one do not go on.
            if job["sandboxed"]:
                _signal_all(STOP)
            running = False
            _report(control, "done", said[-1], cell["fetch"])
        if control in ready:
            received = _receive(control)
            if received is None:
                return
            if received["op"] == "interrupt":
                if running:
                    os.kill(kernel, INTERRUPT)
                continue
            cell = received
            if not _write_files(control, cell):
                continue
            if job["sandboxed"]:
                _signal_all(CONTINUE)
            running, number, code = True, number + 1, cell["code"]
            try:
                _write_all(cells_in, len(code).to_bytes(4, "big") + code)
            except BrokenPipeError:
                pass


def _kernel(cells: int, done: int) -> None:
    """Run cells in one namespace until the pipe ends; report number and failure of each."""
    namespace = _main_module(os.path.join(os.getcwd(), "main.py"))
    import linecache
    import traceback

    # The built-in one shows no lines of sources that are not files.
    sys.excepthook = traceback.print_exception
    number = 0
    while True:
        try:
            head = _read_exactly(cells, 4)
            if head is None:
                return
            source = (_read_exactly(cells, int.from_bytes(head, "big")) or b"").decode("utf-8", "replace")
            number, name = number + 1, f"<cell {number + 1}>"
            # Python marks one column too far in a line without an end.
            linecache.cache[name] = (len(source), None, f"{source}\n".splitlines(True), name)
            failed = 0
            try:
                exec(compile(source, name, "exec", dont_inherit=True), namespace)
            except SystemExit as exc:
                failed = 0 if exc.code in (None, 0) else 1
            except BaseException as exc:
                failed = 1
                _show(exc)
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except (OSError, ValueError, AttributeError):
                    pass
            os.write(done, number.to_bytes(4, "big") + bytes([failed]))
        except KeyboardInterrupt:  # an interrupt that came as the cell ended
            pass


def _reap(kernel: int) -> None:
    """Bury orphans; the kernel's own end is seen by its pipe."""
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in (kernel, os.getpid()):
            try:
                os.waitpid(int(name), os.WNOHANG)
            except OSError:
                pass


def _signal_all(number: int) -> None:
    try:
        os.kill(-1, number)
    except ProcessLookupError:
        pass


def _write_files(control: int, job: dict[str, Any]) -> bool:
    """Write the files of a job; False: one could not be written, which is reported."""
    for name, content in job["files"]:
        try:
            folder = os.path.dirname(name)
            if folder:
                os.makedirs(folder, exist_ok=True)
            _write(name, content)
        except OSError as exc:
            fault = _quoted(f"the file {name} could not be written: {exc.strerror}")
            _send(control, f'"event": "done", "return_code": null, "fault": {fault}')
            return False
    return True


def _write(path: str, content: bytes) -> None:
    # Never through a link: a program of a session may have left one.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        _write_all(fd, content)
    finally:
        os.close(fd)


def _report(control: int, event: str, code: int, fetch: list[str]) -> None:
    parts, left = [], 16 * 2**20
    for number, name in enumerate(fetch):
        content = _read_file(name, left)
        if content is not None:
            left -= len(content)
            parts.append(f'[{number}, "{binascii.b2a_base64(content, newline=False).decode()}"]')
    _send(control, f'"event": "{event}", "return_code": {code}, "files": [{", ".join(parts)}]')


def _read_file(name: str, most: int) -> bytes | None:
    """Return a plain file's content; None: it is not one, or too large."""
    try:
        # Not through a link, and without waiting for the other end of a pipe.
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        if found.st_mode & 0o170000 != 0o100000 or found.st_nlink != 1 or found.st_size > most:
            return None
        content = b""
        while len(content) <= most and (part := os.read(fd, 1 << 20)):
            content += part
        return content if len(content) <= most else None
    except OSError:
        return None
    finally:
        os.close(fd)


def _receive(control: int) -> dict[str, Any] | None:
    head = _read_exactly(control, 4)
    body = None if head is None else _read_exactly(control, int.from_bytes(head, "big"))
    return None if body is None else marshal.loads(body)  # the server's own


def _read_exactly(fd: int, count: int) -> bytes | None:
    parts = []
    while count:
        part = os.read(fd, min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _send(control: int, fields: str) -> None:
    body = ("{" + fields + "}").encode()
    try:
        _write_all(control, len(body).to_bytes(4, "big") + body)
    except (BrokenPipeError, ConnectionResetError):
        pass


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _quoted(text: str) -> str:
    """Return JSON of a text."""
    plain = text.encode("ascii", "backslashreplace").decode()
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else "?" for c in plain) + '"'


if __name__ == "__main__":
    main()
