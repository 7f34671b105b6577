"""Where one answer passes from one version to the next, each side's logprob is that version's own.

The spans of an answer say which version sampled each token. An engine that samples one step ahead of
its bookkeeping labels the token between two versions with the wrong one, which no other token shows.
"""

from __future__ import annotations

import asyncio

import pytest

from tests.conformance.conftest import Answer, Reference, Target
from tests.conformance.test_contract import prompt

RUNS = 20
TOLERANCE = 2e-4
APART = 2e-2
"""The two versions' logprobs of a token differ by more than this, or the token tells nothing."""


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_the_tokens_at_a_boundary_are_of_the_versions_that_the_spans_name(
    target: Target, references: dict[str, Reference], mode: str
) -> None:
    runs = told = 0
    for attempt in range(2 * RUNS):
        before, after = ("0", "1") if target.version == "0" else ("1", "0")
        ids = prompt(25, 100 + attempt)
        answer = await _interrupted(target, ids, mode, after, tokens_before=10 + attempt % 20)
        if len(answer.spans) < 2:
            continue  # on a busy machine it was aborted before its first token of the new version

        boundary = answer.spans[0][2]
        history = ids + answer.ids
        last, first = len(ids) + boundary - 1, len(ids) + boundary
        old, new = references[before], references[after]
        assert answer.logprobs[boundary - 1] == pytest.approx(old.next(history[:last], history[last]), abs=TOLERANCE)

        of_old = old.next(history[:first], history[first])
        of_new = new.next(history[:first], history[first], past=old if mode == "in_place" else None)
        assert answer.logprobs[boundary] == pytest.approx(of_new, abs=TOLERANCE), (attempt, of_old, of_new)

        runs += 1
        told += abs(of_old - of_new) > APART
        if runs == RUNS:
            break

    assert runs == RUNS, "too few answers passed from one version to the next"
    assert told >= RUNS // 2, "the versions hardly differ at the boundaries: the comparison tells nothing"


async def _interrupted(target: Target, ids: list[int], mode: str, version: str, *, tokens_before: int) -> Answer:
    """One answer in whose middle the weights become those of `version`, cut soon after."""
    rid = f"boundary-{mode}-{ids[0]}-{tokens_before}-{version}-{target.rids}"
    running = await target.start(ids, 2000, temperature=1.0, after=tokens_before, rid=rid)
    assert (await target.post("/pause_generation", mode=mode)).status_code == 200
    response = await target.post(
        "/update_weights_from_disk",
        model_path=str(target.folders[version]),
        weight_version=version,
        flush_cache=mode == "retract",
    )
    assert response.status_code == 200 and response.json()["success"], response.text
    target.version = version
    assert (await target.post("/continue_generation")).status_code == 200
    await asyncio.sleep(0.3 if "sglang" in target.kind else 0.05)
    await target.post("/abort_request", rid=rid)
    return await running
