"""Cuts a model: the recipe of a choice, the smaller module, the check that it computes what the masked original does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

from dynprune.gates.compensation import compensation_matrix
from dynprune.pruning.evidence import Evidence, evaluated
from dynprune.pruning.recipe import Recipe, add_bias_, copy_model
from dynprune.pruning.residuals import Residual, resized
from dynprune.pruning.spaces import Anatomy, Space

TOLERANCE = 1e-3
"""Largest difference between the smaller model and the masked original, relative to the largest output; float32 rounding is below 1e-4."""
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "num_kv_heads", "num_key_value_heads")
_HEAD_WIDTHS = ("attn_dim", "all_head_size", "inner_dim", "kv_dim")


def removed_atoms(spaces: Sequence[Space], kept: dict[str, np.ndarray]) -> set[int]:
    """Returns the representatives of the classes that go; `kept` has a mask by space name, spaces not named stay whole."""
    return {int(atom) for space in spaces if space.name in kept for atom in space.atoms[~kept[space.name]]}


def make_recipe(anatomy: Anatomy, removed: set[int], residuals: Sequence[Residual], model: nn.Module) -> Recipe:
    """Returns what to cut so that these classes and branches are gone."""
    kept: dict[str, dict[int, list[int]]] = {}
    for (tensor, dim), ids in anatomy.trace.atoms.slices.items():
        stays = [i for i, atom in enumerate(ids.tolist()) if atom < 0 or int(anatomy.classes[atom]) not in removed]
        if len(stays) < len(ids):
            kept.setdefault(tensor, {})[dim] = stays
    attributes = {}
    for space in anatomy.spaces:
        count = sum(int(atom) not in removed for atom in space.atoms)
        if space.kind == "heads" and count < space.size:
            attributes[space.name] = _head_attributes(model.get_submodule(space.name), space, count)
    replaced = {}
    for residual in residuals:
        rows = kept.get(f"{residual.last}.weight", {}).get(0)
        replaced |= {path: resized(stand_in, rows) for path, stand_in in residual.replaced.items()}
    return Recipe(kept, attributes, replaced)


def _head_attributes(module: nn.Module, space: Space, count: int) -> dict[str, int]:
    """Returns new values for the numbers of heads, and the widths of all heads together, that a module keeps."""
    values = {name: value for name, value in vars(module).items() if isinstance(value, int) and not isinstance(value, bool)}
    changed = {name: count for name in _HEAD_COUNTS if values.get(name) == space.size}
    return changed | {name: values[name] // space.size * count for name in _HEAD_WIDTHS if name in values}


def cut(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Returns a smaller copy of `model`."""
    small = copy_model(model)
    recipe.apply_(small)
    return small


def check(
    model: nn.Module, small: nn.Module, spaces: Sequence[Space], removed: set[int], residuals: Sequence[Residual], call: tuple
) -> str | None:
    """Returns what is wrong with the smaller model on an example call, None where it computes what the masked original does.

    Where a consumer is no module of its own the original cannot be masked; then the smaller model only has to run.
    """
    args, kwargs = call
    with evaluated(small), torch.no_grad():
        try:
            got = small(*args, **kwargs)
        except Exception as error:
            return f"its forward does not take fewer channels ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    want = masked_output(model, spaces, removed, residuals, args, kwargs)
    return None if want is None else _difference(got, want)


def masked_output(
    model: nn.Module, spaces: Sequence[Space], removed: set[int], residuals: Sequence[Residual], args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Returns the original's output where every consumer sees zeros for the removed classes and removed branches give zeros; or None."""
    masks: dict[str, Tensor] = {}
    for space in spaces:
        gone = np.array([int(atom) in removed for atom in space.atoms])
        for part in space.consumers if gone.any() else ():
            module = model.get_submodule(part.module_path)
            if part.tensor.rpartition(".")[2] != "weight" or not (isinstance(module, _ConvNd) or module.weight.dim() == 2):
                return None
            entries = (part.classes >= 0) & gone[part.classes]
            repeats = 1 if isinstance(module, _ConvTransposeNd) else getattr(module, "groups", 1)
            mask = torch.from_numpy(1.0 - np.tile(entries, repeats))
            masks[part.module_path] = masks.get(part.module_path, torch.ones_like(mask)) * mask
    handles = [_mask_input(model.get_submodule(path), mask) for path, mask in masks.items()]
    handles += [model.get_submodule(r.output).register_forward_hook(lambda _, __, y: y * 0) for r in residuals]
    try:
        with evaluated(model), torch.no_grad():
            return model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def _mask_input(module: nn.Module, mask: Tensor) -> Any:
    spatial = len(module.kernel_size) if isinstance(module, _ConvNd) else 0

    def before(_: nn.Module, args: tuple) -> tuple:
        x = args[0]
        return (x * mask.to(x).view(-1, *[1] * spatial), *args[1:])

    return module.register_forward_pre_hook(before)


def _difference(got: Any, want: Any) -> str | None:
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=False):
        if not isinstance(b, Tensor):
            continue
        if not isinstance(a, Tensor) or a.shape != b.shape:
            return f"it returns another shape: {tuple(getattr(a, 'shape', ()))} for {tuple(b.shape)}"
        scale = b.abs().max().clamp_min(1e-6) if b.numel() else 1.0
        if b.is_floating_point() and torch.isfinite(b).all() and ((a - b).abs() > TOLERANCE * scale).any():
            return "its forward computes something else with fewer channels than with masked ones"
    return None


def compensate_(small: nn.Module, evidence: Evidence, spaces: Sequence[Space], removed: set[int], recipe: Recipe) -> Recipe:
    """Adds, to the biases of the consumers, what the removed channels give on average; returns the recipe with the new biases."""
    biased = []
    for space in spaces:
        gone = np.array([int(atom) in removed for atom in space.atoms])
        for part in space.consumers if gone.any() else ():
            moments, module = evidence.moments(part.module_path), evidence.model.get_submodule(part.module_path)
            if moments is None or isinstance(module, _ConvTransposeNd) or recipe.removes(part.module_path):
                continue
            groups = getattr(module, "groups", 1)
            entries = torch.from_numpy(np.tile((part.classes >= 0) & gone[part.classes], groups))
            matrix = compensation_matrix(module.weight.detach().double(), moments[0] * entries, groups)
            added = matrix.sum(1)[_kept_rows(recipe, part.tensor, matrix.shape[0])]
            target = small.get_submodule(part.module_path)
            if target.bias is None:
                add_bias_(target)
                biased.append(part.module_path)
            with torch.no_grad():
                target.bias += added.to(target.bias)
    return Recipe(recipe.kept, recipe.attributes, recipe.replaced, tuple(dict.fromkeys(biased)))


def _kept_rows(recipe: Recipe, tensor: str, rows: int) -> Tensor:
    return torch.as_tensor(recipe.kept.get(tensor, {}).get(0, range(rows)), dtype=torch.long)
