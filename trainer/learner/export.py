"""From a trainer checkpoint to a Hugging Face folder: in one process, whatever number of ranks saved it.

The model exists on the meta device alone, for its names and shapes. Tensors are read one by one, cast and written to
their place in a file, so that memory holds about one of them however large the model is.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoConfig, GenerationConfig

from agentloop.errors import ModelError, RunDirError
from agentloop.files import partial_of, rename_folder
from agentloop.model_folder import copy_tokenizer
from agentloop.weights.layout import TensorSpec
from trainer.learner.model.loading import local_folder
from trainer.learner.model.lora import adapter_names, is_adapter, merged
from trainer.learner.model.name_plan import plan_names
from trainer.learner.model.policy import loader_of
from trainer.learner.model.safetensors_folder import SafetensorsFolder
from trainer.learner.weights.base import PublishedTensors, write_config
from trainer.learner.weights.disk import MAX_SHARD_BYTES, Shards

PREFIX = "model.lm."
"""Prefix of a checkpoint's language-model keys: `model` of the checkpoint, `lm` of `PolicyModel`."""

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: parameters and buffers, their bytes, and the weights' files."""

    tensors: int
    parameters: int
    size: int
    files: int


def export_checkpoint(
    tensors: Path,
    model_path: str,
    out: Path,
    *,
    dtype: str,
    chat_template: Path | None = None,
    lora_alpha: float | None = None,
    on_progress: OnProgress | None = None,
    shard_bytes: int = MAX_SHARD_BYTES,
) -> Exported:
    """Write `out`, which appears when it is whole; what stood there is replaced.

    Args:
        tensors: the `trainer/` folder of a checkpoint.
        model_path: folder or hub id of the model that the run started from: its configuration and its tokenizer.
        dtype: `float32` or `bfloat16`, of the parameters. Buffers keep their own.
        chat_template: what the run used instead of the tokenizer's own; becomes the folder's.
        lora_alpha: `trainer.lora.alpha` of a run with adapters, which are merged.
        on_progress: called with the bytes that are written, and all.
        shard_bytes: size at which a file ends.

    Raises:
        RunDirError: it is no checkpoint, or one of another model.
        ModelError: the model's configuration or tokenizer cannot be read.
    """
    saved = _SavedModel(tensors)
    lm = _empty_model(model_path)
    saved.check(lm, model_path)
    merger = _Merger(saved, lm, model_path, lora_alpha)
    layout = PublishedTensors(lm, dtype)
    size = layout.specs[-1].end
    partial = partial_of(out)
    shutil.rmtree(partial, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < size:
        raise RunDirError(
            f"{out.parent} has {free / 2**30:.1f} GB free, the model needs {size / 2**30:.1f}", "make room"
        )
    partial.mkdir()
    try:
        shards = Shards(partial, layout.specs, shard_bytes)
        for spec in layout.specs:
            shards.add(spec, merger.read(spec))
            if on_progress is not None:
                on_progress(spec.end, size)
        shards.close()
        _take_generation_config(lm, model_path)
        write_config(lm, dtype, partial)
        copy_tokenizer(model_path, partial, chat_template)
        rename_folder(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Exported(
        tensors=len(layout.specs),
        parameters=sum(parameter.numel() for parameter in lm.parameters()),
        size=size,
        files=len(list(out.glob("*.safetensors"))),
    )


class _Merger:
    """The model's tensors as they are written. Of a run with adapters the checkpoint holds these alone: the rest is
    that of the model that the run started from.

    Args:
        alpha: the run's `trainer.lora.alpha`; None: it is not known.

    Raises:
        RunDirError: there are adapters, and alpha is not known, or they are those of another model.
        ModelError: the model that the run started from cannot be read tensor by tensor.
    """

    def __init__(self, saved: _SavedModel, lm: Any, model_path: str, alpha: float | None) -> None:
        self._saved = saved
        self._alpha = alpha or 0.0
        self._files: SafetensorsFolder | None = None
        if not saved.adapters:
            return
        if alpha is None:
            raise RunDirError(
                f"{saved.folder} holds adapters, and how much they count is not known outside of their run",
                "give the run directory, or the checkpoint where it lies in it",
            )
        self._files = SafetensorsFolder(local_folder(model_path))
        plan = plan_names(lm, self._files)
        if isinstance(plan, str):
            raise ModelError(f"{model_path} cannot be read tensor by tensor: {plan}", "save it with transformers first")
        self._plan = plan

    def read(self, spec: TensorSpec) -> torch.Tensor:
        """One whole tensor, float32 where it is a parameter."""
        if self._files is None:
            return self._saved.read(spec.name)
        tensor = self._files.read(self._plan[spec.name], None)
        first, second = adapter_names(spec.name)
        if first not in self._saved.shapes:
            return tensor
        a, b = self._saved.read(first), self._saved.read(second)
        return merged(tensor, a, b, self._alpha / len(a))


class _SavedModel:
    """The model's tensors in a checkpoint, read one at a time.

    Args:
        folder: the `trainer/` folder of a checkpoint.

    Raises:
        RunDirError: it holds no checkpoint that can be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / ".metadata").is_file():
            raise RunDirError(
                f"{folder} holds no checkpoint", "give a run directory, or a folder checkpoints/step_N of one"
            )
        self._reader = _Reader(folder)
        entries = self._reader.read_metadata().state_dict_metadata
        self.shapes: dict[str, torch.Size] = {
            key.removeprefix(PREFIX): entry.size
            for key, entry in entries.items()
            if key.startswith(PREFIX) and isinstance(entry, TensorStorageMetadata)
        }
        self._dtypes = {name: entries[PREFIX + name].properties.dtype for name in self.shapes}
        self.adapters = [name for name in self.shapes if is_adapter(name)]

    def check(self, lm: Any, model_path: str) -> None:
        """Whether these are the tensors of a model.

        Raises:
            RunDirError: naming the first that is not.
        """
        wanted = self._wanted(lm)
        for name, shape in wanted.items():
            if self.shapes.get(name) != shape:
                found = f"has the shape {list(self.shapes[name])}" if name in self.shapes else "is missing"
                raise RunDirError(
                    f"{self.folder} is a checkpoint of another model than {model_path}: {name} {found}, "
                    f"the model's has {list(shape)}",
                    "name the model that the run started from with --model",
                )
        extra = [name for name in self.shapes if name not in wanted]
        if extra:
            raise RunDirError(
                f"{self.folder} is a checkpoint of another model than {model_path}, which has no {extra[0]}",
                "name the model that the run started from with --model",
            )

    def _wanted(self, lm: Any) -> dict[str, torch.Size]:
        """The tensors that a checkpoint of `lm` holds; with adapters, those of the weights that have one."""
        shapes = {name: tensor.shape for name, tensor in lm.state_dict().items()}
        if not self.adapters:
            return shapes
        wanted: dict[str, torch.Size] = {}
        for name, shape in shapes.items():
            a, b = adapter_names(name)
            if a in self.shapes:
                rank = self.shapes[a][0]
                wanted |= {a: torch.Size([rank, shape[-1]]), b: torch.Size([shape[0], rank])}
        return wanted

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, put together from the parts that the ranks have saved."""
        key = PREFIX + name
        tensor = torch.empty(self.shapes[name], dtype=self._dtypes[name])
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is meant to be
                dcp.load({key: tensor}, storage_reader=self._reader, no_dist=True)
        except CheckpointException as exc:
            cause = next(iter(exc.failures.values()))[0]
            raise RunDirError(
                f"{self.folder} cannot be read: {cause}",
                "if its run goes on, it was deleted for newer ones (checkpoint.keep): choose another, or wait for the "
                "run's end",
            ) from exc
        return tensor


class _Reader(dcp.FileSystemReader):
    """Reads the list of tensors once, and not for each of them."""

    _known: Any = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if self._known is None:
            self._known = super().read_metadata(*args, **kwargs)
        return self._known


def _empty_model(model_path: str) -> Any:
    """The model without a single weight."""
    try:
        config = AutoConfig.from_pretrained(model_path)
        with torch.device("meta"):
            return loader_of(config)[0].from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as exc:
        raise ModelError(
            f"the model that the run started from, {model_path}, cannot be read: {exc}",
            "name the folder it lies in now with --model; config.json and the tokenizer's files are enough",
        ) from exc


def _take_generation_config(lm: Any, model_path: str) -> None:
    """Take over how the model that the run started from generates, where it says so."""
    try:
        lm.generation_config = GenerationConfig.from_pretrained(model_path)
    except (OSError, ValueError):
        return  # it has no such file: what the configuration says is all there is
