"""The process of one rank: `python -m trainer.learner.process --fd N`. Started by `trainer.workers`.

It answers one message after the other and ends when the main process does: at end of file on the socket, and by the
kernel's parent-death signal while it is busy.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import socket
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from agentloop.config import OptimConfig, TrainerConfig
from agentloop.errors import AgentloopError
from trainer.channel import BlockingChannel, Message, arrays_to_samples
from trainer.types import LearnerSettings, LossSpec, TrainSample, ValueSample

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--fd", type=int, required=True, help="inherited socket to the main process")
    channel = BlockingChannel(socket.socket(fileno=arguments.parse_args().fd))
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trainer").setLevel(logging.INFO)
    first = channel.receive()
    if first is None:
        return
    try:
        learner = _start(first[0])
        channel.send({"ok": {}})
    except Exception as exc:  # noqa: BLE001 - whatever it is, the main process has to hear of it
        channel.send(_described(exc))
        return
    while (message := channel.receive()) is not None:
        try:
            body, arrays = _answer(learner, message)
            channel.send({"ok": body}, arrays)
        except Exception as exc:  # noqa: BLE001 - as above
            channel.send(_described(exc))
    _end()


def _start(start: dict[str, Any]) -> Any:
    """Join the process group and load the model."""
    import torch
    import torch.distributed as dist

    from trainer.learner.learner import Learner

    config = TrainerConfig.model_validate(start["config"])
    torch.set_num_threads(config.threads)
    backend = "gloo"
    if config.device == "cuda":
        torch.cuda.set_device(start["rank"])
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        store=dist.FileStore(start["store"], start["ranks"]),
        rank=start["rank"],
        world_size=start["ranks"],
        timeout=COLLECTIVE_TIMEOUT,
    )
    settings = {key: start[key] for key in ("model_path", "dtype", "total_steps", "seed", "reference", "init")}
    return Learner(LearnerSettings(config=config, **settings))


def _answer(learner: Any, message: Message) -> tuple[dict[str, Any], list[np.ndarray]]:
    body, arrays = message
    match body["op"]:
        case "accumulate":
            sums = learner.accumulate(
                arrays_to_samples(arrays, TrainSample), body["temperature"], LossSpec(**body["loss"])
            )
            return sums, []
        case "step":
            return learner.step(body["normalizer"]), []
        case "logprobs":
            return {}, list(
                learner.logprobs(arrays_to_samples(arrays, TrainSample), body["temperature"], of=body["of"])
            )
        case "values":
            return {}, list(learner.values(arrays_to_samples(arrays, TrainSample)))
        case "accumulate_values":
            return learner.accumulate_values(arrays_to_samples(arrays, ValueSample)), []
        case "step_critic":
            return learner.critic.step(body["normalizer"]), []
        case "reset_optimizer":
            learner.reset_optimizer(OptimConfig.model_validate(body["optim"]), body["total_steps"])
        case "publish":
            return {"checksum": learner.publish(Path(body["folder"]))}, []
        case "publish_shared":
            return {"checksum": learner.handout.to_shared(Path(body["folder"]), reader_s=body["reader_s"])}, []
        case "publish_broadcast":
            folder = Path(body["folder"]) if body["folder"] else None
            checksum, error = learner.handout.to_group(body["group"], body["bucket_bytes"], folder)
            return {"checksum": checksum, "error": error}, []
        case "layout":
            return {"tensors": learner.handout.layout}, []
        case "open_group":
            return {"port": learner.handout.open_group(body["address"])}, []
        case "join_group":
            return {"error": learner.handout.join_group(body["group"], body["world_size"], body["backend"])}, []
        case "leave_group":
            learner.handout.leave_group(body["group"])
        case "save":
            return learner.save(Path(body["folder"]), body["state"], body["files"], wait=body["wait"]), []
        case "saved":
            return learner.saved(wait=body["wait"]), []
        case "load":
            learner.load(Path(body["folder"]), optimizer=body["optimizer"])
        case op:
            raise ValueError(f"unknown operation {op!r}")
    return {}, []


def _described(exc: Exception) -> dict[str, Any]:
    """An error as data: ours by name, any other by its last line; the traceback goes to the log."""
    traceback.print_exception(exc)
    sys.stderr.flush()
    if isinstance(exc, AgentloopError):
        return {"error": type(exc).__name__, "message": exc.message, "hint": exc.hint}
    return {"error": None, "message": f"{type(exc).__name__}: {exc}", "hint": None}


def _end() -> None:
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError):  # another rank may be gone already
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
