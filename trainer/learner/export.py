"""Export a trainer checkpoint of any number of ranks as a Hugging Face folder, in one process.

The model exists only on the meta device, for its names and shapes. Tensors are read, cast and
written one by one, so that memory holds about one of them, however large the model.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import GenerationConfig, PreTrainedModel

from agentloop.errors import ModelError, RunDirError
from agentloop.files import partial_of, rename_folder
from agentloop.model_folder import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    ModelFolder,
    check_files,
    copy_tokenizer,
    load_pretrained,
)
from agentloop.model_folder.pretrained import build_model, load_config
from agentloop.model_folder.tensors import compare_with
from agentloop.weights.layout import TensorSpec
from trainer.learner.checkpoint import reading
from trainer.learner.model.lora import adapter_names, is_adapter, merged
from trainer.learner.model.name_plan import plan_names
from trainer.learner.model.safetensors_folder import SafetensorsFolder
from trainer.learner.weights.base import PublishedTensors, write_config
from trainer.learner.weights.disk import MAX_SHARD_BYTES, Shards

PREFIX = "model.lm."
"""Prefix of the language model's keys: `model` of the checkpoint, `lm` of `PolicyModel`."""

CONFIG_FILES = (CONFIG_FILE, "generation_config.json", *TOKENIZER_FILES, "*.jinja")
"""Files of the model that the run started from, which are enough without adapters."""

