"""Building the sharded policy without ever holding the whole model.

The model is built on `meta`, sharded there, and then each rank reads its rows of each tensor from the safetensors
files: a rank's host memory is its shard and one tensor's rows. Random weights are drawn block by block, by every rank
alike, and each keeps its rows. Where the names in the files are not those of the model and no renaming makes them so
(fused or split tensors of other releases), transformers' own loading is used, which holds the whole model.

Rows: FSDP2 shards the first dimension as `torch.chunk` does.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from agentloop.config import TrainerConfig
from agentloop.errors import ModelError
from agentloop.weights.layout import LayoutError, read_layout
from trainer.learner.model.lora import add_adapters, base_name, drawn, is_adapter
from trainer.learner.model.matmul import use_in
from trainer.learner.model.policy import (
    PolicyModel,
    build_lm,
    decoder_blocks,
    is_vision,
    language_blocks,
    load_policy,
    shard,
)
from trainer.learner.model.vision import freeze_tower

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

ModelT = TypeVar("ModelT", bound=PolicyModel)


def load_sharded(
    path: str,
    config: TrainerConfig,
    *,
    dtype: str,
    init: Literal["weights", "random"],
    seed: int,
    device: torch.device,
    reference: bool = False,
    kind: type[ModelT] = PolicyModel,  # type: ignore[assignment]
) -> ModelT:
    """The policy, the frozen reference or the critic, sharded over all ranks, which call this together.

    Args:
        path: folder of a Hugging Face model, or a hub id.
        dtype: compute dtype; master weights are float32.
        init: `random` draws the weights with `seed`, the same ones for any number of ranks.
        reference: what the config says of the reference counts: its offload; nothing of it is trained.
        kind: what the language model becomes part of; parameters that it adds are not initialized.

    Raises:
        ModelError: the path is no causal LM, or one that the packed path does not compute.
    """
    path = local_folder(path)
    lm = build_lm(path)
    policy = kind(lm, config.logprob_chunk).eval()
    _freeze(policy, config, reference=reference)
    source: _Source | None = None
    if init == "random":
        source = _Drawn(path, seed)
    else:
        plan = plan_names(lm, files := SafetensorsFolder(path))
        source = _Read(files, plan) if isinstance(plan, dict) else None
        if source is None:
            log.warning("%s: %s; every rank loads the whole model through transformers", path, plan)
    if source is None:
        read = load_policy(path, init=init, seed=seed, logprob_chunk=config.logprob_chunk, device=device)
        whole = kind(read.lm, config.logprob_chunk).eval()
        _freeze(whole, config, reference=reference)
        fuse(whole.lm, config, device)
        if config.lora is not None and not reference:
            add_adapters(whole.lm, language_blocks(whole.lm), config.lora)
        _materialize(whole, device)
        shard(whole, dtype, config.fsdp, device, reference=reference)
        _draw_adapters(whole.lm, seed)
        return whole
    fill_buffers(lm)
    fuse(lm, config, device)
    if config.lora is not None and not reference:
        add_adapters(lm, language_blocks(lm), config.lora)
    shard(policy, dtype, config.fsdp, device, reference=reference)
    offloaded = config.fsdp.offloads(reference=reference, device=device.type)
    _materialize(policy, torch.device("cpu") if offloaded else device)
    source.fill(lm)
    _draw_adapters(lm, seed)
    for module in policy.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return policy


def fuse(lm: nn.Module, config: TrainerConfig, device: torch.device) -> None:
    """Replace parts of the model by faster ones, where there are any.

    On CUDA: norms, rotations and MLPs by liger-kernel's fused ones, if it is installed. The head and the loss stay
    ours: they never hold the logits either. On a CPU: the matmul of linear layers, as `trainer.matmul` says.
    """
    if device.type == "cpu":
        use_in(lm)
    elif config.liger and importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(
            model=lm, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
        )


def _freeze(policy: PolicyModel, config: TrainerConfig, *, reference: bool) -> None:
    if reference:
        policy.requires_grad_(False)
    elif config.freeze_vision and is_vision(policy.lm):
        freeze_tower(policy.lm)


def local_folder(path: str) -> str:
    """`path`, or where the snapshot of a hub id lies."""
    if Path(path).is_dir():
        return path
    from agentloop.model_folder import ModelFolder

    return str(ModelFolder.resolve(path).path)


class SafetensorsFolder:
    """The tensors of a model folder, read in whole or by rows.

    Read, not mapped: pages of a mapped file that were touched count as a process's memory until they are needed
    elsewhere, and a rank would seem to hold its shard twice.

    Attributes:
        specs: each tensor by its name, and its file.
        bytes_read: bytes of tensors that have been read so far, in the files' own dtype.

    Raises:
        ModelError: the folder holds no safetensors, a file is damaged, or its index names files that are not there.
    """

    def __init__(self, folder: str) -> None:
        root = Path(folder)
        self.bytes_read = 0
        self._open: dict[Path, BinaryIO] = {}
        index = root / INDEX
        if index.is_file():
            files = sorted({root / file for file in json.loads(index.read_text())["weight_map"].values()})
        elif (root / SINGLE).is_file():
            files = [root / SINGLE]
        else:
            raise ModelError(
                f"{folder} cannot be loaded as a causal language model: it holds no {SINGLE}",
                "model.path has to be a folder with config.json and safetensors, or a hub id",
            )
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelError(f"{index} names {missing[0]}, which is not there", "download the model again, whole")
        try:
            self.specs = {spec.name: (spec, file) for file in files for spec in read_layout(file)}
        except LayoutError as exc:
            raise ModelError(str(exc), "download the model again, whole") from exc

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.end - spec.begin for spec, _ in self.specs.values())

    def shape(self, name: str) -> tuple[int, ...]:
        return self.specs[name][0].shape

    def read(self, name: str, rows: slice | None) -> Tensor:
        """A tensor, or those rows of it; nothing else is read."""
        spec, path = self.specs[name]
        begin, end, shape = spec.begin, spec.end, spec.shape
        if rows is not None:
            row = (end - begin) // shape[0]
            begin, end, shape = begin + rows.start * row, begin + rows.stop * row, (rows.stop - rows.start, *shape[1:])
        data = torch.empty(end - begin, dtype=torch.uint8)
        if path not in self._open:
            self._open[path] = path.open("rb", buffering=0)
        self._open[path].seek(begin)
        view = memoryview(data.numpy())
        while view:
            count = self._open[path].readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise ModelError(f"{path} became shorter while it was read", "keep it as it is until the run has begun")
            view = view[count:]
        self.bytes_read += len(data)
        return data.view(getattr(torch, spec.dtype)).view(shape)

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()


def plan_names(lm: nn.Module, files: SafetensorsFolder) -> dict[str, str] | str:
    """Which tensor of the files each parameter and persistent buffer of `lm` (on meta) is.

    Names that transformers renames on load (other prefixes of earlier releases) are renamed in the same way.

    Returns:
        model's name -> file's name, tied parameters once; or why there is no such mapping.
    """
    aliases = _aliases(lm)
    known = {alias: names[0] for names in aliases.values() for alias in names}
    shapes = {names[0]: tuple(tensor.shape) for tensor, names in aliases.items()}
    renamed, fault = _renamed(lm, files)
    if fault:
        return fault
    plan: dict[str, str] = {}
    for own, name in renamed.items():
        first = known.get(own)
        if first is None:
            if own.endswith(("rotary_emb.inv_freq", "position_ids")):
                continue  # computed, and saved by earlier releases
            return f"{name} of its files is no tensor of the model"
        if first in plan:
            return f"its files hold both {plan[first]} and {name}, which the model ties"
        if files.shape(name) != shapes[first]:
            return f"{name} has the shape {list(files.shape(name))} and not {list(shapes[first])}"
        plan[first] = name
    missing = shapes.keys() - plan.keys()
    if missing:
        return f"{sorted(missing)[0]} is not in its files"
    return plan


def _aliases(lm: nn.Module) -> dict[Tensor, list[str]]:
    """Each parameter and persistent buffer with all of its names."""
    found: dict[Tensor, list[str]] = {}
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, []).append(name)
    persistent = lm.state_dict().keys()
    for name, buffer in lm.named_buffers():
        if name in persistent:
            found.setdefault(buffer, []).append(name)
    return found


def _renamed(lm: nn.Module, files: SafetensorsFolder) -> tuple[dict[str, str], str]:
    """The model's name of each of the files' names, as far as renaming alone does it; or why it does not."""
    own = lm.state_dict().keys()
    if files.specs.keys() == own or files.specs.keys() == {name for name, _ in lm.named_parameters()}:
        return {name: name for name in files.specs}, ""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return {name: name for name in files.specs}, ""
    transforms = get_model_conversion_mapping(lm)
    prefix = f"{getattr(lm, 'base_model_prefix', '')}."
    renamed: dict[str, str] = {}
    for name in files.specs:
        new = name
        for transform in transforms:
            new, matched = transform.rename_source_key(new)
            if matched is not None and not isinstance(transform, WeightRenaming):
                return {}, f"{name} of its files is stored in another form"
        if new not in own and prefix + new in own:  # saved without the head
            new = prefix + new
        if new in renamed:
            return {}, f"{name} and {renamed[new]} of its files are both {new}"
        renamed[new] = name
    return renamed, ""


class _Source(Protocol):
    """Where a model's values come from."""

    def fill(self, lm: nn.Module) -> None:
        """Give each rank's part of each parameter, and each persistent buffer, its values."""
        ...


