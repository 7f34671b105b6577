"""The main process's side of the trainer's ranks: starts them, talks to them, notices when one dies. No torch.

group = await WorkerGroup.start(model_path=..., config=..., ...)
sums = await group.accumulate(samples, temperature=1.0)      # as often as groups of episodes finish
await group.step(sums["normalizer"])                         # one optimizer step over all of them
await group.publish(folder)
await group.close()
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

import agentloop.errors
from agentloop.config import OptimConfig, TrainerConfig
from agentloop.errors import AgentloopError, WorkerError
from agentloop.model_folder import ModelFolder
from agentloop.runtime.child import child_environment, log_tail, spawn
from trainer.algorithms.aggregation import normalizer
from trainer.channel import (
    HEADER_LENGTH_BYTES,
    array_bytes,
    decode_header,
    encode,
    header_length,
    samples_to_arrays,
)
from trainer.packing.units import split_over_ranks
from trainer.types import LossSpec, Sample, TrainSample, ValueSample, add_sums

CLOSE_TIMEOUT_S = 10.0
DEFAULT_HIDDEN_SIZE = 1024

DEATH_IS_SEEN_S = 5.0
"""How long after one rank's failure another one's death is waited for."""

Answer = tuple[dict[str, Any], list[np.ndarray]]


class RankDied(WorkerError):
    """A process of the trainer ended: what other ranks say then follows from it."""


class _Rank:
    """One process and its socket."""

    def __init__(
        self,
        number: int,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        log: Path,
    ) -> None:
        self.number = number
        self.process = process
        self.log = log
        self._reader = reader
        self._writer = writer

    async def call(self, body: dict[str, Any], arrays: Sequence[np.ndarray]) -> Answer:
        """Send one message and wait for its answer."""
        try:
            self._writer.writelines(encode(body, arrays))
            await self._writer.drain()
            length = header_length(await self._reader.readexactly(HEADER_LENGTH_BYTES))
            answer, described = decode_header(await self._reader.readexactly(length))
            received = [
                np.frombuffer(await self._reader.readexactly(array_bytes(dtype, shape)), dtype=dtype).reshape(shape)
                for dtype, shape in described
            ]
        except (asyncio.IncompleteReadError, ConnectionError) as exc:
            code = await self.process.wait()
            raise RankDied(
                f"trainer rank {self.number} died (exit code {code}). Last lines of {self.log}:\n{log_tail(self.log)}",
                "an exit code of -9 is most often memory: lower trainer.tokens_per_micro_batch",
            ) from exc
        if "ok" in answer:
            return answer["ok"], received
        raise self._error(answer)

    def _error(self, answer: dict[str, Any]) -> AgentloopError:
        known = getattr(agentloop.errors, answer["error"] or "", None)
        if known is not None:
            return known(answer["message"], answer["hint"])
        return WorkerError(f"trainer rank {self.number} failed: {answer['message']}", f"see {self.log}")

    async def end(self) -> None:
        """Close the socket, which tells the process to end; kill it when it does not."""
        self._writer.close()
        try:
            await asyncio.wait_for(self.process.wait(), CLOSE_TIMEOUT_S)
        except TimeoutError:
            self.kill()
            await self.process.wait()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()


class WorkerGroup:
    """The trainer's ranks. Commands run one at a time, in the order in which they were called."""

    def __init__(self, ranks: list[_Rank], config: TrainerConfig, hidden_size: int) -> None:
        self._ranks = ranks
        self._config = config
        self._hidden_size = hidden_size
        self._lock = asyncio.Lock()
        self._in_flight: set[asyncio.Task[list[Answer]]] = set()
        self._broken: AgentloopError | None = None

    @classmethod
    async def start(
        cls,
        *,
        model_path: str,
        config: TrainerConfig,
        dtype: str,
        total_steps: int,
        seed: int,
        log_dir: Path,
        reference: bool = False,
        init: Literal["weights", "random"] = "weights",
    ) -> WorkerGroup:
        """Start the rank processes and load the model in each.

        Args:
            model_path: folder of a Hugging Face model, or a hub id.
            total_steps: optimizer steps of the whole run, for the schedule.
            log_dir: gets `trainer_rank{r}.log`.
            reference: keep a frozen copy of the initial policy, for `kl_coef`.
            init: `random` draws the weights with `seed`.

        Raises:
            ModelError: the model cannot be loaded.
            WorkerError: a process died; its last lines of log are in the message.
        """
        log_dir.mkdir(parents=True, exist_ok=True)
        ranks: list[_Rank] = []
        store = log_dir / ".ranks"  # where the ranks find each other; one left by a killed run would confuse them
        store.unlink(missing_ok=True)
        group = cls(ranks, config, _hidden_size(model_path))
        try:
            for number in range(config.ranks):
                ranks.append(await _spawn(number, config, log_dir / f"trainer_rank{number}.log"))
            start = {
                "config": json.loads(config.model_dump_json()),
                "store": str(store.absolute()),
                "ranks": config.ranks,
                "model_path": model_path,
                "dtype": dtype,
                "total_steps": total_steps,
                "seed": seed,
                "reference": reference,
                "init": init,
            }
            await group._call([(start | {"rank": rank.number}, ()) for rank in ranks])
        except BaseException:
            await group.close()
            raise
        return group

    async def accumulate(
        self, samples: Sequence[TrainSample], *, temperature: float, loss: LossSpec | None = None
    ) -> dict[str, float]:
        """Add the gradient of the summed loss of `samples` to what has been accumulated.

        Called any number of times before `step`. Calls of a few thousand tokens are as fast as one large call; smaller
        ones leave part of a core's speed unused.

        Args:
            samples: samples with an equal `group_key` share their prompt.
            temperature: the one they were sampled with.
            loss: default: what the config's `algorithm` says.

        Returns:
            sums over the trained tokens: `loss_sum` (weighted as the aggregation says), `entropy_sum`, `clip_sum`,
            `kl_ref_sum`, `logprob_abs_sum` (|trainer - engine| logprob), `k3_sum` (KL of engine against trainer),
            `weight_sum`, `weight_square_sum` and `weight_max` (trainer / engine probability) and `masked_sum` (tokens
            left out by the correction); counts: `tokens` (trained), `sequences`, `packed_tokens` (computed, shared
            prompts once), `micro_batches`, `normalizer` (to be summed over the calls of a step and given to it);
            `time_s` of the slowest rank. Put calls together with `types.add_sums`. Without `proximal_logprobs` the
            mismatch sums compare like with like only before the first `step` of a version.

        Raises:
            ValueError: a sample's columns do not fit together, or the temperature is 0.
        """
        spec = loss or LossSpec.from_config(self._config.algorithm)
        _check(samples, temperature)
        trained = [sample for sample in samples if sample.loss_mask.any()]
        if not trained:
            return {"tokens": 0.0, "sequences": 0.0, "normalizer": 0.0}
        answers = await self._share(trained, {"op": "accumulate", "temperature": temperature, "loss": asdict(spec)})
        total: dict[str, float] = {}
        for body, _ in answers[1]:
            add_sums(total, body)
        return total | {
            "time_s": max(body["time_s"] for body, _ in answers[1]),
            "normalizer": normalizer(trained, spec.aggregation, spec.aggregation_constant),
        }

    async def step(self, normalizer: float) -> dict[str, float]:
        """One optimizer step on the accumulated gradient divided by `normalizer`; returns `lr` and `grad_norm`.

        Raises:
            WorkerError: the gradient is not finite.
        """
        answers = await self._all({"op": "step", "normalizer": normalizer})
        return answers[0][0]

    async def reset_optimizer(self, optim: OptimConfig, total_steps: int) -> None:
        """Forget the moments and start a schedule of `total_steps` at its step 0: the next stage of a training."""
        body = {"op": "reset_optimizer", "optim": json.loads(optim.model_dump_json()), "total_steps": total_steps}
        await self._all(body)

    async def logprobs(
        self, samples: Sequence[TrainSample], *, temperature: float, of: Literal["policy", "reference"] = "policy"
    ) -> list[np.ndarray]:
        """The logprobs of the trained tokens by the policy itself, or by the frozen one that the run started from.

        Returns:
            for each sample (L) float32, 0 where the mask is 0.

        Raises:
            WorkerError: there is no reference (`reference=True` at the start).
        """
        _check(samples, temperature)
        return await self._columns(samples, {"op": "logprobs", "temperature": temperature, "of": of})

    async def values(self, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        """The critic's value of the state in which each trained token was sampled: as `logprobs`.

        Raises:
            WorkerError: there is no critic.
        """
        return await self._columns(samples, {"op": "values"})

    async def accumulate_values(self, samples: Sequence[ValueSample]) -> dict[str, float]:
        """Add the gradient of the critic's loss, over trained tokens, to what has been accumulated for it.

        Returns:
            sums over the trained tokens: `value_loss_sum`, `value_clip_sum`, `value_sum`; `tokens` and `normalizer`, to
            be summed over the calls of a step; `time_s` of the slowest rank.
        """
        total: dict[str, float] = {}
        _, answers = await self._share(samples, {"op": "accumulate_values"}, ValueSample)
        for body, _ in answers:
            add_sums(total, body)
        return total | {
            "time_s": max(body["time_s"] for body, _ in answers),
            "tokens": float(sum(sample.trained_tokens for sample in samples)),
            "normalizer": normalizer(samples, "token_mean"),
        }

    async def step_critic(self, normalizer: float) -> dict[str, float]:
        """`step` for the critic."""
        return await self._first({"op": "step_critic", "normalizer": normalizer})

    async def _columns(self, samples: Sequence[TrainSample], body: dict[str, Any]) -> list[np.ndarray]:
        """A number for each trained token, put back where its token is."""
        result = [np.zeros(len(sample), dtype=np.float32) for sample in samples]
        shares, answers = await self._share(samples, body)
        for share, (_, (sample_index, token_index, numbers)) in zip(shares, answers, strict=True):
            for local in np.unique(sample_index):
                rows = sample_index == local
                result[share[local]][token_index[rows]] = numbers[rows]
        return result

    async def publish(self, folder: Path) -> str:
        """Write the whole policy as a Hugging Face folder, which appears under its name when it is complete; returns
        the checksum (`agentloop.weights.layout`)."""
        return str((await self._first({"op": "publish", "folder": str(Path(folder).absolute())}))["checksum"])

    async def publish_shared(self, folder: Path, *, reader_s: float = 0.0) -> str:
        """Write the policy over what is in a folder of `agentloop.weights.shared`; returns the checksum.

        Args:
            reader_s: how long to wait for the first reader.
        """
        body = {"op": "publish_shared", "folder": str(folder.absolute()), "reader_s": reader_s}
        return str((await self._first(body))["checksum"])

    async def publish_broadcast(self, group: str, bucket_bytes: int, folder: Path | None) -> tuple[str, str]:
        """Broadcast the policy and, with `folder`, write a copy as `publish_shared` does.

        Returns:
            the checksum, and why the broadcast broke off; empty when it did not.
        """
        path = str(folder.absolute()) if folder is not None else None
        body = {"op": "publish_broadcast", "group": group, "bucket_bytes": bucket_bytes, "folder": path}
        answer = await self._first(body)
        return str(answer["checksum"]), str(answer["error"])

    async def layout(self) -> list[tuple[str, str, list[int]]]:
        """Name, dtype and shape of each published tensor, in the order in which they are broadcast."""
        return [tuple(tensor) for tensor in (await self._first({"op": "layout"}))["tensors"]]

    async def open_group(self, address: str) -> int:
        """Open a store for a weights group at `address`; returns its port."""
        return int((await self._first({"op": "open_group", "address": address}))["port"])

    async def join_group(self, group: str, world_size: int, backend: str) -> str:
        """Meet the engines as rank 0; returns why they did not come, or an empty text."""
        body = {"op": "join_group", "group": group, "world_size": world_size, "backend": backend}
        return str((await self._first(body))["error"])

    async def leave_group(self, group: str) -> None:
        """Close a group, if there is one."""
        await self._all({"op": "leave_group", "group": group})

    async def save(
        self,
        folder: Path,
        state: dict[str, Any] | None = None,
        *,
        files: Mapping[str, Path] | None = None,
        wait: bool = True,
    ) -> None:
        """Write a checkpoint: `folder/trainer/`, `files` and `folder/state.json`; whole or not at all.

        Args:
            files: name in the folder, and path of a file that is moved there.
            wait: False returns when the ranks have copied their state; ask `saved` how the writing goes.

        Raises:
            WorkerError: it could not be written.
        """
        body = {
            "op": "save",
            "folder": str(Path(folder).absolute()),
            "state": state or {},
            "files": {name: str(path.absolute()) for name, path in (files or {}).items()},
            "wait": wait,
        }
        if not wait:
            await self._all(body)
            return
        if error := _save_error(await self._all(body)):
            raise WorkerError(f"the checkpoint {folder} could not be written: {error}", "see that its disk has room")

    async def saved(self, *, wait: bool) -> tuple[bool, str]:
        """Whether the save that was begun has ended, and why it failed (an empty text when it did not).

        Until it has ended the folder is not there. Each of the ranks has to be asked, for each gives its part.

        Args:
            wait: until it has ended.
        """
        answers = await self._all({"op": "saved", "wait": wait})
        if not wait and not all(body["done"] for body, _ in answers):
            return False, ""
        return True, _save_error(answers)

    async def load(self, folder: Path, *, optimizer: bool = True) -> None:
        """Read the `trainer/` folder of what `save` wrote.

        Args:
            optimizer: False reads the weights only; optimizer, schedule and random state stay as they are.

        Raises:
            RunDirError: it is no checkpoint, or one of another model.
        """
        await self._all({"op": "load", "folder": str(Path(folder).absolute()), "optimizer": optimizer})

    async def close(self) -> None:
        """End the processes. Ranks that are busy or broken are killed."""
        if self._broken is not None or self._in_flight:
            for rank in self._ranks:
                rank.kill()
        await asyncio.gather(*self._in_flight, return_exceptions=True)
        await asyncio.gather(*(rank.end() for rank in self._ranks))

    # -- talking to the ranks ----------------------------------------------------------------------------------------

    async def _share(
        self, samples: Sequence[Sample], body: dict[str, Any], kind: type[Sample] = TrainSample
    ) -> tuple[list[list[int]], list[Answer]]:
        """Send each rank its part of the samples; returns the parts and the answers."""
        shares = split_over_ranks(samples, len(self._ranks), self._config.tokens_per_micro_batch, self._hidden_size)
        messages = [(body, samples_to_arrays([samples[index] for index in share], kind)) for share in shares]
        return shares, await self._call(messages)

    async def _first(self, body: dict[str, Any]) -> dict[str, Any]:
        """All ranks do it; what rank 0 answers."""
        return (await self._all(body))[0][0]

    async def _all(self, body: dict[str, Any]) -> list[Answer]:
        return await self._call([(body, ())] * len(self._ranks))

    async def _call(self, messages: Sequence[tuple[dict[str, Any], Sequence[np.ndarray]]]) -> list[Answer]:
        """One message to each rank.

        A cancelled caller (Ctrl-C) does not tear the exchange: it goes on, its answer is dropped, and the next command,
        which may be the `save` of the stopped run, waits for it.
        """
        task = asyncio.ensure_future(self._exchange(messages))
        self._in_flight.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[list[Answer]]) -> None:
        self._in_flight.discard(task)
        if not task.cancelled():
            task.exception()  # seen, also where the caller was cancelled

    async def _exchange(self, messages: Sequence[tuple[dict[str, Any], Sequence[np.ndarray]]]) -> list[Answer]:
        async with self._lock:
            if self._broken is not None:
                raise WorkerError(f"the trainer is broken since: {self._broken.message}", self._broken.hint)
            calls = [
                asyncio.ensure_future(rank.call(*message)) for rank, message in zip(self._ranks, messages, strict=True)
            ]
            try:
                return list(await asyncio.gather(*calls))
            except BaseException as first:
                exc = await _cause(first, calls)
                # Ranks may be at different places now, and wait for each other in a collective that never comes.
                self._broken = (
                    exc if isinstance(exc, AgentloopError) else WorkerError(f"a command was cut off: {exc!r}")
                )
                for rank in self._ranks:
                    rank.kill()
                await asyncio.gather(*calls, return_exceptions=True)
                if exc is first:
                    raise
                raise exc from first


