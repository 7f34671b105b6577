"""Build the sharded policy without ever holding the whole model in memory.

The model is built on `meta` and sharded there; then each rank reads its rows of each tensor from
the safetensors files. A rank's host memory is its shard and one tensor's rows. Random weights are
drawn block by block, identically on every rank, and each rank keeps its rows. If the names in the
files cannot be mapped to those of the model by renaming (fused or split tensors of other releases),
transformers' own loading is used, which holds the whole model.

Rows: FSDP2 shards the first dimension as `torch.chunk` does.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from agentloop.config import TrainerConfig
from agentloop.model_folder import ModelFolder, check_files
from agentloop.model_folder.tensors import compare_with, refuse_nonfinite
from trainer.learner.model.kernels import Kernels
from trainer.learner.model.lora import add_adapters, base_name, initial_adapter, is_adapter
from trainer.learner.model.name_plan import plan_names
from trainer.learner.model.policy import PolicyModel, build_lm, is_vision, load_policy
from trainer.learner.model.safetensors_folder import SafetensorsFolder
from trainer.learner.model.sharding import decoder_blocks, language_blocks, shard
from trainer.learner.model.vision import freeze_tower

log = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=PolicyModel)


def load_sharded(
    path: str,
    config: TrainerConfig,
    *,
    dtype: str,
    init: Literal["weights", "random"],
    seed: int,
    device: torch.device,
    kind: type[ModelT],
    reference: bool = False,
    trust_remote_code: bool = False,
) -> ModelT:
    """Load the policy, the reference or the critic, sharded; all ranks call this together.

    Args:
        path: folder of a Hugging Face model, or a hub id.
        dtype: compute dtype; master weights are float32.
        init: `random` draws the weights with `seed`, the same for any number of ranks.
        kind: the class that wraps the language model; parameters that it adds are not initialized.
        reference: load the frozen reference: without adapters, nothing trained, and its own offload
            setting.
        trust_remote_code: `model.trust_remote_code`.

    Raises:
        ConfigError: a kernel that `config` names is not installed.
        ModelError: the path is not a causal LM, or one that the packed path does not compute; its
            files lack a tensor or hold others, or one has NaN or infinite values.
    """
    kernels = Kernels.of(config, device)
    path = local_folder(path)
    folder = ModelFolder(Path(path))
    check_files(folder, weights=init == "weights")
    lm = build_lm(path, trust_remote_code=trust_remote_code)
    source = _Drawn(path, seed, trust_remote_code) if init == "random" else _source(folder, lm)

    if source is None:
        lm = load_policy(
            path, init=init, seed=seed, logprob_chunk=config.logprob_chunk, device=device, kernels=kernels,
            trust_remote_code=trust_remote_code,
        ).lm  # fmt: skip
        for name, tensor in _stored_tensors(lm):
            refuse_nonfinite(tensor, name, path)
    else:
        fill_buffers(lm)
    policy = kind(lm, config.logprob_chunk, kernels).eval()
    _freeze(policy, config, reference=reference)
    fuse(lm, config, device, kernels)
    if config.lora is not None and not reference:
        add_adapters(lm, language_blocks(lm), config.lora)

    if source is None:
        # The whole model is in memory; only parameters added by peft and `kind` are still on meta.
        _materialize(policy, device)
        shard(policy, dtype, config.fsdp, device, reference=reference)
        _draw_adapters(lm, seed)
        return policy

    shard(policy, dtype, config.fsdp, device, reference=reference)
    offloaded = config.fsdp.offloads(reference=reference, device=device.type)
    _materialize(policy, torch.device("cpu") if offloaded else device)
    source.fill(lm)
    _draw_adapters(lm, seed)
    for module in policy.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return policy


def fuse(lm: PreTrainedModel, config: TrainerConfig, device: torch.device, kernels: Kernels) -> None:
    """Replace parts of the model by faster ones, where available.

    On CUDA: norms, rotations and MLPs by liger-kernel's fused ones, if it is installed. Head and
    loss are not replaced: they never hold the logits either. On a CPU: linear layers, by
    `trainer.matmul`.
    """
    if device.type == "cpu":
        kernels.matmul.install(lm)
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
    """Return `path`, or the folder of a hub id's snapshot."""
    return path if Path(path).is_dir() else str(ModelFolder.resolve(path).path)


