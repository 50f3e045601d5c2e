"""What a pruning takes from a model, as plain data: it can be applied to another copy, composed, and saved beside the weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from dynprune.errors import CheckpointError, InputError
from dynprune.graph.branches import is_within
from dynprune.version import __version__

_KEY = "dynprune_pruned"


class Passthrough(nn.Module):
    """Returns its first input: what stands in a removed branch for its inner modules."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Returns `x`."""
        return x


class ZeroBranch(nn.Module):
    """Returns zeros of the shape of its first input: what stands for the last module of a removed branch.

    Args:
        channels: of the result, for images (N, channels, height, width); None for those of the input.
        stride: every how many rows and columns of the input there is one of the result.
    """

    def __init__(self, channels: int | None = None, stride: int = 1):
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Returns zeros."""
        if self.channels is None:
            return torch.zeros_like(x)
        return x.new_zeros(x.shape[0], self.channels, *(-(-size // self.stride) for size in x.shape[2:]))


def _stand_in(words: str) -> nn.Module:
    """Returns the module that "pass", "zero" or "zero CHANNELS STRIDE" names."""
    kind, *sizes = words.split()
    return Passthrough() if kind == "pass" else ZeroBranch(*map(int, sizes))


@dataclass(frozen=True)
class Recipe:
    """A pruning as data.

    Attributes:
        kept: tensor name -> dimension -> ascending indices that stay; dimensions that stay whole are left out.
        attributes: module path -> attribute -> its new value (the number of heads, say).
        replaced: module path -> "pass", "zero" or "zero CHANNELS STRIDE": what stands in for the modules of removed branches.
        biased: paths of convolutions and linear layers that get a bias of their final size, for the means of what was removed.
    """

    kept: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    attributes: dict[str, dict[str, int]] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    biased: tuple[str, ...] = ()

    def apply_(self, model: nn.Module) -> None:
        """Cuts `model` in place.

        Raises:
            InputError: the model has no such tensor or module, or they have other sizes.
        """
        for path, stand_in in self.replaced.items():
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, _stand_in(stand_in).train(model.training))
        touched = {}
        for name, dims in self.kept.items():
            path, _, attribute = name.rpartition(".")
            if self.removes(path) or (attribute == "bias" and path in self.biased):
                continue
            module = _module(model, path, name)
            _cut(model, module, attribute, name, dims)
            touched[path] = module
        for module in touched.values():
            fit_sizes_(module)
        for path in self.biased:
            if not self.removes(path):
                add_bias_(model.get_submodule(path))
        for path, values in self.attributes.items():
            if not self.removes(path):
                for attribute, value in values.items():
                    setattr(model.get_submodule(path), attribute, value)

    def removes(self, path: str) -> bool:
        """Whether a module is gone with a branch."""
        return any(is_within(path, gone) for gone in self.replaced)

    def then(self, later: Recipe) -> Recipe:
        """Returns the recipe that does this one and then `later`, whose indices count what this one left."""
        kept = {name: dict(dims) for name, dims in self.kept.items()}
        for name, dims in later.kept.items():
            for dim, indices in dims.items():
                before = kept.setdefault(name, {}).get(dim)
                kept[name][dim] = list(indices) if before is None else [before[i] for i in indices]
        attributes = {path: dict(values) for path, values in self.attributes.items()}
        for path, values in later.attributes.items():
            attributes[path] = attributes.get(path, {}) | values
        biased = tuple(dict.fromkeys((*self.biased, *later.biased)))
        return Recipe(kept, attributes, self.replaced | later.replaced, biased)

    def to_json(self) -> str:
        """Returns the recipe as JSON."""
        return json.dumps({"kept": self.kept, "attributes": self.attributes, "replaced": self.replaced, "biased": self.biased})

    @staticmethod
    def from_json(text: str) -> Recipe:
        """Returns the recipe that `to_json` wrote."""
        data = json.loads(text)
        kept = {name: {int(dim): list(indices) for dim, indices in dims.items()} for name, dims in data["kept"].items()}
        return Recipe(kept, data["attributes"], data["replaced"], tuple(data["biased"]))


def save_pruned(path: str | PathLike, model: nn.Module, recipe: Recipe) -> None:
    """Writes a pruned model's weights and the recipe that cut it, as one safetensors file."""
    from safetensors.torch import save_file

    names: dict[int, str] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in names or not tensor.numel():  # shared tensors are stored once
            names[tensor.data_ptr()] = name
            state[name] = tensor.contiguous()
    save_file(state, path, {_KEY: recipe.to_json(), "version": __version__})


