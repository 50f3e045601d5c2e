"""Measures the times of a calibrated model again: on another machine, or after the machine has changed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dynprune.control.frontier import Frontier, OperatingPoint
from dynprune.errors import CalibrationError
from dynprune.runtime.costs import CostTable
from dynprune.runtime.engine import Engine
from dynprune.runtime.profile import level_latencies, machine_name, measure_costs, scaled_to

if TYPE_CHECKING:
    from dynprune.runtime.model import DynamicModel

SECONDS = 0.06
"""Timed seconds per level and number of threads."""
_DRAWS = 4
"""Random choices of channels that a level's runs take in turn."""


def remeasured(dm: DynamicModel, inputs: tuple) -> tuple[Frontier, CostTable]:
    """Returns frontier and cost table with the times of this machine; see `DynamicModel.remeasure`."""
    frontier, old = dm.frontier, dm.costs
    if frontier is None or old is None:
        raise CalibrationError("Only a calibrated model can be measured again; call calibrate(dm, data) first.")
    if old.run_share is None or old.work_share is None or old.site_share is None or len(old.site_share) != len(frontier.points):
        raise CalibrationError("This model was saved by a version that did not keep how much runs at each level; calibrate it again.")
    args, kwargs = (inputs, {}) if inputs else dm.example
    with torch.no_grad():
        engine = dm.engine_for(*args, **kwargs)
        if not old.fits(engine.plan):
            raise CalibrationError("The model was calibrated for inputs of another shape; give `remeasure` one of that shape.")
        flat = dm.flat_inputs(*args, **kwargs)
        batch = flat[0].shape[engine.plan.inputs[0].batch_dim]
        table = measure_costs(engine, flat, {site.name: site for site in dm.sites})
        runs = _gated(engine, flat, frontier) if inputs else _replayed(dm, engine, flat, batch, old.site_share)
        latencies_ms, fewer_threads = level_latencies(runs, dm.num_threads, SECONDS)
    shares = {"run_share": old.run_share, "work_share": old.work_share, "site_share": old.site_share}
    unscaled = CostTable(table.fixed_ms, table.scaled_ms, np.zeros_like(old.run_share), table.signature, **shares)
    costs = scaled_to(unscaled, [ms / batch for ms in latencies_ms])
    size = engine.plan.fixed_batch or 1
    points = tuple(
        OperatingPoint(point.level, predicted * size, latency * size / batch, point.skip_rate, point.accuracy)
        for point, predicted, latency in zip(frontier.points, costs.level_ms.sum(1), latencies_ms, strict=True)
    )
    fewer = tuple((count, tuple(ms * size / batch for ms in times)) for count, times in fewer_threads)
    return Frontier(points, machine_name(engine.isa), dm.num_threads, fewer), costs


def _gated(engine: Engine, flat: list[Tensor], frontier: Frontier) -> list[Callable[[int], Any]]:
    """Returns, by level, runs in which the gates choose."""

    def run_at(level: float) -> Callable[[int], Any]:
        return lambda threads: engine.run(flat, level=level, num_threads=threads)

    return [run_at(point.level) for point in frontier.points]


def _replayed(dm: DynamicModel, engine: Engine, flat: list[Tensor], batch: int, site_share: np.ndarray) -> list[Callable[[int], Any]]:
    """Returns, by level, runs of random channels, as many as calibration saw; a branch runs in as many of them."""
    generator = np.random.default_rng(0)
    sites = {site.name: site for site in dm.sites}

    def draw(site_name: str, share: float) -> list[np.ndarray]:
        groups = sites[site_name].num_groups
        return [np.sort(generator.permutation(groups)[: int(share * groups + generator.random())]).astype(np.int32) for _ in range(batch)]

    def run_at(shares: np.ndarray) -> Callable[[int], Any]:
        names = [site.name for site in engine.plan.sites]
        choices = [{name: draw(name, share) for name, share in zip(names, shares, strict=True)} for _ in range(_DRAWS)]
        turn = itertools.cycle(choices)
        return lambda threads: engine.run(flat, active=next(turn), num_threads=threads)

    return [run_at(shares) for shares in site_share]
