"""The wall around torch: the main process of a run orchestrates, and only ranks and server compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOGGER = '''
import json
import sys
from pathlib import Path


class Modules:
    """A metric logger that writes which modules its process has imported."""

    library = "json"

    def __init__(self, run, out):
        self._out = Path(out)
        self._steps = []

    def log(self, step, metrics):
        self._steps.append(step)
        self._out.write_text(json.dumps({"steps": self._steps, "modules": sorted(sys.modules)}))

    def close(self, *, failed):
        pass
'''


def install(site: Path) -> None:
    """Make a folder for PYTHONPATH that holds the logger as an installed distribution with an entry point."""
    facts = site / "wall_logger-1.0.dist-info"
    facts.mkdir(parents=True)
    (site / "wall_logger.py").write_text(LOGGER)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: wall-logger\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[agentloop.loggers]\nmodules = wall_logger:Modules\n")


def test_the_main_process_has_not_imported_torch_when_its_first_step_is_logged(quickstart: Any, tmp_path: Path) -> None:
    install(tmp_path / "site")
    out = tmp_path / "modules.json"
    run = quickstart(
        "run.steps=1", "rollout.batch_size=2", "rollout.group_size=2", "eval.before_train=false", "eval.every=null",
        "data.val=null", "loggers=" + json.dumps([{"modules": {"out": str(out)}}]),
        env={"PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert run.code == 0, run.err

    seen = json.loads(out.read_text())
    assert seen["steps"] == [1]
    assert {"trainer.run.run", "trainer.workers.group", "transformers"} <= set(seen["modules"]), (
        "it is the main process"
    )
    behind = ("torch", "trainer.learner", "rollout_server.engines")
    found = [name for name in seen["modules"] if name in behind or name.startswith(tuple(f"{b}." for b in behind))]
    assert not found, f"the main process imported {found[:5]}"
