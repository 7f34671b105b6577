"""Sessions over replicas that are killed and stopped while the weights change every second.

`make chaos` runs it for two minutes, CI for 10 seconds. `test_run_chaos.py` does the like to a whole run.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.rollout_server.support import CONTEXT, TOLERANCE, Reference, random_ids, save_model

SECONDS = float(os.environ.get("CHAOS_SECONDS", "10"))
ROOT = Path(__file__).parents[2]
REPLICAS, SESSIONS, TURNS = 4, 256, 4
UPDATE_EVERY_S, HURT_EVERY_S = 1.0, 6.0
NOBODY = ("no replica serves", "no serving replica could load")
"""Answers to an update while all replicas are being started again, or are killed by it."""
CHECKED = 1500
"""Answers whose every token is checked against its version's own forward pass, those over several versions first."""


@dataclass
class Answered:
    rid: str
    prompt: list[int]
    ids: list[int]
    logprobs: list[float]
    spans: list[tuple[str, int, int]]


class Chaos:
    """One server, and everything that is done to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model = save_model(folder / "v_0", "qwen2", seed=0)
        self.log = folder / "server.log"
        self.answers: list[Answered] = []
        self.asked = 0
        self.hurt = {"killed": 0, "stopped": 0}
        self.versions = 0
        self.pids: set[int] = set()
        self._end = 0.0

    def folder_of(self, version: int | str) -> Path:
        return self._folder / f"v_{version}"

    async def run(self) -> None:
        ready = self._folder / "ready.json"
        command = [
            sys.executable, "-P", "-m", "rollout_server", "--model", str(self._model), "--replicas", str(REPLICAS),
            "--weights-root", str(self._folder), "--probe-timeout", "2", "--start-timeout", "30",
            "--stream-tokens", "8", "--log-dir", str(self._folder / "logs"), "--ready-file", str(ready),
        ]  # fmt: skip
        with self.log.open("wb") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            server = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment)  # noqa: ASYNC220
        try:
            while not ready.exists():
                assert server.poll() is None, self.log.read_text()
                await asyncio.sleep(0.1)
            url = json.loads(ready.read_text())["url"]
            async with AsyncExitStack() as stack:
                clients = [await stack.enter_async_context(client_of(url)) for _ in range(1 + SESSIONS)]
                await self._abuse(server, *clients)
                await self._comes_to_rest(clients[0])
            self._note_children(server)
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                code = server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                raise
        assert code in (0, -signal.SIGTERM)

    async def _abuse(
        self, server: subprocess.Popen[bytes], trainer: httpx.AsyncClient, *clients: httpx.AsyncClient
    ) -> None:
        self._end = time.monotonic() + SECONDS
        trouble = [asyncio.create_task(self._update(trainer)), asyncio.create_task(self._hurt(server))]
        sessions = [asyncio.create_task(self._sessions(i, http)) for i, http in enumerate(clients)]
        await asyncio.gather(*sessions)
        for task in trouble:
            await task

    async def _sessions(self, index: int, http: httpx.AsyncClient) -> None:
        """One session after the other, each of so many turns, until the time is over."""
        rnd = random.Random(index)
        number = 0
        while time.monotonic() < self._end:
            ids = random_ids(rnd.randint(5, 60), seed=1000 * index + number)
            for turn in range(TURNS):
                new = rnd.choice((4, 16, 64))
                if len(ids) + new + 3 > CONTEXT:
                    break
                ids = ids + await self._ask(http, ids, new, f"{index}-{number}", turn) + [3, 4]
            number += 1

    async def _ask(self, http: httpx.AsyncClient, ids: list[int], new: int, session: str, turn: int) -> list[int]:
        rid = f"{session}-{turn}"
        body = {"rid": rid, "input_ids": ids, "sampling_params": {"max_new_tokens": new, "ignore_eos": True}}
        self.asked += 1
        response = await http.post("/generate", json=body, headers={"X-Session-Id": session})
        assert response.status_code == 200, response.text
        answer = response.json()
        meta = answer["meta_info"]
        spans = [(s["version"], s["start"], s["end"]) for s in meta["weight_versions"]]
        logprobs = [pair[0] for pair in meta["output_token_logprobs"]]
        assert meta["id"] == rid and len(answer["output_ids"]) == len(logprobs) == new
        self.answers.append(Answered(rid, ids, answer["output_ids"], logprobs, spans))
        return list(answer["output_ids"])

    async def _update(self, http: httpx.AsyncClient) -> None:
        while time.monotonic() < self._end:
            begin = time.monotonic()
            version = self.versions + 1
            await asyncio.to_thread(save_model, self.folder_of(version), "qwen2", version)
            update = {"model_path": str(self.folder_of(version)), "weight_version": str(version)}
            taken = 0
            while taken != 200:
                # As a trainer's publisher does: it comes again while no replica serves, or after the last one that
                # served was killed while it loaded.
                assert (await http.post("/pause_generation", json={"mode": "retract"})).status_code == 200
                try:
                    response = await http.post("/update_weights_from_disk", json=update)
                finally:
                    assert (await http.post("/continue_generation", json={})).status_code == 200
                taken = response.status_code
                assert taken == 200 or any(reason in response.text for reason in NOBODY), response.text
                await asyncio.sleep(0 if taken == 200 else 0.2)
            facts = (await http.get("/server_info")).json()
            assert facts["weight_version"] == str(version)
            self.versions = version
            await asyncio.sleep(max(0.0, begin + UPDATE_EVERY_S - time.monotonic()))

    async def _hurt(self, server: subprocess.Popen[bytes]) -> None:
        rnd = random.Random(0)
        while time.monotonic() < self._end - HURT_EVERY_S:
            await asyncio.sleep(HURT_EVERY_S / 2)
            replicas = self._note_children(server)
            for how, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
                if len(replicas) > 1:
                    victim = replicas.pop(rnd.randrange(len(replicas)))
                    victim.send_signal(number)
                    self.hurt[how] += 1
                await asyncio.sleep(HURT_EVERY_S / 4)

    def _note_children(self, server: subprocess.Popen[bytes]) -> list[psutil.Process]:
        children = psutil.Process(server.pid).children(recursive=True)
        self.pids |= {child.pid for child in children}
        return [child for child in children if child.status() != psutil.STATUS_STOPPED]

    async def _comes_to_rest(self, http: httpx.AsyncClient) -> None:
        """All replicas serve the last version again, and none holds a slot."""
        deadline = time.monotonic() + 150
        while True:
            facts: dict[str, Any] = (await http.get("/server_info")).json()
            states = facts["states"]
            if all(state["state"] == "serving" for state in states):
                break
            assert time.monotonic() < deadline, states
            await asyncio.sleep(0.5)
        for state in states:
            assert state["weight_version"] == str(self.versions)
            assert state["running"] == state["waiting"] == state["in_flight"] == state["in_flight_tokens"] == 0, state


def client_of(url: str) -> httpx.AsyncClient:
    """A client for one caller.

    A pool that hundreds share costs more than the server does: their requests crowd on the first free connection, and
    one that expires may be closed under a request that has just been given it.
    """
    return httpx.AsyncClient(base_url=url, timeout=120, verify=False, trust_env=False)  # noqa: S501  # no TLS at all


def check_spans(chaos: Chaos) -> int:
    """Compare tokens with the version that is said to have sampled them; returns how many answers were looked at."""
    for answer in chaos.answers:
        covered = 0
        for version, start, end in answer.spans:
            assert start == covered and end > start and 0 <= int(version) <= chaos.versions
            covered = end
        assert covered == len(answer.ids)
        order = [int(version) for version, _, _ in answer.spans]
        assert order == sorted(set(order)), answer.spans
    looked_at = sorted(chaos.answers, key=lambda answer: -len(answer.spans))[:CHECKED]
    by_version: dict[str, list[tuple[Answered, int, int]]] = {}
    for answer in looked_at:
        for version, start, end in answer.spans:
            by_version.setdefault(version, []).append((answer, start, end))
    for version, parts in by_version.items():
        reference = Reference(chaos.folder_of(version))
        for answer, start, end in parts:
            prompt = len(answer.prompt)
            expected = reference.logprobs(answer.prompt + answer.ids[:end], prompt + start, 1.0)
            worst = max(abs(a - b) for a, b in zip(answer.logprobs[start:end], expected, strict=True))
            assert worst <= 10 * TOLERANCE, (answer.rid, version, start, end, worst)
    return len(looked_at)


@pytest.mark.chaos
async def test_no_request_is_lost_and_no_span_is_wrong(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path)
    await chaos.run()
    rids = [answer.rid for answer in chaos.answers]
    assert len(rids) == len(set(rids)) == chaos.asked
    looked_at = check_spans(chaos)
    several = sum(len(answer.spans) > 1 for answer in chaos.answers)
    print(
        f"{chaos.asked} requests answered once, {several} of them over several of {chaos.versions} versions, "
        f"{looked_at} checked token by token; replicas: {chaos.hurt}"
    )
    assert several and chaos.hurt["killed"] and chaos.hurt["stopped"]
    assert not [pid for pid in chaos.pids if psutil.pid_exists(pid)], "a process is left"
    shutil.rmtree(tmp_path, ignore_errors=True)
