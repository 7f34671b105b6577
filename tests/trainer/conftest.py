"""A tiny random Qwen2, and samples for it. Everything is fp32 on one core."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from agentloop.config import AlgorithmConfig, TrainerConfig
from tests.forked import forking
from trainer.rollouts.producer import Group
from trainer.rollouts.samples import collect, set_advantages
from trainer.types import TrainSample
from trainer.workers.group import WorkerGroup
from trainer.workers.rank import early_ranks

VOCAB = 96


def samples_of(group: Group, advantage: str, image_token: int | None = None) -> list[TrainSample]:
    """The samples of one group, with the advantages of an estimator that needs nothing but the group."""
    batch = collect(group, image_token=image_token)
    set_advantages(batch, AlgorithmConfig(advantage=advantage))
    return batch.samples


async def start_workers(*, config: TrainerConfig, **options: Any) -> WorkerGroup:
    """Start ranks as a run does: they are forked from a process that has imported torch."""
    with forking(early_ranks(config)):
        return await WorkerGroup.start(config=config, **options)


@pytest.fixture(scope="session", autouse=True)
def forked_commands() -> Iterator[None]:
    """Commands that run in this process fork their programs off, as `start_workers`."""
    with pytest.MonkeyPatch.context() as patch:
        for command in ("train", "sft", "eval"):
            patch.setattr(f"trainer.commands.{command}.early_programs", forking)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Qwen2: 2 layers, 4 query heads on 2 key heads, tied embeddings."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.2,  # large enough that every position's distribution is its own
        )
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one rank in this process."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_samples(
    seed: int = 0, groups: int = 3, size: int = 4, prompt: int = 9, longest: int = 24, gaps: bool = True
) -> list[TrainSample]:
    """Groups with shared prompts of different lengths; with `gaps`, stretches of tool output that are not trained."""
    rng = np.random.default_rng(seed)
    samples = []
    for key in range(groups):
        shared = rng.integers(0, VOCAB, prompt + key)
        for _ in range(size):
            length = int(rng.integers(1, longest))
            ids = np.concatenate([shared, rng.integers(0, VOCAB, length)]).astype(np.int32)
            mask = np.zeros(len(ids), dtype=bool)
            mask[len(shared) :] = rng.random(length) < 0.7 if gaps else True
            mask[rng.integers(len(shared), len(ids))] = True
            samples.append(
                TrainSample(
                    token_ids=ids,
                    loss_mask=mask,
                    old_logprobs=np.where(mask, rng.normal(-4.5, 0.3, len(ids)), 0.0).astype(np.float32),
                    advantages=np.where(mask, rng.normal(), 0.0).astype(np.float32),
                    prompt_length=len(shared),
                    group_key=key,
                )
            )
    return samples


@pytest.fixture
def trainer_config() -> TrainerConfig:
    return TrainerConfig.model_validate({"optim": {"lr": 1e-2, "grad_clip": 1e9}})
