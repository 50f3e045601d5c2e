"""One number of threads that a controller may choose: its times on an idle machine, and how much slower it runs now."""

from __future__ import annotations

import math
from bisect import bisect_left

from dynprune.control.frontier import Frontier
from dynprune.control.slowdown import SlowdownEstimator

GRID = 64
"""Levels are multiples of 1/64, so that small changes of the estimate leave the level alone."""
_SAME_TIME = 1.02
"""A level that takes at most so many times as long as level 1 takes as long."""
_BESIDE_OTHERS = 0.1
"""Logarithm of the slow-down of threads that have their cores to themselves beside busy ones: they share caches, memory and clock."""
_FEW_OTHERS = 0.3
"""Busy cores below this are the system's own noise."""
_ALONE_DEVIATION = 0.06
"""Of the logarithm of the latency where no thread has to share its core."""


class Arm:
    """Expected latencies at one number of threads.

    Args:
        threads: the number.
        frontier: with the times at that number.

    Attributes:
        slowdown: learned from the inferences that ran so.
        margin: deviations above the mean that a latency may lie, set by the controller.
        margins: those that it had beside other programs, by their load in cores.
        mean: logarithm of the slow-down that is expected.
        high, expected: logarithm of the next latency over the idle one at the percentile wanted, and its exponential.
        others: cores' worth of other programs when this arm ran last; None where no sample told.
        seen: the controller's count of inferences when this arm ran last; None before.
        log_idle: logarithm of the idle machine's latency in milliseconds, at each level of the grid.
        least_ms: the idle machine's latency at level 1.
        last_step: the lowest level, in steps of the grid, from which on more skipping buys no time.
    """

    __slots__ = (
        "_negated_ms", "expected", "frontier", "high", "last_step", "least_ms", "log_idle", "margin", "margins", "mean", "others", "seen",
        "slowdown", "threads",
    )  # fmt: skip

    def __init__(self, threads: int, frontier: Frontier) -> None:
        latencies_ms = [frontier.latency_ms_at(i / GRID) for i in range(GRID + 1)]
        self.threads = threads
        self.frontier = frontier
        self._negated_ms = [-ms for ms in latencies_ms]
        self.log_idle = [math.log(ms) for ms in latencies_ms]
        self.least_ms = latencies_ms[-1]
        self.last_step = self.fitting_step(_SAME_TIME * self.least_ms)
        self.slowdown = SlowdownEstimator()
        self.margin = 0.0
        self.margins: dict[int, float] = {}
        self.mean = 0.0
        self.high = 0.0
        self.expected = 1.0
        self.others: float | None = None
        self.seen: int | None = None

    def fitting_step(self, ms: float) -> int:
        """Returns the lowest level, in steps of the grid, that an idle machine takes at most `ms` for; one beyond the last for none."""
        return bisect_left(self._negated_ms, -ms)

    def expect(self, mean: float, hardness: float, hardness_variance: float) -> None:
        """Sets what is expected of the next inference from what this arm has seen itself, the slow-down's logarithm being `mean`."""
        self._set(mean, self.slowdown.variance, hardness, hardness_variance)

    def expect_beside(self, others: float, cores: float, hardness: float, hardness_variance: float, spread: float) -> None:
        """Sets the same from the load alone: every runnable thread gets a fair share of the cores.

        Args:
            others: cores' worth of threads of other programs.
            cores: of the machine.
            hardness, hardness_variance: of the inputs.
            spread: variance of the logarithm of the latency where threads share cores.
        """
        wanted = self.threads + others
        if wanted <= cores:
            mean, variance = (_BESIDE_OTHERS if others > _FEW_OTHERS else 0.0), _ALONE_DEVIATION**2
        else:
            mean, variance = math.log(wanted / cores) + _BESIDE_OTHERS, spread
        self._set(mean, variance, hardness, hardness_variance)

    def _set(self, mean: float, variance: float, hardness: float, hardness_variance: float) -> None:
        self.mean = mean
        self.high = high = mean + hardness + self.margin * math.sqrt(variance + hardness_variance)
        self.expected = math.exp(high)


def other_load(slowdown: float, threads: int, cores: float) -> float:
    """Returns the cores' worth of other threads that slow `threads` threads down so, where each thread gets a fair share."""
    return max(0.0, math.exp(slowdown) * cores - threads)
