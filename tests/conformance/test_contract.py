"""What every target keeps. What only ours keep is said in each test."""

from __future__ import annotations

import asyncio
import json
import random

import httpx
import pytest

from tests.conformance.conftest import Answer, Reference, Target

TOLERANCE = 5e-4
"""Largest difference of a logprob from transformers' own forward pass in float32."""

FIRST_PLAIN, VOCAB = 3, 300

RUNS = 20
"""Answers whose boundary between two versions is compared."""

APART = 2e-2
"""The versions' logprobs of a token at a boundary differ by more than this, or it tells nothing."""

BOUNDARY_TOLERANCE = 2e-4
"""Smaller than `TOLERANCE`: the versions may differ by little at a boundary."""


def prompt(length: int, seed: int = 0) -> list[int]:
    rnd = random.Random(seed)
    return [rnd.randrange(FIRST_PLAIN, VOCAB) for _ in range(length)]


def close(a: list[float], b: list[float], tolerance: float = TOLERANCE) -> bool:
    return len(a) == len(b) and max((abs(x - y) for x, y in zip(a, b, strict=True)), default=0.0) <= tolerance


async def test_greedy_answers_are_the_models(target: Target, references: dict[str, Reference]) -> None:
    for seed, length in enumerate((1, 7, 60)):
        ids = prompt(length, seed)
        answer = await target.generate(ids, 24, temperature=0)
        assert answer.ids == references["0"].greedy(ids, 24, answer.ids)
        assert close(answer.logprobs, references["0"].logprobs(ids, answer.ids))
        assert answer.finish == {"type": "length", "length": 24}
        assert answer.meta["prompt_tokens"] == length


async def test_logprobs_are_after_temperature(target: Target, references: dict[str, Reference]) -> None:
    ids = prompt(20, 3)
    for temperature in (0.5, 1.0, 1.7):
        answer = await target.generate(ids, 40, temperature=temperature)
        assert close(answer.logprobs, references["0"].logprobs(ids, answer.ids, temperature))


async def test_logprobs_are_before_truncation(target: Target, references: dict[str, Reference]) -> None:
    ids = prompt(20, 4)
    for options in ({"top_p": 0.6}, {"top_k": 3}, {"min_p": 0.2}):
        answer = await target.generate(ids, 40, temperature=1.5, **options)
        table = references["0"].table(ids + answer.ids, len(ids), 1.5)
        assert close(answer.logprobs, references["0"].logprobs(ids, answer.ids, 1.5))
        for row, token in zip(table, answer.ids, strict=True):
            likelier = row[row > row[token] + 1e-5]
            if "top_p" in options:
                assert float(likelier.exp().sum()) < 0.6 + 1e-3
            elif "top_k" in options:
                assert len(likelier) < 3
            else:
                assert float((row[token] - row.max()).exp()) > 0.2 - 1e-3


async def test_a_logit_bias_and_penalties_change_what_is_sampled(target: Target) -> None:
    ids = prompt(9, 5)
    plain = await target.generate(ids, 12, temperature=0)
    banned = await target.generate(ids, 12, temperature=0, logit_bias={str(plain.ids[0]): -100})
    assert plain.ids[0] not in banned.ids
    penalized = await target.generate(ids, 12, temperature=0, frequency_penalty=2.0, presence_penalty=2.0)
    assert len(set(penalized.ids)) >= len(set(plain.ids))
    await target.generate(ids, 12, temperature=0, repetition_penalty=1.5)


async def test_a_stop_token_ends_the_turn_and_is_returned(target: Target, references: dict[str, Reference]) -> None:
    ids = prompt(30, 6)
    greedy = references["0"].greedy(ids, 24)
    stop = greedy[-1]
    answer = await target.generate(ids, 24, temperature=0, stop_token_ids=[stop], ignore_eos=False)
    assert answer.ids == greedy[: greedy.index(stop) + 1]
    assert answer.finish["type"] == "stop" and answer.finish["matched"] == stop


async def test_a_later_turn_pays_for_its_new_tokens_only(target: Target) -> None:
    ids = prompt(120, 7)
    first = await target.generate(ids, 16, session="s")
    assert first.meta["cached_tokens"] == 0
    second = await target.generate([*ids, *first.ids, 5, 6], 4, session="s")
    # The last sampled token may not be cached yet.
    assert second.meta["cached_tokens"] >= len(ids) + len(first.ids) - 1


