"""One contract, four targets: the torch engine, a bare SGLang, and our server over replicas of each.

The two targets with SGLang need it in an environment of its own: `make test-sglang` makes one. Elsewhere they are
deselected by their mark, or skipped.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import forked

Process = subprocess.Popen[bytes] | forked.Forked

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "recipes/quickstart/model"
START_TIMEOUT_S = 300.0
KINDS = ("torch", "torch-fleet", pytest.param("sglang", marks=pytest.mark.sglang),
         pytest.param("sglang-server", marks=pytest.mark.sglang))  # fmt: skip

torch.set_num_threads(1)


def sglang_python() -> str:
    """The interpreter of SGLang's environment; the test is skipped when there is none."""
    named = os.environ.get("AGENTLOOP_SGLANG_PYTHON")
    python = named or str(ROOT / ".venv-sglang/bin/python")
    if named is None and not Path(python).exists():
        pytest.skip("no SGLang environment: make test-sglang")
    return python


@dataclass
class Target:
    """A server that speaks the dialect, and what may be asked of it."""

    kind: str
    url: str
    process: Process
    log: Path
    folders: dict[str, Path]
    version: str = "0"
    rids: int = 0
    http: httpx.AsyncClient = field(init=False)

    @property
    def ours(self) -> bool:
        """Our server answers, whatever the engine behind it."""
        return self.kind != "sglang"

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def generate(
        self,
        ids: list[int],
        new: int = 16,
        *,
        session: str | None = None,
        fields: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> Answer:
        """Generate; anything but a 200 fails the test. `fields`: further fields of the request."""
        self.rids += 1
        rid = sampling.pop("rid", f"{self.kind}-{self.rids}")
        body = {
            "rid": rid,
            "input_ids": ids,
            "sampling_params": {"max_new_tokens": new, "ignore_eos": True, **sampling},
            "return_logprob": True,
            **(fields or {}),
        }
        response = await self.http.post(
            "/generate", json=body, headers={} if session is None else {"X-Session-Id": session}
        )
        assert response.status_code == 200, response.text
        answer = Answer(response.json())
        assert answer.meta["id"] == rid
        answer.check(self.version)
        return answer

    async def start(self, ids: list[int], new: int, *, after: int = 20, **sampling: Any) -> asyncio.Task[Answer]:
        """Generate, and return while it runs: when `after` tokens have been sampled."""
        self.rids += 1
        body = {
            "rid": sampling.pop("rid", f"{self.kind}-{self.rids}"),
            "input_ids": ids,
            "sampling_params": {"max_new_tokens": new, "ignore_eos": True, "stream_interval": 10, **sampling},
            "return_logprob": True,
            "stream": True,
        }
        runs = asyncio.Event()

        async def follow() -> Answer:
            last: dict[str, Any] = {}
            async with self.http.stream("POST", "/generate", json=body) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        last = json.loads(line.removeprefix("data: "))
                        if len(last["output_ids"]) >= after:
                            runs.set()
            answer = Answer(last)
            answer.check(self.version)
            return answer

        task = asyncio.create_task(follow())
        waiting = asyncio.create_task(runs.wait())
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        assert not task.done(), "it ended before it could be interrupted"
        return task

    async def update(self, version: str) -> None:
        """Serve another version of the weights."""
        response = await self.post(
            "/update_weights_from_disk", model_path=str(self.folders[version]), weight_version=version
        )
        assert response.status_code == 200 and response.json()["success"], response.text
        self.version = version


class Answer:
    """One answer of `/generate`, taken apart."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.ids: list[int] = body["output_ids"]
        self.meta: dict[str, Any] = body["meta_info"]
        pairs = self.meta["output_token_logprobs"]
        self.logprobs = [pair[0] for pair in pairs]
        assert [pair[1] for pair in pairs] == self.ids
        self.finish: dict[str, Any] = self.meta["finish_reason"]

    @property
    def spans(self) -> list[tuple[str, int, int]]:
        return [(s["version"], s["start"], s["end"]) for s in self.meta["weight_versions"]]

    def check(self, version: str) -> None:
        """What is true of every answer."""
        assert self.meta["completion_tokens"] == len(self.ids)
        assert all(logprob <= 0 for logprob in self.logprobs)
        covered = 0
        for _, start, end in self.spans:
            assert start == covered and end > start
            covered = end
        assert covered == len(self.ids)
        # A bare SGLang that was never updated calls its weights "default".
        if version != "0":
            assert self.meta["weight_version"] == version


class Reference:
    """transformers' own forward pass over one version of the weights."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @torch.no_grad()
    def table(self, ids: list[int], start: int, temperature: float = 1.0) -> torch.Tensor:
        """Logprobs [len(ids) - start, vocabulary] of what follows each of `ids[start - 1 : -1]`."""
        logits = self._model(torch.tensor([ids])).logits[0, start - 1 : -1]
        return torch.log_softmax(logits / temperature, -1)

    def logprobs(self, prompt: list[int], answer: list[int], temperature: float = 1.0) -> list[float]:
        table = self.table(prompt + answer, len(prompt), temperature)
        return [float(table[i, token]) for i, token in enumerate(answer)]

    @torch.no_grad()
    def next(self, history: list[int], token: int, past: Reference | None = None) -> float:
        """Logprob of `token` after `history`; keys and values of all but its last token from `past`, if given."""
        if past is None:
            logits = self._model(torch.tensor([history])).logits
        else:
            kept = past._model(torch.tensor([history[:-1]]), use_cache=True).past_key_values
            logits = self._model(torch.tensor([history[-1:]]), past_key_values=kept).logits
        return float(torch.log_softmax(logits[0, -1], -1)[token])

    @torch.no_grad()
    def greedy(self, prompt: list[int], new: int, guess: Sequence[int] = ()) -> list[int]:
        """The likeliest ids, one after the other.

        Args:
            guess: ids whose start may be right. One forward pass finds how far they are, where each id that is
                not guessed takes a pass of its own.
        """
        ids = list(prompt)
        if guess:
            likeliest = self.table([*prompt, *guess], len(prompt)).argmax(-1).tolist()
            for token, expected in zip(guess, likeliest, strict=True):
                if len(ids) == len(prompt) + new or token != expected:
                    break
                ids.append(token)
        while len(ids) < len(prompt) + new:
            ids.append(int(self._model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two versions of weights that answer differently. Version 0 is the quickstart's model."""
    folder = tmp_path_factory.mktemp("weights")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.3)
    model.save_pretrained(folder / "v1")
    return {"0": MODEL, "1": folder / "v1"}


@pytest.fixture(scope="session")
def references(folders: dict[str, Path]) -> dict[str, Reference]:
    return {version: Reference(folder) for version, folder in folders.items()}


@pytest.fixture(scope="module")
def start_target(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Target]]:
    """Start targets of any kind; they end with the module, because an idle SGLang keeps a core busy."""
    started: list[Target] = []

    def start(
        kind: str,
        dtype: str = "float32",
        folders: dict[str, Path] = folders,
        environment: Mapping[str, str] = {},
        options: Sequence[str] = (),
    ) -> Target:
        model = str(folders["0"])
        images = folders["0"] != MODEL
        folder = tmp_path_factory.mktemp(kind)
        port = _free_port()
        log = folder / "log"
        if kind == "sglang":
            command = [
                sglang_python(), "-m", "sglang.launch_server", "--model-path", model, "--host", "127.0.0.1",
                "--port", str(port), "--device", "cpu", "--dtype", dtype,
                "--attention-backend", "torch_native", "--max-total-tokens", "100000", "--skip-tokenizer-init",
                "--random-seed", "0", "--enable-fp32-lm-head", "--sleep-on-idle",
                "--disable-overlap-schedule", *([] if images else ["--model-impl", "transformers"]), *options,
            ]  # fmt: skip
            with log.open("wb") as out:
                process: Process = subprocess.Popen(
                    command, stdout=out, stderr=out, cwd=folder, start_new_session=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **environment},
                )  # fmt: skip
        else:
            words = ["--model", model, "--port", str(port), "--dtype", dtype, "--log-dir", str(folder)]
            for root in {path.parent for path in folders.values()}:
                words += ["--weights-root", str(root)]
            if kind == "torch-fleet":
                words += ["--replicas", "2"]
            if kind == "sglang-server":
                words += ["--engine", "sglang", "--python", sglang_python(), "--in-place-updates"]
            process = forked.start("rollout_server", [*words, *options], log, environment)
        target = Target(kind, f"http://127.0.0.1:{port}", process, log, folders)
        started.append(target)
        return target

    yield start
    for target in started:
        target.process.terminate()
    for target in started:
        try:
            target.process.wait(20)
        except subprocess.TimeoutExpired:
            target.process.kill()