class _Source(Protocol):
    """The source of a model's values."""

    def fill(self, lm: nn.Module) -> None:
        """Fill each rank's part of each parameter, and each persistent buffer."""
        ...


def _source(folder: ModelFolder, lm: PreTrainedModel) -> _Source | None:
    """The source of the values of `lm` (on meta); None if only transformers can load them.

    Raises:
        ModelError: the files are not those of `lm`.
    """
    files = SafetensorsFolder(folder)
    plan = plan_names(lm, files)
    if isinstance(plan, str):
        # Refuse here what transformers would fill with random numbers.
        compare_with(lm, folder)
        log.warning("%s: %s; every rank loads the whole model through transformers", folder.path, plan)
        return None
    return _Read(files, plan)


class _Read:
    """Weights read from the model's files, each rank its rows."""

    def __init__(self, files: SafetensorsFolder, plan: dict[str, str]) -> None:
        self._files = files
        self._plan = plan

    @torch.no_grad()
    def fill(self, lm: nn.Module) -> None:
        for name, tensor in _stored_tensors(lm):
            local, rows = _local(tensor)
            if local.numel():
                stored = self._plan[base_name(name)]
                local.copy_(self._files.read(stored, rows))
                refuse_nonfinite(local, stored, self._files.path)
        log.info("read %d of the %d bytes of tensors in the model's files", self._files.bytes_read, self._files.size)
        self._files.close()


class _Drawn:
    """Weights drawn as transformers initializes the model, a block at a time."""

    def __init__(self, path: str, seed: int, trust_remote_code: bool) -> None:
        self._path = path
        self._seed = seed
        self._trust_remote_code = trust_remote_code

    @torch.no_grad()
    def fill(self, lm: nn.Module) -> None:
        template = build_lm(self._path, trust_remote_code=self._trust_remote_code)
        targets = {base_name(name): tensor for name, tensor in _stored_tensors(lm)}

        # Every rank draws the whole model in the same order, so that the values do not depend on
        # the number of ranks.
        torch.manual_seed(self._seed)
        for prefix, part, owner, whole in _parts(template):
            if not any(True for _ in part.parameters(recurse=whole)):
                continue
            part.to_empty(device="cpu", recurse=whole)
            _draw(part, owner, recurse=whole)

            for name, parameter in part.named_parameters(prefix, recurse=whole):
                if name in targets:  # skip the second name of a tied parameter
                    local, rows = _local(targets[name])
                    local.copy_(parameter if rows is None else parameter[rows])
            part.to(device="meta") if whole else _to_meta(part)


def _parts(template: PreTrainedModel) -> Iterator[tuple[str, nn.Module, Any, bool]]:
    """Yield parts of the model: name, module, its transformers model, with children or not."""
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
def fill_buffers(lm: PreTrainedModel) -> None:
    """Compute the buffers that no file holds (rotary frequencies), for a model on meta.

    transformers' own initialization computes them; a mark on each parameter keeps it from
    initializing these too.
    """
    for module in lm.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
    for parameter in lm.parameters():
        parameter._is_hf_initialized = True
    lm.initialize_weights()


def _materialize(model: nn.Module, device: torch.device) -> None:
    """Allocate the parameters that are on meta, tied ones once. Buffers are allocated already."""
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
            local.copy_(initial_adapter(name, parameter.shape, seed)[rows])


def _stored_tensors(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a model's files: parameters, tied ones once, and persistent buffers."""
    yield from ((name, parameter) for name, parameter in lm.named_parameters() if not is_adapter(name))
    persistent = lm.state_dict().keys()
    yield from ((name, buffer) for name, buffer in lm.named_buffers() if name in persistent)


def _local(tensor: Tensor) -> tuple[Tensor, slice | None]:
    """This rank's part of a tensor, and its rows in the whole tensor; None: all of them."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor, None

    local = tensor.to_local()
    assert tensor.placements == (Shard(0),), "FSDP2 shards the first dimension"
    rows = -(-tensor.shape[0] // tensor.device_mesh.size())
    start = min(tensor.device_mesh.get_local_rank() * rows, tensor.shape[0])
    return local, slice(start, start + local.shape[0])
