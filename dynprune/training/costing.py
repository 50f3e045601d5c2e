"""What the allocation of keep ratios takes the steps of a plan to cost."""

from __future__ import annotations

from dataclasses import replace

from dynprune.runtime.costs import CostTable
from dynprune.runtime.plan import Plan
from dynprune.runtime.profile import channel_sites
from dynprune.training.allocation import StepCost


def step_costs(plan: Plan, table: CostTable) -> list[StepCost]:
    """Returns the cost of each step with the names of the sites it depends on."""
    return [
        StepCost(fixed, scaled, tuple(channel_sites(plan, step)), tuple(plan.sites[i].name for i in step.branches))
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
