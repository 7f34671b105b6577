"""Where one answer passes from one version to the next, each side's logprob is that version's own.

The spans of an answer say which version sampled each token. An engine that samples one step ahead of
its bookkeeping labels the token between two versions with the wrong one, which no other token shows.
"""

from __future__ import annotations

import pytest

from tests.conformance.conftest import Reference, Target
from tests.conformance.test_contract import prompt

RUNS = 20
TOLERANCE = 2e-4
APART = 2e-2
"""The two versions' logprobs of a token differ by more than this, or the token tells nothing."""


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_the_tokens_at_a_boundary_are_of_the_versions_that_the_spans_name(
    target: Target, references: dict[str, Reference], mode: str
) -> None:
    told = 0
    for run in range(RUNS):
        before, after = ("0", "1") if run % 2 == 0 else ("1", "0")
        ids = prompt(25, 100 + run)
        running = await target.start(ids, 1000, temperature=1.0, after=10 + run)
        assert (await target.post("/pause_generation", mode=mode)).status_code == 200
        response = await target.post(
            "/update_weights_from_disk",
            model_path=str(target.folders[after]),
            weight_version=after,
            flush_cache=mode == "retract",
        )
        assert response.status_code == 200 and response.json()["success"], response.text
        target.version = after
        assert (await target.post("/continue_generation")).status_code == 200

        answer = await running
        assert len(answer.spans) == 2, answer.spans
        boundary = answer.spans[0][2]
        history = ids + answer.ids

        last, first = len(ids) + boundary - 1, len(ids) + boundary
        old, new = references[before], references[after]
        assert answer.logprobs[boundary - 1] == pytest.approx(old.next(history[:last], history[last]), abs=TOLERANCE)

        of_old = old.next(history[:first], history[first])
        of_new = new.next(history[:first], history[first], past=old if mode == "in_place" else None)
        assert answer.logprobs[boundary] == pytest.approx(of_new, abs=TOLERANCE), (run, of_old, of_new)
        told += abs(of_old - of_new) > APART

    assert told >= RUNS // 2, "the versions hardly differ at the boundaries: the comparison tells nothing"
