"""How much each channel, neuron, head or branch matters: the criteria, by name.

| name | a channel's score |
| --- | --- |
| l1, l2 | norm of its filter (Li et al. 2017, arXiv 1608.08710) |
| bn_scale | absolute scale of its batch norm (Liu et al. 2017, Network Slimming, arXiv 1708.06519) |
| fpgm | sum of distances to the other filters of its layer (He et al. 2019, geometric median, arXiv 1811.00250) |
| taylor | squared first-order estimate of what the loss loses with it (Molchanov et al. 2019, arXiv 1906.10771); needs data and loss |
| activation | root mean square of what its consumers read times the norm of their weights for it; needs data |
| random | drawn from the seed |

Where a class has several filters (an attention head, coupled layers) squared norms, and else scores, are added.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from dynprune.errors import InputError
from dynprune.pruning.evidence import Evidence
from dynprune.pruning.spaces import Part, Space

Criterion = Callable[[Space, Evidence], np.ndarray]
"""Returns one score per class of a space, (size,); higher stays longer."""


def score_space(criterion: str | Criterion, space: Space, evidence: Evidence) -> np.ndarray:
    """Returns the scores of a space's classes, f64.

    Raises:
        InputError: the criterion is unknown, does not fit the space, or returned something else than one finite number per class.
        CalibrationError: it needs data, or gradients, that are not there.
    """
    if not callable(criterion) and criterion not in CRITERIA:
        raise InputError(f"`criterion` must be a callable or one of {sorted(CRITERIA)}, got {criterion!r}.")
    scores = criterion(space, evidence) if callable(criterion) else CRITERIA[criterion](space, evidence)
    scores = np.asarray(scores.detach().cpu() if isinstance(scores, Tensor) else scores, np.float64)
    if scores.shape != (space.size,) or not np.isfinite(scores).all():
        raise InputError(
            f"`criterion` must give {space.size} finite scores for {space.name!r}, one per class, got shape {scores.shape}"
            f"{'' if np.isfinite(scores).all() else ' with NaN or infinity'}."
        )
    return scores


def by_class(part: Part, values: Tensor, size: int) -> np.ndarray:
    """Returns the sum of `values`, one per entry of the part's dimension, over each class."""
    inside = part.classes >= 0
    return np.bincount(part.classes[inside], weights=values.double().cpu().numpy()[inside], minlength=size)


def _entries(part: Part, evidence: Evidence) -> Tensor:
    """Returns the tensor of a part as (entries, everything else)."""
    return evidence.tensor(part.tensor).movedim(part.dim, 0).flatten(1)


def _l1(space: Space, evidence: Evidence) -> np.ndarray:
    return sum(by_class(part, _entries(part, evidence).abs().sum(1), space.size) for part in space.producers)


def _l2(space: Space, evidence: Evidence) -> np.ndarray:
    return np.sqrt(sum(by_class(part, _entries(part, evidence).square().sum(1), space.size) for part in space.producers))


def _bn_scale(space: Space, evidence: Evidence) -> np.ndarray:
    def is_scale(part: Part) -> bool:
        module = evidence.model.get_submodule(part.module_path)
        return isinstance(module, _NormBase) and part.tensor.endswith("weight")

    scales = [part for part in space.parts if is_scale(part)]
    if not scales:
        raise InputError(f"criterion='bn_scale' needs a batch norm with weights in {space.name!r}; exclude it or take another criterion.")
    return sum(by_class(part, evidence.tensor(part.tensor).abs(), space.size) for part in scales)


def _fpgm(space: Space, evidence: Evidence) -> np.ndarray:
    def distances(part: Part) -> Tensor:
        filters = _entries(part, evidence)
        chosen = torch.from_numpy(part.classes >= 0)
        result = torch.zeros(len(filters), dtype=torch.float64)
        result[chosen] = torch.cdist(filters[chosen], filters[chosen]).sum(1)
        return result

    return sum(by_class(part, distances(part), space.size) for part in space.producers)


def _taylor(space: Space, evidence: Evidence) -> np.ndarray:
    batches = evidence.products()
    return np.mean([np.square(first_order(space, products)) for products in batches], axis=0)


def first_order(space: Space, products: dict[str, Tensor]) -> np.ndarray:
    """Returns, per class, the derivative of the loss by a common factor on all weights that read it."""
    found = [part for part in space.consumers if part.tensor in products]
    return sum(
        (by_class(part, products[part.tensor].movedim(part.dim, 0).flatten(1).sum(1), space.size) for part in found), np.zeros(space.size)
    )


def _activation(space: Space, evidence: Evidence) -> np.ndarray:
    total = np.zeros(space.size)
    for part in space.consumers:
        moments = evidence.moments(part.module_path)
        if moments is None:
            continue
        module = evidence.model.get_submodule(part.module_path)
        norms = _entries(part, evidence).square().sum(1)
        groups = getattr(module, "groups", 1)
        squares = (moments[1].square().view(groups, -1).mean(0) if groups > 1 else moments[1].square()) * norms
        total += by_class(part, squares, space.size)
    return np.sqrt(total)


def _random(space: Space, evidence: Evidence) -> np.ndarray:
    return np.random.default_rng((evidence.seed, zlib.crc32(space.name.encode()))).random(space.size)


CRITERIA: dict[str, Criterion] = {
    "l1": _l1,
    "l2": _l2,
    "bn_scale": _bn_scale,
    "fpgm": _fpgm,
    "taylor": _taylor,
    "activation": _activation,
    "random": _random,
}
