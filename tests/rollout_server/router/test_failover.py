"""An answer outlives the replicas that sampled it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agentloop.wire import SamplingParams
from rollout_server.engines.base import AnswerChunk, FolderWeights, Generation
from rollout_server.errors import EngineError, Overloaded, WeightsError
from rollout_server.router.router import OVERLOAD_TOKENS, Router
from tests.rollout_server.fakes import FakeReplica, token_at


def request(prompt: int = 5, new: int = 10, **options: Any) -> Generation:
    sampling = SamplingParams(max_new_tokens=new, **options)
    return Generation("r", list(range(prompt)), sampling)


def pair(**options: Any) -> tuple[FakeReplica, FakeReplica, Router]:
    """Two replicas, of which the first is asked first."""
    first, second = FakeReplica("first", **options), FakeReplica("second", **options)
    return first, second, Router([first, second])


async def test_what_was_sampled_is_kept_and_sampling_goes_on_elsewhere() -> None:
    first, second, router = pair()
    first.dies_after, second.weight_version = 8, "1"
    result = await router.generate(request(prompt=5, new=10))
    assert result.output_ids == [token_at(5 + i) for i in range(10)]
    assert result.logprobs == [-0.01 * (5 + i) for i in range(10)]
    assert [(s.version, s.start, s.end) for s in result.spans] == [("0", 0, 8), ("1", 8, 10)]
    rest = second.asked[0]
    assert rest.input_ids == [0, 1, 2, 3, 4] + [token_at(5 + i) for i in range(8)]
    assert rest.sampling.max_new_tokens == 2
    assert (router.resent, router.resent_kept_tokens) == (1, 8)


async def test_an_answer_goes_on_over_several_deaths() -> None:
    replicas = [FakeReplica(str(i)) for i in range(4)]
    for replica in replicas[:3]:
        replica.dies_after = 4
    router = Router(replicas)
    result = await router.generate(request(new=14))
    assert result.output_ids == [token_at(5 + i) for i in range(14)]
    assert [(s.start, s.end) for s in result.spans] == [(0, 14)]
    assert [replica.asked[0].sampling.max_new_tokens for replica in replicas] == [14, 10, 6, 2]


async def test_an_answer_whose_last_token_was_sent_is_finished() -> None:
    first, second, router = pair()
    first.dies_after = 8
    result = await router.generate(request(new=8))
    assert len(result.output_ids) == 8 and result.finish == "length"
    assert second.asked == []


@pytest.mark.parametrize(
    "options",
    [{"frequency_penalty": 0.5}, {"presence_penalty": 0.5}, {"repetition_penalty": 1.1}, {"min_new_tokens": 3}],
)
async def test_what_depends_on_earlier_samples_starts_again(options: dict[str, Any]) -> None:
    first, second, router = pair()
    first.dies_after = 8
    result = await router.generate(request(**options))
    assert second.asked[0].sampling.max_new_tokens == 10
    assert [(s.start, s.end) for s in result.spans] == [(0, 10)]


async def test_a_stream_goes_on_without_a_seam() -> None:
    first, _, router = pair()
    first.dies_after = 8
    chunks: list[AnswerChunk] = []
    generation = request(new=10)
    generation.on_chunk, generation.stream_tokens = chunks.append, 2
    result = await router.generate(generation)
    ids = [token for chunk in chunks for token in chunk.output_ids]
    assert ids == result.output_ids[: len(ids)] and len(ids) >= 8
    assert [len(chunk.output_ids) for chunk in chunks[:4]] == [2, 2, 2, 2]


async def test_the_callers_request_is_not_changed() -> None:
    first, _, router = pair()
    first.dies_after = 8
    generation = request(new=10)
    chunks: list[AnswerChunk] = []
    listener = chunks.append
    generation.on_chunk, generation.stream_tokens = listener, 2
    await router.generate(generation)
    assert generation.on_chunk is listener and generation.stream_tokens == 2
    assert generation.input_ids == list(range(5)) and generation.sampling.max_new_tokens == 10


async def test_a_stream_that_cannot_go_on_is_an_error() -> None:
    first, second, router = pair()
    first.dies_after = 8
    generation = request(frequency_penalty=1.0)
    generation.on_chunk, generation.stream_tokens = (lambda chunk: None), 4
    with pytest.raises(EngineError, match="streamed"):
        await router.generate(generation)
    assert second.asked == []


async def test_a_dead_replica_is_fenced_and_its_sessions_move() -> None:
    first, second, router = pair()
    await router.generate(request(), "s")
    first.dies_after = 0
    await router.generate(request(), "s")
    await router.generate(request(), "s")
    assert [len(first.asked), len(second.asked)] == [2, 2]
    assert [member.state for member in router.members] == ["fenced", "serving"]
    assert router.moved == 1 and router.members[0].fenced == 1


async def test_requests_of_a_hung_replica_are_sent_again_when_it_is_fenced() -> None:
    first, second, router = pair()
    first.go_on.clear()
    answer = asyncio.create_task(router.generate(request()))
    await asyncio.sleep(0)
    await router.members.fence(router.members[0], "hung")
    assert len((await answer).output_ids) == 10
    assert len(second.asked) == 1 and router.members[0].in_flight_tokens == 0


async def test_a_request_waits_for_a_replica_when_none_serves() -> None:
    _, _, router = pair()
    for member in router.members:
        await router.members.fence(member, "dead")
    answer = asyncio.create_task(router.generate(request()))
    await asyncio.sleep(0.01)
    assert not answer.done()
    router.members[1].replica = FakeReplica("new")
    await router.members.admit(router.members[1])
    assert len((await answer).output_ids) == 10


async def test_a_request_does_not_wait_for_what_is_given_up() -> None:
    _, _, router = pair()
    for member in router.members:
        await router.members.fence(member, "no such model", "failed")
    with pytest.raises(EngineError, match="no such model"):
        await router.generate(request())


async def test_a_session_leaves_a_replica_that_is_far_busier_than_the_others() -> None:
    first, second, router = pair()
    first.go_on.clear()
    running = asyncio.create_task(router.generate(request(prompt=5, new=900), "s"))
    await asyncio.sleep(0)
    await router.generate(request(), "s2")
    assert len(second.asked) == 1
    many = [asyncio.create_task(router.generate(request(new=990), "s")) for _ in range(4 * OVERLOAD_TOKENS // 990 + 2)]
    await asyncio.sleep(0)
    assert router.moved >= 1 and len(second.asked) >= 2
    first.go_on.set()
    await asyncio.gather(running, *many)


async def test_a_full_queue_refuses() -> None:
    replica = FakeReplica()
    replica.go_on.clear()
    router = Router([replica], max_in_flight=2)
    running = [asyncio.create_task(router.generate(request())) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as refused:
        await router.generate(request())
    assert refused.value.retry_after_s > 0
    replica.go_on.set()
    await asyncio.gather(*running)
    assert router.in_flight == 0
    await router.generate(request())


async def test_one_replica_that_refuses_a_version_is_fenced(tmp_path: Path) -> None:
    first, _, router = pair()
    first.refuses = WeightsError("a tensor is missing")
    await router.weights.update(FolderWeights(tmp_path), "1")
    assert [member.state for member in router.members] == ["fenced", "serving"]
    assert router.weights.version == "1" and router.weights.source == FolderWeights(tmp_path)
    assert "version 1" in router.members[0].reason


async def test_a_version_that_all_refuse_changes_nothing(tmp_path: Path) -> None:
    first, second, router = pair()
    first.refuses = second.refuses = WeightsError("a tensor is missing")
    with pytest.raises(WeightsError, match="missing"):
        await router.weights.update(FolderWeights(tmp_path), "1")
    assert [member.state for member in router.members] == ["serving", "serving"]
    assert router.weights.version == "0" and router.weights.source is None


async def test_pause_wait_lets_requests_end_and_holds_new_ones() -> None:
    first, second, router = pair()
    first.go_on.clear()
    running = asyncio.create_task(router.generate(request(), "s"))
    await asyncio.sleep(0)
    pause = asyncio.create_task(router.pause("wait"))
    await asyncio.sleep(0.01)
    held = asyncio.create_task(router.generate(request(), "t"))
    await asyncio.sleep(0.01)
    assert not pause.done() and not held.done() and second.asked == []
    first.go_on.set()
    await running
    await pause
    assert first.calls == ["pause in_place"] and not held.done()
    await router.resume()
    await held


async def test_abort_by_session_reaches_its_requests_alone() -> None:
    first, second, router = pair()
    first.go_on.clear()
    second.go_on.clear()
    a, b = request(), request()
    a.rid, b.rid = "a", "b"
    running = [asyncio.create_task(router.generate(g, s)) for g, s in ((a, "one"), (b, "two"))]
    await asyncio.sleep(0)
    assert await router.abort(session="two") == 1
    assert (first.calls, second.calls) == ([], ["abort b"])
    first.go_on.set()
    second.go_on.set()
    await asyncio.gather(*running)


async def test_a_pause_waits_for_a_request_that_is_sent_again() -> None:
    first, second, router = pair()
    first.go_on.clear()
    second.go_on.clear()
    answer = asyncio.create_task(router.generate(request()))
    await asyncio.sleep(0)
    pause = asyncio.create_task(router.pause("wait"))
    await asyncio.sleep(0)
    late = asyncio.create_task(router.generate(request()))
    await router.members.fence(router.members[0], "dead")
    await asyncio.sleep(0.02)
    assert not pause.done() and len(second.asked) == 1  # sent again, though new requests wait
    second.go_on.set()
    await pause
    assert answer.done() and not late.done()
    await router.resume()
    assert len((await late).output_ids) == 10
