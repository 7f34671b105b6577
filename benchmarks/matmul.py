"""Float32 matmul of a rank on one core: oneDNN in blocks (`trainer.matmul`) against torch's own, in turn.

    python benchmarks/matmul.py [--record | --quick]

Forward, gradient of the input and gradient of the weight, for linear layers of the quickstart and
of a 31 M model, with numbers of rows that are not multiples of a block.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Literal

from quick import QUICK, add_quick_option, expect
from report import hardware, record, table
from step import REPO

if TYPE_CHECKING:
    from trainer.learner.model.matmul import Matmul

LAYERS = ((128, 384), (384, 128), (512, 512), (512, 1536), (1536, 512), (512, 8192))
"""Inputs and outputs of a layer."""

ROWS = (300, 548, 1096, 2040)


def operations_per_s(matmul: Matmul, count: int, inputs: int, outputs: int) -> float:
    """Operations a second, forward and both gradients of a layer."""
    import torch

    x, w, g = torch.randn(count, inputs), torch.randn(outputs, inputs), torch.randn(count, outputs)
    begin = time.perf_counter()
    matmul.linear(x, w)
    matmul.linear(g, w.T)
    matmul.add_weight_gradient(torch.zeros_like(w), g, x)
    return 6.0 * count * inputs * outputs / (time.perf_counter() - begin)


def check_same(made: dict[str, Matmul], inputs: int, outputs: int, rows_tried: Sequence[int]) -> None:
    """Stop unless all choices compute the same products, forward and both gradients."""
    import torch

    for count in rows_tried:
        x, w, g = torch.randn(count, inputs), torch.randn(outputs, inputs), torch.randn(count, outputs)
        wanted = (x @ w.T, g @ w, g.T @ x)
        for choice, matmul in made.items():
            gradient = torch.zeros_like(w)
            matmul.add_weight_gradient(gradient, g, x)
            found = (matmul.linear(x, w), matmul.linear(g, w.T), gradient)
            same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-2) for a, b in zip(found, wanted, strict=True))
            expect(f"{choice} computes the products of {count} rows, {inputs} to {outputs}", same, True)


def measure(rounds: int, rows_tried: Sequence[int] = ROWS) -> tuple[list[list[str]], list[float]]:
    """Return the table, and each layer's ratio of speeds."""
    import torch

    from trainer.learner.model.matmul import make_matmul

    torch.set_num_threads(1)
    choices: tuple[Literal["torch", "onednn"], ...] = ("torch", "onednn")
    made = {choice: make_matmul(choice) for choice in choices}
    rows, ratios = [], []
    for inputs, outputs in LAYERS:
        check_same(made, inputs, outputs, rows_tried)
        found: dict[str, list[float]] = {choice: [] for choice in choices}
        for turn in range(rounds + 1):
            for count, choice in product(rows_tried, choices):
                speed = operations_per_s(made[choice], count, inputs, outputs)
                if turn:  # the first compiles
                    found[choice].append(speed)
        medians = {choice: statistics.median(speeds) for choice, speeds in found.items()}
        ratios.append(medians["onednn"] / medians["torch"])
        rows.append([f"{inputs} to {outputs}", *(f"{medians[c] / 1e9:.0f}" for c in choices), f"{ratios[-1]:.2f}"])
    return rows, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--record", action="store_true", help="write the table into benchmarks/RESULTS.md")
    add_quick_option(parser)
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    machine, command = hardware(), shlex.join(["python", "benchmarks/matmul.py", *sys.argv[1:]])
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows, ratios = measure(options.rounds, ROWS[:1] if options.quick else ROWS)
    lines = [*table([["layer", "torch, Gflop/s", "oneDNN, Gflop/s", "ratio"], *rows]), ""]
    lines.append(f"**{min(ratios):.2f} to {max(ratios):.2f} times as fast**, forward and both gradients together.")
    print("\n".join([command, machine, "", *lines]))
    if options.quick:
        print(QUICK)
    elif options.record:
        record(REPO / "benchmarks" / "RESULTS.md", command, ["\n".join(lines)], "matmul.py", machine)


if __name__ == "__main__":
    main()
