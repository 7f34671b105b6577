"""Measure the cost of the agent loops beside the engine: CPU, episodes a second and memory, on one
core.

    python benchmarks/loop_overhead.py [--json FILE]

Real: `EpisodeRunner`, `ToolAgent`, `Episode`, `ChatRenderer`, `TokenLedger`, `ToolSession`, the
Qwen tokenizer and template, a reward function. Fake: the client, which answers at once with 64
canned ids, and a tool that returns at once. All episodes of a round are in flight together, and
their trajectories are kept until it ends. Each measurement runs in its own process, on one core,
after a warm-up; the table shows the median of three such processes, by CPU. Seconds are CPU time
(`time.process_time`).

Memory: the peak growth of the process in the first round, per episode. Tokens: the four columns of
a trajectory with everything that they have allocated (`sys.getsizeof`). Bytes a token: the same
divided by the number of tokens. One more line, measured once, holds `--held` episodes of 8
generations at the same time.

`distinct` is the relevant row: another tool result at every call and another prompt for every group
of 8 episodes. `same` repeats one prompt and one result, which the renderer caches.

Lag: the longest delay of an event loop callback (`LoopLagMonitor`).

Exit code 1: a bound is not met.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from material import REPO, SHARED, add_tokenizer_option, existing
from quick import QUICK, add_quick_option, expect
from quiet import OtherLoad

GENERATIONS = (2, 8)
AT_ONCE = (64, 512, 4096)
EPISODES = 4096
"""The fewest episodes of a measurement; they run in rounds."""

HELD, HELD_GENERATIONS = 16_384, 8
"""Episodes at once, and their generations, in the line that shows the memory of a large run."""

BOUNDS_MS = {2: 0.5, 8: 1.2}
"""CPU of an episode by generations: a tenth of what verl 0.9.1's agent-loop worker took."""

HEADLINES = ((2, 4096), (8, 512), (8, 4096))
"""The (generations, episodes at once) that the bounds are stated for."""

BOUND_KB, MEMORY_GENERATIONS = 20.0, 2
"""Memory of an episode beyond its tokens, for as many generations as verl's 130 KB were measured
with."""

BOUND_BYTES = 16.0
"""Memory of a token in the columns of a trajectory."""

BOUND_LAG_S, LAG_AT_ONCE = 0.05, 4096
"""The longest delay of an event loop callback, and the number of episodes at once that it is stated
for."""

BOUND_FLAT = 1.2
"""CPU of a turn after the longest history over that after the shortest; a larger ratio is not
flat."""

BOUND_SHARE = 0.02
VERL = """verl 0.9.1's agent-loop worker, measured the same way on one such core (figures of the issue that asked for
this benchmark; verl is not run here): 5.2 ms of CPU an episode of 2 generations at 4,096 at once, 190 episodes a
second, 130 KB an episode; 12.1 ms an episode of 8 generations at 512; 16 s of set-up."""


def measure(kind: str, options: argparse.Namespace, *arguments: Any) -> dict[str, Any]:
    """Run one measurement in a fresh process."""
    folders = ["--tokenizer", options.tokenizer, "--template", options.template]
    command = [sys.executable, REPO / "benchmarks" / "loop_worker.py", kind, *arguments, *folders]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return dict(json.loads(result.stdout))


