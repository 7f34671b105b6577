"""`--quick`: every benchmark in seconds, to see that its workload is still what it says. It gives no verdict on times.

What is measured is checked in every run (`expect`), so that a long one cannot measure something else either.
"""

from __future__ import annotations

import argparse

QUICK = "QUICK: the workload is as described; times mean nothing and were not judged"


def add_quick_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quick", action="store_true", help="in seconds: small sizes; checks the workload and judges no time"
    )


def expect(what: str, found: object, wanted: object) -> None:
    """Stop when something that is measured is not what the benchmark says.

    Raises:
        SystemExit: with both values.
    """
    if found != wanted:
        raise SystemExit(f"the workload is not what it says: {what}: {found}, not {wanted}")


def expect_between(what: str, found: float, low: float, high: float) -> None:
    """The same for a number that may lie between two others."""
    if not low <= found <= high:
        raise SystemExit(f"the workload is not what it says: {what}: {found:g}, not {low:g} to {high:g}")
