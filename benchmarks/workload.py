"""What `step.py` gives to both sides: rows, prompts and lengths, as pure functions, so that both make the same.

Only the standard library and transformers are used: this file is imported by our environment and by TRL's.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUICKSTART = Path(__file__).resolve().parents[1] / "recipes" / "quickstart"

GROUP, BATCH = 8, 32
ROWS = GROUP * BATCH
"""Samples of a step: 32 prompts x 8."""

PROMPT_TOKENS = {"equal": 36, "longtail": 36, "tool": 199, "tool-short": 36}
"""Tokens of every prompt, by scenario. 199: with the tool's whole JSON schema; 36: the quickstart's own template."""

SCENARIOS = tuple(PROMPT_TOKENS)
LEARNING_RATE = 1e-6
"""So small that the policy, and with it the number of tokens, stays the same; every part of a step still runs."""

TURN_TOKENS, EPISODE_TOKENS = 48, 128
"""Tool scenarios: new tokens of one turn at most; of one episode, tool output counted."""

EQUAL_TOKENS, LONGTAIL_MEDIAN, LONGTAIL_MAX = 64, 32, 512


@dataclass(frozen=True)
class Workload:
    """The rows of a run. `prompts[i]` is the text of `rows[i]`; `lengths` holds one number for each sample of a step.

    `lengths` is empty in the tool scenarios: there the model ends its turns. `batch`: prompts of a step.
    """

    scenario: str
    rows: list[dict[str, Any]]
    prompts: list[str]
    lengths: list[int]
    batch: int = BATCH

    @property
    def samples(self) -> int:
        """Samples of a step."""
        return GROUP * self.batch


def uses_tool(scenario: str) -> bool:
    return scenario.startswith("tool")


def lengths_of(scenario: str, count: int = ROWS) -> list[int]:
    """New tokens of each of the `count` samples of a step, in the order of groups and samples.

    longtail: the quantiles of a lognormal with median 32, spread so that the largest is 512, shuffled. Quantiles
    rather than draws: median, maximum and sum do not depend on the luck of a seed.
    """
    if uses_tool(scenario):
        return []
    if scenario == "equal":
        return [EQUAL_TOKENS] * count
    normal = statistics.NormalDist()
    sigma = math.log(LONGTAIL_MAX / LONGTAIL_MEDIAN) / normal.inv_cdf((count - 0.5) / count)
    drawn = [LONGTAIL_MEDIAN * math.exp(sigma * normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    random.Random(0).shuffle(drawn)
    return [min(LONGTAIL_MAX, max(1, round(length))) for length in drawn]


def workload(scenario: str, model: Path, steps: int, batch: int = BATCH) -> Workload:
    """Rows for `steps` steps of `batch` prompts: questions of the quickstart whose prompt has exactly PROMPT_TOKENS."""
    from transformers import AutoTokenizer

    sys.path.insert(0, str(QUICKSTART))
    try:
        from data import TOOLS, rows
    finally:
        sys.path.remove(str(QUICKSTART))
    tokenizer = AutoTokenizer.from_pretrained(model)
    wanted = PROMPT_TOKENS[scenario]
    chosen: list[dict[str, Any]] = []
    prompts: list[str] = []
    for row in rows("train", 8 * BATCH * steps):
        text = tokenizer.apply_chat_template(row["prompt"], tools=TOOLS, add_generation_prompt=True, tokenize=False)
        if len(tokenizer(text)["input_ids"]) == wanted:
            chosen.append(row)
            prompts.append(text)
        if len(chosen) == batch * steps:
            return Workload(scenario, chosen, prompts, lengths_of(scenario, GROUP * batch), batch)
    raise SystemExit(f"the quickstart has too few prompts of {wanted} tokens in {model}: change PROMPT_TOKENS")
