"""Moves trained thresholds along the level, so that each level costs what it was to cost."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dynprune.runtime.model import DynamicModel
from dynprune.training.cost import RunCost
from dynprune.training.samples import Chunk


def settle_levels(dm: DynamicModel, chunks: list[Chunk], cost: RunCost, target: float) -> float:
    """Rewrites the threshold curves of all gates so that the mean cost at level l is `1 - l * (1 - target)`; returns it at level 1.

    The sets of thresholds stay those that were trained: only the level at which each is used moves. Where even the last one costs more
    than the target, it stays for the tightest levels.

    Args:
        dm: in place, in eval mode.
        chunks: samples to measure on.
        cost: relative to the whole model.
        target: at level 1.
    """
    count = max(len(dm.gate(site.name).curve) for site in dm.sites)
    levels = np.linspace(0, 1, count)
    costs = np.array([1.0, *(mean_cost(dm, chunks, cost, level) for level in levels[1:])])
    falling = np.minimum.accumulate(costs)
    wanted = 1 - levels * (1 - target)
    places = np.interp(wanted[::-1], falling[::-1], levels[::-1])[::-1]
    for site in dm.sites:
        gate = dm.gate(site.name)
        first = gate.curve[:1].clone()
        gate.set_curve(torch.cat([first, torch.tensor([gate.threshold(max(1e-6, place)) for place in places[1:]]).to(first)]))
    dm.refresh()
    return float(max(falling[-1], target))


@torch.no_grad()
def mean_cost(dm: DynamicModel, chunks: list[Chunk], cost: RunCost, level: float) -> float:
    """Returns the mean of the relative cost over the samples at a level, by the hooked model."""
    total, size = 0.0, 0
    for chunk in chunks:
        _, masks = dm.attachment.run(chunk.args, chunk.kwargs, level=level)
        total += float(cost(_shares(masks)).expand(chunk.size).sum())
        size += chunk.size
    return total / size


def _shares(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: mask.mean(1) for name, mask in masks.items()}
