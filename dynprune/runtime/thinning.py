"""Plans for one token whose linear layers leave out their small inputs: a weight's column that meets a small value is not read.

The inputs of a layer are compared with one threshold by magnitude, as TEAL does (Liu et al. 2024, arXiv 2408.14690). Nothing is predicted
from something else, so this keeps more of the output than a gate does; it is for single tokens only, as each token leaves out others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from dynprune.gates.heads import Gate
from dynprune.graph.sites import Site
from dynprune.runtime.plan import Plan, PlanSite, Rows, Step


def thinned(plan: Plan, curves: Mapping[str, torch.Tensor]) -> tuple[Plan, dict[str, Site], dict[str, Gate]]:
    """Returns a plan whose named linear steps leave out inputs at or below a threshold, and the sites and gates that it has instead.

    Layers that read the same value share a site, which is named after the first of them. At level 0 nothing is left out.

    Args:
        plan: of one token, without sites.
        curves: name of a linear step to the threshold (levels,) at each level.
    """
    steps: list[Step] = []
    numbers: dict[Rows, int] = {}
    plan_sites: list[PlanSite] = []
    gates: dict[str, Gate] = {}
    for step in plan.steps:
        if step.op == "linear" and step.name in curves:
            (value,) = step.inputs
            if value not in numbers:
                numbers[value] = len(plan_sites)
                plan_sites.append(PlanSite(step.name, "channels", value.rows, 1))
                gates[step.name] = gate = Gate(value.rows, value.rows, 1)
                gate.set_curve(curves[step.name])
                steps.append(Step("gate", step.name, (value,), ints={"site": [numbers[value]], "by_magnitude": [1]}))
            step = replace(step, in_site=numbers[value], ints={**step.ints, "whole_input": [1]})
        steps.append(step)
    sites = {site.name: _site_of(site) for site in plan_sites}
    return replace(plan, steps=tuple(steps), sites=tuple(plan_sites)), sites, gates


def _site_of(site: PlanSite) -> Site:
    return Site(site.name, "channels", site.num_channels, 1, (), (), 0, 0.0, "", site.num_channels, frozenset())
