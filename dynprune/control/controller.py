"""Picks the level and the threads of the next inference so that a latency budget is kept while the machine's load changes."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from statistics import NormalDist

from dynprune.control.arms import GRID, Arm, other_load
from dynprune.control.checks import check_budget_ms, check_percentile
from dynprune.control.frontier import Frontier
from dynprune.control.pressure import ResourceSample, fraction, other_cores
from dynprune.control.slowdown import SlowdownEstimator
from dynprune.errors import InputError

_CALM_INFERENCES = 8
_CALM_SECONDS = 2.0
"""The level relaxes to the tightest one wanted in the last 8 inferences or 2 seconds, whichever is shorter."""
_DEAD_BAND = 4
"""Steps of the grid; a relaxation by less is not worth a change of level, unless it ends at level 0."""
_HARDNESS_RATE = 0.05
"""Share of the newest inference in the running mean and variance of how hard inputs are."""
_MARGIN_RATE = 0.1
"""Deviations that the margin gains by a latency beyond it at the 95th percentile; at higher ones, which are exceeded less often, more."""
_AIM, _CAUTIOUS_AIM = 0.9, 0.35
"""Share of the misses allowed that the margin aims at; the latter below the normal distribution's, to leave some for changes of load."""
_MOST_EXTRA_MARGIN = 20.0
"""Deviations by which the margin may grow beyond the normal distribution's: a p99 under 2 % spikes of twice the time needs 17."""
_SEEN_RATE = 0.2
"""Share of the newest sample in the load that the estimate is taken to know already."""
_NEW_LOAD = 0.1
"""Growth of the logarithm of the expected slow-down that is taken for the samples' own noise."""
_FRESH = 128
"""Inferences for which an arm's own estimate is believed after it last ran."""
_OTHER_LOAD = 0.5
"""Change of the other programs' load, in cores, after which an arm's own estimate is not believed any more."""
_SLOWED = 0.15
"""Logarithm of the slow-down from which it tells how many other threads there are."""
_MOST_PRESSURE = 0.9
_MOST_LOG = 7.0
"""Ratios beyond e^7 = 1097 tell no more than that."""