def load_pruned(path: str | PathLike, model: nn.Module) -> nn.Module:
    """Returns `model` cut and filled as the model that `save_pruned` wrote; changed in place.

    Args:
        path: the file.
        model: a fresh module of the original architecture; its weights do not matter.

    Raises:
        CheckpointError: the file is damaged or foreign, or of another model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read as a pruned model: {error}") from error
    if text is None:
        raise CheckpointError(f"{str(path)!r} holds no recipe; expected a file that save_pruned wrote.")
    try:
        Recipe.from_json(text).apply_(model)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (InputError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{str(path)!r} belongs to another model: {error}") from error
    filled = {tensor.data_ptr() for name, tensor in model.state_dict().items() if name in state}
    missing = [name for name in missing if model.state_dict()[name].data_ptr() not in filled]  # shared tensors are stored once
    if unexpected or missing:
        raise CheckpointError(f"{str(path)!r} belongs to another model: missing {missing[:3]}, unexpected {unexpected[:3]}.")
    return model


def _module(model: nn.Module, path: str, name: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise InputError(f"The recipe cuts {name!r}, which this model does not have; expected the model that was pruned.") from error


def _cut(model: nn.Module, module: nn.Module, attribute: str, name: str, dims: dict[int, Iterable[int]]) -> None:
    old = getattr(module, attribute, None)
    if not isinstance(old, Tensor):
        raise InputError(f"The recipe cuts {name!r}, which this model does not have; expected the model that was pruned.")
    new = old.detach()
    for dim, indices in dims.items():
        index = torch.as_tensor(list(indices), dtype=torch.long, device=new.device)
        if dim >= new.dim() or (len(index) and int(index.max()) >= new.shape[dim]):
            raise InputError(f"The recipe cuts {name!r} of shape {tuple(new.shape)} at index {int(index.max())} of dimension {dim}.")
        new = new.index_select(dim, index)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new.clone(), requires_grad=old.requires_grad)
    for owner in model.modules():  # tied and shared parameters stay one
        for key, value in (*owner._parameters.items(), *owner._buffers.items()):
            if value is old:
                setattr(owner, key, new)


def fit_sizes_(module: nn.Module) -> None:
    """Makes a module's size attributes those of its weights."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, _ConvTransposeNd):
        if module.groups > 1 and weight.shape[1] == 1:
            module.groups = weight.shape[0]
        module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, _ConvNd):
        if module.groups > 1 and weight.shape[1] == 1:
            module.groups = weight.shape[0] // (module.out_channels // module.groups)
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, _NormBase):
        sized = next((t for t in (weight, module.running_mean) if t is not None), None)
        module.num_features = module.num_features if sized is None else len(sized)
    elif isinstance(getattr(module, "nf", None), int) and weight is not None and weight.dim() == 2:
        module.nf = weight.shape[1]  # transformers' Conv1D, a linear layer with a weight (in, out)
        if isinstance(getattr(module, "nx", None), int):
            module.nx = weight.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)


def add_bias_(module: nn.Module) -> None:
    """Gives a convolution or linear layer without a bias one of zeros."""
    if module.bias is None:
        outputs = module.weight.shape[1] * module.groups if isinstance(module, _ConvTransposeNd) else module.weight.shape[0]
        module.bias = nn.Parameter(module.weight.new_zeros(outputs))


def copy_model(model: nn.Module) -> nn.Module:
    """Returns a deep copy; weights that `torch.nn.utils.prune` computes are copied too, without their history."""
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(module, key, value.detach())
    return copy.deepcopy(model)
