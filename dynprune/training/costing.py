"""Measures what the steps of a plan cost on this machine, and predicts times from which rows run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dynprune.graph.sites import Site
from dynprune.runtime.costs import CostTable, plan_signature
from dynprune.runtime.engine import Engine
from dynprune.runtime.plan import Plan, Step
from dynprune.timing import measure
from dynprune.training.allocation import StepCost

RUNS = 9
"""Profiled runs per keep ratio; the median counts."""
LEAST_SCALED = 0.1
"""A gated step's time follows its rows at least to this share, however noisy the two measurements were."""


def measure_costs(engine: Engine, inputs: Sequence[Tensor], sites: Mapping[str, Site]) -> CostTable:
    """Returns the cost table of the engine's plan, without `level_ms`: two-point fits from whole runs and runs at half the channels.

    What a run takes beyond its steps counts to PyTorch's steps, which the engine does not time, or to the first step.

    Args:
        engine: at the threads to be served with.
        inputs: one sample, flattened.
        sites: by name; at least those of the plan.
    """
    plan = engine.plan
    batch = inputs[0].shape[plan.inputs[0].batch_dim]
    generator = torch.Generator().manual_seed(0)

    def half() -> dict[str, list[list[int]]]:
        groups = {s.name: sites[s.name].num_groups for s in plan.sites if s.kind == "channels"}
        return {
            name: [torch.randperm(n, generator=generator)[: max(1, n // 2)].sort().values.tolist() for _ in range(batch)]
            for name, n in groups.items()
        }

    profile: Callable = engine.step_times_ms
    profile(inputs), profile(inputs, active=half())
    pairs = [(profile(inputs), profile(inputs, active=half())) for _ in range(RUNS)]
    whole_ms, half_ms = (np.median([pair[i] for pair in pairs], 0) / batch for i in (0, 1))
    total_ms = measure(lambda: engine.run(inputs), min_seconds=0.1).median_ms / batch
    rest_ms = total_ms - whole_ms.sum()
    if rest_ms < 0:  # the clock reads of a profiled run cost something themselves
        whole_ms, half_ms = whole_ms * (total_ms / whole_ms.sum()), half_ms * (total_ms / whole_ms.sum())
        rest_ms = 0.0
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


def step_costs(plan: Plan, table: CostTable) -> list[StepCost]:
    """Returns the cost of each step with the names of the sites it depends on."""
    return [
        StepCost(fixed, scaled, tuple(_channel_sites(plan, step)), tuple(plan.sites[i].name for i in step.branches))
        for step, fixed, scaled in zip(plan.steps, table.fixed_ms, table.scaled_ms, strict=True)
    ]


def executed(plan: Plan, table: CostTable, shares: Mapping[str, Tensor]) -> tuple[np.ndarray, float]:
    """Returns the predicted milliseconds of each step (steps,), mean over samples, and the share of multiply-adds skipped.

    Args:
        plan: of the table.
        table: its fixed and scaled times are used.
        shares: site name to the share of groups that ran per sample (N,); sites not named ran whole.
    """
    step_ms, macs = np.zeros(len(plan.steps)), 0.0
    for i, step in enumerate(plan.steps):
        inner, outer = (_product(shares, names) for names in (_channel_sites(plan, step), [plan.sites[b].name for b in step.branches]))
        step_ms[i] = np.mean((table.fixed_ms[i] + table.scaled_ms[i] * inner) * outer)
        macs += step.macs * np.mean(inner * outer)
    return step_ms, 1 - macs / max(1, sum(step.macs for step in plan.steps))


def _channel_sites(plan: Plan, step: Step) -> list[str]:
    return [plan.sites[i].name for i in sorted({step.in_site, step.out_site} - {-1})]


def _product(shares: Mapping[str, Tensor], names: Sequence[str]) -> np.ndarray | float:
    result: np.ndarray | float = 1.0
    for name in names:
        if name in shares:
            result = result * shares[name].double().numpy()
    return result
