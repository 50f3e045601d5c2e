"""Chooses how much of each site to keep at each level: the least output error for the time saved, by greedy steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

FLOOR = 0.25
"""No site keeps less than this share, so that no layer collapses."""
STEPS = 12
"""Greedy steps from whole to the floor."""


@dataclass(frozen=True)
class StepCost:
    """Predicted time of one step of a plan: `fixed_ms + scaled_ms * (product of the keep ratios of its channel sites)`.

    All of it is multiplied by the keep ratios of the branches that skip the step.
    """

    fixed_ms: float
    scaled_ms: float
    sites: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()


class Sensitivity:
    """The output error when a single site keeps a share of its groups, from errors measured at a few keep ratios.

    Between the measured ratios the square root of the error is interpolated linearly, since errors of independent losses grow with
    the square of their size; then the curve is replaced by its lower convex hull, so that greedy steps see what lies behind a bump.

    Args:
        errors: keep ratio in [0, 1) to error >= 0; at 1 the error is 0.
    """

    def __init__(self, errors: Mapping[float, float]):
        known = sorted({1.0: 0.0, **errors}.items(), reverse=True)
        roots, highest = [], 0.0
        for keep, error in known:
            highest = max(highest, math.sqrt(max(error, 0.0)))
            roots.append((keep, highest))
        grid = [1 - (1 - FLOOR) * i / STEPS for i in range(STEPS + 1)]
        self._hull = _lower_hull([(1 - keep, _interpolate(roots, keep) ** 2) for keep in grid])

    def error(self, keep: float) -> float:
        """Returns the error at a keep ratio between the floor and 1."""
        skip = 1 - keep
        for (a, low), (b, high) in pairwise(self._hull):
            if skip <= b + 1e-12:
                return low + (high - low) * (skip - a) / (b - a)
        return self._hull[-1][1]


def predicted_ms(costs: Sequence[StepCost], keep: Mapping[str, float]) -> float:
    """Returns the predicted time of all steps when each site keeps its share; sites not named keep all."""
    total = 0.0
    for cost in costs:
        share = math.prod(keep.get(name, 1.0) for name in cost.sites)
        total += (cost.fixed_ms + cost.scaled_ms * share) * math.prod(keep.get(name, 1.0) for name in cost.branches)
    return total


def allocate(
    costs: Sequence[StepCost],
    sensitivities: Mapping[str, Sensitivity],
    levels: int,
    is_useful: Callable[[Mapping[str, float]], bool] | None = None,
    *,
    tightest: float = 0.0,
) -> list[dict[str, float]]:
    """Returns the keep ratio of each site at each level; level 0 keeps all, and no ratio rises with the level.

    Starting from the whole model, the site whose next step saves most time per error takes it, until all are at their floor (a
    Lagrangian descent on convex curves). The levels are the first states on this way whose predicted time is below `levels` evenly
    spaced times from the whole model's to the last useful one's.

    Args:
        costs: of the plan's steps.
        sensitivities: of the sites to gate, by name.
        levels: number of levels, >= 2.
        is_useful: whether the model is still worth running with these keep ratios; asked a few times, by bisection. None: always.
        tightest: share of the whole model's time at which to end; default 0: where all sites are at their floor.
    """
    step = (1 - FLOOR) / STEPS
    taken = dict.fromkeys(sensitivities, 0)
    keep = dict.fromkeys(sensitivities, 1.0)
    gain = {name: [s.error(1 - step * (i + 1)) - s.error(1 - step * i) for i in range(STEPS)] for name, s in sensitivities.items()}
    path = [(predicted_ms(costs, keep), dict(keep))]
    while open_sites := [name for name in taken if taken[name] < STEPS]:
        slopes = _time_slopes(costs, keep)
        best = min(open_sites, key=lambda name: gain[name][taken[name]] / max(slopes.get(name, 0.0), 1e-12))
        taken[best] += 1
        keep[best] = 1 - step * taken[best]
        path.append((predicted_ms(costs, keep), dict(keep)))
    whole_ms = path[0][0]
    path = path[: next((i for i, (time_ms, _) in enumerate(path) if time_ms <= tightest * whole_ms), len(path)) + 1]
    if is_useful is not None:
        path = path[: _last_useful([state for _, state in path], is_useful) + 1]
    tightest_ms = path[-1][0]
    chosen = []
    for level in range(levels):
        target_ms = whole_ms - (whole_ms - tightest_ms) * level / (levels - 1)
        chosen.append(next(state for time_ms, state in path if time_ms <= target_ms + 1e-9 * whole_ms))
    return chosen


def _last_useful(states: Sequence[Mapping[str, float]], is_useful: Callable[[Mapping[str, float]], bool]) -> int:
    """Returns the index of the last useful state, at least 1, taking it that none after a useless one is useful."""
    if is_useful(states[-1]):
        return len(states) - 1
    useful, useless = 1, len(states) - 1
    while useless - useful > 1:
        middle = (useful + useless) // 2
        useful, useless = (middle, useless) if is_useful(states[middle]) else (useful, middle)
    return useful


def _time_slopes(costs: Sequence[StepCost], keep: Mapping[str, float]) -> dict[str, float]:
    """Returns the milliseconds saved per unit of each site's keep ratio, the others staying."""
    slopes: dict[str, float] = {}
    for cost in costs:
        shares = [keep.get(name, 1.0) for name in cost.sites]
        branches = [keep.get(name, 1.0) for name in cost.branches]
        scaled, outer = cost.scaled_ms * math.prod(shares), math.prod(branches)
        for name, share in zip(cost.sites, shares, strict=True):
            slopes[name] = slopes.get(name, 0.0) + scaled / share * outer
        for name, share in zip(cost.branches, branches, strict=True):
            slopes[name] = slopes.get(name, 0.0) + (cost.fixed_ms + scaled) * outer / share
    return slopes


def _interpolate(points: list[tuple[float, float]], x: float) -> float:
    """Returns y at x on the line through `points`, which fall in x; beyond the last point the last slope goes on."""
    for (right, low), (left, high) in pairwise(points):
        if x >= left or (left, high) == points[-1]:
            return low + (high - low) * (right - x) / (right - left)
    return points[0][1]


def _lower_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the lower convex hull of points sorted by x."""
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1 and _turn(hull[-2], hull[-1], point) <= 0:
            hull.pop()
        hull.append(point)
    return hull


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
