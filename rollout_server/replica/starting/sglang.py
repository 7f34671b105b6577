"""Replicas that are child processes of SGLang's own server, in its own Python environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from agentloop.config.server import ServerSettings
from agentloop.runtime.child import Child, free_port
from rollout_server.process import THREAD_VARIABLES
from rollout_server.replica.base import Replica
from rollout_server.replica.sglang import SglangReplica
from rollout_server.replica.starting.base import ChildSource

CPU_PLATFORM = "agentloop_cpu"
CPU_PLATFORM_FOLDER = Path(__file__).parent / "sglang_cpu"
"""Name and folder of the platform plugin that models with images need on a CPU."""

CPU_TOTAL_TOKENS = 200_000
"""KV cache on a CPU, in tokens: SGLang's own default is a share of all memory."""


class SglangSource(ChildSource):
    """One replica as a server of SGLang."""

    async def start(self) -> Replica:
        settings = self._settings
        port = free_port()
        on_gpu = settings.device != "cpu"

        child = Child(
            f"replica {self.name}",
            sglang_command(settings, self._index, port, images=self._info.images),
            sglang_environment(settings, self._index, images=self._info.images),
            self._log_file,
        )
        self._child = child
        replica = SglangReplica(
            self.name,
            f"http://127.0.0.1:{port}",
            self._info,
            on_gpu=on_gpu,
            overlap=not settings.in_place_updates,
            tensor_parallel=settings.gpus_per_replica,
            version=settings.first_version,
            stream_tokens=settings.stream_tokens,
            admin_timeout_s=settings.probe_timeout_s,
            update_timeout_s=settings.update_timeout_s,
        )

        try:
            await child.until_ready(replica.is_up, settings.start_timeout_s)
        except BaseException:
            await replica.close()
            raise
        return replica


def sglang_command(settings: ServerSettings, index: int, port: int, *, images: bool = False) -> list[str]:
    """Return the command line of replica `index`; `images`: whether the model takes images."""
    command = [
        settings.python or sys.executable, "-m", "sglang.launch_server",
        "--model-path", settings.model, "--host", "127.0.0.1", "--port", str(port),
        "--dtype", settings.dtype, "--random-seed", str(settings.seed + index),
        "--max-running-requests", str(settings.max_running), "--weight-version", settings.first_version,
        "--skip-tokenizer-init", "--incremental-streaming-output", "--log-level", "warning",
        "--enable-fp32-lm-head",  # as the torch engine: 16-bit logits are the largest part of the mismatch
    ]  # fmt: skip

    device = settings.device.partition(":")[0]
    if device == "cpu":
        # SGLang's own CPU kernels need AMX and a special build; this path runs on any CPU. Images
        # need SGLang's own code of the model, and with it `CPU_PLATFORM`.
        command += ["--device", "cpu", "--attention-backend", "torch_native"]
        command += [] if images else ["--model-impl", "transformers"]
        command += ["--max-total-tokens", str(settings.max_kv_tokens or CPU_TOTAL_TOKENS)]
        command += ["--sleep-on-idle"]  # otherwise it busy-waits on a core that others need
    else:
        command += ["--device", device, "--base-gpu-id", str(settings.first_gpu + index * settings.gpus_per_replica)]
        if settings.max_kv_tokens is not None:
            command += ["--max-total-tokens", str(settings.max_kv_tokens)]

    command += ["--tp-size", str(settings.gpus_per_replica)]
    if settings.in_place_updates:
        command += ["--disable-overlap-schedule"]
    if settings.memory_saver and device != "cpu":
        command += ["--enable-memory-saver"]
    if settings.trust_remote_code:
        command += ["--trust-remote-code"]
    if settings.context_length is not None:
        command += ["--context-length", str(settings.context_length)]
    return [*command, *settings.engine_args]


def sglang_environment(settings: ServerSettings, index: int = 0, *, images: bool = False) -> dict[str, str]:
    """Return the environment of replica `index`: ours without the variables of our interpreter.

    Args:
        images: whether the model takes images.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    environment.update(dict.fromkeys(THREAD_VARIABLES, str(settings.threads)))
    if settings.python and "/" in settings.python:
        # SGLang starts tools (ninja, triton's compiler) that are installed beside its interpreter.
        environment["PATH"] = f"{Path(settings.python).absolute().parent}:{environment.get('PATH', '')}"
    if settings.device == "cpu" and settings.gpus_per_replica > 1:
        # SGLang binds each process to cores: by itself, a NUMA node to each.
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(_cores(settings, index))
    if images:
        # A flush does not clear its cache of images: after an update of the weights they would keep
        # the embeddings of the old vision tower.
        environment["SGLANG_VLM_CACHE_SIZE_MB"] = "0"
        # It decodes the ids to find the images. With this it keeps them, and does not encode the
        # text again.
        environment["SGLANG_MM_AVOID_RETOKENIZE"] = "1"
        if settings.device == "cpu":
            environment |= {"PYTHONPATH": str(CPU_PLATFORM_FOLDER), "SGLANG_PLATFORM": CPU_PLATFORM}
    return environment


def _cores(settings: ServerSettings, index: int) -> list[str]:
    """Return the cores of each process of replica `index`, as `0,1`; replicas share them where they
    are too few."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    ranks, threads = settings.gpus_per_replica, settings.threads
    first = index * ranks * threads
    return [
        ",".join(str(cores[(first + rank * threads + thread) % len(cores)]) for thread in range(threads))
        for rank in range(ranks)
    ]
