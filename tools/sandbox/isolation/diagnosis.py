"""What to change on a machine where bubblewrap cannot make a sandbox."""

from __future__ import annotations

import os
from pathlib import Path

from tools.sandbox.settings import NO_SANDBOX_OPTION

SYSCTLS = {
    "kernel/unprivileged_userns_clone": (
        "0", "user namespaces are off for ordinary users: sysctl -w kernel.unprivileged_userns_clone=1"),
    "user/max_user_namespaces": ("0", "user namespaces are off: sysctl -w user.max_user_namespaces=15000"),
    "kernel/apparmor_restrict_unprivileged_userns": (
        "1", "AppArmor restricts user namespaces (Ubuntu 24.04): allow bwrap in a profile (apt-get install "
        "apparmor-profiles, then aa-enforce bwrap-userns-restrict), or sysctl -w "
        "kernel.apparmor_restrict_unprivileged_userns=0"),
}  # fmt: skip

IN_CONTAINER = (
    "in a container, start it with --security-opt seccomp=unconfined --security-opt systempaths=unconfined "
    "(Docker, Podman), or set a seccomp profile that allows unshare, clone and mount, and procMount: Unmasked "
    "(Kubernetes, with hostUsers: false)"
)


def what_to_change(said: str, proc: Path = Path("/proc/sys")) -> str:
    """Return the fix for what bubblewrap said.

    Args:
        proc: folder of the system's settings; another one in tests.
    """
    for name, (value, fix) in SYSCTLS.items():
        path = proc / name
        if path.is_file() and path.read_text().strip() == value and (os.geteuid() != 0 or "max" in name):
            return fix
    if "no permissions to creat" in said.lower() or "operation not permitted" in said.lower():
        return IN_CONTAINER
    if "permission denied" in said.lower():
        return (
            "let the user of this server read the interpreter and its site-packages (a home folder is often closed): "
            "give another --python, for instance /usr/bin/python3"
        )
    return f"see docs/sandbox.md; {IN_CONTAINER}; {NO_SANDBOX_OPTION} starts without any isolation"