class _Read:
    def __init__(self, files: SafetensorsFolder, plan: dict[str, str]) -> None:
        self._files = files
        self._plan = plan

    @torch.no_grad()
    def fill(self, lm: nn.Module) -> None:
        for name, tensor in _targets(lm):
            local, rows = _local(tensor)
            if local.numel():
                local.copy_(self._files.read(self._plan[base_name(name)], rows))
        log.info("read %d bytes of tensors; the model's files hold %d", self._files.bytes_read, self._files.size)
        self._files.close()


class _Drawn:
    """Weights drawn as transformers initializes the model, a block at a time."""

    def __init__(self, path: str, seed: int) -> None:
        self._path = path
        self._seed = seed

    @torch.no_grad()
    def fill(self, lm: nn.Module) -> None:
        template = build_lm(self._path)
        targets = {base_name(name): tensor for name, tensor in _targets(lm)}
        torch.manual_seed(self._seed)
        for prefix, part, owner, whole in _parts(template):
            if not any(True for _ in part.parameters(recurse=whole)):
                continue
            part.to_empty(device="cpu", recurse=whole)
            _draw(part, owner, recurse=whole)
            for name, parameter in part.named_parameters(prefix, recurse=whole):
                if name in targets:  # not the second name of a tied one
                    local, rows = _local(targets[name])
                    local.copy_(parameter if rows is None else parameter[rows])
            part.to(device="meta") if whole else _to_meta(part)


