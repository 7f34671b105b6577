"""A learner's policy on its way to a real server, by each transport."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from agentloop.config import PublishConfig, Recipe
from agentloop.errors import RequestRejected, ServerError
from agentloop.weights.shared import Progress
from tests import forked
from tests.trainer.conftest import make_samples, start_workers
from trainer.publishing.base import Publisher
from trainer.publishing.broadcast import BroadcastPublisher
from trainer.publishing.disk import DiskPublisher
from trainer.publishing.server_link import ServerLink
from trainer.publishing.shared import SharedPublisher
from trainer.publishing.transports import make_publisher
from trainer.rank_commands import JoinGroup, Layout, OpenGroup, PublishWeights
from trainer.types import LossSpec, Published
from trainer.workers.group import WorkerGroup


class Started:
    """A server process of one or more replicas."""

    def __init__(self, model: Path, root: Path, folder: Path, *options: str) -> None:
        ready = folder / "ready.json"
        ready.unlink(missing_ok=True)
        self.process = forked.start(
            "rollout_server",
            ["--model", str(model), "--ready-file", str(ready), "--weights-root", str(root), "--log-dir", str(folder),
             "--parent-pid", str(os.getpid()), *options],
            folder / "server.log",
        )  # fmt: skip
        deadline = time.monotonic() + 240
        while not ready.exists():
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        self.url = httpx.Response(200, content=ready.read_bytes()).json()["url"]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def server(tiny_model: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    started = Started(tiny_model, root, tmp_path_factory.mktemp("server"), "--replicas", "2", "--stream-tokens", "4")
    yield started
    started.stop()


@pytest.fixture
async def workers(tiny_model: Path, trainer_config: Any, tmp_path: Path) -> AsyncIterator[WorkerGroup]:
    group = await start_workers(
        model_path=str(tiny_model), config=trainer_config, dtype="float32", total_steps=10, seed=0, log_dir=tmp_path
    )
    yield group
    await group.close()


async def step(workers: WorkerGroup, seed: int) -> None:
    sums = await workers.accumulate(make_samples(seed), temperature=1.0, loss=LossSpec())
    await workers.step(sums["normalizer"])


async def facts(server: Started) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
        return dict((await http.get("/server_info")).json())


async def mismatch(server: Started, workers: WorkerGroup, version: int) -> float:
    """The largest difference between the replicas' logprobs and the trainer's own."""
    sampling = {"max_new_tokens": 12, "ignore_eos": True}
    samples = make_samples(3)
    worst = 0.0
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        for number, sample in enumerate(samples[:4]):
            prompt = sample.token_ids[: sample.prompt_length].tolist()
            request = {"input_ids": prompt, "sampling_params": sampling}
            # Sessions spread over the replicas.
            answer = (await http.post("/generate", json=request, headers={"X-Session-Id": str(number)})).json()
            assert [span["version"] for span in answer["meta_info"]["weight_versions"]] == [str(version)]
            sample.token_ids = np.array(prompt + answer["output_ids"], dtype=np.int32)
            sample.loss_mask = np.arange(len(sample.token_ids)) >= len(prompt)
            sample.old_logprobs = sample.advantages = sample.loss_mask.astype("float32")
            (ours,) = await workers.logprobs([sample], temperature=1.0)
            theirs = [logprob for logprob, _, _ in answer["meta_info"]["output_token_logprobs"]]
            worst = max(worst, *(abs(a - b) for a, b in zip(ours[len(prompt) :].tolist(), theirs, strict=True)))
    return worst


def publisher_of(
    transport: str, workers: WorkerGroup, link: ServerLink, root: Path, noted: dict[int, Path]
) -> Publisher:
    recipe = Recipe.model_validate(
        {
            "run": {"name": "x", "steps": 1},
            "model": {"path": "x"},
            "data": {"train": "x"},
            "rollout": {"publish": PublishConfig(transport=transport, bucket_mb=1).model_dump()},  # type: ignore[arg-type]
        }
    )
    return make_publisher(recipe, workers, link, root / transport, noted.__setitem__)


@pytest.mark.parametrize("transport", ["disk", "shm", "distributed"])
async def test_each_version_is_served_by_both_replicas_also_after_one_died(
    transport: str, server: Started, workers: WorkerGroup, root: Path
) -> None:
    link = ServerLink(server.url, running="retract", token=None, timeout_s=60)
    noted: dict[int, Path] = {}
    publisher = publisher_of(transport, workers, link, root, noted)
    first = int((await facts(server))["weight_version"]) + 1
    for version in range(first, first + 3):
        await step(workers, seed=version)
        await publisher.publish(version)
        assert await mismatch(server, workers, version) < 1e-5
        state = await facts(server)
        assert [s["weight_version"] for s in state["states"]] == [str(version)] * 2
        assert [s["state"] for s in state["states"]] == ["serving"] * 2
        assert (noted[version] / "model.safetensors").exists()
    # A replica that dies comes back with the current version.
    kill_one(server)
    state = await until(server, lambda s: [x["state"] for x in s["states"]] == ["serving"] * 2 and restarted(s, state))
    assert [s["weight_version"] for s in state["states"]] == [str(version)] * 2
    assert await mismatch(server, workers, version) < 1e-5
    # And takes part in the next one.
    await step(workers, seed=99)
    await publisher.publish(version + 1)
    assert await mismatch(server, workers, version + 1) < 1e-5
    state = await facts(server)
    assert [s["weight_version"] for s in state["states"]] == [str(version + 1)] * 2
    await publisher.close()
    await link.close()


def kill_one(server: Started) -> None:
    children = [c for c in psutil.Process(server.process.pid).children() if "rollout_server" in " ".join(c.cmdline())]
    children[0].kill()


def restarted(now: dict[str, Any], before: dict[str, Any]) -> bool:
    fenced = sum(state["fenced"] for state in now["states"])
    return bool(fenced > sum(state["fenced"] for state in before["states"]))


async def until(server: Started, condition: Any) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while not condition(state := await facts(server)):  # noqa: ASYNC110  # another process sets no event
            await asyncio.sleep(0.1)
    return state


class FakeWorkers:
    """Writes nothing, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def ask(self, command: Any) -> Any:
        match command:
            case PublishWeights("disk", options):
                options["folder"].mkdir(parents=True)
            case PublishWeights("shared", options):
                if self.error:
                    raise self.error
                Progress(options["folder"]).finish("xxh3:00")
            case Layout():
                return [("a", "float32", [2])]
            case OpenGroup():
                return 1
            case JoinGroup():
                return ""
        return Published("xxh3:00")


