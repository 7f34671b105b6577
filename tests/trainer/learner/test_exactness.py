"""The packed path computes what plain transformers computes: logprobs, entropy and gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from agentloop.errors import ModelError
from tests.trainer.conftest import make_samples
from tests.trainer.models import save_tiny
from trainer.learner.model.attention import Attention, PackedRow, packed_attention, portable_attention
from trainer.learner.model.kernels import Kernels
from trainer.learner.model.logprobs import selected_logprobs
from trainer.learner.model.matmul import Matmul
from trainer.learner.model.policy import DeviceBatch, PolicyModel, load_policy
from trainer.packing.layout import PackedLayout, pack
from trainer.packing.units import plan_units
from trainer.types import TrainSample

CPU = torch.device("cpu")


def plain_logprobs(model: torch.nn.Module, sample: TrainSample, temperature: float) -> torch.Tensor:
    """One sample, one forward, all logits: (L - 1) logprobs of tokens 1.."""
    ids = torch.from_numpy(sample.token_ids)
    logits = model(input_ids=ids[None]).logits[0].float() / temperature
    return torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None]).squeeze(1)


def load(path: Path, chunk: int = 7, kernels: Kernels | None = None) -> PolicyModel:
    return load_policy(str(path), init="weights", seed=0, logprob_chunk=chunk, device=CPU, kernels=kernels or Kernels())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_logprobs_and_gradients_equal_the_plain_ones(tiny_model: Path, temperature: float) -> None:
    samples = make_samples()
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    policy = load(tiny_model)
    packed = pack(samples, plan_units(samples, 10_000), "token_mean")
    assert packed.layout.prefixes, "the test is about shared prompts"
    logprobs, _ = policy(DeviceBatch.of(packed, CPU), temperature)
    weights = torch.from_numpy(packed.columns["advantages"])
    (logprobs * weights).sum().backward()

    rows = [plain_logprobs(plain, sample, temperature) for sample in samples]
    expected = torch.stack(
        [rows[i][t - 1] for i, t in zip(packed.sample_index.tolist(), packed.token_index.tolist(), strict=True)]
    )
    (expected * weights).sum().backward()
    assert (logprobs - expected).abs().max() < 1e-5
    for (name, ours), theirs in zip(policy.lm.named_parameters(), plain.parameters(), strict=True):
        scale = theirs.grad.abs().max()
        assert (ours.grad - theirs.grad).abs().max() <= 2e-5 * scale + 1e-6, name


@pytest.mark.parametrize("kind", ["qwen3", "llama", "mistral", "gemma", "gemma3"])
def test_packed_logprobs_equal_the_plain_ones_in_other_families(kind: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, kind)
    samples = make_samples(groups=2)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    packed = pack(samples, plan_units(samples, 10_000), "token_mean")
    with torch.no_grad():
        logprobs, _ = load(model)(DeviceBatch.of(packed, CPU), 1.0)
        rows = [plain_logprobs(plain, sample, 1.0) for sample in samples]
    pairs = zip(packed.sample_index.tolist(), packed.token_index.tolist(), strict=True)
    assert (logprobs - torch.stack([rows[i][t - 1] for i, t in pairs])).abs().max() < 1e-5


def test_plain_attention_is_the_same_and_is_what_it_says(tiny_model: Path) -> None:
    samples = make_samples(groups=2)
    batch = DeviceBatch.of(pack(samples, plan_units(samples, 10_000), "token_mean"), CPU)
    with torch.no_grad():
        usual = load(tiny_model)(batch, 1.0)[0]
        plain = load(tiny_model, kernels=Kernels(attention=Attention("plain")))(batch, 1.0)[0]
    assert (plain - usual).abs().max() < 1e-5
    assert not torch.equal(plain, usual), "another kernel, other rounding"


def test_what_the_packed_path_does_not_compute_is_refused(tmp_path: Path) -> None:
    """Capped logits (Gemma 2), and a sliding window that is shorter than the sequence."""
    with pytest.raises(ModelError, match="final_logit_softcapping of gemma2"):
        load(save_tiny(tmp_path / "gemma2", "gemma2"))
    samples = make_samples(groups=1)
    batch = DeviceBatch.of(pack(samples, plan_units(samples, 10_000), "token_mean"), CPU)
    for kind in ("mistral", "gemma3"):
        with pytest.raises(ModelError, match="sliding window shorter"):
            load(save_tiny(tmp_path / kind, kind, sliding_window=8))(batch, 1.0)
    capped = save_tiny(tmp_path / "capped", "gemma2", final_logit_softcapping=None)
    with pytest.raises(ModelError, match="logit capping"):
        load(capped)(batch, 1.0)


def test_a_mask_shifted_by_one_token_blows_the_mismatch_up(tiny_model: Path) -> None:
    samples = make_samples(gaps=False)
    policy = load(tiny_model)

    def recomputed(of: list[TrainSample]) -> tuple[np.ndarray, np.ndarray]:
        packed = pack(of, plan_units(of, 10_000), "token_mean")
        with torch.no_grad():
            return policy(DeviceBatch.of(packed, CPU), 1.0)[0].numpy(), packed.columns["old_logprobs"]

    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    for sample in samples:
        with torch.no_grad():
            engine_logprobs = np.concatenate([[0.0], plain_logprobs(plain, sample, 1.0).numpy()])
        sample.old_logprobs = np.where(sample.loss_mask, engine_logprobs, 0.0).astype(np.float32)
    ours, engine = recomputed(samples)
    assert np.abs(ours - engine).mean() < 1e-5

    for sample in samples:  # the engine's numbers, one token late
        sample.old_logprobs = np.roll(sample.old_logprobs, 1)
    ours, engine = recomputed(samples)
    assert np.abs(ours - engine).mean() > 0.1


def test_samples_packed_side_by_side_do_not_see_each_other(tiny_model: Path) -> None:
    policy = load(tiny_model)
    samples = make_samples(groups=2)
    alone = samples[:4]
    together = pack(samples, plan_units(samples, 10_000), "token_mean")
    single = pack(alone, plan_units(alone, 10_000), "token_mean")
    with torch.no_grad():
        both, _ = policy(DeviceBatch.of(together, CPU), 1.0)
        first, _ = policy(DeviceBatch.of(single, CPU), 1.0)
    assert (both[: len(first)] - first).abs().max() < 1e-6


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_attention_equals_masked_attention_forward_and_backward(key_heads: int) -> None:
    torch.manual_seed(1)
    layout = PackedLayout(runs=[(0, 1, 5), (5, 3, 4), (17, 1, 7), (24, 2, 6)], prefixes=[(5, 19, 0, 5)])
    q, k, v = (
        torch.randn(1, heads, 36, 8, dtype=torch.float32, requires_grad=True) for heads in (4, key_heads, key_heads)
    )
    weights = torch.randn(1, 36, 4, 8)
    module = torch.nn.Identity()
    out, _ = packed_attention(module, q, k, v, None, packed_row=PackedRow(layout, Attention()), scaling=0.3)
    ours = torch.autograd.grad((out * weights).sum(), (q, k, v))
    rows = [tensor[0].transpose(0, 1).double() for tensor in (q, k, v)]
    rows = [row.repeat_interleave(4 // row.shape[1], dim=1) for row in rows]
    expected = portable_attention(*rows, layout, 0.3)
    theirs = torch.autograd.grad((expected * weights[0]).sum(), (q, k, v))
    assert (out[0] - expected).abs().max() < 1e-6
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 5e-6


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunked_logprob_and_entropy_equal_autograd(chunk: int) -> None:
    torch.manual_seed(2)
    hidden = torch.randn(23, 8, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(31, 8, dtype=torch.float32, requires_grad=True)
    targets = torch.randint(0, 31, (23,))
    a, b = torch.randn(23), torch.randn(23)
    logprobs, entropy = selected_logprobs(hidden, weight, targets, 0.8, chunk, Matmul())
    ours = torch.autograd.grad((a * logprobs + b * entropy).sum(), (hidden, weight), retain_graph=True)
    only_logprobs = torch.autograd.grad((a * logprobs).sum(), (hidden, weight))
    everything = torch.log_softmax(hidden.double() @ weight.double().T / 0.8, -1)
    expected = everything.gather(1, targets[:, None]).squeeze(1)
    expected_entropy = -(everything.exp() * everything).sum(-1)
    theirs = torch.autograd.grad((a * expected + b * expected_entropy).sum(), (hidden, weight), retain_graph=True)
    theirs_only = torch.autograd.grad((a * expected).sum(), (hidden, weight))
    assert (logprobs - expected).abs().max() < 1e-5
    assert (entropy - expected_entropy).abs().max() < 1e-5
    for x, y in zip((*ours, *only_logprobs), (*theirs, *theirs_only), strict=True):
        assert (x - y).abs().max() < 2e-5
