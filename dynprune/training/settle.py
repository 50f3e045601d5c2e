"""Moves trained thresholds along the level, so that each level costs what it was to cost."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dynprune.runtime.model import DynamicModel
from dynprune.training.cost import RunCost
from dynprune.training.samples import Chunk

BEYOND = (1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0)
"""How far past the last trained thresholds to look, in levels, where those cost more than the target."""


def settle_levels(dm: DynamicModel, chunks: list[Chunk], cost: RunCost, target: float) -> float:
    """Rewrites the threshold curves of all gates so that the mean cost at level l is `1 - l * (1 - target)`; returns it at level 1.

    The thresholds stay those that were trained: only the level at which they are used moves. Where even the last ones cost more than the
    target, they are raised on the line from the first to the last, at most to twice its length.

    Args:
        dm: in place, in eval mode.
        chunks: samples to measure on.
        cost: relative to the whole model.
        target: at level 1.
    """
    gates = [dm.gate(site.name) for site in dm.sites]
    count = max(len(gate.curve) for gate in gates)
    for gate in gates:
        gate.set_curve(_extended(gate.curve))
    levels = np.linspace(0, 1, count)
    places, costs = [0.0], [1.0]
    for place in (*levels[1:], *BEYOND):
        if place > 1 and costs[-1] <= target:
            break
        places.append(float(place))
        costs.append(min(costs[-1], mean_cost(dm, chunks, cost, place / 2)))
    wanted = 1 - levels * (1 - target)
    found = np.interp(wanted[::-1], costs[::-1], places[::-1])[::-1]
    for gate in gates:
        gate.set_curve(torch.tensor([gate.threshold(max(1e-6, place / 2)) for place in found]))
    dm.refresh()
    return float(max(costs[-1], target))


@torch.no_grad()
def mean_cost(dm: DynamicModel, chunks: list[Chunk], cost: RunCost, level: float) -> float:
    """Returns the mean of the relative cost over the samples at a level, by the hooked model."""
    total, size = 0.0, 0
    for chunk in chunks:
        _, masks = dm.attachment.run(chunk.args, chunk.kwargs, level=level)
        total += float(cost({name: mask.mean(1) for name, mask in masks.items()}).expand(chunk.size).sum())
        size += chunk.size
    return total / size


def _extended(curve: Tensor) -> Tensor:
    """Returns the curve over twice its range of levels: the second half goes on as the line from its first to its last threshold."""
    steps = torch.linspace(0, 1, len(curve), device=curve.device)[1:]
    return torch.cat([curve, curve[-1] + (curve[-1] - curve[0]) * steps])
