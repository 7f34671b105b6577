"""Float32 products of a rank on one core: oneDNN's in blocks (`trainer.matmul`) beside torch's own, in turn.

    python benchmarks/products.py [--record]

Forward, gradient of the input and gradient of the weight of linear layers of the quickstart and of a 31 M model, for
numbers of rows that are no multiples of a block.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from itertools import product as product_of
from typing import Literal

from report import hardware, record, table
from step import REPO

LAYERS = ((128, 384), (384, 128), (512, 512), (512, 1536), (1536, 512), (512, 8192))
"""Inputs and outputs."""

ROWS = (300, 548, 1096, 2040)


def operations_per_s(count: int, inputs: int, outputs: int) -> float:
    """Forward and both gradients of a layer."""
    import torch

    from trainer.learner.model.matmul import add_product, product

    x, w, g = torch.randn(count, inputs), torch.randn(outputs, inputs), torch.randn(count, outputs)
    begin = time.perf_counter()
    product(x, w)
    product(g, w.T)
    add_product(torch.zeros_like(w), g, x)
    return 6.0 * count * inputs * outputs / (time.perf_counter() - begin)


def measure(rounds: int) -> tuple[list[list[str]], list[float]]:
    """The table, and each layer's ratio."""
    import torch

    from trainer.learner.model.matmul import use_products

    torch.set_num_threads(1)
    choices: tuple[Literal["torch", "onednn"], ...] = ("torch", "onednn")
    rows, ratios = [], []
    for inputs, outputs in LAYERS:
        found: dict[str, list[float]] = {choice: [] for choice in choices}
        for turn in range(rounds + 1):
            for count, choice in product_of(ROWS, choices):
                use_products(choice)
                speed = operations_per_s(count, inputs, outputs)
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
    options = parser.parse_args()
    machine, command = hardware(), shlex.join(["python", "benchmarks/products.py", *sys.argv[1:]])
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows, ratios = measure(options.rounds)
    lines = [*table([["layer", "torch, Gflop/s", "oneDNN, Gflop/s", "ratio"], *rows]), ""]
    lines.append(f"**{min(ratios):.2f} to {max(ratios):.2f} times as fast**, forward and both gradients together.")
    print("\n".join([command, machine, "", *lines]))
    if options.record:
        record(REPO / "benchmarks" / "RESULTS.md", command, ["\n".join(lines)], "products.py", machine)


if __name__ == "__main__":
    main()