class LatencyController:
    """Picks levels that keep `percentile` of the latencies within the budget, at the best accuracy that fits.

    An inference at a level is expected to take the frontier's time, times how much harder the inputs are than the calibration's, times
    how much slower the machine is than when it was idle. Both factors are learned as logarithms, with their variance: hardness from
    predicted over mean predicted time, slow-down from observed over predicted (so hard inputs do not look like load). The level is the
    lowest whose expected time, at `percentile` of the spread, fits. The normal distribution gives the margin at first; then it follows
    the misses (an online quantile estimate): it grows with each, and shrinks with each inference that keeps the budget at a level above
    0, down to the level whose mean fits, so that nearly as many happen as `percentile` allows, or a third of them where that is less margin
    than the normal distribution's. After a step upwards, and after two misses in a row, it is the normal distribution's again at least.
    Beside other programs, as samples tell their load in whole cores, it is another one.
    A `ResourceSample` that shows more load than the recent inferences have met raises the expectation before the first slow one. The
    level tightens at once and relaxes after calm. Where no level is expected to fit, the highest one runs, or the lowest one that is as
    fast; but one slow inference after which no level would fit changes nothing: if the next is as slow it is too late for a level to
    help, else it was a spike.

    Where the frontier knows the times of fewer threads, each number of threads has its own estimate, and the one that needs the lowest
    level runs. One that did not run for 128 inferences, or not under such a load, is expected to get a fair share of the cores beside
    the others' threads; few threads that fit beside them have their cores to themselves, so that their latencies spread less.

    Any thread may call any method. Where threads overlap, pass to `observe` the level that `next_level` gave for that call.

    Args:
        frontier: of the calibrated model on this machine.
        budget_ms: longest latency wanted, in milliseconds, > 0; None for no budget, so that only limits of single calls count. A budget
            that no level can meet is accepted, see `reachable`.
        percentile: share of the inferences that should keep the budget, in percent, inside (0, 100).
        num_threads: the most threads to use; None for those of the frontier.
        cores: of the machine, for the fair share; None for `num_threads`.
        clock: gives seconds; one that goes backwards only delays a relaxation, by 32 inferences at most.

    Raises:
        InputError: budget or percentile is not a number or out of range.

    Example:
        >>> controller = LatencyController(frontier, budget_ms=12)
        >>> level = controller.next_level(monitor.sample())
        >>> controller.observe(latency_ms=11.4, predicted_ms=10.9)
    """

    def __init__(
        self,
        frontier: Frontier,
        *,
        budget_ms: float | None,
        percentile: float = 95,
        num_threads: int | None = None,
        cores: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.frontier = frontier
        self._log_usual = [math.log(frontier.predicted_ms_at(i / GRID)) for i in range(GRID + 1)]
        self._clock = clock
        self._lock = threading.Lock()
        self._count = 0
        self._set_arms(num_threads or frontier.num_threads or 1)
        self._cores = float(cores or self._arm.threads)
        self._hardness = 0.0
        self._hardness_variance = 0.0
        self._sample: ResourceSample | None = None
        self._sampled_others: float | None = None
        self._met = 0
        self._load = 0.0
        self._seen_load = 0.0
        self._missed = False
        self._wanted: deque[tuple[int, float, int]] = deque()
        self._step = 0
        self.set_budget(budget_ms, percentile=percentile)

    @property
    def budget_ms(self) -> float:
        """The budget, in milliseconds; infinite where there is none."""
        return self._budget_ms

    @property
    def percentile(self) -> float:
        """The share of inferences that should keep the budget, in percent."""
        return self._percentile

    @property
    def level(self) -> float:
        """The level that `next_level` gave last, or would give now for an idle machine."""
        return self._step / GRID

    @property
    def threads(self) -> int:
        """How many threads to run the inference on that `next_level` gave the last level for."""
        return self._arm.threads

    @property
    def reachable(self) -> bool:
        """Whether some level was expected to keep the budget when the last level was picked; if not, it is the fastest."""
        return self._reachable

    @property
    def slowdown(self) -> float:
        """How many times longer inferences are estimated to take now than on an idle machine."""
        return math.exp(self._arm.slowdown.mean)

    @property
    def pace(self) -> float:
        """How many times longer than the cost table predicts inferences are estimated to take now, on `threads` threads."""
        arm, step = self._arm, self._step
        return math.exp(arm.mean + arm.log_idle[step] - self._log_usual[step])

    def set_num_threads(self, num_threads: int) -> None:
        """Sets the most threads to use; what was learned about the times of these is forgotten.

        Raises:
            InputError: `num_threads` is not an int >= 1.
        """
        if isinstance(num_threads, bool) or not isinstance(num_threads, int) or num_threads < 1:
            raise InputError(f"`num_threads` must be an int >= 1, got {num_threads!r}.")
        with self._lock:
            self._set_arms(num_threads)
            self._set_margins()

    def set_budget(self, budget_ms: float | None, *, percentile: float | None = None) -> None:
        """Sets the budget from the next inference on; what was learned of load and inputs is kept.

        Args:
            budget_ms: in milliseconds, > 0; None for none.
            percentile: in percent, inside (0, 100); None keeps the present one.

        Raises:
            InputError: budget or percentile is not a number or out of range.
        """
        budget_ms = math.inf if budget_ms is None else check_budget_ms(budget_ms)
        percentile = self._percentile if percentile is None else check_percentile(percentile)
        with self._lock:
            self._budget_ms = budget_ms
            self._percentile = percentile
            self._target_misses = min(max(1 - percentile / 100, 1e-9), 1 - 1e-9)
            self._margin_rate = _MARGIN_RATE * max(1.0, math.sqrt(0.05 / max(self._target_misses, 0.002)))
            self._normal_margin = NormalDist().inv_cdf(1 - self._target_misses)
            self._wanted.clear()
            self._set_margins()
            wanted, self._arm = self._choose(budget_ms)
            self._reachable = wanted <= GRID
            self._step = min(wanted, self._last_step)

    def next_level(self, sample: ResourceSample | None = None, *, work: float = 1.0, limit_ms: float = math.inf) -> float:
        """Returns the level in [0, 1] to run the next inference at.

        Args:
            sample: the machine's latest sample; None where nothing is known beyond the latencies.
            work: cost of this call as a multiple of what the frontier was measured with (a batch of 4 where it was 1: about 4).
            limit_ms: time left for this call alone; it tightens this one, later calls keep to the budget.
        """
        with self._lock:
            self._count += 1
            if sample is None:
                self._load = self._seen_load
            elif sample is not self._sample:
                self._sample, self._load = sample, _expected_log_slowdown(sample)
                self._sampled_others = other_cores(sample)
                if self._sampled_others is not None and round(self._sampled_others) != self._met:
                    self._meet(round(self._sampled_others))
            factor = work
            extra_load = self._load - self._seen_load - _NEW_LOAD
            if extra_load > 0.0:
                factor *= math.exp(extra_load)
            arm, last_step = self._arm, self._last_step
            on_trial = arm.slowdown.on_trial
            if on_trial and arm.fitting_step(self._budget_ms / work / arm.expected) <= GRID:
                wanted = arm.fitting_step(self._budget_ms / factor / arm.expected)  # other threads would not show whether it was a spike
            else:
                if on_trial and self._choose(self._budget_ms / work)[0] > GRID:
                    # If this is a step no level keeps the budget; only if it is a spike does the choice of the level matter.
                    arm.expect(arm.slowdown.mean_before, self._hardness, self._hardness_variance)
                wanted, arm = self._choose(self._budget_ms / factor)
            self._reachable = wanted <= GRID
            if wanted > last_step:
                wanted = last_step
            if on_trial:  # a spike tightens one inference, a step all that follow
                step = max(self._step, wanted)
            else:
                step = tightest = self._tightest_wanted(wanted)
                if self._step - _DEAD_BAND < tightest < self._step and tightest > 0:
                    step = self._step
                self._step = step
            if limit_ms < self._budget_ms:
                tighter, arm = self._choose(limit_ms / factor)
                self._reachable = tighter <= GRID
                step = max(step, min(tighter, last_step))
            self._arm = arm
            return step / GRID

    def observe(
        self,
        latency_ms: float,
        predicted_ms: float,
        *,
        level: float | None = None,
        threads: int | None = None,
        work: float = 1.0,
        limit_ms: float | None = None,
        guarded: bool = False,
    ) -> None:
        """Learns from a finished inference; figures that are not finite and positive are ignored.

        Args:
            latency_ms: how long it took, in milliseconds.
            predicted_ms: the cost table's prediction for the steps and rows that were executed, in milliseconds.
            level: the level it began with; None means the one that `next_level` gave last.
            threads: it ran on; None means `threads`.
            work: as given to `next_level`.
            limit_ms: that it ran under, in milliseconds; None means the budget.
            guarded: whether the deadline guard skipped more on the way, so that at `level` it would have taken as long as the limit.
        """
        if not (0 < latency_ms < math.inf and 0 < predicted_ms < math.inf):
            return
        with self._lock:
            arm = self._arm if threads is None else self._arm_of.get(threads, self._arm)
            last_level = self._step / GRID
            if level is None:
                level = last_level
            place = level * GRID
            step = int(place)
            if step == place:
                log_usual, log_idle = self._log_usual[step], arm.log_idle[step]
            else:
                log_usual = math.log(self.frontier.predicted_ms_at(level))
                log_idle = math.log(arm.frontier.latency_ms_at(level))
            excess = math.log(predicted_ms) - log_usual
            slowdown = math.log(latency_ms) - excess - log_idle
            hardness = excess if work == 1.0 else excess - math.log(work)
            if limit_ms is None:
                limit_ms = self._budget_ms
            if guarded and limit_ms > 0:
                hardness = max(hardness, math.log(limit_ms / work) - log_idle - max(slowdown, arm.mean))
            if not -_MOST_LOG < slowdown < _MOST_LOG:
                slowdown = math.copysign(_MOST_LOG, slowdown)
            if not -_MOST_LOG < hardness < _MOST_LOG:
                hardness = math.copysign(_MOST_LOG, hardness)
            estimator = arm.slowdown
            if not self._is_fresh(arm):
                estimator = arm.slowdown = SlowdownEstimator()
            arm.seen, arm.others = self._count, self._sampled_others
            # At a level that the limit asked for a miss tells; elsewhere nothing is at stake, and the expectation stands for the limit.
            at_limit = 0 < level <= last_level and self._reachable
            missed = latency_ms > limit_ms if at_limit else slowdown + hardness > arm.high
            estimator.update(slowdown)
            normal = self._normal_margin
            margin = arm.margin
            margin += self._margin_rate * (missed - (_AIM if margin > normal else _CAUTIOUS_AIM) * self._target_misses)
            if margin < normal and (estimator.on_trial or (missed and self._missed)):
                margin = normal
            elif margin < 0.0:
                margin = 0.0
            elif margin > normal + _MOST_EXTRA_MARGIN:
                margin = normal + _MOST_EXTRA_MARGIN
            self._missed = missed
            arm.margin = margin
            surprise = hardness - self._hardness
            self._hardness += _HARDNESS_RATE * surprise
            self._hardness_variance += _HARDNESS_RATE * ((1 - _HARDNESS_RATE) * surprise * surprise - self._hardness_variance)
            self._seen_load += _SEEN_RATE * (self._load - self._seen_load)
            arm.expect(estimator.mean, self._hardness, self._hardness_variance)

    def _set_arms(self, num_threads: int) -> None:
        counts = {count for count, _ in self.frontier.fewer_threads if count < num_threads}
        measured = {count for count, _ in self.frontier.fewer_threads}
        widest = self.frontier.with_threads(num_threads) if num_threads in measured else self.frontier
        self._arms = [Arm(num_threads, widest), *(Arm(count, self.frontier.with_threads(count)) for count in sorted(counts, reverse=True))]
        self._arm_of = {arm.threads: arm for arm in self._arms}
        self._arm = self._arms[0]
        self._last_step = max(arm.last_step for arm in self._arms)

    def _meet(self, others: int) -> None:
        """Takes the margins learned beside so many cores' worth of other programs: how latencies spread depends on them."""
        for arm in self._arms:
            arm.margins[self._met] = arm.margin
            unknown = self._normal_margin if others < self._met else max(arm.margin, self._normal_margin)
            arm.margin = arm.margins.get(others, unknown)
            arm.expect(arm.slowdown.mean, self._hardness, self._hardness_variance)
        self._met = others

    def _set_margins(self) -> None:
        for arm in self._arms:
            arm.margins.clear()
            arm.margin = self._normal_margin
            arm.expect(arm.slowdown.mean, self._hardness, self._hardness_variance)

    def _is_fresh(self, arm: Arm) -> bool:
        if len(self._arms) == 1:
            return True
        if arm.seen is None or self._count - arm.seen > _FRESH:
            return False
        if arm is self._arm or arm.others is None or self._sampled_others is None:
            return True
        return abs(arm.others - self._sampled_others) <= _OTHER_LOAD

    def _choose(self, ms: float) -> tuple[int, Arm]:
        """Returns the lowest step of the grid at which some number of threads is expected to take at most `ms`, and its arm.

        Where there is none the step is beyond the grid, and the arm the one that is expected to be the fastest.
        """
        first = self._arms[0]
        if len(self._arms) == 1:
            return first.fitting_step(ms / first.expected), first
        best, chosen, least_ms = GRID + 1, first, math.inf
        for arm in self._arms:
            if not self._is_fresh(arm):
                spread = max(arm.slowdown.variance, self._arm.slowdown.variance)
                arm.expect_beside(self._others(), self._cores, self._hardness, self._hardness_variance, spread)
            step = arm.fitting_step(ms / arm.expected)
            if step < best:
                best, chosen = step, arm
                if step == 0:
                    break
            elif best > GRID and arm.expected * arm.least_ms < least_ms:
                least_ms, chosen = arm.expected * arm.least_ms, arm
        return best, chosen

    def _others(self) -> float:
        """Returns how many cores' worth of threads other programs run: by the last sample, else by how slow inferences are.

        The latter leaves one core free at least: waiting for each other slows threads down too, and one inference tells how it is.
        """
        if self._sampled_others is not None:
            return self._sampled_others
        slowdown = self._arm.slowdown.mean
        return min(other_load(slowdown, self._arm.threads, self._cores), self._cores - 1) if slowdown > _SLOWED else 0.0

    def _tightest_wanted(self, wanted: int) -> int:
        """Returns the highest level wanted in the calm window, `wanted` included (a queue of falling levels, its head the highest)."""
        queue, now_s = self._wanted, self._clock()
        while queue and queue[-1][2] <= wanted:
            queue.pop()
        queue.append((self._count, now_s, wanted))
        while self._count - queue[0][0] >= _CALM_INFERENCES or now_s - queue[0][1] > _CALM_SECONDS:
            queue.popleft()
        return queue[0][2]


def _expected_log_slowdown(sample: ResourceSample) -> float:
    """Returns the logarithm of the slow-down that the shares of CPU time lost suggest: a share p is lost when all takes 1 / (1 - p)."""
    lost = max(fraction(sample.cpu_pressure), fraction(sample.runqueue_wait_fraction), fraction(sample.throttled_fraction))
    return -math.log(1 - min(lost, _MOST_PRESSURE))
