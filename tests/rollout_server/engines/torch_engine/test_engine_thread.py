"""The engine's thread: cancellation, pauses, updates under way, and steps that fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rollout_server.engines.base import FolderWeights
from rollout_server.engines.torch_engine.core import Core
from rollout_server.engines.torch_engine.engine import MAX_STEP_FAILURES, TorchEngine
from rollout_server.engines.torch_engine.model.attention import DecodePass, PrefillPass
from rollout_server.engines.torch_engine.model.models import Runner
from rollout_server.engines.torch_engine.weights.loader import WeightLoader
from rollout_server.errors import EngineError, RequestError, WeightsError
from tests.rollout_server.support import EOS, TOLERANCE, VOCAB, Reference, load, make_core, random_ids, request

EngineFactory = Callable[..., TorchEngine]


class Unreliable:
    """A runner whose next decodes fail on demand."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.failures = 0

    def prefill(self, chunks: PrefillPass) -> None:
        self._runner.prefill(chunks)

    def decode(self, tokens: torch.Tensor, batch: DecodePass) -> torch.Tensor:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("out of luck")
        return self._runner.decode(tokens, batch)

    def weights_changed(self) -> None:
        self._runner.weights_changed()


@pytest.fixture
async def unreliable(model_dir: Path):  # type: ignore[no-untyped-def]
    """An engine, and the runner that makes its steps fail."""
    loaded = load(model_dir)
    core: Core = make_core(loaded)
    runner = Unreliable(core.runner)
    core.runner = runner
    engine = TorchEngine(loaded, core, None, loader=WeightLoader(loaded.model))  # type: ignore[arg-type]
    yield engine, runner
    await engine.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # what another thread does
            await asyncio.sleep(0.005)


async def test_a_failing_step_fails_its_requests_and_the_engine_recovers(unreliable, model_dir: Path) -> None:
    engine, runner = unreliable
    runner.failures = 1
    answers = await asyncio.gather(
        *(engine.generate(request(random_ids(20, seed=i), rid=str(i))) for i in range(3)), return_exceptions=True
    )
    assert any(isinstance(answer, EngineError) and "out of luck" in str(answer) for answer in answers)
    prompt = random_ids(20, seed=1)
    result = await engine.generate(request(prompt, ignore_eos=True))
    expected = Reference(model_dir).logprobs(prompt + result.output_ids, 20, 1.0)
    assert max(abs(a - b) for a, b in zip(result.logprobs, expected, strict=True)) < TOLERANCE
    assert engine.failure is None


async def test_the_engine_gives_up_when_steps_keep_failing(unreliable) -> None:
    engine, runner = unreliable
    runner.failures = 100
    for _ in range(MAX_STEP_FAILURES):
        with pytest.raises(EngineError):
            await engine.generate(request([9, 9, 9]))
    await until(lambda: engine.failure is not None)
    assert "out of luck" in engine.failure
    with pytest.raises(EngineError, match="out of luck"):
        await engine.generate(request([9]))


async def test_a_cancelled_request_frees_its_row(engine_factory: EngineFactory) -> None:
    engine = engine_factory(max_running=1)
    task = asyncio.create_task(engine.generate(request(random_ids(5, seed=1), new=500, ignore_eos=True)))
    await until(lambda: engine.stats().running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: engine.stats().running == 0)
    assert engine.stats().aborted == 1
    result = await engine.generate(request(random_ids(5, seed=2), new=3, ignore_eos=True))
    assert len(result.output_ids) == 3


