"""From how many GPUs on which process of a run is full: a model of capacities, and a simulation with queues beside it.

    python benchmarks/scale_model.py                    # the tables of docs/scale.md, in a second
    python benchmarks/scale_model.py --simulate         # the same pipeline with queues and long tails, two minutes
    python benchmarks/scale_model.py --measure          # the costs of `scale_costs.py` again, a minute of CPU
    python benchmarks/scale_model.py --stream-tokens 0 --peak-flops 2.25e15      # other assumptions

Measured: CPU of the product's own functions (`scale_costs.py` names the command of each). Assumed: all of GPUs, network
and workloads; each assumption is an option. Exit code 1: the simulation is not within 15% of the model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from quick import QUICK, add_quick_option, expect, expect_between
from scale_capacity import WAIT_SHARE, Plan, Publish
from scale_costs import COSTS, MODELS, WORKLOADS, Assumed
from scale_simulation import GROUP, Run

TOLERANCE = 0.15
"""Most that the simulated episodes a second may differ from the model's."""

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
FIXED_EPISODES = 8192
"""Episodes of a step whose size does not grow with the GPUs: 512 prompts x 16, the batch of DAPO (arXiv:2503.14476)."""

CASES = (
    # workload, model, the part, its utilization by the model, routers, stream_tokens, episodes a step, steps
    ("maths", "0.5B", "router", 0.5, 1, 64, 2048, 7),
    ("maths", "0.5B", "router", 0.9, 1, 64, 2048, 7),
    ("maths", "0.5B", "router", 1.3, 1, 64, 2048, 7),
    ("tools", "0.5B", "router", 0.5, 1, 64, 1024, 7),
    ("tools", "0.5B", "router", 0.9, 1, 64, 1024, 7),
    ("tools", "0.5B", "router", 1.3, 1, 64, 1024, 7),
    ("agentic", "7B", "router", 0.5, 1, 64, 768, 5),
    ("agentic", "7B", "router", 0.9, 1, 64, 768, 5),
    ("agentic", "7B", "router", 1.3, 1, 64, 768, 5),
    ("maths", "0.5B", "driver", 0.5, 8, 0, 8192, 7),
    ("maths", "0.5B", "driver", 0.7, 8, 0, 8192, 7),
    ("maths", "0.5B", "driver", 1.3, 8, 0, 8192, 7),
)
QUICK_CASES = (("maths", "0.5B", "router", 0.5, 1, 64, 1024, 6), ("maths", "0.5B", "router", 1.3, 1, 64, 1024, 6))


def shortened(plan: Plan) -> Plan:
    """Return the same plan with little latency: a sequence at a time a GPU, tools fifty times as fast, equal rates.

    With it the GPUs are busy all the time, as the model has it. What long tails take from them is in `tails`.
    """
    rate = plan.gpus.engine_tokens_s
    work = replace(plan.work, tool_s=plan.work.tool_s / 50)
    return replace(plan, work=work, assumed=replace(plan.assumed, running=1, engine_tokens_s=rate))


