"""How a sandbox is started: the command line of bubblewrap, and the user that programs run as.

`Bubblewrap` makes what every sandbox shares once, in a folder of its own: the filter of system
calls, the compiled first process, and the few files of /etc. What a program then sees:

    /usr, /bin, /lib...           the system's, read-only
    the interpreter's folder      where it is on this machine, read-only
    /opt/packages                 its site-packages, read-only
    /home/sandbox, /tmp, /dev/shm its own, in memory, of limited size
    /proc, /dev                   of its own namespace; /sys is missing

If the server runs as root, its sandboxes must not: root is not counted against the limit of
processes, and owns /proc/sys. Each then has a user namespace in which root is the server's, for
bubblewrap to find the files, and 1000 is a user that nobody else has; `setpriv` changes to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agentloop.errors import ConfigError
from tools.sandbox.isolation.seccomp import write_filter
from tools.sandbox.settings import MB, NO_SANDBOX_OPTION, SandboxSettings

HOME = "/home/sandbox"
USER = 1000
INIT = Path(__file__).parents[1] / "inside" / "init.py"

FIRST_USER = 2_000_000_000
"""Users of sandboxes under root, if the server's namespace has so many."""

FOLDERS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
ETC = ("alternatives", "fonts", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "mime.types")
OWN_ETC = {
    "passwd": f"root:x:0:0:root:/root:/usr/sbin/nologin\nsandbox:x:{USER}:{USER}::{HOME}:/bin/bash\n",
    "group": f"root:x:0:\nsandbox:x:{USER}:\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost sandbox\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}

MASKED = ("cmdline", "kallsyms", "modules", "config.gz", "timer_list", "sched_debug", "keys", "key-users")
"""Files of /proc that tell of the host; they are empty inside."""

EMPTIED = ("/proc/acpi", "/proc/driver", "/proc/pressure", "/proc/scsi", "/dev/pts")
"""Folders that are empty inside. Terminals are counted for the whole machine."""

ABOUT_PYTHON = """
import json, sys
paths = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
print(json.dumps([sys.base_prefix, f"python{sys.version_info[0]}.{sys.version_info[1]}", paths]))
"""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """The Python that programs run in.

    Attributes:
        prefix: its installation.
        version: `python3.11`.
        packages: folders of site-packages, on this machine.
    """

    prefix: Path
    version: str
    packages: tuple[Path, ...]

    @property
    def in_system(self) -> bool:
        """Whether /usr, which every sandbox has, holds it."""
        return self.prefix == Path("/usr") or Path("/usr") in self.prefix.parents

    @property
    def program(self) -> str:
        return str(self.prefix / "bin" / self.version)


def find_interpreter(python: Path) -> Interpreter:
    """Ask an interpreter where its parts are.

    Raises:
        ConfigError: it cannot be started.
    """
    try:
        found = subprocess.run(
            [str(python), "-c", ABOUT_PYTHON], capture_output=True, text=True, check=True, timeout=60,
            env={"PATH": os.environ.get("PATH", os.defpath)},
        ).stdout  # fmt: skip
        prefix, version, packages = json.loads(found)
    except (OSError, subprocess.SubprocessError, ValueError) as exc:
        raise ConfigError(
            f"the interpreter {python} cannot be used: {exc}", "give another --python, an executable of Python 3.8+"
        ) from exc
    return Interpreter(Path(prefix), version, tuple(Path(path) for path in packages if Path(path).is_dir()))


class Bubblewrap:
    """Command lines that start sandboxes. `close` removes its folder.

    Args:
        sandboxed: False: the same processes without any isolation.

    Raises:
        ConfigError: bubblewrap, the interpreter or the filter is missing; says what to install.
    """

    def __init__(self, settings: SandboxSettings, *, sandboxed: bool = True) -> None:
        self.settings = settings
        self.sandboxed = sandboxed
        self.interpreter = find_interpreter(settings.python)
        self._bwrap = shutil.which("bwrap")
        if sandboxed and (sys.platform != "linux" or self._bwrap is None):
            raise ConfigError(
                "bubblewrap, which isolates the programs, is not installed",
                "apt-get install bubblewrap (or dnf, pacman, apk); a server without isolation starts with "
                + NO_SANDBOX_OPTION,
            )
        self._root = sandboxed and os.geteuid() == 0
        self._first_user = _first_free_user() if self._root else 0
        self._folder = Path(tempfile.mkdtemp(prefix="agentloop-sandbox-"))
        self._namespaces: dict[int, int] = {}
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        self.init = self._folder / "init.pyc"
        compiling = "import py_compile, sys; py_compile.compile(sys.argv[1], sys.argv[2], 'init.py', doraise=True)"
        subprocess.run(
            [self.interpreter.program, "-I", "-S", "-c", compiling, str(INIT), str(self.init)],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        self.init.chmod(0o644)
        if self.sandboxed:
            self._filter = self._folder / "seccomp.bpf"
            write_filter(self._filter, loopback=self.settings.loopback)
            for name, text in OWN_ETC.items():
                path = self._folder / name
                path.write_text(text)
                path.chmod(0o644)
            self._options = self._mounts() + self._environment()

    def _restore(self) -> None:
        """Write files again that a cleaner of old temporary files has removed.

        Raises:
            OSError: they cannot be written, or somebody else has a folder of this name.
        """
        names = ["init.pyc", *(["seccomp.bpf", "nothing", "empty", *OWN_ETC] if self.sandboxed else [])]
        if all([(self._folder / name).exists() for name in names]):
            return
        try:
            self._folder.mkdir(0o700)
        except FileExistsError:
            found = self._folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
                raise
        try:
            self._prepare()
        except subprocess.SubprocessError as exc:
            raise OSError(f"{self.init} cannot be written: {exc}") from exc

    def close(self) -> None:
        for namespace in self._namespaces.values():
            os.close(namespace)
        self._namespaces.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def packages(self) -> tuple[str, ...]:
        """The folders of site-packages, as a program sees them."""
        if not self.sandboxed:
            return tuple(map(str, self.interpreter.packages))
        return tuple(f"/opt/packages/{number}" for number in range(len(self.interpreter.packages)))

    @contextmanager
    def command(self, slot: int, info: int) -> Iterator[tuple[list[str], list[int]]]:
        """Yield the command of one sandbox, and the file descriptors that it inherits.

        Args:
            slot: number of the sandbox among those that live now.
            info: descriptor of a pipe to which bubblewrap writes the number of its child.

        Raises:
            OSError: what it needs cannot be opened.
        """
        self._restore()
        settings = self.settings
        python = [self.interpreter.program, "-I", "-S", "-X", "utf8"]
        with contextlib.ExitStack() as stack:
            if not self.sandboxed:
                yield [*python, str(self.init), ":".join(self.packages), *settings.preload], []
                return

            rules = os.open(self._filter, os.O_RDONLY)
            stack.callback(os.close, rules)
            users: list[str]
            if self._root:
                namespace = self._namespace(slot)
                users = [
                    "--userns", str(namespace), "--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add",
                    "CAP_SETGID",
                ]  # fmt: skip
                inherited = [rules, namespace, info]
                python = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--inh-caps=-all", *python]
            else:
                users = ["--unshare-user", "--uid", str(USER), "--gid", str(USER)]
                inherited = [rules, info]

            arguments = [*users, *self._options, "--seccomp", str(rules), "--info-fd", str(info)]
            # In a pipe: the command line is visible to every user of the host.
            read, write = os.pipe()
            stack.callback(os.close, read)
            with os.fdopen(write, "wb") as file:
                file.write(b"".join(argument.encode() + b"\0" for argument in arguments))
            command = [str(self._bwrap), "--args", str(read), "--", *python, "/opt/sandbox/init.pyc"]
            yield [*command, ":".join(self.packages), *settings.preload], [*inherited, read]

    def _namespace(self, slot: int) -> int:
        """Return the user namespace of a slot: a file descriptor."""
        if slot not in self._namespaces:
            user = self._first_user + slot
            # `cat` answers when it is in the new namespace, and ends when its input ends.
            with subprocess.Popen(
                ["unshare", "--user", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            ) as holder:
                assert holder.stdin is not None and holder.stdout is not None and holder.stderr is not None
                with contextlib.suppress(BrokenPipeError):
                    holder.stdin.write(b"\n")
                    holder.stdin.flush()
                if not holder.stdout.read(1):
                    raise OSError(holder.stderr.read().decode(errors="replace").strip())
                for kind in ("uid_map", "gid_map"):
                    Path(f"/proc/{holder.pid}/{kind}").write_text(f"0 0 1\n{USER} {user} 1\n")
                self._namespaces[slot] = os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY)
                holder.stdin.close()
        return self._namespaces[slot]

    def _mounts(self) -> list[str]:
        options = [
            "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try", "--as-pid-1",
            "--die-with-parent", "--new-session", "--hostname", "sandbox", "--ro-bind", "/usr", "/usr",
        ]  # fmt: skip
        options += _open_folders("/etc", "/home", "/opt", "/opt/packages", "/opt/sandbox")
        for name in FOLDERS:
            path = Path("/", name)
            if path.is_symlink():
                options += ["--symlink", str(path.readlink()), f"/{name}"]
            elif path.is_dir():
                options += ["--ro-bind", f"/{name}", f"/{name}"]
        options += [word for name in ETC for word in ("--ro-bind-try", f"/etc/{name}", f"/etc/{name}")]
        options += [word for name in OWN_ETC for word in ("--ro-bind", str(self._folder / name), f"/etc/{name}")]

        for source, target in zip(self.interpreter.packages, self.packages, strict=True):
            options += ["--ro-bind", str(source), target]
        options += ["--ro-bind", str(self.init), "/opt/sandbox/init.pyc", "--proc", "/proc", "--dev", "/dev"]
        empty_file = self._folder / "nothing"
        empty_file.touch(0o644)
        for name in MASKED:
            if Path("/proc", name).exists():
                options += ["--ro-bind", str(empty_file), f"/proc/{name}"]

        empty = self._folder / "empty"
        empty.mkdir(exist_ok=True)
        options += [word for name in EMPTIED if Path(name).is_dir() for word in ("--ro-bind", str(empty), name)]

        size = str(self.settings.disk_mb * MB)
        for place, mode in ((HOME, "0777"), ("/tmp", "1777"), ("/dev/shm", "1777")):  # noqa: S108  # its own
            options += ["--perms", mode, "--size", size, "--tmpfs", place]
        if not self.interpreter.in_system:
            # At its own place, which its libraries may have been built for; after /tmp and /home,
            # where it may lie.
            prefix = self.interpreter.prefix
            options += _open_folders(*reversed([str(parent) for parent in prefix.parents if parent != Path("/")]))
            options += ["--ro-bind", str(prefix), str(prefix)]
        # The rest lies in file systems in memory without a limit.
        return [*options, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", HOME]

    def environment(self, home: str) -> dict[str, str]:
        """Return a program's whole environment; nothing of the server's is in it."""
        return program_environment(self.interpreter.program, self.packages, home)

    def _environment(self) -> list[str]:
        return [
            "--clearenv", *(word for name, value in self.environment(HOME).items()
                            for word in ("--setenv", name, value)),
        ]  # fmt: skip


def program_environment(python: str, packages: tuple[str, ...], home: str) -> dict[str, str]:
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {
        "PATH": ":".join(dict.fromkeys([str(Path(python).parent), "/usr/local/bin", "/usr/bin", "/bin"])),
        "HOME": home,
        "USER": "sandbox",
        "LANG": "C.UTF-8",
        "MPLBACKEND": "Agg",
        "MPLCONFIGDIR": home,
        "PYTHONPATH": ":".join(packages),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": "/tmp",  # noqa: S108  # the sandbox's own
        **one_thread,
    }


def _open_folders(*paths: str) -> list[str]:
    """Return options that make folders which everybody may enter; bubblewrap's own are closed."""
    return [word for path in paths for word in ("--perms", "0755", "--dir", path)]


def _first_free_user() -> int:
    """Return the first of 2,000 users of the host, within the namespace that this process is in."""
    first = 0
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        inside, _, count = map(int, line.split())
        first = max(first, inside + count - 2_000)
    return min(first, FIRST_USER)
