"""`sparsify`: masks on single weights, the same as those of `torch.nn.utils.prune`, by magnitude or by what the inputs make of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import prune as torch_prune

from dynprune.errors import CalibrationError, InputError, UnsupportedModelError
from dynprune.pruning.evidence import input_moments
from dynprune.pruning.patterns import Pattern, expand_blocks, n_of_m_mask, parse_pattern, reduce_blocks, threshold_mask
from dynprune.pruning.recipe import copy_model
from dynprune.pruning.schedule import shares
from dynprune.pruning.selection import SCOPES
from dynprune.pruning.spaces import choose_names
from dynprune.training.samples import read_samples

CRITERIA = ("magnitude", "activation", "random")


@dataclass(frozen=True)
class SparseLayer:
    """One layer with a mask: how many of its weights are zero."""

    name: str
    weights: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """The share of zeros, in [0, 1]."""
        return self.zeros / self.weights


@dataclass(frozen=True)
class SparsifyReport:
    """The report of `sparsify`; `str(report)` is a table. Whether the engine gains by the zeros, `DynamicModel.explain()` says."""

    layers: tuple[SparseLayer, ...]
    pattern: str | None

    @property
    def sparsity(self) -> float:
        """The share of zeros among the weights of all these layers, in [0, 1]."""
        return sum(layer.zeros for layer in self.layers) / sum(layer.weights for layer in self.layers)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        rows = [f"{layer.name.ljust(width)}  {layer.weights:>10}  {layer.sparsity:7.2%}" for layer in self.layers]
        header, total = f"{'layer'.ljust(width)}  {'weights':>10}    zeros", f"{'all'.ljust(width)}  {'':>10}  {self.sparsity:7.2%}"
        return "\n".join([header, *rows, total])


def sparsify(
    model: nn.Module,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    scope: str = "global",
    floor: float = 0.01,
    criterion: str = "magnitude",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    data: Iterable[Any] | None = None,
    schedule: str = "one_shot",
    steps: int = 1,
    finetune: Callable[[nn.Module], Any] | None = None,
    seed: int = 0,
) -> tuple[nn.Module, SparsifyReport]:
    """Returns a copy of `model` with masks on single weights, and a report. The model itself stays as it is.

    The masks are those of `torch.nn.utils.prune`: parameters `weight_orig`, buffers `weight_mask`, and `torch.nn.utils.prune.remove`
    makes them permanent. `DynamicModel` runs a layer by its nonzeros alone where that is faster; see `docs/pruning.md`.

    Args:
        model: any module with convolutions or linear layers; masks that it has already stay and count.
        sparsity: share of weights to set to zero, in [0, 1); default None only with a pattern "N:M", which sets it.
        pattern: None: anywhere; "2:4": of every 4 input channels 2 stay (Mishra et al. 2021, arXiv 2104.08378); "4x1": blocks of 4
            output channels share their zeros, which the engine runs up to twice as fast.
        scope: "global" ranks the weights of all layers together, "local" gives every layer the same share.
        floor: with scope="global", the least share of a layer's weights that stays, so that none collapses.
        criterion: "magnitude" (Han et al. 2015, arXiv 1506.02626), "activation" (magnitude times the root mean square of the input, as
            Wanda, Sun et al. 2023, arXiv 2306.11695; needs data), or "random".
        include, exclude: shell patterns of module paths.
        data: batches as the model takes them, for criterion="activation".
        schedule, steps, finetune: as for `prune`; "cubic" is the gradual schedule of Zhu & Gupta 2017 (arXiv 1710.01878).
        seed: of criterion="random".

    Raises:
        InputError: an argument does not fit.
        CalibrationError: criterion="activation" without data.
        UnsupportedModelError: the model has no convolution or linear layer.

    Example:
        >>> sparse, report = sparsify(model, sparsity=0.8, pattern="4x1", exclude=("fc",))
    """
    rule = parse_pattern(pattern)
    target = _check(sparsity, rule, scope, criterion, finetune)
    if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor <= 1:
        raise InputError(f"`floor` must be a share in [0, 1], got {floor!r}.")
    progress = shares(schedule, steps)
    sparse = copy_model(model)
    layers = _layers(sparse, include, exclude)
    chunks = None
    if criterion == "activation":
        if data is None:
            raise CalibrationError("criterion='activation' needs data: pass `data=`, an iterable of batches as the model takes them.")
        chunks = read_samples(data, labelled=False, num_inputs=1)
    for share in progress:
        moments = input_moments(sparse, chunks) if chunks is not None else {}
        scores = {name: _scores(module, criterion, moments.get(name), seed + i) for i, (name, module) in enumerate(layers.items())}
        for name, mask in _masks(scores, rule, target * share, scope, floor).items():
            torch_prune.custom_from_mask(layers[name], "weight", mask.to(layers[name].weight))
        if finetune is not None:
            finetune(sparse)
    for module in layers.values():
        module.weight = module.weight.detach()  # so that the model can be copied
    report = tuple(SparseLayer(name, m.weight.numel(), int((m.weight_mask == 0).sum())) for name, m in layers.items())
    return sparse, SparsifyReport(report, pattern)


def _check(sparsity: float | None, rule: Pattern, scope: str, criterion: str, finetune: Any) -> float:
    if rule.fixed_sparsity is not None:
        if sparsity is not None and abs(sparsity - rule.fixed_sparsity) > 1e-6:
            raise InputError(f"The pattern sets a sparsity of {rule.fixed_sparsity:g}; leave `sparsity` out, got {sparsity!r}.")
        sparsity = rule.fixed_sparsity
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise InputError(f"`sparsity` must be a share in [0, 1), got {sparsity!r}.")
    if scope not in SCOPES:
        raise InputError(f"`scope` must be one of {SCOPES}, got {scope!r}.")
    if criterion not in CRITERIA:
        raise InputError(f"`criterion` must be one of {CRITERIA}, got {criterion!r}.")
    if finetune is not None and not callable(finetune):
        raise InputError(f"`finetune` must be a callable that takes the model, got {type(finetune).__name__}.")
    return float(sparsity)


def _layers(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> dict[str, nn.Module]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _ConvNd | nn.Linear)}
    found = {name: m for name, m in layers.items() if "weight" in m._parameters or torch_prune.is_pruned(m)}
    if not found:
        raise UnsupportedModelError("The model has no convolution or linear layer with a weight of its own, so nothing to sparsify.")
    chosen = choose_names(list(found), include, exclude, "convolution or linear layer")
    if not chosen:
        raise InputError("`include` and `exclude` leave no layer.")
    return {name: module for name, module in found.items() if name in chosen}


def _scores(module: nn.Module, criterion: str, moments: tuple[Tensor, Tensor] | None, seed: int) -> Tensor:
    """Returns the worth of each weight, f64; those that are masked already are below all others."""
    weight = module.weight.detach().double().cpu()
    if criterion == "random":
        scores = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    else:
        scores = weight.abs()
    if criterion == "activation" and moments is not None:
        groups = getattr(module, "groups", 1)
        sizes = moments[1].cpu().view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).reshape(weight.shape[0], -1)
        scores = scores * sizes.view(*weight.shape[:2], *[1] * (weight.dim() - 2))
    masked = getattr(module, "weight_mask", None)
    return scores if masked is None else scores.masked_fill(masked.cpu() == 0, -1.0)


def _masks(scores: dict[str, Tensor], rule: Pattern, sparsity: float, scope: str, floor: float) -> dict[str, Tensor]:
    if rule.m:
        share = sparsity / rule.fixed_sparsity
        return {name: _partly(value, n_of_m_mask(value, rule), share) for name, value in scores.items()}
    decisions = {name: reduce_blocks(value, rule.block) for name, value in scores.items()}
    if scope == "local":
        chosen = [threshold_mask(value, sparsity) for value in decisions.values()]
    else:
        everything = torch.cat([_protected(value, floor) for value in decisions.values()])
        chosen = threshold_mask(everything, sparsity).split([value.numel() for value in decisions.values()])
    return {name: expand_blocks(part, scores[name].shape, rule.block) for name, part in zip(scores, chosen, strict=True)}


def _protected(scores: Tensor, floor: float) -> Tensor:
    """Returns scores in which the share `floor` of highest ones is above all others."""
    best = scores.topk(math.ceil(floor * scores.numel())).indices
    return scores.index_fill(0, best, math.inf)


def _partly(scores: Tensor, mask: Tensor, share: float) -> Tensor:
    """Returns the mask with the given share of its zeros, those of the lowest scores: a step on the way of a schedule."""
    zeros = int((mask == 0).sum())
    lowest = torch.argsort(scores.masked_fill(mask == 1, torch.inf).flatten(), stable=True)[: round(share * zeros)]
    partial = torch.ones_like(mask).flatten()
    partial[lowest] = 0
    return partial.view_as(mask)
