"""The viewer's API over a run that a command wrote: what it shows is what is stored."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from agentloop.trace.index import TraceIndex
from agentloop.viewer import create_app

from .conftest import Run


async def test_the_viewer_shows_what_a_run_stored(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not TraceIndex(finished.dir).refresh()  # the run indexed its steps itself
    app: Any = create_app([finished.dir.parent])
    name = finished.dir.name
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:

        async def get(path: str, **parameters: Any) -> Any:
            answer = await http.get(f"/api/runs/{name}{path}", params=parameters)
            assert answer.status_code == 200, answer.text
            return answer.json()

        described = await get("")
        assert (described["live"], described["finished"], described["has_text"]) == (False, True, True)
        records = {
            record.key: record
            for step, split in [(1, "train"), (2, "train"), (3, "train"), (0, "eval")]
            for record in finished.records(step, split)
            if record.is_main
        }
        rows = (await get("/episodes", limit=500, split="train"))["rows"]
        assert {row["key"] for row in rows} == {key for key in records if key.startswith("train/")}
        for row in rows:
            t = records[row["key"]].trajectory
            assert (row["reward"], row["length"], row["turns"], row["answer"]) == (
                t.reward, len(t), len(t.turns), t.answer
            )  # fmt: skip

        key = max(records, key=lambda one: len(records[one].trajectory.turns))
        stored = records[key]
        shown = await get("/episode", key=key)
        sampled = [message for message in shown["conversation"] if message["turn"] is not None]
        assert [message["text"] for message in sampled] == [turn.text for turn in stored.trajectory.turns]
        assert {span["name"] for span in shown["spans"]} >= {"episode", "turn", "generate", "reward"}

        tokens = await get("/tokens", key=key)
        assert tokens["ids"] == list(stored.trajectory.token_ids)
        assert tokens["mask"] == list(stored.trajectory.loss_mask)
        assert "".join(tokens["pieces"][: tokens["prompt_length"]]) == shown["prompt_text"]
        for ours, wanted in zip(tokens["logprobs"], stored.trajectory.logprobs, strict=True):
            assert ours == (None if wanted is None else pytest.approx(wanted, abs=1e-5))

        metrics = await get("/metrics", keys="reward/mean")
        assert [value for value in metrics["series"]["reward/mean"] if value is not None] == pytest.approx(
            [row["reward/mean"] for row in finished.train_metrics]
        )
