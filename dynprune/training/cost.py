"""What a run costs, differentiably, from the masks of its gates: milliseconds of the cost table, or multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynprune.runtime.plan import Plan
from dynprune.runtime.profile import channel_sites
from dynprune.training.allocation import StepCost


class RunCost:
    """The cost of each sample as a function of the shares of groups that run, relative to the cost of the whole model.

    Args:
        costs: of the plan's steps, in any unit.

    Attributes:
        steps: the costs it was made of.
        whole: cost of one sample when everything runs, in the unit of `costs`.
        sites: names of the sites that it depends on.
    """

    def __init__(self, costs: Sequence[StepCost]):
        self.steps = tuple(costs)
        terms: dict[tuple[tuple[str, ...], tuple[str, ...]], float] = {}
        for cost in costs:
            scaled, fixed = (cost.sites, cost.branches), ((), cost.branches)
            terms[scaled] = terms.get(scaled, 0.0) + cost.scaled_ms
            terms[fixed] = terms.get(fixed, 0.0) + cost.fixed_ms
        self._terms = {names: value for names, value in terms.items() if value > 0}
        self.whole = sum(self._terms.values())
        self.sites = tuple(dict.fromkeys(name for sites, branches in self._terms for name in (*sites, *branches)))

    def __call__(self, keep: Mapping[str, Tensor | float]) -> Tensor:
        """Returns the relative cost, 1 for the whole model; of a site not in `keep` everything runs.

        Args:
            keep: site name to the share of its groups that run: (N,) or a number.
        """
        total: Tensor | float = 0.0
        for (sites, branches), value in self._terms.items():
            for name in (*sites, *branches):
                value = value * keep.get(name, 1.0)
            total = total + value
        return torch.as_tensor(total) / self.whole


def mac_costs(plan: Plan) -> list[StepCost]:
    """Returns the multiply-adds of each step of a plan, in place of times, with the names of the sites they depend on."""
    result = []
    for step in plan.steps:
        sites = tuple(channel_sites(plan, step))
        fixed, scaled = (0.0, float(step.macs)) if sites else (float(step.macs), 0.0)
        result.append(StepCost(fixed, scaled, sites, tuple(plan.sites[i].name for i in step.branches)))
    return result
