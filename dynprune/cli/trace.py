"""The trace of a served scenario and the figures drawn from it: plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

from dynprune.control.frontier import Frontier
from dynprune.timing import percentiles

SETTLE_S = 1.0
"""The first second after a change of the load counts apart."""


@dataclass
class Trace:
    """What every inference of a scenario took; one entry per inference in each list.

    Attributes:
        start_s: since the scenario's begin.
        latency_ms, threads: of the inference.
        level, end_level: where it began, and where the deadline guard left it.
        load: what the scenario did at that time: busy processes, or cores taken away by a quota.
    """

    start_s: list[float] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    level: list[float] = field(default_factory=list)
    end_level: list[float] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    load: list[float] = field(default_factory=list)

    def add(self, start_s: float, latency_ms: float, level: float, end_level: float, threads: int, load: float) -> None:
        """Adds an inference."""
        for name, value in zip(
            ("start_s", "latency_ms", "level", "end_level", "threads", "load"),
            (start_s, latency_ms, level, end_level, threads, load),
            strict=True,
        ):
            getattr(self, name).append(value)

    def __len__(self) -> int:
        return len(self.start_s)


@dataclass(frozen=True)
class Figures:
    """Of one trace against one budget; NaN where there was nothing to count.

    Attributes:
        inferences: how many.
        p50_ms, p95_ms, p99_ms: latency.
        steady_misses: share of the inferences above the budget, the first second after each change of load left out.
        first_second_misses: the same in the first second after the load rose.
        recovery: number of the inference, counted from the first that missed after a rise of the load, that kept the budget again: the
            largest over the rises; 1 where none missed.
        slack: mean share of the budget left by inferences that kept it at a level above 0 (at level 0 there is nothing to spend it on).
        hindsight_slack: the same, had each phase run at its best fixed level in hindsight: what the spread of the latencies costs anybody
            who keeps the percentile.
        mean_level: at the end of the inferences.
        guarded: share of the inferences in which the deadline guard acted.
        level_changes: share of the inferences that began at another level than the one before.
        accuracy_loss: expected accuracy at the best fixed level of each phase in hindsight, less that of the levels that ran; in the
            unit of the frontier's accuracy.
    """

    inferences: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    steady_misses: float
    first_second_misses: float
    recovery: int
    slack: float
    hindsight_slack: float
    mean_level: float
    guarded: float
    level_changes: float
    accuracy_loss: float


def figures_of(trace: Trace, budget_ms: float, percentile: float, frontier: Frontier) -> Figures:
    """Returns the figures of a trace.

    Args:
        trace: of one variant.
        budget_ms, percentile: that it was to keep.
        frontier: of the model on this machine.
    """
    changes = [i for i in range(1, len(trace)) if trace.load[i] != trace.load[i - 1]]
    changed = set(changes)
    steady, first_second = [], []
    last_change, rose = -math.inf, False
    for i, start_s in enumerate(trace.start_s):
        if i in changed:
            last_change, rose = start_s, trace.load[i] > trace.load[i - 1]
        missed = trace.latency_ms[i] > budget_ms
        if start_s - last_change >= SETTLE_S:
            steady.append(missed)
        elif rose:
            first_second.append(missed)
    kept = [
        1 - latency / budget_ms
        for latency, level in zip(trace.latency_ms, trace.end_level, strict=True)
        if latency <= budget_ms and level > 0
    ]
    rises = [i for i in changes if trace.load[i] > trace.load[i - 1]]
    hindsight_slack, accuracy_loss = _against_hindsight(trace, [0, *changes, len(trace)], budget_ms, percentile, frontier)
    return Figures(
        len(trace),
        *percentiles(trace.latency_ms),
        _mean(steady),
        _mean(first_second),
        max((_recovery(trace, i, budget_ms) for i in rises), default=1),
        _mean(kept),
        hindsight_slack,
        _mean(trace.end_level),
        _mean([end > begin + 1e-6 for begin, end in zip(trace.level, trace.end_level, strict=True)]),
        _mean([a != b for a, b in pairwise(trace.level)]),
        accuracy_loss,
    )


def _recovery(trace: Trace, first: int, budget_ms: float) -> int:
    """Returns the number of the inference that keeps the budget again, counted from the first miss in the second after the rise."""
    number = 1
    for i in range(first, len(trace)):
        if trace.latency_ms[i] > budget_ms:
            number += 1
        elif number > 1 or trace.start_s[i] - trace.start_s[first] > SETTLE_S:
            break
    return number


def _against_hindsight(trace: Trace, bounds: list[int], budget_ms: float, percentile: float, frontier: Frontier) -> tuple[float, float]:
    """Returns the slack of the lowest level that would have kept the budget in `percentile` of each phase, had it met the same
    slow-downs, and its accuracy less that of the levels that ran."""
    losses, slacks = [], []
    for begin, end in pairwise(bounds):
        if end - begin < 2:
            continue
        slowdowns = [trace.latency_ms[i] / frontier.latency_ms_at((trace.level[i] + trace.end_level[i]) / 2) for i in range(begin, end)]
        level, _ = frontier.level_for(budget_ms / percentiles(slowdowns, (percentile,))[0])
        best = frontier.accuracy_at(level)
        losses += [best - frontier.accuracy_at(trace.end_level[i]) for i in range(begin, end)]
        if level > 0:
            left = [1 - slowdown * frontier.latency_ms_at(level) / budget_ms for slowdown in slowdowns]
            slacks += [share for share in left if share >= 0]
    return _mean(slacks), _mean(losses)


def _mean(values: list) -> float:
    return sum(values) / len(values) if values else math.nan
