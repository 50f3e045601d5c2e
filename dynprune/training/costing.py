"""Measures what the steps of a plan cost on this machine, and predicts times from which rows run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dynprune.graph.sites import Site
from dynprune.runtime.costs import CostTable, plan_signature
from dynprune.runtime.engine import Engine
from dynprune.runtime.plan import Plan, Step
from dynprune.timing import measure
from dynprune.training.allocation import StepCost

RUNS = 12
"""Profiled runs per keep ratio."""
LEAST_SCALED = 0.1
"""A gated step's time follows its rows at least to this share, however noisy the two measurements were."""
LEAST_FACTOR = 0.2
"""Measured latencies never scale a part of the table by less than this: they may be noisy."""


def measure_costs(engine: Engine, inputs: Sequence[Tensor], sites: Mapping[str, Site]) -> CostTable:
    """Returns the cost table of the engine's plan, without `level_ms`: two-point fits from whole runs and runs at half the channels.

    The lower quartile of the runs counts, as other programs only ever add time. What a run takes beyond its steps counts to PyTorch's
    steps, which the engine does not time, or to the first step.

    Args:
        engine: at the threads to be served with.
        inputs: one sample, flattened.
        sites: by name; at least those of the plan.
    """
    plan = engine.plan
    batch = inputs[0].shape[plan.inputs[0].batch_dim]
    generator = torch.Generator().manual_seed(0)
    groups = {site.name: sites[site.name].num_groups for site in plan.sites if site.kind == "channels"}

    def half(count: int) -> list[list[int]]:
        return [torch.randperm(count, generator=generator)[: max(1, count // 2)].sort().values.tolist() for _ in range(batch)]

    whole, halved, total = [], [], []
    for _ in range(RUNS + 1):  # the first warms up
        whole.append(engine.step_times_ms(inputs))
        halved.append(engine.step_times_ms(inputs, active={name: half(count) for name, count in groups.items()}))
        total.append(measure(lambda: engine.run(inputs), min_seconds=0.0, min_runs=1, warmup=0).median_ms)
    whole_ms, half_ms, total_ms = (np.percentile(times[1:], 25, 0) / batch for times in (whole, halved, total))
    rest_ms = max(0.0, total_ms - whole_ms.sum())
    shares = np.array([0.5 ** len(_channel_sites(plan, step)) for step in plan.steps])
    gated = shares < 1
    saved_ms = (whole_ms - half_ms) / np.where(gated, 1 - shares, 1.0)
    scaled_ms = np.where(gated, np.clip(saved_ms, LEAST_SCALED * whole_ms, whole_ms), 0.0)
    fixed_ms = whole_ms - scaled_ms
    unseen = np.array([step.torch_call is not None for step in plan.steps])
    if not unseen.any():
        unseen[0] = True
    fixed_ms[unseen] += rest_ms / unseen.sum()
    return CostTable(tuple(fixed_ms.tolist()), tuple(scaled_ms.tolist()), np.zeros((0, len(plan.steps))), plan_signature(plan))


def fit_to_latencies(
    plan: Plan, table: CostTable, shares: Sequence[Mapping[str, Tensor]], latencies_ms: Sequence[float]
) -> tuple[CostTable, list[float]]:
    """Returns the table scaled to measured latencies, with its `level_ms`, and the share of multiply-adds skipped at each level.

    All fixed times are multiplied by one factor and all scaled times by another, by least squares over the levels, as a profiled step
    has caches and threads to itself in another way than a step in a run.

    Args:
        plan, table: as for `step_costs`.
        shares: by level: site name to the share of groups that ran, per sample (N,); a site not named ran whole.
        latencies_ms: by level, for one sample.
    """
    fixed, scaled, skip_rates = (np.stack(part) for part in zip(*(_executed(plan, table, level) for level in shares), strict=True))
    parts = np.stack([fixed.sum(1), scaled.sum(1)], 1)
    factors = _bounded_fit(parts, np.asarray(latencies_ms))
    fixed_ms, scaled_ms = (tuple((np.asarray(t) * f).tolist()) for t, f in zip((table.fixed_ms, table.scaled_ms), factors, strict=True))
    return CostTable(fixed_ms, scaled_ms, fixed * factors[0] + scaled * factors[1], table.signature), skip_rates.tolist()


def step_costs(plan: Plan, table: CostTable) -> list[StepCost]:
    """Returns the cost of each step with the names of the sites it depends on."""
    return [
        StepCost(fixed, scaled, tuple(_channel_sites(plan, step)), tuple(plan.sites[i].name for i in step.branches))
        for step, fixed, scaled in zip(plan.steps, table.fixed_ms, table.scaled_ms, strict=True)
    ]


def allocation_costs(plan: Plan, table: CostTable) -> list[StepCost]:
    """Returns the costs to allocate by: half of each is its measured time, half what its share of the multiply-adds would take.

    The times of small steps are noisy, and what looks slow on one run would be cut at the price of accuracy.
    """
    whole_ms = sum(table.fixed_ms) + sum(table.scaled_ms)
    mixed = []
    for step, cost in zip(plan.steps, step_costs(plan, table), strict=True):
        by_macs_ms = whole_ms * step.macs / max(1, plan.macs)
        mixed.append(replace(cost, fixed_ms=0.5 * cost.fixed_ms, scaled_ms=0.5 * (cost.scaled_ms + by_macs_ms)))
    return mixed


def _bounded_fit(parts: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Returns the two factors, each at least `LEAST_FACTOR`, whose mix of the two columns is nearest to `measured`."""
    factors = np.linalg.lstsq(parts, measured, rcond=None)[0]
    low = int(factors.argmin())
    if factors[low] < LEAST_FACTOR:
        other = parts[:, 1 - low]
        factors[low] = LEAST_FACTOR
        factors[1 - low] = other @ (measured - LEAST_FACTOR * parts[:, low]) / max(1e-30, other @ other)
    return factors.clip(LEAST_FACTOR)


def _executed(plan: Plan, table: CostTable, shares: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns the fixed and the scaled milliseconds of each step (steps,), means over samples, and the share of multiply-adds skipped."""
    fixed_ms, scaled_ms, macs = np.zeros(len(plan.steps)), np.zeros(len(plan.steps)), 0.0
    for i, step in enumerate(plan.steps):
        inner, outer = (_product(shares, names) for names in (_channel_sites(plan, step), [plan.sites[b].name for b in step.branches]))
        fixed_ms[i] = table.fixed_ms[i] * np.mean(outer)
        scaled_ms[i] = table.scaled_ms[i] * np.mean(inner * outer)
        macs += step.macs * np.mean(inner * outer)
    return fixed_ms, scaled_ms, 1 - macs / max(1, sum(step.macs for step in plan.steps))


def _channel_sites(plan: Plan, step: Step) -> list[str]:
    return [plan.sites[i].name for i in sorted({step.in_site, step.out_site} - {-1})]


def _product(shares: Mapping[str, Tensor], names: Sequence[str]) -> np.ndarray | float:
    result: np.ndarray | float = 1.0
    for name in names:
        if name in shares:
            result = result * shares[name].double().numpy()
    return result
