"""One rank's maths: gradients do not depend on how a batch is cut, and a checkpoint brings everything back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from agentloop.config import FsdpConfig, TrainerConfig
from agentloop.errors import ModelError, RunDirError, WorkerError
from tests.trainer.conftest import make_samples
from trainer.algorithms.aggregation import normalizer
from trainer.learner.learner import TOKEN_SUMS, Learner, LearnerSettings
from trainer.learner.model.sharding import move_model
from trainer.learner.optim import move_optimizer
from trainer.types import LossSpec, TrainSample

pytestmark = pytest.mark.usefixtures("process_group")

SPEC = LossSpec(entropy_coef=0.01)


def learner(
    model: Path,
    *,
    reference: bool = False,
    dtype: str = "float32",
    seed: int = 0,
    adapters: Path | None = None,
    **config: Any,
) -> Learner:
    settings = {"optim": {"lr": 1e-2, "grad_clip": 1e9}, "logprob_chunk": 16} | config
    return Learner(
        LearnerSettings(
            model_path=str(model),
            config=TrainerConfig.model_validate(settings),
            dtype=dtype,
            total_steps=10,
            seed=seed,
            reference=reference,
            adapters=adapters,
        )
    )


def gradients(of: Learner) -> torch.Tensor:
    return torch.cat([p.grad.to_local().flatten().double() for p in of.policy.parameters()])


def accumulated(
    model: Path,
    samples: list[TrainSample],
    *,
    budget: int = 8192,
    calls: int = 1,
    spec: LossSpec = SPEC,
    reference: bool = False,
) -> tuple[torch.Tensor, dict[str, float]]:
    of = learner(model, reference=reference, tokens_per_micro_batch=budget)
    sums: dict[str, float] = {}
    for part in np.array_split(np.arange(len(samples)), calls):
        for key, value in of.accumulate([samples[i] for i in part], 1.0, spec).items():
            sums[key] = sums.get(key, 0.0) + value
    return gradients(of), sums


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    "choice",
    [
        {"aggregation": "token_mean"},
        {"aggregation": "seq_mean_token_sum"},
        {"aggregation": "seq_mean_token_mean", "kind": "gspo"},
        {"kind": "cispo", "decoupled": True, "importance": "sequence", "importance_cap": 2.0},
        {"decoupled": True, "importance": "token", "mask": "geometric", "mask_low": 0.8, "mask_high": 1.2, "veto": 0.3},
    ],
)
def test_no_loss_and_no_correction_depends_on_micro_batches(tiny_model: Path, choice: dict[str, Any]) -> None:
    samples = make_samples(groups=4, size=6)
    rng = np.random.default_rng(0)
    for sample in samples:
        noise = rng.normal(0, 0.2, len(sample)).astype(np.float32)
        sample.proximal_logprobs = np.where(sample.loss_mask, sample.old_logprobs + noise, np.float32(0))
    spec = LossSpec(**choice, entropy_coef=0.01)
    whole, sums = accumulated(tiny_model, samples, spec=spec)
    cut, cut_sums = accumulated(tiny_model, samples, budget=100, spec=spec)
    assert sums["micro_batches"] == 1
    assert cut_sums["micro_batches"] >= 4
    assert relative(cut, whole) < 1e-6
    for key in ("loss_sum", "entropy_sum", "logprob_abs_sum", "k3_sum", "masked_sum", "weight_square_sum", "tokens"):
        assert cut_sums[key] == pytest.approx(sums[key], rel=1e-6), key
    assert 0 < sums["masked_sum"] < sums["tokens"] or spec.mask == "none"


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_sum", "seq_mean_token_mean"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_gradient_does_not_depend_on_micro_batches(tiny_model: Path, aggregation: Any, seed: int) -> None:
    """Ragged groups, shared prompts, tool output, samples that weigh less: in one row, or in at least four."""
    rng = np.random.default_rng(seed)
    samples = make_samples(seed=seed, groups=4, size=6, longest=40)
    for sample in samples:
        sample.weight = float(rng.choice([1.0, 0.5, 1 / 3]))
        if rng.random() < 0.2:  # some stand apart from their group
            sample.group_key += 10
    order = rng.permutation(len(samples))
    spec = LossSpec(aggregation=aggregation, entropy_coef=0.01, kl_coef=0.1, clip_ratio_c=3.0)
    whole, sums = accumulated(tiny_model, samples, spec=spec, reference=True)
    cut, cut_sums = accumulated(tiny_model, [samples[i] for i in order], budget=150, spec=spec, reference=True)
    assert sums["micro_batches"] == 1
    assert cut_sums["micro_batches"] >= 4
    assert relative(cut, whole) < 1e-6
    for key in (*TOKEN_SUMS, "tokens", "sequences", "weight_max"):
        assert cut_sums[key] == pytest.approx(sums[key], rel=1e-6, abs=1e-9), key


@pytest.mark.parametrize("each", [True, False])
def test_ranks_add_up_gradients_after_each_micro_batch_or_once(tiny_model: Path, *, each: bool) -> None:
    samples = make_samples(groups=3, size=6)
    of = learner(tiny_model, tokens_per_micro_batch=128, fsdp={"reduce_each_micro_batch": each})
    parameters = list(of.policy.parameters())  # the shards, which have a gradient once it is added up
    found: list[bool] = []
    of.policy.register_forward_pre_hook(lambda *_: found.append(all(p.grad is not None for p in parameters)))
    sums = of.accumulate(samples, 1.0, SPEC)
    assert len(found) == sums["micro_batches"] >= 3
    assert found == [False] + [each] * (len(found) - 1)
    assert relative(gradients(of), accumulated(tiny_model, samples)[0]) < 1e-6


def test_checkpointing_activations_keeps_less_and_changes_no_bit(tiny_model: Path) -> None:
    samples = make_samples()
    grads, kept = [], []
    for on in (False, True):
        of = learner(tiny_model, fsdp={"activation_checkpointing": on})
        saved: list[int] = []

        def keep(tensor: torch.Tensor, into: list[int] = saved) -> torch.Tensor:
            into.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            of.accumulate(samples, 1.0, SPEC)
        grads.append(gradients(of))
        kept.append(sum(saved))
    assert torch.equal(*grads)
    assert kept[1] < 0.5 * kept[0]


def test_offloading_means_host_memory_and_nothing_on_the_cpu() -> None:
    config = FsdpConfig(offload_policy=True)
    assert config.offloads(reference=False, device="cuda")
    assert not config.offloads(reference=True, device="cuda")
    assert not config.offloads(reference=False, device="cpu")


def test_the_gradient_does_not_depend_on_streaming(tiny_model: Path) -> None:
    samples = make_samples(groups=4, size=6)
    whole, sums = accumulated(tiny_model, samples)
    streamed, parts = accumulated(tiny_model, samples, calls=4)
    assert relative(streamed, whole) < 1e-6
    assert parts["tokens"] == sums["tokens"] == normalizer(samples, "token_mean")


def test_sharing_prompts_does_not_change_the_gradient(tiny_model: Path) -> None:
    samples = make_samples(groups=3, size=6)
    shared, sums = accumulated(tiny_model, samples)
    for key, sample in enumerate(samples):
        sample.group_key = key
    alone, alone_sums = accumulated(tiny_model, samples)
    assert relative(shared, alone) < 5e-6  # other matrix shapes: the noise of fp32, not of one order of summation
    assert sums["packed_tokens"] < 0.8 * alone_sums["packed_tokens"]


def test_the_gradient_is_that_of_plain_transformers(tiny_model: Path) -> None:
    """The whole loss, written out again on a plain model."""
    samples = make_samples(groups=2, size=3)
    spec = LossSpec(aggregation="seq_mean_token_mean")
    ours, sums = accumulated(tiny_model, samples, spec=spec)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    total = torch.zeros(())
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids)
        logprobs = torch.log_softmax(plain(input_ids=ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
        mask = torch.from_numpy(sample.loss_mask[1:])
        ratio = (logprobs - torch.from_numpy(sample.old_logprobs[1:]))[mask].exp()
        advantage = torch.from_numpy(sample.advantages[1:])[mask]
        total = total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    total.backward()
    theirs = torch.cat([p.grad.flatten().double() for p in plain.parameters()])
    assert relative(ours, theirs) < 1e-5
    assert sums["loss_sum"] == pytest.approx(total.item(), rel=1e-5)


def test_weights_of_samples_scale_their_loss(tiny_model: Path) -> None:
    samples = make_samples(groups=1, size=2)
    double, _ = accumulated(tiny_model, [*samples, *samples], spec=LossSpec())
    for sample in samples:
        sample.weight = 2.0
    weighted, _ = accumulated(tiny_model, samples, spec=LossSpec())
    assert relative(weighted, double) < 1e-6


def test_the_proximal_policy_is_that_of_the_sample_and_not_the_present_one(tiny_model: Path) -> None:
    """Logprobs recomputed before the first step keep the ratio of later minibatches against the start of the batch."""
    of = learner(tiny_model)
    samples = make_samples(groups=2)
    index, token, numbers = of.logprobs(samples, 1.0)
    for i, sample in enumerate(samples):
        sample.proximal_logprobs = np.zeros(len(sample), dtype=np.float32)
        sample.proximal_logprobs[token[index == i]] = numbers[index == i]
    spec = LossSpec(decoupled=True, importance="token")
    first = of.accumulate(samples, 1.0, spec)
    of.step(10.0)
    second = of.accumulate(samples, 1.0, spec)
    assert first["clip_sum"] == 0.0, "at the start of the step the ratio is 1"
    assert second["clip_sum"] > 0.0
    for key in ("logprob_abs_sum", "k3_sum", "weight_sum", "weight_max"):
        assert second[key] == pytest.approx(first[key], rel=1e-6), "the mismatch is of the engine, not of the optimizer"


def test_the_reference_keeps_the_logprobs_of_the_start(tiny_model: Path) -> None:
    of = learner(tiny_model, reference=True)
    samples = make_samples()
    before = of.logprobs(samples, 1.0)[2]
    of.accumulate(samples, 1.0, SPEC)
    of.step(10.0)
    assert np.array_equal(of.logprobs(samples, 1.0, of="reference")[2], before)
    assert not np.array_equal(of.logprobs(samples, 1.0)[2], before)
    with pytest.raises(WorkerError, match="no reference"):
        learner(tiny_model).logprobs(samples, 1.0, of="reference")


def test_the_first_kl_to_the_reference_is_zero_and_grows(tiny_model: Path) -> None:
    of = learner(tiny_model, reference=True)
    samples = make_samples()
    spec = LossSpec(kl_coef=0.1)
    first = of.accumulate(samples, 1.0, spec)
    of.step(first["tokens"])
    second = of.accumulate(samples, 1.0, spec)
    assert first["kl_ref_sum"] == pytest.approx(0.0, abs=1e-6)
    assert second["kl_ref_sum"] > 1e-3


def test_steps_reduce_the_loss_and_report_the_schedule(tiny_model: Path) -> None:
    of = learner(tiny_model, optim={"lr": 1e-2, "lr_end": 0.0, "schedule": "linear", "warmup_steps": 2})
    samples = make_samples()
    spec = LossSpec(kind="sft")
    losses, rates = [], []
    for _ in range(6):
        sums = of.accumulate(samples, 1.0, spec)
        losses.append(sums["loss_sum"])
        metrics = of.step(sums["tokens"])
        rates.append(metrics["lr"])
        assert metrics["grad_norm"] > 0
    assert losses == sorted(losses, reverse=True)
    assert rates[:3] == pytest.approx([0.5e-2, 1e-2, 1e-2])


def test_looking_at_logprobs_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """A pass without gradient leaves gathered parameters: they have no gradient, and no optimizer changes them."""
    told: list[list[float]] = []
    for looks in (False, True):
        of = learner(tiny_model)

        def look(of: Learner = of, looks: bool = looks) -> None:
            if looks:
                of.logprobs(make_samples(), 1.0)

        look()
        of.reset_optimizer(of.optim, 10)
        of.accumulate(make_samples(), 1.0, SPEC)
        look()
        norm = of.step(10.0)["grad_norm"]
        after = float(of.logprobs(make_samples(), 1.0)[2].sum())
        of.accumulate(make_samples(seed=1), 1.0, SPEC)
        of.step(10.0)
        look()
        of.save(tmp_path / "step_2", {})
        expected = float(of.logprobs(make_samples(), 1.0)[2].sum())
        of.accumulate(make_samples(seed=2), 1.0, SPEC)
        of.step(10.0)
        look()
        of.load(tmp_path / "step_2" / "trainer", optimizer=True)
        assert float(of.logprobs(make_samples(), 1.0)[2].sum()) == expected
        told.append([norm, after, expected])
    assert told[0] == told[1]


def test_the_gradient_norm_is_clipped(tiny_model: Path) -> None:
    of = learner(tiny_model, optim={"lr": 0.0, "grad_clip": 0.5})
    of.accumulate(make_samples(), 1.0, SPEC)
    norm = of.step(1.0)["grad_norm"]
    assert norm > 0.5, "the norm before clipping is reported"


def test_a_gradient_that_is_not_finite_is_refused_and_forgotten(tiny_model: Path) -> None:
    of = learner(tiny_model)
    samples = make_samples()
    samples[0].advantages = np.where(samples[0].loss_mask, np.float32("inf"), np.float32(0.0))
    of.accumulate(samples, 1.0, LossSpec())
    with pytest.raises(WorkerError, match="not finite"):
        of.step(1.0)
    sums = of.accumulate(make_samples(), 1.0, LossSpec())
    assert np.isfinite(of.step(sums["tokens"])["grad_norm"])


def test_published_weights_are_the_policy(tiny_model: Path, tmp_path: Path) -> None:
    of = learner(tiny_model)
    samples = make_samples()
    of.accumulate(samples, 1.0, SPEC)
    of.step(10.0)
    of.publish(tmp_path / "v_1")
    index, token, ours = of.logprobs(samples, 0.9)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "v_1", dtype=torch.float32)
    for i, sample in enumerate(samples):
        ids = torch.from_numpy(sample.token_ids)
        with torch.no_grad():
            theirs = torch.log_softmax(plain(input_ids=ids[None]).logits[0, :-1] / 0.9, -1)
        rows = index == i
        expected = theirs.gather(1, ids[1:, None])[:, 0].numpy()[token[rows] - 1]
        assert np.abs(ours[rows] - expected).max() < 1e-5
    assert sorted(file.name for file in (tmp_path / "v_1").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    assert not list(tmp_path.glob(".*")), "no temporary folder is left"


def test_publishing_bfloat16_halves_the_file(tiny_model: Path, tmp_path: Path) -> None:
    of = learner(tiny_model, dtype="bfloat16")
    sums = of.accumulate(make_samples(), 1.0, SPEC)
    assert np.isfinite(of.step(sums["tokens"])["grad_norm"])
    assert all(p.dtype == torch.float32 for p in of.policy.parameters()), "master weights"
    of.publish(tmp_path / "v_1")
    assert {t.dtype for t in load_file(tmp_path / "v_1" / "model.safetensors").values()} == {torch.bfloat16}


def test_save_and_load_bring_the_run_back_to_the_bit(tiny_model: Path, tmp_path: Path) -> None:
    def train(of: Learner, steps: range) -> list[dict[str, float]]:
        metrics = []
        for step in steps:
            sums = of.accumulate(make_samples(seed=step), 1.0, SPEC)
            del sums["time_s"]
            metrics.append(sums | of.step(sums["tokens"]))
        return metrics

    optim = {"lr": 1e-2, "schedule": "cosine", "lr_end": 0.0, "weight_decay": 0.1}
    straight = learner(tiny_model, optim=optim)
    train(straight, range(3))
    straight.save(tmp_path / "step_3", {"step": 3, "version": 3})
    expected = train(straight, range(3, 6))

    resumed = learner(tiny_model, optim=optim, seed=9)
    resumed.load(tmp_path / "step_3" / "trainer", optimizer=True)
    assert train(resumed, range(3, 6)) == expected
    for a, b in zip(straight.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(a.to_local(), b.to_local())
    state = json.loads((tmp_path / "step_3" / "state.json").read_text())
    assert (state["step"], state["version"]) == (3, 3)


def test_the_same_inputs_give_the_same_bits(tiny_model: Path) -> None:
    samples = make_samples()
    first, second = (accumulated(tiny_model, samples, budget=100)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_checkpoint_of_a_run_that_has_not_stepped_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    saved, unsaved = learner(tiny_model), learner(tiny_model)
    saved.save(tmp_path / "step_0", {})
    results = []
    for of in (saved, unsaved):
        of.accumulate(make_samples(), 1.0, SPEC)
        of.step(10.0)
        results.append(torch.cat([p.to_local().flatten() for p in of.policy.parameters()]))
    assert torch.equal(*results)


def test_loading_weights_only_keeps_the_optimizer_fresh(tiny_model: Path, tmp_path: Path) -> None:
    of = learner(tiny_model)
    of.accumulate(make_samples(), 1.0, SPEC)
    of.step(10.0)
    of.save(tmp_path / "step_1", {})
    other = learner(tiny_model)
    other.load(tmp_path / "step_1" / "trainer", optimizer=False)
    assert torch.equal(next(other.policy.parameters()).to_local(), next(of.policy.parameters()).to_local())
    assert other.steps == 0
    assert not other.optimizer.state


def test_saving_over_a_checkpoint_replaces_it_whole(tiny_model: Path, tmp_path: Path) -> None:
    of = learner(tiny_model)
    of.save(tmp_path / "step_1", {"try": 1})
    of.save(tmp_path / "step_1", {"try": 2})
    assert json.loads((tmp_path / "step_1" / "state.json").read_text())["try"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_a_folder_without_a_checkpoint_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="has no checkpoint"):
        learner(tiny_model).load(tmp_path, optimizer=True)


def test_a_path_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        learner(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        learner(tmp_path / "empty")


def test_random_weights_depend_on_the_seed_alone(tiny_model: Path) -> None:
    def first(seed: int) -> torch.Tensor:
        settings = LearnerSettings(str(tiny_model), TrainerConfig(), "float32", 1, seed, init="random")
        return next(Learner(settings).policy.parameters()).to_local().detach().clone()

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_moving_out_and_in_again_changes_nothing(tiny_model: Path) -> None:
    """On the CPU both places are the same memory: parameters stay those that the optimizer holds."""
    samples = make_samples(6)
    stays, moves = learner(tiny_model, reference=True), learner(tiny_model, reference=True)
    for _ in range(2):
        for of in (stays, moves):
            of.accumulate(samples, 1.0, SPEC)
            of.step(normalizer(samples, "token_mean", None))
        moves.move_out(policy=False)
        moves.move_out(policy=True)
        moves.move_in()
    before, after = (of.logprobs(samples, 1.0) for of in (stays, moves))
    assert np.array_equal(before[2], after[2])


def test_a_move_to_another_device_takes_everything_and_keeps_the_optimizers_parameters(tiny_model: Path) -> None:
    samples, of = make_samples(6), learner(tiny_model)
    of.accumulate(samples, 1.0, SPEC)
    of.step(normalizer(samples, "token_mean", None))
    move_model(of.policy, torch.device("meta"))  # the only other device that every machine has
    move_optimizer(of.optimizer, torch.device("meta"))

    held = [parameter for group in of.optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in of.policy.parameters()}
    states = [value for state in of.optimizer.state.values() for value in state.values()]
    assert states and {value.device.type for value in (*held, *states)} == {"meta"}


@pytest.mark.parametrize("kind", ["ppo_clip", "gspo", "cispo", "pg"])
def test_without_advantages_there_is_no_gradient_and_a_forward_pass_has_the_same_sums(
    tiny_model: Path, kind: Any
) -> None:
    samples = make_samples(groups=2, size=4)
    for sample in samples:
        sample.advantages[:] = 0
    spec = LossSpec(kind=kind, decoupled=True, importance="token", mask="token", mask_low=0.5, mask_high=2.0)
    assert spec.only_advantages
    gradient, sums = accumulated(tiny_model, samples, spec=spec)
    assert not gradient.any()
    of, kept = learner(tiny_model), []
    forward = of.accumulate(samples, 1.0, spec, kept, forward_only=True)
    assert all(parameter.grad is None for parameter in of.policy.parameters())
    assert {**forward, "time_s": 0} == {**sums, "time_s": 0}
    assert sum(len(numbers.numbers) for numbers in kept) == forward["tokens"] > 0


def test_the_moments_move_the_policy_on_in_a_step_without_any_gradient(tiny_model: Path) -> None:
    samples = make_samples(groups=2, size=4)
    flat_ones = make_samples(groups=2, size=4, seed=1)
    for sample in flat_ones:
        sample.advantages[:] = 0
    spec = LossSpec(kind="pg")
    found = []
    for forward_only in (False, True):
        of = learner(tiny_model, optim={"lr": 1e-2, "weight_decay": 0.1})
        for number in range(3):  # also the first step, which has no moments yet
            part = samples if number == 1 else flat_ones
            of.accumulate(part, 1.0, spec, forward_only=forward_only and part is flat_ones)
            of.step(100.0)
        found.append(torch.cat([p.to_local().flatten().detach().clone() for p in of.policy.parameters()]))
    assert torch.equal(*found)