async def test_abort_ends_one_request_by_id_with_what_it_has(engine_factory: EngineFactory) -> None:
    engine = engine_factory()
    calls = [
        asyncio.create_task(engine.generate(request(random_ids(9, seed=1), new=400, rid=rid, ignore_eos=True)))
        for rid in ("mine", "other")
    ]
    await until(lambda: engine.stats().sampled_tokens > 10)
    assert await engine.abort("mine") == 1
    mine, other = await asyncio.gather(*calls)
    assert mine.finish == "abort"
    assert 0 < len(mine.output_ids) == len(mine.logprobs) < 400
    assert len(other.output_ids) == 400
    assert await engine.abort(None) == 0


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_an_update_in_a_pause_is_finished_inside(
    engine_factory: EngineFactory, model_dir: Path, other_weights: Path, mode: str
) -> None:
    engine = engine_factory()
    prompt = random_ids(30, seed=3)
    call = asyncio.create_task(engine.generate(request(prompt, new=300, ignore_eos=True, sampling_seed=1)))
    await until(lambda: engine.stats().sampled_tokens > 5)
    await engine.pause(mode)  # type: ignore[arg-type]
    sampled = engine.stats().sampled_tokens
    late = asyncio.create_task(engine.generate(request(prompt, new=4, ignore_eos=True)))
    await engine.update_weights(FolderWeights(other_weights), "1")
    assert engine.stats().sampled_tokens == sampled
    assert not call.done()
    await engine.resume()
    result = await call
    assert [(s.version, s.start, s.end) for s in result.spans] == [("0", 0, sampled), ("1", sampled, 300)]
    assert result.weight_version == engine.weight_version == "1"
    assert [s.version for s in (await late).spans] == ["1"]
    old = Reference(model_dir).logprobs(prompt + result.output_ids, 30, 1.0)[:sampled]
    assert max(abs(a - b) for a, b in zip(result.logprobs, old, strict=False)) < TOLERANCE


async def test_an_update_without_a_pause_happens_between_two_steps(
    engine_factory: EngineFactory, model_dir: Path, other_weights: Path
) -> None:
    engine = engine_factory()
    prompt = random_ids(30, seed=3)
    call = asyncio.create_task(engine.generate(request(prompt, new=300, ignore_eos=True)))
    await until(lambda: engine.stats().sampled_tokens > 5)
    await engine.update_weights(FolderWeights(other_weights), "1")
    result = await call
    first, second = result.spans
    assert (first.version, first.start, second.version, second.end) == ("0", 0, "1", 300)
    assert first.end == second.start
    for span, folder in ((first, model_dir), (second, other_weights)):
        expected = Reference(folder).logprobs(prompt + result.output_ids, 30, 1.0)[span.start : span.end]
        got = result.logprobs[span.start : span.end]
        assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) < TOLERANCE


async def test_refused_weights_leave_the_old_version_serving(engine_factory: EngineFactory, tmp_path: Path) -> None:
    engine = engine_factory()
    before = await engine.generate(request([9, 10, 11], temperature=0.0, ignore_eos=True))
    with pytest.raises(WeightsError):
        await engine.update_weights(FolderWeights(tmp_path), "1")
    after = await engine.generate(request([9, 10, 11], temperature=0.0, ignore_eos=True))
    assert after.output_ids == before.output_ids
    assert (after.weight_version, engine.weight_version) == ("0", "0")


async def test_a_pause_that_aborts_answers_what_runs(engine_factory: EngineFactory) -> None:
    engine = engine_factory()
    call = asyncio.create_task(engine.generate(request(random_ids(9, seed=1), new=400, ignore_eos=True)))
    await until(lambda: engine.stats().sampled_tokens > 3)
    await engine.pause("abort")
    assert (await call).finish == "abort"
    assert engine.stats().paused


async def test_a_closed_engine_answers_what_it_still_had(engine_factory: EngineFactory) -> None:
    engine = engine_factory()
    call = asyncio.create_task(engine.generate(request(random_ids(9, seed=1), new=500, ignore_eos=True)))
    await until(lambda: engine.stats().running == 1)
    await engine.close()
    with pytest.raises(EngineError, match="stopping"):
        await call


async def test_a_minimum_that_no_token_can_meet_is_refused(engine_factory: EngineFactory) -> None:
    engine = engine_factory()
    every = [token for token in range(VOCAB) if token != EOS]  # the end token is the model's own
    with pytest.raises(RequestError, match="min_new_tokens cannot be met") as error:
        await engine.generate(request([9], min_new_tokens=2, stop_token_ids=every))
    assert error.value.field == "sampling_params.min_new_tokens"
    result = await engine.generate(request([9], min_new_tokens=2, stop_token_ids=every[1:]))
    assert result.output_ids[:2] == [every[0]] * 2
