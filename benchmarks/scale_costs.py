"""The measured costs and the assumptions of `scale_model.py`, each with where it comes from.

Costs are CPU seconds of one core of the AMD EPYC machine of RESULTS.md, Python 3.11. `MEASURED` costs are printed again
by `python benchmarks/scale_model.py --measure`; they were measured while other programs used both cores, which makes
them too high rather than too low. Everything about a GPU or a network is an assumption: no card has run these
benchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass

US, NS = 1e-6, 1e-9


@dataclass(frozen=True)
class Cost:
    """Seconds of one core, and where the figure is from.

    Attributes:
        key: the line of `--measure` that prints it again; empty: a benchmark of its own does.
    """

    seconds: float
    unit: str
    source: str
    key: str = ""


MEASURED = "python benchmarks/scale_model.py --measure"

COSTS = {
    # -- the main process (driver) ------------------------------------------------------------------
    "boundary": Cost(85 * US, "an episode that an agent worker runs", MEASURED, "boundary_us"),
    "prepare": Cost(14.5 * US, "an episode: sample, advantages, packed length", MEASURED, "prepare_us"),
    "prepare_token": Cost(4.2 * NS, "a token of it", MEASURED, "prepare_token_ns"),
    "send": Cost(26 * US, "an episode: divide over 64 ranks, encode, write to sockets", MEASURED, "send_us"),
    "send_token": Cost(5.4 * NS, "a token of it", MEASURED, "send_token_ns"),
    "report": Cost(9 * US, "an episode: metrics of the step, trace records", MEASURED, "report_us"),
    "report_token": Cost(12.7 * NS, "a token of it", MEASURED, "report_token_ns"),
    "trace": Cost(129 * US, "an episode written to the trace, in a thread", MEASURED, "trace_us"),
    "trace_token": Cost(51 * NS, "a token of it", MEASURED, "trace_token_ns"),
    "signals": Cost(41 * US, "an episode judged for signals, in a thread", MEASURED, "signals_us"),
    "signals_token": Cost(5.1 * NS, "a token of it", MEASURED, "signals_token_ns"),
    # -- where episodes run -------------------------------------------------------------------------
    "generation": Cost(
        460 * US, "a generation: render, request, answer, ledger, a share of tool call and reward", MEASURED,
        "generation_us",
    ),
    "generation_token": Cost(720 * NS, "a sampled token of it", MEASURED, "generation_token_ns"),
    "client_prompt_token": Cost(
        145 * US / 63_676, "a prompt token in the JSON of a request",
        "python benchmarks/loop_overhead.py: 145 us at 63,676 tokens",
    ),
    # -- the router ---------------------------------------------------------------------------------
    "request": Cost(1 / 10_790, "a small request", "python benchmarks/router.py: 10,790 requests/s"),
    "router_prompt_token": Cost(
        68 * NS, "a prompt token: parse, check, write again", MEASURED, "router_prompt_token_ns"
    ),
    "router_answer_token": Cost(308 * NS, "a sampled token: read, write again", MEASURED, "router_answer_token_ns"),
    "event": Cost(39 * US, "a streamed event of 64 tokens from a replica", MEASURED, "router_event_us"),
    # -- publishing ---------------------------------------------------------------------------------
    "publish_byte": Cost(
        0.059 / 0.99e9, "a byte written and hashed by rank 0",
        "python benchmarks/publish.py: 59 ms of one core for 0.99 GB",
    ),
    "folder_byte": Cost(
        0.531 / 0.99e9, "a byte written to a folder and read once",
        "python benchmarks/publish.py: 531 ms for 0.99 GB, in /dev/shm",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A model's sizes, from its public config.json.

    Attributes:
        kv_bytes: of the KV cache a token, bfloat16.
        gpus: of one replica (tensor parallelism).
    """

    parameters: float
    kv_bytes: int
    gpus: int


MODELS = {
    "0.5B": Model(0.49e9, 2 * 2 * 24 * 2 * 64, 1),  # Qwen2.5-0.5B: 24 layers, 2 KV heads of 64
    "7B": Model(7.62e9, 2 * 2 * 28 * 4 * 128, 1),  # Qwen2.5-7B: 28 layers, 4 KV heads of 128
    "32B": Model(32.8e9, 2 * 2 * 64 * 8 * 128, 4),  # Qwen2.5-32B: 64 layers, 8 KV heads of 128
}


@dataclass(frozen=True)
class Workload:
    """Mean sizes of an episode. ASSUMED: typical of their kind, not measured on a real run.

    Attributes:
        sampled: tokens of a turn; lognormal in the simulation.
        observed: tokens of tool results between two turns.
        tool_s: seconds that a tool takes, elsewhere.
    """

    turns: int
    prompt: int
    sampled: int
    observed: int
    tool_s: float


WORKLOADS = {
    "maths": Workload(turns=1, prompt=200, sampled=2000, observed=0, tool_s=0.0),
    "tools": Workload(turns=4, prompt=400, sampled=200, observed=500, tool_s=0.5),
    "agentic": Workload(turns=40, prompt=2000, sampled=300, observed=700, tool_s=2.0),
}


@dataclass(frozen=True)
class Assumed:
    """What was not measured. Each is a flag of `scale_model.py`.

    Attributes:
        peak_flops, memory_bytes_s, memory_bytes: dense bfloat16, HBM: data sheet of NVIDIA's H100 SXM.
        trainer_share: of the peak that the trainer reaches; the target of `train.py --device cuda` is 0.45.
        prefill_share: of the peak in prefill.
        memory_share: of the memory bandwidth in decoding. Roofline: a step reads the weights and the cache once.
        engine_step_s: shortest step of an engine, for its scheduler in Python and kernel launches.
        running: sequences that a replica decodes at once, a GPU of it.
        network_bytes_s: of rank 0's link: 400 Gb/s InfiniBand.
        folder_bytes_s: of a shared file system, all readers together.
        engine_tokens_s, trainer_tokens_s: a GPU; None: from the figures above.
        stream_tokens: `rollout.stream_tokens`; 0: answers are not streamed.
        episodes_gpu: episodes of a step for each GPU.
        traced: share of steps whose trace is written (1 / `trace.train_every`).
        target: utilization at which one more process is due.
    """

    peak_flops: float = 989e12
    memory_bytes_s: float = 3.35e12
    memory_bytes: float = 80e9
    trainer_share: float = 0.4
    prefill_share: float = 0.4
    memory_share: float = 0.5
    engine_step_s: float = 0.005
    running: int = 128
    network_bytes_s: float = 50e9
    folder_bytes_s: float = 20e9
    engine_tokens_s: float | None = None
    trainer_tokens_s: float | None = None
    stream_tokens: int = 64
    episodes_gpu: int = 64
    traced: float = 1.0
    target: float = 0.7