async def _cause(first: BaseException, calls: Sequence[asyncio.Future[Answer]]) -> BaseException:
    """The death of a rank rather than the failure of another one, which lost its connection to it and said so first."""
    if not isinstance(first, WorkerError) or isinstance(first, RankDied):
        return first
    await asyncio.wait(calls, timeout=DEATH_IS_SEEN_S)
    failures = [call.exception() for call in calls if call.done() and not call.cancelled()]
    return next((failure for failure in failures if isinstance(failure, RankDied)), first)


def _save_error(answers: Sequence[Answer]) -> str:
    """What the first rank says whose part failed."""
    return next((body["error"] for body, _ in answers if body["error"]), "")


def _check(samples: Sequence[TrainSample], temperature: float) -> None:
    if temperature <= 0:
        raise ValueError("temperature 0 has no logprobs to train on: set rollout.sampling.temperature above 0")
    for index, sample in enumerate(samples):
        try:
            sample.check()
        except ValueError as exc:
            raise ValueError(f"sample {index}: {exc}") from exc


async def _spawn(number: int, config: TrainerConfig, log: Path) -> _Rank:
    ours, theirs = socket.socketpair()
    environment = child_environment(config.threads)
    if sys.platform == "linux":  # local ranks; a host name that resolves to elsewhere would hang
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # The rank imports the trainer that started it, whatever the working directory holds under that name (-P).
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    with theirs, log.open("ab") as output:
        process = await spawn(
            [sys.executable, "-P", "-m", "trainer.learner.process", "--fd", str(theirs.fileno())],
            environment=environment,
            stdout=output,
            stderr=output,
            pass_fds=[theirs.fileno()],
        )
    reader, writer = await asyncio.open_connection(sock=ours)
    return _Rank(number, process, reader, writer, log)


def _hidden_size(model_path: str) -> int:
    """`hidden_size` of a model folder; it only balances work, so that a hub id gets a usual value."""
    folder = ModelFolder(Path(model_path))
    return (folder.hidden_size if folder.has_config else None) or DEFAULT_HIDDEN_SIZE
