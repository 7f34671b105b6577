"""The system calls that a program may make, as a filter for the kernel.

A list of what is allowed: anything else is answered with ENOSYS, as an older kernel would, so that
libraries take their other way. What could touch the host even from its own namespaces is not in it:
mounts, namespaces, ptrace, kernel keys, BPF, io_uring, modules, sockets of kinds that network
namespaces do not separate (vsock), memory that belongs to no process (memfd, System V).
"""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import Any

from agentloop.errors import ConfigError

ALLOWED = """
    access alarm arch_prctl brk capget capset chdir chmod chown clock_getres clock_gettime clock_nanosleep close
    close_range copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2
    epoll_wait eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fallocate fchdir
    fchmod fchmodat fchmodat2 fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr
    fstat fstatfs fsync ftruncate futex futex_waitv futimesat get_robust_list get_thread_area getcpu getcwd getdents
    getdents64 getegid geteuid getgid getgroups getitimer getpeername getpgid getpgrp getpid getppid getpriority
    getrandom getresgid getresuid getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday getuid
    getxattr inotify_add_watch inotify_init inotify_init1 inotify_rm_watch ioctl ioprio_get kill lchown lgetxattr
    link linkat listen listxattr llistxattr lremovexattr lseek lsetxattr lstat madvise membarrier mincore mkdir
    mkdirat mknod mknodat mlock mlock2 mlockall mmap mprotect mremap msync munlock munlockall munmap nanosleep
    newfstatat open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2 poll ppoll prctl pread64 preadv
    preadv2 prlimit64 pselect6 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv recvfrom recvmmsg
    recvmsg remap_file_pages removexattr rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction
    rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo
    sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler
    sched_rr_get_interval sched_yield sched_setaffinity select sendfile sendmmsg sendmsg sendto
    set_robust_list set_thread_area set_tid_address setfsgid setfsuid setgid setgroups setitimer setpgid setpriority
    setregid setresgid setresuid setreuid setrlimit setsid setsockopt setuid setxattr shutdown sigaltstack signalfd
    signalfd4 splice stat statfs statx symlink symlinkat sync_file_range sysinfo tee tgkill time timer_create
    timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime times
    tkill truncate umask uname unlink unlinkat utime utimensat utimes vfork wait4 waitid write writev accept accept4
    bind connect
"""

REFUSED = """
    mount umount2 unshare setns pivot_root chroot ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd bpf
    perf_event_open userfaultfd add_key request_key keyctl init_module finit_module delete_module reboot swapon
    swapoff sethostname setdomainname settimeofday clock_settime clock_adjtime adjtimex acct quotactl syslog iopl
    ioperm open_by_handle_at name_to_handle_at fanotify_init kexec_load kexec_file_load nfsservctl personality
    vhangup
"""
"""Answered with EPERM, as to any user without rights."""

NAMESPACE_FLAGS = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET."""

KIND_BITS = 0xF
"""Bits of a socket's type without SOCK_CLOEXEC and SOCK_NONBLOCK."""


def write_filter(path: Path, *, loopback: bool = False) -> None:
    """Write the compiled filter, as bubblewrap's `--seccomp` reads it.

    Args:
        loopback: allow TCP and UDP, which reach the sandbox's own loopback device only. Their
            buffers count against a limit of the whole machine, so they are refused by default.

    Raises:
        ConfigError: libseccomp or its Python binding is missing.
    """
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError) as exc:
        raise ConfigError(
            f"the filter of system calls cannot be made: {exc}",
            "pip install 'agentloop-rl[sandbox]', and install libseccomp (Debian: apt-get install libseccomp2)",
        ) from exc

    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.ENOSYS))
    for name in ALLOWED.split():
        _add(rules, pyseccomp, pyseccomp.ALLOW, name)
    for name in REFUSED.split():
        _add(rules, pyseccomp, pyseccomp.ERRNO(errno.EPERM), name)

    # Threads and processes, without new namespaces. clone3 hides its flags from a filter: ENOSYS
    # makes the C library use clone.
    without_namespaces = pyseccomp.Arg(0, pyseccomp.MASKED_EQ, NAMESPACE_FLAGS, 0)
    _add(rules, pyseccomp, pyseccomp.ALLOW, "clone", without_namespaces)

    # Streams and datagrams within the sandbox.
    families: dict[int, tuple[int, ...]] = {int(socket.AF_UNIX): (0,)}
    if loopback:
        tcp_udp = (0, socket.IPPROTO_TCP, socket.IPPROTO_UDP)
        families |= {int(socket.AF_INET): tcp_udp, int(socket.AF_INET6): tcp_udp}
    combinations = [
        (family, kind, protocol)
        for family, protocols in families.items()
        for kind in (int(socket.SOCK_STREAM), int(socket.SOCK_DGRAM))
        for protocol in protocols
    ]
    for family, kind, protocol in combinations:
        for name in ("socket", "socketpair"):
            _add(
                rules, pyseccomp, pyseccomp.ALLOW, name,
                pyseccomp.Arg(0, pyseccomp.EQ, family),
                pyseccomp.Arg(1, pyseccomp.MASKED_EQ, KIND_BITS, kind),
                pyseccomp.Arg(2, pyseccomp.EQ, int(protocol)),
            )  # fmt: skip
    # Other kinds are refused as on a machine that has none: libraries know that answer.
    for name in ("socket", "socketpair"):
        for family in range(64):
            if family not in families:
                refused = pyseccomp.ERRNO(errno.EAFNOSUPPORT)
                _add(rules, pyseccomp, refused, name, pyseccomp.Arg(0, pyseccomp.EQ, family))
    with path.open("wb") as file:
        rules.export_bpf(file)


def _add(rules: Any, library: Any, action: int, name: str, *arguments: Any) -> None:
    try:
        number = library.resolve_syscall(library.system_arch(), name)
    except ValueError:
        return  # this architecture has none of this name
    if number >= 0:
        rules.add_rule(action, name, *arguments)
