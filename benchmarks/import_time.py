"""CPU seconds of `import agentloop` beside those of a bare interpreter.

    python benchmarks/import_time.py [--quick]

Ends with exit code 1 when it is over the bound or loads a heavy package: every agent process and every command pays it.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

from quick import QUICK, add_quick_option

RUNS = 10
BOUND_S = 0.5
HEAVY = ("torch", "transformers", "fastapi", "ray", "sglang", "uvicorn")


def cpu_seconds(code: str) -> float:
    """User and system seconds of a fresh interpreter that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_quick_option(parser)
    options = parser.parse_args()
    runs = 1 if options.quick else RUNS
    bare = statistics.median(cpu_seconds("pass") for _ in range(runs))
    ours = statistics.median(cpu_seconds("import agentloop") for _ in range(runs))
    probe = f"import sys, agentloop; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True).stdout.split()
    print(f"python -c pass               {bare:.3f} s CPU (median of {runs})")
    print(f"python -c 'import agentloop' {ours:.3f} s CPU (bound {BOUND_S} s)")
    print(f"heavy packages loaded        {', '.join(loaded) or 'none'}")
    if options.quick:
        print(QUICK)
    if loaded or (ours > BOUND_S and not options.quick):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