def table(results: list[dict[str, Any]]) -> str:
    """Return the table, one line a measurement."""
    lines = [
        "| generations | at once | observed | CPU ms an episode | CPU µs a generation | episodes/s "
        "| KB an episode | of it tokens | beyond tokens | bytes a token | peak MB | lag ms, longest |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in results:
        memory = f"| {one['kb_episode']:.1f} | {one['kb_tokens']:.1f} | {one['kb_beyond_tokens']:.1f} "
        lines.append(
            f"| {one['generations']} | {one['at_once']:,} | {one['observed']} | {one['cpu_ms_episode']:.3f} "
            f"| {one['cpu_us_generation']:.0f} | {one['episodes_per_s']:,.0f} {memory}| {one['bytes_token']:.1f} "
            f"| {one['peak_mb']:.0f} | {1e3 * one['lag_max_s']:.0f} |"
        )
    return "\n".join(lines)


def history_text(result: dict[str, Any]) -> str:
    """Return the cost of a turn by history, and the share of rendering."""
    lines = ["| history, tokens up to | CPU µs a turn | JSON of the request, µs |", "|---:|---:|---:|"]
    lines += [f"| {band['to_tokens']:,} | {band['us_turn']:.0f} | {band['us_json']:.0f} |" for band in result["bands"]]
    cpu, turns, rendering = (1e3 * result[key] for key in ("cpu_s", "turns_cpu_s", "rendering_s"))
    lines += [
        "",
        f"One episode of {result['turns']} turns and {result['tokens']:,} tokens: {cpu:.0f} ms of CPU, of which "
        f"{turns:.0f} ms in its turns and the rest after the last. Rendering and tokenizing {rendering:.0f} ms: "
        f"{100 * result['share']:.4f}% of the {result['generation_s']:,.0f} s in which {result['sampled']:,} tokens "
        f"are sampled at {result['rate']:g} tokens/s.",
    ]
    return "\n".join(lines)


def verdicts(
    results: list[dict[str, Any]], held: dict[str, Any] | None, history: dict[str, Any]
) -> list[tuple[bool, str]]:
    """Return (met, text) of every bound that was measured."""
    found = []
    for one in results:
        if one["observed"] != "distinct" or (one["generations"], one["at_once"]) not in HEADLINES:
            continue
        what = f"{one['generations']} generations, {one['at_once']:,} at once"
        bound, cost, memory = BOUNDS_MS[one["generations"]], one["cpu_ms_episode"], one["kb_beyond_tokens"]
        found.append((cost <= bound, f"{what}: {cost:.2f} ms of CPU an episode, bound {bound} ms"))
        if one["generations"] == MEMORY_GENERATIONS:
            beyond = f"{what}: {memory:.1f} KB an episode beyond its tokens, bound {BOUND_KB:g} KB"
            found.append((memory <= BOUND_KB, beyond))
        if one["at_once"] == LAG_AT_ONCE:
            lag = f"{what}: the event loop is late by {1e3 * one['lag_max_s']:.0f} ms at most, bound 50 ms"
            found.append((one["lag_max_s"] <= BOUND_LAG_S, lag))

    if held is not None:
        what = f"{held['generations']} generations, {held['at_once']:,} at once"
        text = f"{what}: {held['bytes_token']:.1f} bytes a token in its columns, bound {BOUND_BYTES:g} bytes"
        found.append((held["bytes_token"] <= BOUND_BYTES, text))

    flat, share, tokens = history["last_over_first"], history["share"], history["tokens"]
    found.append((flat <= BOUND_FLAT, f"a turn after {tokens:,} tokens costs {flat:.2f} of one after few"))
    found.append((share <= BOUND_SHARE, f"rendering and tokenizing: {100 * share:.4f}% of generation time, bound 2%"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, nargs="*", default=GENERATIONS, help="generations of an episode")
    parser.add_argument("--at-once", type=int, nargs="*", default=AT_ONCE, help="episodes in flight")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="fewest episodes of a measurement")
    parser.add_argument("--repeats", type=int, default=3, help="processes a measurement; shows the median by CPU")
    parser.add_argument("--held", type=int, default=HELD, help="episodes at once in the line about memory; 0: none")
    parser.add_argument("--observed", nargs="*", choices=["same", "distinct"], default=["same", "distinct"])
    parser.add_argument("--history", action="store_true", help="only the cost of a turn by the length of its history")
    parser.add_argument("--turns", type=int, default=128, help="turns of the episode with the long history")
    parser.add_argument("--tokens", type=int, default=64_000, help="tokens of that episode, about")
    parser.add_argument("--core", type=int, help="core to run on; default: the last one that is allowed")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--template", type=Path, default=SHARED / "chat_templates" / "qwen2_5.jinja")
    add_tokenizer_option(parser)
    add_quick_option(parser)
    options = parser.parse_args()
    if options.quick:
        options.generations, options.at_once, options.episodes, options.repeats, options.held = [3], [8], 8, 1, 16
        options.turns, options.tokens = 16, 2000
    existing(options.template, "--template")
    existing(options.tokenizer / "tokenizer.json", "--tokenizer")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0)) if options.core is None else options.core})

    results: list[dict[str, Any]] = []
    with OtherLoad() as others:
        for generations in options.generations if not options.history else ():
            for at_once in options.at_once:
                for observed in options.observed:
                    rounds = max(1, round(options.episodes / at_once))
                    shape = ["--generations", generations, "--at-once", at_once, "--rounds", rounds]
                    runs = [
                        measure("episodes", options, *shape, "--observed", observed) for _ in range(options.repeats)
                    ]
                    results.append(sorted(runs, key=lambda run: run["cpu_ms_episode"])[len(runs) // 2])
                    results[-1]["cpu_ms_of_all"] = [run["cpu_ms_episode"] for run in runs]
        held = None
        if options.held and not options.history:
            shape = ["--generations", HELD_GENERATIONS, "--at-once", options.held, "--rounds", 1]
            held = measure("episodes", options, *shape, "--observed", "distinct")
        history = measure("history", options, "--turns", options.turns, "--tokens", options.tokens, "--rounds", 5)
    expect("turns of the long episode", history["turns"], options.turns)
    if results:
        print(table([*results, held] if held is not None else results))
        print(
            "Set-up (imports, tokenizer, renderer): " + f"{max(one['set_up_cpu_s'] for one in results):.1f} s of CPU.\n"
        )
    print(history_text(history) + "\n")
    if results:
        print(VERL + "\n")
    found = verdicts(results, held, history)
    for met, text in found:
        print(f"{'met    ' if met else 'NOT MET'}  {text}")
    if others.cores is not None:
        print(f"Other processes took {others.cores:.2f} of this core meanwhile.")
    if options.json:
        figures = {"episodes": results, "held": held, "history": history, "others_cores": others.cores}
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if options.quick:
        print(QUICK)
    elif not all(met for met, _ in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
