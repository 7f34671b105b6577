"""A model that calls the calculator in every episode: the quickstart's, tuned briefly on conversations with a call.

The quickstart's own weights call it in a quarter of the episodes, and have to: finding that out is its task. Two kinds
of prompt: the quickstart's, which names the tool and its argument, and one with the tool's whole JSON schema, as the
templates of large models write it.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

from workload import QUICKSTART

STEPS, QUICK_STEPS, ROWS_A_STEP = {False: 120, True: 400}, 4, 16
"""Steps by whether the prompt holds the schema: to that the weights have to get used."""

ANNOUNCED = "function.name + '(' + arguments | join(', ') + ')'"
SCHEMA = """'{"type": "function", "function": {"name": "' + function.name + '", "description": "' + function.description
      + '", "parameters": ' + function.parameters | tojson + '}}'"""
"""What the template writes of a tool. Field by field: TRL's schema says more, and both sides shall prompt alike."""


HEADING = "# Tools as JSON"
"""Above the schema. Its length makes the shortest prompts 199 tokens: those of the issue that set the target."""


def make_caller(out: Path, *, schema: bool, quick: bool = False) -> Path:
    """Write the model folder `out`, unless it is there.

    Args:
        quick: tune for a few steps only: the model then calls as rarely as the quickstart's.
    """
    steps = QUICK_STEPS if quick else STEPS[schema]
    if (out / "model.safetensors").exists():
        return out
    work = out.with_name(out.name + ".sft")
    shutil.rmtree(work, ignore_errors=True)
    start = work / "start"
    shutil.copytree(QUICKSTART / "model", start)
    if schema:
        template = start / "chat_template.jinja"
        text = template.read_text(encoding="utf-8")
        for old, new in ((ANNOUNCED, SCHEMA), ("'# Tools'", repr(HEADING))):
            if text.count(old) != 1:
                raise SystemExit(f"the quickstart's chat template no longer has {old!r}: mend benchmarks/caller.py")
            text = text.replace(old, new)
        template.write_text(text, encoding="utf-8")
    _write_rows(work / "rows.jsonl", steps * ROWS_A_STEP)
    recipe = {
        "run": {"name": "caller", "dir": str(work / "run")},
        "model": {"path": str(start)},
        "out": str(work / "model"),
        "checkpoint_every": None,
        "stages": [
            {
                "name": "call",
                "data": str(work / "rows.jsonl"),
                "steps": steps,
                "batch_size": ROWS_A_STEP,
                "optim": {"lr": 6e-4, "lr_end": 0.0, "schedule": "linear", "warmup_steps": min(10, steps // 2)},
            }
        ],
    }
    (work / "sft.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-P", "-m", "agentloop.commands.main", "sft", "--config", str(work / "sft.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    (work / "model").rename(out)
    shutil.copy(start / "chat_template.jinja", out)
    return out


def _write_rows(path: Path, count: int) -> None:
    sys.path.insert(0, str(QUICKSTART))
    try:
        from data import tool_conversation
    finally:
        sys.path.remove(str(QUICKSTART))
    rng = random.Random(0)
    path.write_text("".join(json.dumps(tool_conversation(rng)) + "\n" for _ in range(count)), encoding="utf-8")
