"""Map each parameter of a model to a tensor in the model's files.

Releases of transformers name tensors differently. If renaming is enough, the names are mapped here;
if tensors are fused or split, there is no such mapping.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainer.learner.model.safetensors_folder import SafetensorsFolder


def plan_names(lm: nn.Module, files: SafetensorsFolder) -> dict[str, str] | str:
    """Map each parameter and persistent buffer of `lm` (on meta) to a tensor of the files.

    Names that transformers renames on load (prefixes of earlier releases) are renamed in the same
    way.

    Returns:
        model's name -> file's name, tied parameters once; or the reason why there is no such
        mapping.
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
            return f"the model has no tensor {name}, which is in its files"
        if first in plan:
            return f"its files hold both {plan[first]} and {name}, which are one tied tensor in the model"
        if files.shape(name) != shapes[first]:
            return f"{name} has the shape {list(files.shape(name))} in its files and {list(shapes[first])} in the model"
        plan[first] = name

    missing = shapes.keys() - plan.keys()
    if missing:
        return f"{sorted(missing)[0]} is missing from its files"
    return plan


def _aliases(lm: nn.Module) -> dict[Tensor, list[str]]:
    """Map each parameter and persistent buffer to all of its names."""
    found: dict[Tensor, list[str]] = {}
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, []).append(name)

    persistent = lm.state_dict().keys()
    for name, buffer in lm.named_buffers():
        if name in persistent:
            found.setdefault(buffer, []).append(name)
    return found


def _renamed(lm: nn.Module, files: SafetensorsFolder) -> tuple[dict[str, str], str]:
    """Map the model's names to the files'; if renaming is not enough, return the reason."""
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
                return {}, f"{name} is fused or split in its files"

        if new not in own and prefix + new in own:  # saved without the head
            new = prefix + new
        if new in renamed:
            return {}, f"{name} and {renamed[new]} of its files both become {new}"
        renamed[new] = name
    return renamed, ""
