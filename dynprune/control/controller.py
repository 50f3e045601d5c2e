"""Picks the level of the next inference so that a latency budget is kept while the machine's load changes."""

from __future__ import annotations

import math
import numbers
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

from dynprune.control.frontier import Frontier
from dynprune.control.slowdown import SlowdownEstimator
from dynprune.errors import InputError

_GRID = 64
"""Levels are multiples of 1/64, so that small changes of the estimate leave the level alone."""
_CALM_INFERENCES = 32
_CALM_SECONDS = 2.0
"""The level relaxes to the tightest one wanted in the last 32 inferences or 2 seconds, whichever is shorter."""
_DEAD_BAND = 2 / _GRID
"""A relaxation smaller than this is not worth a change of level, unless it ends at level 0."""
_HARDNESS_RATE = 0.05
"""Share of the newest inference in the running mean and variance of how hard inputs are."""
_MARGIN_RATE = 0.1
_MOST_EXTRA_MARGIN = 12.0
"""Deviations by which the margin may grow beyond the normal distribution's: a p99 under 3 % spikes of twice the time needs 11."""
_SEEN_RATE = 0.2
"""Share of the newest sample in the load that the estimate is taken to know already."""
_NEW_LOAD = 0.1
"""Growth of the logarithm of the expected slow-down that is taken for the samples' own noise."""
_MOST_PRESSURE = 0.9
_MOST_LOG = 7.0
"""Ratios beyond e^7 = 1097 tell no more than that."""


@dataclass(frozen=True)
class ResourceSample:
    """What the machine was doing over the last interval; a figure that no source gave is None.

    A rate covers the time since the previous sample and is None in the first one. Fractions and pressures lie in [0, 1].

    Attributes:
        timestamp_s: `time.monotonic` when the sample was taken, in seconds.
        cpu_pressure: share of the CPU time wanted that would not be got: 0 on an idle machine, 0.5 where everything takes twice as long.
        memory_pressure: share of the memory in use, of the host or the container, or share of the time stalled on it: the largest.
        cpu_fraction: busy share of the host's cores, this process included.
        per_cpu_fraction: the same per core.
        own_cpu_fraction: CPU time of this process as a share of the host's cores.
        load_average: runnable tasks of the host, mean over one minute.
        steal_fraction: share of the CPU time that the hypervisor gave to others.
        runqueue_wait_fraction: share of this process's runnable thread time spent waiting for a core.
        throttled_fraction: share of the container's runnable time spent throttled by its CPU quota.
        cpu_stall_fraction, memory_stall_fraction, io_stall_fraction: share of the time in which some task was stalled (pressure stall
            information, of the container where it has its own).
        rss_bytes: resident memory of this process.
        memory_available_bytes: memory that can be had without swapping, within the container's limit.
        container_memory_fraction: memory of the container, reclaimable file pages left out, as a share of its limit.
        host_memory_fraction: used share of the host's memory.
        swap_fraction: used share of the swap space.
        battery_fraction: charge of the battery.
        on_battery: whether the machine runs from its battery.
        temperature_celsius: hottest sensor.
    """

    timestamp_s: float | None = None
    cpu_pressure: float | None = None
    memory_pressure: float | None = None
    cpu_fraction: float | None = None
    per_cpu_fraction: tuple[float, ...] | None = None
    own_cpu_fraction: float | None = None
    load_average: float | None = None
    steal_fraction: float | None = None
    runqueue_wait_fraction: float | None = None
    throttled_fraction: float | None = None
    cpu_stall_fraction: float | None = None
    memory_stall_fraction: float | None = None
    io_stall_fraction: float | None = None
    rss_bytes: int | None = None
    memory_available_bytes: int | None = None
    container_memory_fraction: float | None = None
    host_memory_fraction: float | None = None
    swap_fraction: float | None = None
    battery_fraction: float | None = None
    on_battery: bool | None = None
    temperature_celsius: float | None = None


@dataclass(frozen=True)
class PressurePolicy:
    """How tight the gates are at least under CPU and memory pressure, with or without a latency budget.

    The floor is 0 up to `start` and rises linearly to 1 at `full`; the higher of the two floors holds. A `start` of 1 turns one off.

    Args:
        cpu_start, cpu_full: CPU pressures; by default nothing happens until a third of the CPU time wanted goes to others.
        memory_start, memory_full: memory pressures; by default nothing happens until 85 % of the memory is in use.

    Raises:
        InputError: not 0 <= start < full <= 1, unless start is 1.
    """

    cpu_start: float = 0.34
    cpu_full: float = 0.9
    memory_start: float = 0.85
    memory_full: float = 0.98

    def __post_init__(self) -> None:
        for kind in ("cpu", "memory"):
            start, full = getattr(self, f"{kind}_start"), getattr(self, f"{kind}_full")
            if not (is_number(start) and is_number(full) and (start == 1 or 0 <= start < full <= 1)):
                raise InputError(
                    f"Expected 0 <= {kind}_start < {kind}_full <= 1 (or {kind}_start=1 for never), got {start!r} and {full!r}."
                )

    def level_floor(self, sample: ResourceSample) -> float:
        """Returns the lowest level in [0, 1] to use under the pressures of `sample`; a pressure that is not known counts as none."""
        cpu = _ramp(_fraction(sample.cpu_pressure), self.cpu_start, self.cpu_full)
        memory = _ramp(_fraction(sample.memory_pressure), self.memory_start, self.memory_full)
        return max(cpu, memory)