STARTED_FROM = "the model that the run started from,"

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Exported:
    """Summary of an export: number of tensors, of parameters, bytes, and number of weight files."""

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
    trust_remote_code: bool = False,
    on_progress: OnProgress | None = None,
    shard_bytes: int = MAX_SHARD_BYTES,
) -> Exported:
    """Write the folder `out`. It appears once it is complete, and replaces an existing folder.

    Args:
        tensors: the `trainer/` folder of a checkpoint.
        model_path: folder or hub id of the model that the run started from, for configuration and
            tokenizer.
        dtype: `float32` or `bfloat16`, of the parameters. Buffers keep their own.
        chat_template: the template that the run used instead of the tokenizer's own; becomes the
            folder's.
        lora_alpha: `trainer.lora.alpha` of a run with adapters, which are merged.
        trust_remote_code: the run's `model.trust_remote_code`.
        on_progress: called with the bytes written so far, and the total.
        shard_bytes: size at which a new file begins.

    Raises:
        RunDirError: not a checkpoint, or one of another model; or the disk is full.
        ModelError: the model's configuration or tokenizer cannot be read.
    """
    saved = _SavedModel(tensors)
    lm, source = _empty_model(model_path, trust_remote_code)
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
            f"{out.parent} has {free / 2**30:.1f} GB free, the model needs {size / 2**30:.1f}",
            "free some space, or choose another folder with --out",
        )

    partial.mkdir()
    try:
        shards = Shards(partial, layout.specs, shard_bytes)
        for spec in layout.specs:
            shards.add(spec, merger.read(spec))
            if on_progress is not None:
                on_progress(spec.end, size)
        shards.close()

        _copy_generation_config(lm, source)
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
    """Reads the model's tensors for export, adapters merged.

    A run with adapters saves only those in its checkpoint: the base weights come from the model
    that the run started from.

    Args:
        alpha: the run's `trainer.lora.alpha`; None if it is not known.

    Raises:
        RunDirError: there are adapters, but alpha is not known.
        ModelError: the model that the run started from cannot be read tensor by tensor.
    """

    def __init__(self, saved: _SavedModel, lm: PreTrainedModel, model_path: str, alpha: float | None) -> None:
        self._saved = saved
        self._alpha = alpha or 0.0
        self._files: SafetensorsFolder | None = None
        self._plan: dict[str, str] = {}
        if not saved.adapters:
            return

        if alpha is None:
            raise RunDirError(
                f"{saved.folder} has adapters, but their trainer.lora.alpha is stored only in the run directory",
                "give the run directory, or the checkpoint inside it",
            )

        folder = ModelFolder.resolve(model_path, key=STARTED_FROM)
        check_files(folder)
        self._files = SafetensorsFolder(folder)
        plan = plan_names(lm, self._files)
        if isinstance(plan, str):
            compare_with(lm, folder)
            raise ModelError(
                f"{model_path} cannot be read tensor by tensor: {plan}",
                "load it with transformers, save it with save_pretrained, and pass that folder as --model",
            )
        self._plan = plan

    def read(self, spec: TensorSpec) -> torch.Tensor:
        """Read one whole tensor; parameters in float32."""
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
        RunDirError: the folder holds no checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / ".metadata").is_file():
            raise RunDirError(
                f"{folder} holds no checkpoint", "give a run directory, or a folder checkpoints/step_N of one"
            )

        self._reader = _Reader(folder)
        with reading(folder, Exception):
            entries = self._reader.read_metadata().state_dict_metadata
        stored = {
            key.removeprefix(PREFIX): entry
            for key, entry in entries.items()
            if key.startswith(PREFIX) and isinstance(entry, TensorStorageMetadata)
        }
        self.shapes: dict[str, torch.Size] = {name: entry.size for name, entry in stored.items()}
        self._dtypes = {name: entry.properties.dtype for name, entry in stored.items()}
        self.adapters = [name for name in self.shapes if is_adapter(name)]

    def check(self, lm: PreTrainedModel, model_path: str) -> None:
        """Check that these are the tensors of `lm`.

        Raises:
            RunDirError: names the first tensor that does not match.
        """
        wanted = self._wanted(lm)
        for name, shape in wanted.items():
            if self.shapes.get(name) != shape:
                found = f"has the shape {list(self.shapes[name])}" if name in self.shapes else "is missing"
                raise RunDirError(
                    f"{self.folder} is not a checkpoint of {model_path}: {name} {found}, the model's has {list(shape)}",
                    "name the model that the run started from with --model",
                )

        extra = [name for name in self.shapes if name not in wanted]
        if extra:
            raise RunDirError(
                f"{self.folder} is not a checkpoint of {model_path}, which has no {extra[0]}",
                "name the model that the run started from with --model",
            )

    def _wanted(self, lm: PreTrainedModel) -> dict[str, torch.Size]:
        """Return the tensors in a checkpoint of `lm`; with adapters, only those."""
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
        """Read a whole tensor, assembled from the parts that the ranks saved.

        Raises:
            RunDirError: its files are missing or damaged.
        """
        key = PREFIX + name
        tensor = torch.empty(self.shapes[name], dtype=self._dtypes[name])
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose
                load({key: tensor}, storage_reader=self._reader, no_dist=True)
        except CheckpointException as exc:
            cause = next(iter(exc.failures.values()))[0]
            raise RunDirError(
                f"{self.folder} cannot be read: {cause}",
                "if its run is still active, newer checkpoints have replaced it (checkpoint.keep): choose another, or "
                "wait for the end of the run",
            ) from exc
        return tensor


class _Reader(FileSystemReader):
    """Reads the list of tensors once instead of once per tensor."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata


def _empty_model(model_path: str, trust_remote_code: bool) -> tuple[PreTrainedModel, Path]:
    """Build the model on meta; return it and its folder, where config and tokenizer are."""
    try:
        folder = ModelFolder.resolve(model_path, CONFIG_FILES, key=STARTED_FROM, code=trust_remote_code)
        check_files(folder, weights=False)
        config = load_config(str(folder.path), trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            lm = build_model(config, str(folder.path), trust_remote_code=trust_remote_code, dtype=torch.float32)
    except ModelError as exc:
        raise ModelError(
            exc.message, f"{exc.hint}; or name another folder with --model: config.json and tokenizer are enough"
        ) from exc
    return lm, folder.path


def _copy_generation_config(lm: PreTrainedModel, folder: Path) -> None:
    """Copy the generation settings of the model that the run started from, if any."""
    if (folder / "generation_config.json").is_file():
        lm.generation_config = load_pretrained(GenerationConfig, str(folder), "generation_config.json")
