"""The process of one rank: `python -m trainer.learner.process --fd N`. Started by
`trainer.workers.rank`.

It answers one message at a time. It ends with the main process: at end of file on the socket or,
while it is busy, by the kernel's parent-death signal (`agentloop.runtime.child`).
"""

from __future__ import annotations

import argparse
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

from agentloop.errors import DiskError
from agentloop.faults import error_to_json
from agentloop.files import DISK_FAULTS, disk_error
from agentloop.runtime.event_loop import uncollected
from agentloop.runtime.scan import remember_scans
from trainer.channel import BlockingChannel, Message, arrays_to_samples
from trainer.rank_commands import (
    SampleCommand,
    Start,
    answer_to_message,
    command_from_json,
    sample_type,
    start_from_json,
)

if TYPE_CHECKING:
    from trainer.learner.learner import Learner


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--fd", type=int, required=True, help="inherited socket to the main process")
    channel = BlockingChannel(socket.socket(fileno=arguments.parse_args().fd))
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trainer").setLevel(logging.INFO)

    remember_scans()
    first = channel.receive()
    if first is None:
        return
    store: Path | None = None
    try:
        start = start_from_json(first[0])
        store = start.store
        with uncollected():
            learner = _start(start)
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


def _start(start: Start) -> Learner:
    """Join the process group and load the model."""
    import torch
    import torch.distributed as dist

    from trainer.learner.learner import Learner

    config = start.settings.config
    torch.set_num_threads(config.threads)
    backend = "gloo"
    if config.device == "cuda":
        torch.cuda.set_device(start.rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        store=dist.FileStore(str(start.store), start.ranks),  # type: ignore[attr-defined]  # torch does not list it in __all__
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