class LatencyController:
    """Picks levels that keep `percentile` of the latencies within the budget, at the best accuracy that fits.

    An inference at a level is expected to take the frontier's time, times how much harder the inputs are than the calibration's, times
    how much slower the machine is than when it was idle. Both factors are learned as logarithms, with their variance: hardness from
    predicted over mean predicted time, slow-down from observed over predicted (so hard inputs do not look like load). The level is the
    lowest whose expected time, at `percentile` of the spread, fits. The normal distribution gives the margin at first; it grows when
    more latencies than promised exceed it (an online quantile estimate). A `ResourceSample` that shows more load than the recent
    inferences have met raises the expectation before the first slow one. The level tightens at once and relaxes after calm.

    Any thread may call any method. Where threads overlap, pass to `observe` the level that `next_level` gave for that call.

    Args:
        frontier: of the calibrated model on this machine.
        budget_ms: longest latency wanted, in milliseconds, > 0. One that no level can meet is accepted, see `reachable`.
        percentile: share of the inferences that should keep the budget, in percent, inside (0, 100).
        clock: gives seconds; one that goes backwards only delays a relaxation, by 32 inferences at most.

    Raises:
        InputError: budget or percentile is not a number or out of range.

    Example:
        >>> controller = LatencyController(frontier, budget_ms=12)
        >>> level = controller.next_level(monitor.sample())
        >>> controller.observe(latency_ms=11.4, predicted_ms=10.9)
    """

    def __init__(
        self, frontier: Frontier, *, budget_ms: float, percentile: float = 95, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.frontier = frontier
        self._clock = clock
        self._lock = threading.Lock()
        self._slowdown = SlowdownEstimator()
        self._hardness = 0.0
        self._hardness_variance = 0.0
        self._load = 0.0
        self._seen_load = 0.0
        self._count = 0
        self._wanted: deque[tuple[int, float, float]] = deque()
        self._level = 0.0
        self.set_budget(budget_ms, percentile=percentile)

    @property
    def budget_ms(self) -> float:
        """The budget, in milliseconds."""
        return self._budget_ms

    @property
    def percentile(self) -> float:
        """The share of inferences that should keep the budget, in percent."""
        return self._percentile

    @property
    def level(self) -> float:
        """The level that `next_level` gave last, or would give now for an idle machine."""
        return self._level

    @property
    def reachable(self) -> bool:
        """Whether some level was expected to keep the budget when the last level was picked; if not, that level is 1."""
        return self._reachable

    @property
    def slowdown(self) -> float:
        """How many times longer inferences are estimated to take now than on an idle machine."""
        return math.exp(self._slowdown.mean)

    def set_budget(self, budget_ms: float, *, percentile: float | None = None) -> None:
        """Sets the budget from the next inference on; what was learned of load and inputs is kept.

        Args:
            budget_ms: in milliseconds, > 0.
            percentile: in percent, inside (0, 100); None keeps the present one.

        Raises:
            InputError: budget or percentile is not a number or out of range.
        """
        budget_ms = check_budget_ms(budget_ms)
        percentile = self._percentile if percentile is None else check_percentile(percentile)
        with self._lock:
            self._budget_ms = budget_ms
            self._percentile = percentile
            self._target_misses = min(max(1 - percentile / 100, 1e-9), 1 - 1e-9)
            self._least_margin = self._margin = NormalDist().inv_cdf(1 - self._target_misses)
            self._wanted.clear()
            self._level, self._reachable = self._fitting_level(extra_load=0.0, work=1.0)

    def next_level(self, sample: ResourceSample | None = None, *, work: float = 1.0) -> float:
        """Returns the level in [0, 1] to run the next inference at.

        Args:
            sample: the machine's latest sample; None where nothing is known beyond the latencies.
            work: cost of this call as a multiple of what the frontier was measured with (a batch of 4 where it was 1: about 4).
        """
        with self._lock:
            self._count += 1
            self._load = self._seen_load if sample is None else _expected_log_slowdown(sample)
            wanted, self._reachable = self._fitting_level(max(0.0, self._load - self._seen_load - _NEW_LOAD), work)
            tightest = self._tightest_wanted(wanted)
            if tightest >= self._level or tightest <= self._level - _DEAD_BAND or tightest == 0:
                self._level = tightest
            return self._level

    def observe(
        self, latency_ms: float, predicted_ms: float, *, level: float | None = None, work: float = 1.0, guarded: bool = False
    ) -> None:
        """Learns from a finished inference; figures that are not finite and positive are ignored.

        Args:
            latency_ms: how long it took, in milliseconds.
            predicted_ms: the cost table's prediction for the steps and rows that were executed, in milliseconds.
            level: the level it began with; None means the one that `next_level` gave last.
            work: as given to `next_level`.
            guarded: whether the deadline guard skipped more on the way, so that at `level` it would have taken the budget at least.
        """
        with self._lock:
            level = self._level if level is None else level
            usual_ms = self.frontier.predicted_ms_at(level)
            idle_ms = self.frontier.latency_ms_at(level)
            slowdown = _log_ratio(latency_ms, predicted_ms * idle_ms / usual_ms)
            hardness = _log_ratio(predicted_ms, usual_ms * work)
            if slowdown is None or hardness is None:
                return
            if guarded:
                hardness = max(hardness, math.log(self._budget_ms / (idle_ms * work)) - slowdown)
            center, deviation = self._center_and_deviation()
            exceeded = slowdown + hardness > center + self._margin * deviation
            self._margin += _MARGIN_RATE * (exceeded - self._target_misses)
            self._margin = min(max(self._margin, self._least_margin), self._least_margin + _MOST_EXTRA_MARGIN)
            self._slowdown.update(slowdown)
            surprise = hardness - self._hardness
            self._hardness += _HARDNESS_RATE * surprise
            self._hardness_variance += _HARDNESS_RATE * ((1 - _HARDNESS_RATE) * surprise**2 - self._hardness_variance)
            self._seen_load += _SEEN_RATE * (self._load - self._seen_load)

    def _center_and_deviation(self) -> tuple[float, float]:
        """Returns mean and deviation of the logarithm of the next latency over the frontier's."""
        return self._slowdown.mean + self._hardness, math.sqrt(self._slowdown.variance + self._hardness_variance)

    def _fitting_level(self, extra_load: float, work: float) -> tuple[float, bool]:
        center, deviation = self._center_and_deviation()
        factor = work * math.exp(center + extra_load + self._margin * deviation)
        level, fits = self.frontier.level_for(self._budget_ms / factor)
        return min(1.0, math.ceil(level * _GRID - 1e-6) / _GRID), fits

    def _tightest_wanted(self, wanted: float) -> float:
        """Returns the highest level wanted in the calm window, `wanted` included (a queue of falling levels, its head the highest)."""
        queue, now_s = self._wanted, self._clock()
        while queue and queue[-1][2] <= wanted:
            queue.pop()
        queue.append((self._count, now_s, wanted))
        while self._count - queue[0][0] >= _CALM_INFERENCES or now_s - queue[0][1] > _CALM_SECONDS:
            queue.popleft()
        return queue[0][2]


def check_level(level: float) -> float:
    """Returns `level` as a float.

    Raises:
        InputError: it is not a number in [0, 1].
    """
    if not is_number(level) or not 0 <= level <= 1:
        raise InputError(f"`level` must be a number in [0, 1] (0 runs everything), got {level!r}.")
    return float(level)


def check_budget_ms(budget_ms: float) -> float:
    """Returns `budget_ms` as a float.

    Raises:
        InputError: it is not a finite number > 0.
    """
    if not is_number(budget_ms) or budget_ms <= 0:
        raise InputError(f"`budget_ms` must be a finite number of milliseconds > 0, got {budget_ms!r}.")
    return float(budget_ms)


def check_percentile(percentile: float) -> float:
    """Returns `percentile` as a float.

    Raises:
        InputError: it is not a number inside (0, 100).
    """
    if not is_number(percentile) or not 0 < percentile < 100:
        raise InputError(f"`percentile` must be a number inside (0, 100), such as 95, got {percentile!r}.")
    return float(percentile)


def is_number(value: object) -> bool:
    """Returns whether `value` is a finite real number; True and False are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _fraction(value: float | None) -> float:
    """Returns `value` clamped to [0, 1]; 0 for None and NaN."""
    return 0.0 if value is None or math.isnan(value) else min(max(float(value), 0.0), 1.0)


def _ramp(value: float, start: float, full: float) -> float:
    return 0.0 if value <= start else min(1.0, (value - start) / (full - start))


def _expected_log_slowdown(sample: ResourceSample) -> float:
    """Returns the logarithm of the slow-down that the shares of CPU time lost suggest: a share p is lost when all takes 1 / (1 - p)."""
    lost = max(_fraction(sample.cpu_pressure), _fraction(sample.runqueue_wait_fraction), _fraction(sample.throttled_fraction))
    return -math.log(1 - min(lost, _MOST_PRESSURE))


def _log_ratio(numerator: float, denominator: float) -> float | None:
    """Returns log(numerator / denominator) within +-7, or None where one of them is not finite and positive."""
    if not (0 < numerator < math.inf and 0 < denominator < math.inf):
        return None
    return min(max(math.log(numerator) - math.log(denominator), -_MOST_LOG), _MOST_LOG)
