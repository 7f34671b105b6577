"""The process of one rank: `python -m trainer.learner.process --fd N`, or `--connect host:port`.
Started by `trainer.workers.rank`.

It answers one message at a time. It ends with the main process: at end of file on the socket or,
while it is busy, by the kernel's parent-death signal (`agentloop.runtime.child`) or by the watch on
the connection that it made (`agentloop.launch.joining`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import psutil

from agentloop.errors import DiskError
from agentloop.faults import error_to_json
from agentloop.files import DISK_FAULTS, disk_error
from agentloop.launch.joining import connection
from agentloop.runtime.event_loop import uncollected
from agentloop.runtime.scan import remember_scans
from trainer.channel import BlockingChannel, Message, arrays_to_samples
from trainer.rank_commands import (
    OPEN_MEETING,
    SampleCommand,
    Start,
    answer_to_message,
    command_from_json,
    sample_type,
    start_from_json,
)

if TYPE_CHECKING:
    from trainer.learner.learner import Learner

OPEN_S = 300.0
"""Time for the other ranks to come to rank 0's store."""


def main() -> None:
    sock = connection(__doc__)
    channel = BlockingChannel(sock)
    if sock.family != socket.AF_UNIX:
        _talk_where_connected(sock)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trainer").setLevel(logging.INFO)

    remember_scans()
    first = channel.receive()
    store: Path | None = None
    meeting: Any = None
    try:
        if first is not None and first[0] == OPEN_MEETING:
            meeting = _open_meeting(sock)
            channel.send({"ok": [meeting.host, meeting.port]})
            first = channel.receive()
        if first is None:
            return
        start = start_from_json(first[0])
        store = start.store
        with uncollected():
            learner = _start(start, meeting)
        channel.send({"ok": None})
    except Exception as exc:  # noqa: BLE001 - the main process must learn of every failure
        channel.send(_reported(exc, store))
        return

    while (message := channel.receive()) is not None:
        try:
            body, arrays = _answer(learner, message)
            channel.send({"ok": body}, arrays)
        except Exception as exc:  # noqa: BLE001 - as above
            channel.send(_reported(exc, store))
    _end()


def _talk_where_connected(sock: socket.socket) -> None:
    """Let gloo and NCCL use the network by which the main process is reached. By default they look
    up the host's name, which often leads to loopback."""
    address = sock.getsockname()[0]
    if address.startswith("127."):
        address = "127.0.0.1"  # all of them are the same interface, which names this one
    interfaces = psutil.net_if_addrs()
    found = next((name for name, entries in interfaces.items() if address in (e.address for e in entries)), None)
    if found is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", found)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", found)


def _open_meeting(sock: socket.socket) -> Any:
    """Open the store at which all ranks meet, at the address by which this one is connected."""
    import torch.distributed as dist

    server = socket.socket(sock.family)
    server.bind((sock.getsockname()[0], 0))
    server.listen(socket.SOMAXCONN)
    host, port = server.getsockname()[:2]
    # By itself it would listen on all addresses.
    return dist.TCPStore(  # type: ignore[attr-defined]  # torch does not list it in __all__
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=OPEN_S),
        master_listen_fd=server.detach(),
    )


def _start(start: Start, meeting: Any) -> Learner:
    """Join the process group and load the model.

    Args:
        meeting: the store that this rank has opened; None: another rank's, or a file.
    """
    import torch
    import torch.distributed as dist

    from trainer.learner.learner import Learner

    config = start.settings.config
    torch.set_num_threads(config.threads)
    backend = "gloo"
    if config.device == "cuda":
        # A cluster shows each process its own GPU only.
        torch.cuda.set_device(0 if start.store is None else start.rank)
        backend = "cpu:gloo,cuda:nccl"
    if start.store is not None:
        meeting = dist.FileStore(str(start.store), start.ranks)  # type: ignore[attr-defined]  # torch does not list it in __all__
    elif meeting is None:
        assert start.meeting is not None
        host, port = start.meeting
        meeting = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=OPEN_S))  # type: ignore[attr-defined]  # as above
    dist.init_process_group(
        backend,
        store=meeting,
        rank=start.rank,
        world_size=start.ranks,
        timeout=timedelta(seconds=config.timeout_s),
    )
    return Learner(start.settings)


def _answer(learner: Learner, message: Message) -> tuple[Any, Sequence[np.ndarray]]:
    """Run a command on the learner and encode its answer."""
    body, arrays = message
    command = command_from_json(body)
    if isinstance(command, SampleCommand):
        answer = command.run(learner, arrays_to_samples(arrays, sample_type(command)))
    else:
        answer = command.run(learner)
    return answer_to_message(answer)


def _reported(exc: Exception, store: Path | None) -> dict[str, Any]:
    """Describe an error for the main process; its traceback goes to the log."""
    with contextlib.suppress(OSError):  # the log may lie on a full disk
        traceback.print_exception(exc)
        sys.stderr.flush()
    return error_to_json(_store_error(exc, store) or exc)


def _store_error(exc: Exception, store: Path | None) -> DiskError | None:
    """Return the error to report if torch's store could not write its file: a new process group,
    such as that of the first checkpoint, writes there. torch keeps only the text of the errno."""
    import torch.distributed as dist

    if not isinstance(exc, dist.DistStoreError):
        return None
    found = next((code for code in DISK_FAULTS if os.strerror(code) in str(exc)), None)
    return None if found is None else disk_error(OSError(found, os.strerror(found)), store)


def _end() -> None:
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError):  # another rank may have ended already
        dist.destroy_process_group()


def _exit() -> NoReturn:
    """End this process without tearing down the interpreter: with torch that takes a second."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
    _exit()