@pytest.fixture(scope="module")
def running(start_target: Callable[..., Target], request: pytest.FixtureRequest) -> Callable[[str, str], Target]:
    """The one target of a kind and dtype, started when it is first asked for. Those with SGLang take half a minute,
    so that both are started at once."""
    targets: dict[tuple[str, str], Target] = {}

    def get(kind: str, dtype: str = "float32") -> Target:
        kinds = {kind, "sglang", "sglang-server"} if "sglang" in kind and dtype == "float32" else {kind}
        for each in sorted(kinds):
            if (each, dtype) not in targets:
                targets[each, dtype] = start_target(each, dtype)
        wait_until_served(targets[kind, dtype])
        return targets[kind, dtype]

    return get


@pytest.fixture(params=KINDS)
async def target(request: pytest.FixtureRequest, running: Callable[[str], Target]) -> Any:
    """Each of the four, at version 0, with nothing under way and nothing paused."""
    target = running(request.param)
    async with httpx.AsyncClient(base_url=target.url, timeout=120, trust_env=False) as target.http:
        yield target
        await target.post("/continue_generation")
        await target.post("/abort_request", rid="", abort_all=True)
        for _ in range(100):
            if (await target.post("/flush_cache")).status_code == 200:
                break
            await asyncio.sleep(0.1)
        if target.version != "0":
            await target.update("0")


def wait_until_served(target: Target) -> None:
    """Return once it answers."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert target.process.poll() is None, target.log.read_text(errors="replace")[-3000:]
        try:
            if httpx.get(target.url + "/health", timeout=30, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"{target.kind} did not serve: {target.log.read_text(errors='replace')[-3000:]}")


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