class FakeLink(ServerLink):
    """A server that writes down what it is asked, and refuses when told to."""

    def __init__(self, running: Any = "retract", refuses: Exception | None = None, ours: bool = True) -> None:
        super().__init__("http://fake", running=running, token=None, timeout_s=0.2)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.refuses = refuses
        self.ours = ours
        self.version = "0"

    async def post(self, path: str, body: dict[str, Any], *, ignore: bool = False) -> dict[str, Any]:
        self.asked.append((path, body))
        if path.startswith("/update"):
            if self.refuses:
                raise self.refuses
            self.version = body["weight_version"]
        return {"checksum": "xxh3:00"}

    async def _get(self, path: str) -> dict[str, Any]:
        states = [{"state": "serving", "ranks": 2}, {"state": "fenced", "ranks": 2}]
        return {"weight_version": self.version, "states": states, **({"engine": "torch"} if self.ours else {})}


def nothing(version: int, folder: Path) -> None: ...


async def test_shared_folders_are_written_in_turn_and_the_served_one_never(tmp_path: Path) -> None:
    link = FakeLink()
    publisher = SharedPublisher(FakeWorkers(), link, tmp_path, nothing)
    for version in (1, 2, 3):
        await publisher.publish(version)
    paths = [body["shm_path"] for path, body in link.asked if path == "/update_weights_from_tensor"]
    assert paths[0] == paths[2] != paths[1]
    # A version that was not served is written again where it was, not over the one that serves.
    link.refuses = ServerError("down")
    with pytest.raises(ServerError, match="could not be published"):
        await publisher.publish(4)
    link.refuses = None
    await publisher.publish(4)
    assert link.asked[-1][1]["shm_path"] == paths[1]


async def test_a_trainer_that_fails_to_write_tells_the_readers(tmp_path: Path) -> None:
    publisher = SharedPublisher(FakeWorkers(ServerError("no room")), FakeLink(), tmp_path, nothing)
    with pytest.raises(ServerError, match="no room"):
        await publisher.publish(1)
    (slot,) = tmp_path.iterdir()
    assert Progress(slot).read()[0] == 2**64 - 2


async def test_a_refused_version_is_an_error_at_once(tmp_path: Path) -> None:
    link = FakeLink(refuses=RequestRejected("NaN"))
    for publisher in (DiskPublisher(FakeWorkers(), link, tmp_path, nothing),):
        with pytest.raises(RequestRejected, match="NaN"):
            await publisher.publish(1)


async def test_disk_keeps_two_versions(tmp_path: Path) -> None:
    publisher = DiskPublisher(FakeWorkers(), FakeLink(), tmp_path, nothing)
    for version in range(1, 5):
        await publisher.publish(version)
    await publisher.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v_3", "v_4"]


@pytest.mark.parametrize(
    ("running", "ours", "paths", "field"),
    [
        ("retract", True, ["update"], "retract"),
        ("in_place", True, ["update"], "in_place"),
        ("wait", True, ["pause wait", "update", "continue"], "retract"),
        ("in_place", False, ["pause in_place", "update", "continue"], None),
    ],
)
async def test_what_becomes_of_running_requests_is_said(
    tmp_path: Path, running: str, ours: bool, paths: list[str], field: str | None
) -> None:
    link = FakeLink(running, ours=ours)
    await DiskPublisher(FakeWorkers(), link, tmp_path, nothing).publish(1)
    said = [f"{path[1:].split('_')[0]} {body.get('mode', '')}".strip() for path, body in link.asked]
    assert said == paths
    update = next(body for path, body in link.asked if path.startswith("/update"))
    assert update.get("running") == field
    assert ("checksum" in update) == ours


async def test_a_group_counts_the_serving_replicas_ranks_and_is_made_again_after_a_refusal(tmp_path: Path) -> None:
    link = FakeLink()
    publisher = BroadcastPublisher(
        FakeWorkers(), link, tmp_path, nothing, bucket_bytes=10, address="127.0.0.1", backend="gloo"
    )
    await publisher.publish(1)
    await publisher.publish(2)
    joins = [body["world_size"] for path, body in link.asked if path == "/init_weights_update_group"]
    assert joins == [3], "the trainer and the two ranks of the one that serves"
    link.refuses = RequestRejected("a member is gone")
    with pytest.raises(ServerError, match="a member is gone"):
        await publisher.publish(3)
    link.refuses = None
    await publisher.publish(3)
    paths = [path for path, _ in link.asked]
    assert paths.count("/init_weights_update_group") >= 3
    assert paths.index("/destroy_weights_update_group") < len(paths) - 1