async def test_many_requests_at_once_are_each_answered_with_their_own(
    target: Target, references: dict[str, Reference]
) -> None:
    prompts = [prompt(5 + i % 11, 100 + i) for i in range(24)]
    answers = await asyncio.gather(
        *(target.generate(ids, 4 + i % 7, temperature=0, session=str(i % 5)) for i, ids in enumerate(prompts))
    )
    for i, (ids, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert answer.ids == references["0"].greedy(ids, 4 + i % 7, answer.ids)


async def test_a_stream_grows_to_the_answer(target: Target, references: dict[str, Reference]) -> None:
    ids = prompt(11, 8)
    body = {
        "input_ids": ids, "stream": True, "return_logprob": True,
        "sampling_params": {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True},
    }  # fmt: skip
    events = []
    async with target.http.stream("POST", "/generate", json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            if line:
                assert line.startswith("data: ")
                events.append(line.removeprefix("data: "))
    assert events[-1] == "[DONE]"
    pieces = [json.loads(event) for event in events[:-1]]
    expected = references["0"].greedy(ids, 12)
    assert len(pieces) > 1
    for piece in pieces:
        assert piece["output_ids"] == expected[: len(piece["output_ids"])]
        assert [pair[1] for pair in piece["meta_info"]["output_token_logprobs"]] == piece["output_ids"]
    assert [piece["meta_info"]["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1]["output_ids"] == expected
    assert pieces[-1]["meta_info"]["finish_reason"]["type"] == "length"


async def test_abort_by_rid_answers_with_what_there_is(target: Target) -> None:
    running = await target.start(prompt(8), 3000, rid="long")
    other = asyncio.create_task(target.generate(prompt(8), 64, rid="other"))
    response = await target.post("/abort_request", rid="long")
    assert response.status_code == 200
    answer = await running
    assert answer.finish["type"] == "abort" and len(answer.ids) < 3000
    assert (await other).finish["type"] == "length"


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_a_pause_holds_requests_and_loses_none(
    target: Target, references: dict[str, Reference], mode: str
) -> None:
    ids = prompt(15, 9)
    running = await target.start(ids, 500, temperature=0)
    assert (await target.post("/pause_generation", mode=mode)).status_code == 200
    late = asyncio.create_task(target.generate(ids, 10, temperature=0))
    await asyncio.sleep(1.0)
    assert not late.done()
    assert (await target.post("/continue_generation")).status_code == 200
    answer = await running
    expected = references["0"].greedy(ids, 500, answer.ids)
    assert answer.ids == expected
    assert close(answer.logprobs, references["0"].logprobs(ids, expected))
    assert (await late).ids == expected[:10]


async def test_pause_abort_answers_what_runs(target: Target) -> None:
    running = await target.start(prompt(8), 3000)
    assert (await target.post("/pause_generation", mode="abort")).status_code == 200
    answer = await running
    assert answer.finish["type"] == "abort" and len(answer.ids) < 3000
    assert (await target.post("/continue_generation")).status_code == 200
    assert len((await target.generate(prompt(8), 5)).ids) == 5


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_new_weights_in_the_middle_of_an_answer(
    target: Target, references: dict[str, Reference], mode: str
) -> None:
    """One answer, whose spans are exact: the logprobs of each are that version's own."""
    ids, known = prompt(25, 10), prompt(25, 13)
    await target.generate(known, 2)
    running = await target.start(ids, 1000, temperature=1.0)
    assert (await target.post("/pause_generation", mode=mode)).status_code == 200
    body = {
        "model_path": str(target.folders["1"]), "weight_version": "1", "flush_cache": mode == "retract",
    }  # fmt: skip
    response = await target.post("/update_weights_from_disk", **body)
    assert response.status_code == 200 and response.json()["success"], response.text
    target.version = "1"
    assert (await target.post("/continue_generation")).status_code == 200
    answer = await running
    old, new = answer.spans
    assert old[0] in ("0", "default") and new[0] == "1"
    expected = references["0"].logprobs(ids, answer.ids)
    assert close(answer.logprobs[: old[2]], expected[: old[2]])
    if mode == "retract":
        # Recomputed: as if the new version had read all of it.
        assert close(answer.logprobs[old[2] :], references["1"].logprobs(ids, answer.ids)[old[2] :])
    else:
        # The old keys and values are kept: neither version's own forward pass.
        assert not close(answer.logprobs[old[2] :], expected[old[2] :])
    if mode == "retract":
        after = await target.generate(known, 20, temperature=0)
        assert after.meta["cached_tokens"] == 0
        assert after.ids == references["1"].greedy(known, 20, after.ids)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_the_tokens_at_a_boundary_are_of_the_versions_that_the_spans_name(
    target: Target, references: dict[str, Reference], mode: str
) -> None:
    """An engine that samples one step ahead of its bookkeeping labels the token between two versions with the wrong
    one, which no other token shows."""
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
        assert answer.logprobs[boundary - 1] == pytest.approx(
            old.next(history[:last], history[last]), abs=BOUNDARY_TOLERANCE
        )

        of_old = old.next(history[:first], history[first])
        of_new = new.next(history[:first], history[first], past=old if mode == "in_place" else None)
        assert answer.logprobs[boundary] == pytest.approx(of_new, abs=BOUNDARY_TOLERANCE), (attempt, of_old, of_new)

        runs += 1
        told += abs(of_old - of_new) > APART
        if runs >= RUNS and told >= RUNS // 2:
            break

    assert runs >= RUNS, "too few answers passed from one version to the next"
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


async def test_new_weights_between_answers(target: Target, references: dict[str, Reference]) -> None:
    ids = prompt(25, 11)
    assert (await target.generate(ids, 10, temperature=0)).ids == references["0"].greedy(ids, 10)
    await target.update("1")
    answer = await target.generate(ids, 10, temperature=0)
    assert answer.ids == references["1"].greedy(ids, 10, answer.ids)
    assert answer.spans == [("1", 0, 10)]


async def test_what_is_served_is_told(target: Target) -> None:
    await target.update("1")
    assert (await target.http.get("/health")).status_code == 200
    assert (await target.http.get("/health_generate")).status_code == 200
    facts = (await target.http.get("/model_info")).json()
    assert facts["weight_version"] == "1" and facts["is_generation"]
    assert (await target.http.get("/server_info")).status_code == 200
    metrics = await target.http.get("/metrics")
    assert metrics.status_code == 200 if target.ours else metrics.status_code in (200, 307, 404)


async def test_a_flush_forgets_prefixes(target: Target) -> None:
    ids = prompt(64, 12)
    await target.generate(ids, 2, session="f")
    assert (await target.generate(ids, 2, session="f")).meta["cached_tokens"] > 0
    assert (await target.post("/flush_cache")).status_code == 200
    assert (await target.generate(ids, 2, session="f")).meta["cached_tokens"] == 0


async def test_a_wrong_request_is_refused_and_hurts_nobody(target: Target) -> None:
    """A bare SGLang dies of an id outside the vocabulary, so that this is asked of ours alone."""
    wrong: list[dict[str, object]] = [
        {"input_ids": [1], "sampling_params": {"temperature": -1}},
        {"input_ids": [1], "sampling_params": {"top_p": 2}},
        {"input_ids": [], "sampling_params": {}},
    ]
    if target.ours:
        wrong += [
            {"input_ids": [10**6], "sampling_params": {}},
            {"input_ids": [-1], "sampling_params": {}},
            {"input_ids": [1] * 5000, "sampling_params": {}},
            {"input_ids": [1], "sampling_params": {"max_new_token": 4}},
            {"text": "hello"},
        ]
    running = asyncio.create_task(target.generate(prompt(8), 100))
    for body in wrong:
        response = await target.http.post("/generate", json=body)
        assert 400 <= response.status_code < 500, (body, response.text)
        assert response.json()["error"]["message"]
    assert len((await running).ids) == 100


async def test_a_client_that_leaves_frees_its_slot(target: Target) -> None:
    body = {"input_ids": prompt(9), "sampling_params": {"max_new_tokens": 3500, "ignore_eos": True}}
    with pytest.raises(httpx.ReadTimeout):
        await target.http.post("/generate", json=body, timeout=httpx.Timeout(5, read=0.7))
    # Only an engine without requests can flush its cache, on SGLang; ours tells what runs.
    for _ in range(100):
        if target.ours and target.kind != "sglang-server":
            states = (await target.http.get("/server_info")).json()["states"]
            free = all(state["running"] + state["waiting"] == 0 for state in states)
        else:
            free = (await target.post("/flush_cache")).status_code == 200
        if free:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("it still runs")