def _parts(template: Any) -> Iterator[tuple[str, nn.Module, Any, bool]]:
    """The model in parts: (name, module, the transformers model it belongs to, with all below it)."""
    blocks = set(decoder_blocks(template))

    def walk(name: str, module: Any, owner: Any) -> Iterator[tuple[str, nn.Module, Any, bool]]:
        if hasattr(module, "_init_weights"):
            owner = module
        if module in blocks:
            yield name, module, owner, True
            return
        for child_name, child in module.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child, owner)
        yield name, module, owner, False

    yield from walk("", template, template)


def _draw(module: nn.Module, owner: Any, *, recurse: bool) -> None:
    if recurse:
        for child in module.children():
            _draw(child, owner, recurse=True)
    owner._init_weights(module)


def _to_meta(module: nn.Module) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


@torch.no_grad()
def fill_buffers(lm: Any) -> None:
    """Compute what is in no file (rotary frequencies, embedding scales) for a model on meta.

    transformers' own initialization computes it; the mark on a parameter keeps it from being touched.
    """
    for module in lm.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
    for parameter in lm.parameters():
        parameter._is_hf_initialized = True
    lm.initialize_weights()


def _materialize(model: nn.Module, device: torch.device) -> None:
    """Give the parameters on meta memory, tied ones once. Buffers have theirs."""
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            if parameter not in made:
                empty = torch.empty_like(parameter, device=device, requires_grad=False)
                made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(module, name, made[parameter])


@torch.no_grad()
def _draw_adapters(lm: nn.Module, seed: int) -> None:
    for name, parameter in lm.named_parameters():
        if is_adapter(name):
            local, rows = _local(parameter)
            local.copy_(drawn(name, parameter.shape, seed)[rows])


def _targets(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a model's files hold: parameters, tied ones once, and persistent buffers. Not: adapters."""
    yield from ((name, parameter) for name, parameter in lm.named_parameters() if not is_adapter(name))
    persistent = lm.state_dict().keys()
    yield from ((name, buffer) for name, buffer in lm.named_buffers() if name in persistent)


def _local(tensor: Tensor) -> tuple[Tensor, slice | None]:
    """This rank's part of a tensor, and which rows of the whole it is; None: all of it."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor, None
    local = tensor.to_local()
    assert tensor.placements == (Shard(0),), "FSDP2 shards the first dimension"
    rows = -(-tensor.shape[0] // tensor.device_mesh.size())
    start = min(tensor.device_mesh.get_local_rank() * rows, tensor.shape[0])
    return local, slice(start, start + local.shape[0])