def simulate(case: Sequence[Any], assumed: Assumed) -> dict[str, Any]:
    """Run one case of `CASES` by model and by simulation."""
    workload, model, part, utilization, routers, stream_tokens, episodes, steps = case
    assumed = replace(assumed, stream_tokens=stream_tokens)
    plan = shortened(Plan(WORKLOADS[workload], MODELS[model], assumed))
    gpus = plan.gpus_at(part, utilization)
    workers = 2 * plan.needed("worker", gpus)  # never the limit here
    publish_s = Publish.of(plan.model, assumed).broadcast
    rates = plan.throughput(gpus, workers=workers, routers=routers, episodes=episodes, publish_s=publish_s)
    limit = min(rates, key=rates.__getitem__)
    result = Run(plan, gpus, episodes // GROUP, steps, workers, routers=routers, publish_s=publish_s).simulate()
    check(result, episodes * steps)
    return {
        "workload": workload, "model": model, "part": part, "utilization": utilization, "gpus": gpus, "limit": limit,
        "model_rate": rates[limit], "rate": result.rate, "ratio": result.rate / rates[limit],
        "of_gpus": result.rate / rates["engine"], "share": result.share, "routers": routers,
        "wait_p50_ms": 1e3 * result.wait(part, 0.5), "wait_p99_ms": 1e3 * result.wait(part, 0.99),
        "events": result.events,
    }  # fmt: skip


def check(result: Any, episodes: int) -> None:
    """Check what holds in every simulated run."""
    expect("episodes that finished", result.finished, episodes)
    expect("how often an episode was trained", set(result.trained), {1})
    expect("steps that a group is stale, at most 1", result.stale <= 1, True)
    for name, share in result.share.items():
        expect_between(f"utilization of {name}", share, 0.0, 1.001)


def tails(assumed: Assumed) -> list[dict[str, Any]]:
    """Simulate real latencies: how much of the GPUs' time a step's long tail takes, by episodes of a step."""
    rows = []
    plan = Plan(WORKLOADS["maths"], MODELS["7B"], assumed)
    gpus = 32
    for episodes in (1024, 2048, 4096, 8192):
        workers = 2 * plan.needed("worker", gpus)
        result = Run(plan, gpus, episodes // GROUP, 6, workers).simulate()
        check(result, episodes * 6)
        ideal = plan.throughput(gpus, workers=workers, episodes=episodes)["engine"]
        rows.append({"gpus": gpus, "episodes": episodes, "of_gpus": result.rate / ideal})
    return rows


# -- tables ----------------------------------------------------------------------------------------


def shown(number: float) -> str:
    """Return a number with two digits that count."""
    if math.isinf(number):
        return "-"
    if number >= 100:
        return f"{round(number, 1 - math.floor(math.log10(number))):,.0f}"
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def table(title: str, columns: str, rows: Sequence[Sequence[object]]) -> None:
    """Print a table in Markdown; `columns` are divided by bars."""
    names = columns.split("|")
    print(f"\n{title}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def print_thresholds(assumed: Assumed) -> None:
    rows = []
    for workload, work in WORKLOADS.items():
        for name, model in MODELS.items():
            plan = Plan(work, model, assumed)
            whole = Plan(work, model, replace(assumed, stream_tokens=0))
            numbers = [
                plan.gpus_at("driver alone", assumed.target),
                plan.gpus_at("router", assumed.target),
                whole.gpus_at("router", assumed.target),
                plan.gpus_at("driver", assumed.target),
                plan.ranks_wait_at(),
                plan.connections_at(),
                plan.publish_at(FIXED_EPISODES, "broadcast"),
                plan.publish_at(FIXED_EPISODES, "folder"),
            ]
            rows.append([workload, name, *map(shown, numbers)])
    table(
        f"GPUs from which one process is busier than {assumed.target:.0%}; for ranks and publish, they take a "
        f"tenth of the trainer's time ({FIXED_EPISODES:,} episodes a step):",
        "workload|model|main process, no agent workers|router|router, stream_tokens 0|main process, agent workers|"
        "ranks wait for it|28,232 connections|publish by broadcast|publish by folder",
        rows,
    )


def print_costs(assumed: Assumed) -> None:
    rows = []
    for workload, work in WORKLOADS.items():
        for name, model in MODELS.items():
            plan = Plan(work, model, assumed)
            sizes, cpu, gpus = plan.sizes, plan.cpu, plan.gpus
            times = [f"{1e3 * seconds:.2f}" for seconds in (cpu.worker, cpu.router, cpu.driver, cpu.serial)]
            shares = [f"{seconds:.3f}" for seconds in (gpus.rollout_s, gpus.train_s)]
            rates = [shown(gpus.engine_tokens_s), shown(gpus.trainer_tokens_s)]
            rows.append([workload, name, f"{sizes.length:,.0f}", f"{sizes.asked:,.0f}", *times, *shares, *rates])
    table(
        "What a mean episode costs: CPU in ms of one core, GPU in s:",
        "workload|model|tokens|sent as prompts|agent worker|router|main process|of it ranks wait|GPU rollout|"
        "GPU training|engine tokens/s a GPU|trainer tokens/s a GPU",
        rows,
    )


def print_sizes(plan: Plan, title: str) -> None:
    rows = []
    for gpus in SIZES:
        demand = plan.demand(gpus)
        workers = plan.needed("worker", gpus)
        rates = plan.throughput(gpus, workers=workers)
        limit = min(rates, key=rates.__getitem__)
        share = rates[limit] / rates["engine"]
        if limit in ("engine", "trainer"):
            limit = "GPUs" if share > 1 - WAIT_SHARE else "ranks wait"
        bytes_s = (demand["router_bytes_s"] / 1e6, demand["rank_bytes_s"] / 1e6)
        rates_s = (demand["episodes_s"], demand["requests_s"], demand["sampled_tokens_s"])
        needed = (workers, plan.needed("router", gpus), plan.needed("driver", gpus))
        numbers = (*rates_s, *bytes_s, demand["in_flight"])
        rows.append([f"{gpus:,}", *map(shown, numbers), *needed, f"{share:.0%}", limit])
    table(
        f"{title}:",
        "GPUs|episodes/s|requests/s|sampled tokens/s|MB/s at routers|MB/s to ranks|in flight|agent workers|routers|"
        "main processes|with one router and main process, of what the GPUs can|limit",
        rows,
    )


def print_simulated(found: Sequence[dict[str, Any]]) -> None:
    rows = []
    for row in found:
        busy = [f"{row['share'][name]:.2f}" for name in ("router", "driver")]
        rates = [f"{row['model_rate']:,.1f}", f"{row['rate']:,.1f}", f"{row['ratio']:.2f}"]
        waits = [f"{row['wait_p50_ms']:.1f}", f"{row['wait_p99_ms']:.0f}"]
        full = f"{row['part']} {row['utilization']:.1f}"
        rows.append([row["workload"], row["model"], f"{row['gpus']:.0f}", full, row["limit"], *rates, *busy, *waits])
    table(
        "Simulated, with queues, long-tailed lengths and publishes; waits are those at the named part:",
        "workload|model|GPUs|full by the model|the model's limit|episodes/s, model|simulated|ratio|router busy|"
        "main process busy|wait p50 ms|p99 ms",
        rows,
    )


def print_tails(found: Sequence[dict[str, Any]]) -> None:
    rows = [[row["gpus"], f"{row['episodes']:,}", f"{row['of_gpus']:.2f}"] for row in found]
    table("With real latencies (maths, 7B), simulated:", "GPUs|episodes a step|of what the GPUs can", rows)


def print_measured(*, quick: bool) -> None:
    """Print each cost as measured now beside the constant."""
    from scale_measure import measure, measure_episodes

    found = measure(rounds=1, lengths=(256, 1024)) if quick else {**measure(rounds=9), **measure_episodes()}
    keys = {cost.key: cost for cost in COSTS.values() if cost.key}
    rows = []
    for key, value in found.items():
        if (cost := keys.get(key)) is not None:
            constant = cost.seconds * (1e9 if key.endswith("_ns") else 1e6)
            rows.append([key, cost.unit, f"{value:.1f}", f"{constant:.1f}"])
        expect_between(key, value, -1e4 if quick else 0.0, 1e6)
    table("CPU, us or (for a token) ns:", "cost|what|now|constant", rows)
    if not quick:
        expect("costs that were measured", keys.keys() <= found.keys(), True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true", help="run the simulation too")
    parser.add_argument("--measure", action="store_true", help="only measure the costs again")
    parser.add_argument("--json", type=Path, help="write the simulated figures here")
    for one in fields(Assumed):
        kind = int if isinstance(one.default, int) else float
        parser.add_argument(
            f"--{one.name.replace('_', '-')}", type=kind, default=one.default, help="see scale_costs.py"
        )
    add_quick_option(parser)
    options = parser.parse_args()
    assumed = Assumed(**{one.name: getattr(options, one.name) for one in fields(Assumed)})
    if options.measure or options.quick:
        print_measured(quick=options.quick)
        if not options.quick:
            return 0

    print_thresholds(assumed)
    print_costs(assumed)
    for workload, model in (("maths", "7B"), ("tools", "7B"), ("agentic", "7B")):
        print_sizes(Plan(WORKLOADS[workload], MODELS[model], assumed), f"{workload}, {model}")
    if not options.simulate and not options.quick:
        return 0

    rows = [simulate(case, assumed) for case in (QUICK_CASES if options.quick else CASES)]
    print_simulated(rows)
    slow = [] if options.quick else tails(assumed)
    if slow:
        print_tails(slow)
    if options.json:
        options.json.write_text(json.dumps({"assumed": asdict(assumed), "cases": rows, "tails": slow}, indent=1))
    for row in rows:
        if options.quick:
            expect_between("simulated over the model's episodes/s", row["ratio"], 1 - TOLERANCE, 1 + TOLERANCE)
    if options.quick:
        print(QUICK)
        return 0
    missed = [row for row in rows if abs(row["ratio"] - 1) > TOLERANCE]
    print(
        f"\nMISSED: {len(missed)} cases are not within {TOLERANCE:.0%}" if missed else f"\nall within {TOLERANCE:.0%}"
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
