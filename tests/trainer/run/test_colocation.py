"""Engine and trainer share GPUs in turns: who moves when, seen from the server's and the ranks' side."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from agentloop.config import Recipe, RolloutConfig, SamplingConfig
from agentloop.errors import RequestRejected
from agentloop.types import Task, Trajectory
from trainer.publishing.disk import DiskPublisher
from trainer.publishing.server_link import ServerLink
from trainer.rollouts.producer import Producer
from trainer.run.colocation import Colocation
from trainer.types import Published


class Sglang:
    """A bare SGLang as far as its admin requests go: records them, and ends where a real one would."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen
        self.released: set[str] = set()
        self.version = "default"
        self.status = 200
        self.refused: set[str] = set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):  # the client has closed its connection
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
                body = await reader.readexactly(int(fields.get(b"content-length", 0)))
                reply = json.dumps(self.take(head.split()[1].decode(), json.loads(body or b"{}"))).encode()
                writer.write(b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\n" % self.status)
                writer.write(b"Content-Length: %d\r\n\r\n" % len(reply) + reply)
        writer.close()

    def take(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.status = 409 if path in self.refused else 200
        if self.status == 409:
            return {"message": "not here"}
        tags = set(body.get("tags") or ())
        if path == "/release_memory_occupation":
            assert not self.released
            self.released |= tags
        elif path == "/resume_memory_occupation":
            self.released -= {tag for tag in tags if tag in self.released or pytest.fail(f"{tag} is not released")}
        elif path == "/update_weights_from_disk":
            assert "weights" not in self.released, "the new weights would be written into no memory"
            self.version = body["weight_version"]
        if path == "/server_info":
            return {"weight_version": self.version, "tp_size": 1}
        self.seen.append((path.strip("/"), *sorted(tags)))
        return {}


class Ranks:
    """Ranks that record their commands."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    async def ask(self, command: Any) -> Any:
        self.seen.append((type(command).__name__, *(["policy"] if getattr(command, "policy", False) else [])))
        return Published("0") if type(command).__name__ == "PublishWeights" else None


@pytest_asyncio.fixture
async def parts(tmp_path: Path) -> AsyncIterator[tuple[Colocation, DiskPublisher, list[Any], Sglang]]:
    seen: list[Any] = []
    sglang = Sglang(seen)
    server = await asyncio.start_server(sglang.answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    link = ServerLink(f"http://127.0.0.1:{port}", running="retract", token=None, timeout_s=10)
    ranks: Any = Ranks(seen)
    publisher = DiskPublisher(ranks, link, tmp_path, lambda _version, _folder: None)
    yield Colocation(ranks, link), publisher, seen, sglang
    await publisher.close()
    await link.close()
    server.close()
    await asyncio.sleep(0.01)


async def test_weights_return_before_the_update_and_the_cache_after_the_trainer_has_left(
    parts: tuple[Colocation, DiskPublisher, list[Any], Sglang],
) -> None:
    colocation, publisher, seen, sglang = parts
    await colocation.to_trainer()
    assert seen == [
        ("pause_generation",),
        ("release_memory_occupation", "kv_cache", "weights"),
        ("MoveIn",),
    ]

    seen.clear()
    await colocation.publish(publisher, 1)
    mine = [entry for entry in seen if entry[0] not in ("pause_generation", "continue_generation")]
    assert mine == [
        ("MoveOut",),
        ("resume_memory_occupation", "weights"),
        ("PublishWeights",),
        ("update_weights_from_disk",),
        ("MoveOut", "policy"),
        ("resume_memory_occupation", "kv_cache"),
    ]
    assert seen[-1] == ("continue_generation",) and sglang.version == "1" and not sglang.released


async def test_an_engine_that_cannot_release_its_memory_ends_the_run_with_the_fix(
    parts: tuple[Colocation, DiskPublisher, list[Any], Sglang],
) -> None:
    colocation, _, seen, sglang = parts
    sglang.refused = {"/release_memory_occupation"}
    with pytest.raises(RequestRejected, match="not here") as caught:
        await colocation.to_trainer()
    assert "--memory-saver" in str(caught.value) and ("MoveIn",) not in seen


async def test_a_producer_waits_for_a_whole_batch_without_taking_it() -> None:
    go_on = asyncio.Event()

    class Runner:
        async def run(
            self, task: Task, *, group_id: str, sample_index: int, sampling: SamplingConfig, seed: int | None
        ) -> list[Trajectory]:
            if group_id == "g1":
                await go_on.wait()
            return [Trajectory([1], [0], [None], [None], 1, reward=0.0)]

    rows: Any = {0: 0, 1: 0}
    producer = Producer(
        Runner(), [Task("0", "a", [])], rows, RolloutConfig(group_size=1, batch_size=2), seed=0, total_steps=1
    )
    producer.admit(0)
    waiting = asyncio.create_task(producer.wait(range(2)))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    go_on.set()
    await waiting
    assert [(await producer.take(index)).index for index in range(2)] == [0, 1]
    await producer.close()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"max_staleness": 1}, "rollout.colocated needs rollout.max_staleness=0, not 1"),
        ({"publish": {"transport": "distributed"}}, "NCCL does not connect two processes on one GPU"),
        ({"background": True}, "rollout.colocated needs eval.background=false"),
        ({"engine": "sglang"}, "rollout.colocated needs rollout.device=cuda: SGLang on a CPU cannot"),
    ],
)
def test_what_samples_during_training_is_refused(keys: dict[str, Any], says: str) -> None:
    evaluation = {"background": keys.pop("background", False)}
    with pytest.raises(ValueError, match=says):
        Recipe.model_validate(
            {
                "run": {"steps": 1},
                "model": {"path": "m"},
                "data": {"train": "x"},
                "rollout": {"colocated": True} | keys,
                "eval": evaluation,
            }
        )
