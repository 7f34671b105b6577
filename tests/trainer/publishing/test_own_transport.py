"""A new transport is a class on each side and a line in each table: nothing else knows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from agentloop.config import PublishConfig, Recipe
from agentloop.weights.layout import TensorSpec
from tests.trainer.publishing.test_publish import FakeLink
from trainer.learner.weights.base import PublishedTensors, Transport
from trainer.learner.weights.publisher import WeightPublisher
from trainer.publishing import transports
from trainer.publishing.base import Publisher, Ranks
from trainer.rank_commands import PublishWeights, command_from_json, to_json
from trainer.types import Published

pytestmark = pytest.mark.usefixtures("process_group")


class NumpyTransport:
    """The rank's side: one file for each tensor."""

    def __init__(self, tensors: PublishedTensors) -> None:
        self._tensors = tensors

    def publish(self, *, folder: Path) -> Published:
        folder.mkdir(parents=True)

        def save(spec: TensorSpec, tensor: Tensor) -> None:
            np.save(folder / f"{spec.name}.npy", tensor.numpy())

        self._tensors.gather(save)
        return Published("numpy:0")


class NumpyPublisher(Publisher):
    """The run's side."""

    @staticmethod
    async def write(ranks: Ranks, folder: Path, version: int) -> Path:
        target = folder / str(version)
        await ranks.ask(PublishWeights("numpy", {"folder": target}))
        return target

    async def publish(self, version: int) -> float:
        folder = await self.write(self._ranks, self._folder, version)
        self._on_folder(version, folder)
        body = {"folder": str(folder), "weight_version": str(version)}
        await self._server.until_served(version, lambda: self._server.update("/update_from_numpy", body))
        return 0.0


class ExtendedPublisher(WeightPublisher):
    @property
    def transports(self) -> Mapping[str, Transport]:
        return {**super().transports, "numpy": NumpyTransport(self.tensors)}


class OneRank:
    """A rank in this process; commands cross the wire."""

    def __init__(self, model: Path) -> None:
        self.lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.publisher = ExtendedPublisher(self.lm, "float32")

    async def ask(self, command: Any) -> Any:
        learner: Any = self
        return command_from_json(orjson.loads(orjson.dumps(to_json(command)))).run(learner)


async def test_a_transport_of_ones_own(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "TRANSPORTS", {**transports.TRANSPORTS, "numpy": NumpyPublisher})
    recipe = Recipe.model_validate({"run": {"name": "x", "steps": 1}, "model": {"path": "x"}, "data": {"train": "x"}})
    recipe.rollout.publish = PublishConfig.model_construct(transport="numpy")  # type: ignore[arg-type]
    ranks, link, noted = OneRank(tiny_model), FakeLink(), dict[int, Path]()

    first = await transports.write_version(recipe, ranks, tmp_path, 1)
    publisher = transports.make_publisher(recipe, ranks, link, tmp_path, noted.__setitem__)
    await publisher.publish(2)
    await publisher.close()

    assert noted == {2: tmp_path / "2"} and first == tmp_path / "1"
    assert link.asked[-1] == ("/update_from_numpy", {"folder": str(tmp_path / "2"), "weight_version": "2"})
    for folder in (first, noted[2]):
        for spec in ranks.publisher.tensors.specs:
            saved = torch.from_numpy(np.load(folder / f"{spec.name}.npy"))
            assert torch.equal(saved, ranks.lm.state_dict()[spec.name])
