"""The controller keeps budgets in a simulated world with a fake clock, and its state stays sane whatever it is told."""

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprune.control.checks import check_budget_ms, check_level, check_percentile
from dynprune.control.controller import LatencyController
from dynprune.control.frontier import Frontier, OperatingPoint
from dynprune.control.pressure import PressurePolicy, ResourceSample
from dynprune.control.slowdown import SlowdownEstimator
from dynprune.errors import InputError

DENSE_MS, TIGHTEST_MS = 10.0, 3.0


def toy_frontier(points: int = 17) -> Frontier:
    """Returns a frontier from 10 ms at level 0 to 3 ms at level 1 whose cost table predicts a tenth too little."""
    levels = [i / (points - 1) for i in range(points)]
    latencies = [DENSE_MS + (TIGHTEST_MS - DENSE_MS) * level for level in levels]
    return Frontier(
        tuple(OperatingPoint(level, 0.9 * ms, ms, 0.7 * level, 1 - 0.2 * level) for level, ms in zip(levels, latencies, strict=True))
    )


@dataclass
class World:
    """A machine in which inferences of the toy model run one after the other, 2 ms apart, under a load that depends on the time."""

    budget_ms: float
    load: Callable[[float, random.Random], float] = lambda now_s, chance: 1.0
    percentile: float = 95
    noise: float = 0.015
    hardness: float = 0.05
    sample: Callable[[float], ResourceSample | None] = lambda now_s: None
    now_s: float = 0.0
    trace: list[tuple[float, float, float]] = field(default_factory=list)

    def __post_init__(self):
        self.chance = random.Random(7)
        self.controller = LatencyController(toy_frontier(), budget_ms=self.budget_ms, percentile=self.percentile, clock=lambda: self.now_s)

    def run(self, seconds: float) -> "World":
        """Runs inferences for `seconds` of simulated time; `trace` gets (start in s, level, latency in ms) of each."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            level = self.controller.next_level(self.sample(self.now_s))
            hard = math.exp(self.chance.gauss(0, self.hardness))
            noise = math.exp(abs(self.chance.gauss(0, self.noise)))
            frontier = self.controller.frontier
            latency_ms = frontier.latency_ms_at(level) * hard * noise * self.load(self.now_s, self.chance)
            self.controller.observe(latency_ms, frontier.predicted_ms_at(level) * hard)
            self.trace.append((self.now_s, level, latency_ms))
            self.now_s += latency_ms / 1e3 + 0.002
        return self

    def miss_rate(self, from_s: float = 0.0, to_s: float = math.inf) -> float:
        latencies = [latency_ms for start_s, _, latency_ms in self.trace if from_s <= start_s < to_s]
        return sum(latency_ms > self.budget_ms for latency_ms in latencies) / len(latencies)

    def mean_level(self, from_s: float = 0.0, to_s: float = math.inf) -> float:
        levels = [level for start_s, level, _ in self.trace if from_s <= start_s < to_s]
        return sum(levels) / len(levels)

    def slack(self) -> float:
        """Returns the mean share of the budget left by the inferences that kept it."""
        return sum(max(0.0, 1 - latency_ms / self.budget_ms) for *_, latency_ms in self.trace) / len(self.trace)

    def level_changes(self) -> int:
        return sum(before[1] != after[1] for before, after in zip(self.trace, self.trace[1:], strict=False))


@pytest.mark.parametrize(
    ("budget_ms", "load", "least_level", "most_level"),
    [
        pytest.param(1.15 * DENSE_MS, 1.0, 0.0, 0.03, id="idle-dense"),
        pytest.param(1.15 * 6.5, 1.0, 0.4, 0.6, id="idle-middle"),
        pytest.param(10.0, 1.8, 0.62, 0.85, id="loaded"),
        pytest.param(100.0, 3.0, 0.0, 0.0, id="generous"),
    ],
)
def test_constant_load_keeps_the_budget_with_little_slack(budget_ms, load, least_level, most_level):
    world = World(budget_ms, load=lambda now_s, chance: load).run(30)
    assert world.miss_rate(from_s=2) <= 0.02
    assert least_level <= world.mean_level(from_s=2) <= most_level
    assert world.level_changes() <= 0.04 * len(world.trace)
    if budget_ms < 100:
        assert world.slack() <= 0.15


def test_budget_of_its_own_median_and_a_bit_is_kept_in_99_of_100():
    world = World(1.15 * DENSE_MS, hardness=0.0).run(60)
    assert world.miss_rate() <= 0.01
    assert world.mean_level() == 0


@pytest.mark.parametrize("percentile", [90, 95, 99])
def test_misses_stay_below_the_percentile_under_heavy_noise(percentile):
    world = World(12.0, load=lambda now_s, chance: 2.0 if chance.random() < 0.2 else 1.0, percentile=percentile, noise=0.1).run(60)
    assert world.miss_rate(from_s=2) <= 1 - percentile / 100


@pytest.mark.parametrize("percentile", [95, 99])
def test_heavy_tails_are_learned(percentile):
    world = World(16.0, load=lambda now_s, chance: 1 + 0.3 * min(20, chance.paretovariate(2) - 1), percentile=percentile).run(90)
    assert world.miss_rate(from_s=10) <= 1 - percentile / 100


def test_the_margin_shrinks_while_the_budget_is_kept_and_is_back_after_a_step():
    world = World(8.0, load=lambda now_s, chance: 1.4 if now_s >= 30 else 1.0).run(28)
    normal, arm = world.controller._normal_margin, world.controller._arm
    assert arm.margin < normal - 0.05 and world.miss_rate(from_s=5) <= 0.02
    world.run(2.1)
    assert arm.margin >= normal - 0.01


def test_what_neighbours_taught_the_margin_is_put_aside_when_they_leave_and_known_when_they_are_back():
    def beside(cores: float) -> ResourceSample:
        return ResourceSample(cpu_fraction=0.5 + cores / 2, own_cpu_fraction=0.5, per_cpu_fraction=(0.5, 0.5))

    def busy(now_s: float) -> bool:
        return 5 <= now_s < 25 or now_s >= 35

    samples = {True: beside(1.0), False: beside(0.0)}
    world = World(
        10.5,
        load=lambda now_s, chance: 1.8 if busy(now_s) and chance.random() < 0.05 else 1.0,
        percentile=99,
        sample=lambda now_s: samples[busy(now_s)],
    ).run(24.9)
    learned = world.controller._arm.margin
    assert learned > world.controller._normal_margin + 2
    world.run(9)
    assert world.controller._arm.margin <= world.controller._normal_margin
    assert world.mean_level(26, 34) < world.mean_level(20, 24) - 0.2
    world.run(1.5)
    assert world.controller._arm.margin > learned - 0.5


def test_a_budget_out_of_reach_does_not_widen_the_margin():
    world = World(8.0, load=lambda now_s, chance: 6.0 if 5 <= now_s < 25 else 1.0).run(26)
    assert not all(latency_ms <= 8.0 for start_s, _, latency_ms in world.trace if start_s < 25)
    assert world.controller._arm.margin <= 1.5 * world.controller._normal_margin


def test_the_spread_of_hard_inputs_widens_the_margin():
    world = World(12.0, hardness=0.25, noise=0.0).run(60)
    assert world.miss_rate(from_s=2) <= 0.05


def test_a_steady_load_leaves_the_level_alone():
    world = World(8.0).run(60)
    assert world.level_changes() <= 0.025 * len(world.trace)


def test_higher_percentile_is_tighter():
    levels = [World(8.0, percentile=percentile).run(20).mean_level(from_s=2) for percentile in (50, 90, 99)]
    assert levels == sorted(levels)
    assert levels[0] < levels[2] - 0.02


def test_step_load_costs_few_misses_and_all_is_well_after():
    world = World(11.5, load=lambda now_s, chance: 2.0 if 5 <= now_s < 10 else 1.0).run(20)
    first = next(i for i, (start_s, *_) in enumerate(world.trace) if start_s >= 5)
    assert all(latency_ms <= world.budget_ms for *_, latency_ms in world.trace[first + 3 : first + 10])
    assert world.miss_rate(5, 6) <= 0.1
    assert world.miss_rate(6, 10) <= 0.02
    assert world.mean_level(6, 10) > 0.5
    assert world.mean_level(12, 20) < 0.05


def test_rare_spikes_neither_tighten_for_long_nor_flap():
    calm = World(8.0).run(40)
    spiky = World(8.0, load=lambda now_s, chance: 5.0 if chance.random() < 0.02 else 1.0).run(40)
    assert spiky.miss_rate() <= 0.05
    assert spiky.mean_level() <= calm.mean_level() + 0.1
    assert spiky.level_changes() <= 0.05 * len(spiky.trace)


def test_hard_inputs_are_not_taken_for_load():
    world = World(9.0)
    frontier = world.controller.frontier
    for _ in range(200):
        level = world.controller.next_level()
        world.controller.observe(1.5 * frontier.latency_ms_at(level), 1.5 * frontier.predicted_ms_at(level))
    assert world.controller.slowdown == pytest.approx(1.0, abs=0.02)
    assert 1.5 * frontier.latency_ms_at(world.controller.next_level()) <= 9.0


def test_the_guard_does_not_make_hard_inputs_look_easy():
    world = World(9.0)
    frontier = world.controller.frontier
    guarded = []
    for _ in range(300):
        level = world.controller.next_level()
        whole_ms = 1.5 * frontier.latency_ms_at(level)
        guarded.append(whole_ms > 9.0)
        latency_ms = 0.8 * 9.0 if guarded[-1] else whole_ms
        world.controller.observe(latency_ms, 0.9 * latency_ms, guarded=guarded[-1])
    assert guarded[0]
    assert not any(guarded[-50:])
    assert world.controller.slowdown == pytest.approx(1.0, abs=0.02)


def test_a_guard_that_acted_on_a_load_that_had_gone_says_nothing_of_the_inputs():
    world = World(11.5, load=lambda now_s, chance: 2.0).run(3)
    level = world.controller.next_level()
    assert level > 0.5 and world.controller.pace == pytest.approx(2 / 0.9, rel=0.1)
    tight_ms, hardness = toy_ms(1.0), world.controller._hardness
    for _ in range(2):
        world.controller.observe(tight_ms, 0.9 * tight_ms, level=level, guarded=True)
    assert world.controller._hardness < hardness + 0.03
    assert math.sqrt(world.controller._hardness_variance) < 0.1


def test_new_pressure_tightens_before_the_first_slow_inference():
    sample = [ResourceSample(cpu_pressure=0.0)]
    world = World(11.5, sample=lambda now_s: sample[0]).run(3)
    assert world.trace[-1][1] < 0.05
    sample[0] = ResourceSample(cpu_pressure=0.5)
    assert world.controller.next_level(sample[0]) > 0.5


def test_pressure_that_does_not_slow_us_down_is_forgiven():
    sample = [ResourceSample(cpu_pressure=0.0)]
    world = World(11.5, sample=lambda now_s: sample[0]).run(3)
    sample[0] = ResourceSample(cpu_pressure=0.5)
    world.run(5)
    assert world.mean_level(from_s=6) < 0.05


@pytest.mark.parametrize("name", ["cpu_pressure", "runqueue_wait_fraction", "throttled_fraction"])
def test_each_sign_of_contention_counts(name):
    controller = LatencyController(toy_frontier(), budget_ms=11.5)
    assert controller.next_level(ResourceSample(**{name: 0.5})) > 0.5


def test_a_new_budget_holds_from_the_next_inference():
    world = World(1.2 * DENSE_MS).run(5)
    for budget_ms in (4.0, 8.0, 12.0):
        world.controller.set_budget(budget_ms)
        assert world.controller.frontier.latency_ms_at(world.controller.next_level()) <= budget_ms
    assert world.controller.level == 0


def test_unreachable_budget_runs_at_level_1_and_says_so():
    world = World(1.0)
    assert not world.controller.reachable
    world.run(2)
    assert {level for _, level, _ in world.trace} == {1.0}
    assert not world.controller.reachable
    world.controller.set_budget(20.0)
    assert world.controller.reachable


def test_levels_that_buy_no_time_do_not_run():
    """From level 0.5 on all take as long, give or take 1 %: level 0.5 is the fastest, and keeps the most accuracy of those."""
    levels = [i / 8 for i in range(9)]
    times_ms = [max(10 - 8 * level, 6.0) * (1 - 0.01 * level) for level in levels]
    points = tuple(OperatingPoint(level, ms, ms, level, 1 - level) for level, ms in zip(levels, times_ms, strict=True))
    controller = LatencyController(Frontier(points), budget_ms=1.0)
    assert not controller.reachable
    for _ in range(20):
        level = controller.next_level()
        assert 0.45 <= level <= 0.5
        controller.observe(6.0, 6.0)
    assert controller.next_level(limit_ms=0.5) <= 0.5
    flat = tuple(OperatingPoint(level, 6.0, 6.0, level, 1 - level) for level in levels)
    assert LatencyController(Frontier(flat), budget_ms=1.0).next_level() == 0


def test_a_spike_after_which_no_level_would_fit_changes_nothing():
    world = World(11.5).run(2)
    before = world.controller.next_level()
    world.controller.observe(25 * DENSE_MS, 0.9 * DENSE_MS)
    for _ in range(2):
        assert world.controller.next_level() == pytest.approx(before, abs=0.05)
        assert world.controller.reachable
        assert world.controller.pace < 2, "nor does it set the guard off"
        world.controller.observe(toy_ms(before), 0.9 * toy_ms(before))


def test_a_step_after_which_no_level_fits_is_believed_at_the_second_inference():
    world = World(11.5).run(2)
    for _ in range(2):
        world.controller.next_level()
        world.controller.observe(25 * DENSE_MS, 0.9 * DENSE_MS)
    assert world.controller.next_level() == 1
    assert not world.controller.reachable
    assert world.controller.pace > 20


def test_one_slow_inference_within_reach_tightens_the_next():
    world = World(11.5).run(2)
    before = world.controller.next_level()
    world.controller.observe(2.5 * toy_ms(before), 0.9 * toy_ms(before))
    assert 2.5 * toy_ms(world.controller.next_level()) <= 11.5


def test_budget_that_load_puts_out_of_reach_comes_back():
    world = World(6.0, load=lambda now_s, chance: 4.0 if now_s < 3 else 1.0).run(2)
    assert not world.controller.reachable
    world.run(4)
    assert world.controller.reachable


def test_sparse_requests_relax_by_time():
    world = World(11.5)
    world.controller.observe(30.0, 9.0)
    assert world.controller.next_level() > 0.9
    for _ in range(6):
        world.now_s += 1.0
        world.controller.next_level()
        world.controller.observe(DENSE_MS, 0.9 * DENSE_MS, level=0.0)
    assert world.controller.next_level() == 0


def test_work_scales_the_expectation():
    world = World(40.0)
    assert world.controller.next_level(work=1.0) == 0
    level = world.controller.next_level(work=8.0)
    assert 8 * world.controller.frontier.latency_ms_at(level) <= 40.0
    for _ in range(100):
        world.controller.observe(8 * 5.0, 8 * 4.5, level=5 / 7, work=8.0)
    assert world.controller.slowdown == pytest.approx(1.0, abs=0.02)


def test_clock_going_backwards_is_tolerated():
    world = World(8.0).run(3)
    world.now_s -= 100
    expected = world.mean_level(from_s=2)
    assert World.mean_level(world.run(3), from_s=-200, to_s=-90) == pytest.approx(expected, abs=0.05)


def test_a_false_alarm_is_undone_at_once():
    estimator = SlowdownEstimator()
    for observation in (0.0, 0.01, 1.5):
        estimator.update(observation)
    assert estimator.mean == 1.5
    estimator.update(0.0)
    assert abs(estimator.mean) < 0.02


def test_after_two_false_alarms_a_step_must_show_twice_until_one_lasts():
    estimator = SlowdownEstimator()
    for observation in (0.0, 2.0, 0.0, 3.0, 0.0):
        estimator.update(observation)
    estimator.update(4.0)
    assert estimator.mean < 0.1
    estimator.update(4.0)
    assert estimator.mean == 4.0


def test_relief_must_show_twice():
    estimator = SlowdownEstimator()
    for observation in (2.0, 2.0, 2.0, 0.0):
        estimator.update(observation)
    assert estimator.mean > 1.5
    estimator.update(0.0)
    assert estimator.mean < 0.1


def test_noise_is_learned_in_both_directions():
    estimator = SlowdownEstimator()
    chance = random.Random(3)
    deviations = []
    for noise in (0.3, 0.02):
        for _ in range(400):
            estimator.update(chance.gauss(0.0, noise))
        deviations.append(math.sqrt(estimator.variance))
    assert deviations == pytest.approx([0.3, 0.022], rel=0.35)


anything = st.floats(allow_nan=True, allow_infinity=True) | st.floats(1e-6, 1e6)
unit_or_none = st.none() | st.floats(0, 1) | st.just(math.nan)
samples = st.builds(
    ResourceSample, cpu_pressure=unit_or_none, runqueue_wait_fraction=unit_or_none, throttled_fraction=unit_or_none, timestamp_s=anything
)
histories = st.lists(st.tuples(anything, anything, st.none() | samples, st.floats(-10, 10)), max_size=60)


def controller_after(history, budget_ms: float = 8.0) -> tuple[LatencyController, list[float]]:
    """Returns a controller that lived through `history`, and the levels it gave."""
    now_s = [0.0]
    controller = LatencyController(toy_frontier(), budget_ms=budget_ms, clock=lambda: now_s[0])
    levels = []
    for latency_ms, predicted_ms, sample, elapsed_s in history:
        now_s[0] += elapsed_s
        levels.append(controller.next_level(sample))
        controller.observe(latency_ms, predicted_ms)
    return controller, levels


def copy_of(controller: LatencyController) -> LatencyController:
    """Returns a controller in the same state."""
    twin = copy.copy(controller)
    twin._arms, twin._wanted = copy.deepcopy(controller._arms), copy.copy(controller._wanted)
    twin._arm = twin._arms[controller._arms.index(controller._arm)]
    return twin


@given(histories)
@settings(deadline=None)
def test_levels_are_in_range_whatever_happens(history):
    controller, levels = controller_after(history)
    assert all(0 <= level <= 1 for level in levels)
    assert math.isfinite(controller.slowdown)


@given(histories, samples, st.floats(0, 1))
@settings(deadline=None)
def test_more_pressure_never_loosens(history, sample, more):
    controller, _ = controller_after(history)
    for name in ("cpu_pressure", "runqueue_wait_fraction", "throttled_fraction"):
        value = getattr(sample, name)
        value = 0.0 if value is None or math.isnan(value) else value
        higher = replace(sample, **{name: value + (1 - value) * more})
        assert copy_of(controller).next_level(higher) >= copy_of(controller).next_level(sample)


@given(histories, st.floats(0.1, 100), st.floats(0.1, 100))
@settings(deadline=None)
def test_a_larger_budget_never_tightens(history, one_ms, other_ms):
    levels = []
    for budget_ms in sorted((one_ms, other_ms)):
        controller, _ = controller_after(history)
        controller.set_budget(budget_ms)
        levels.append(controller.next_level())
    assert levels[0] >= levels[1]


@given(histories)
@settings(deadline=None, max_examples=30)
def test_recovers_from_any_history(history):
    controller, _ = controller_after(history, budget_ms=1.2 * 6.5)
    chance = random.Random(1)
    for _ in range(400):
        level = controller.next_level()
        ms = toy_ms(level) * math.exp(chance.gauss(0, 0.01))
        controller.observe(ms, 0.9 * toy_ms(level))
    fresh = LatencyController(toy_frontier(), budget_ms=1.2 * 6.5).next_level()
    assert controller.next_level() == pytest.approx(fresh, abs=0.15)


def toy_ms(level: float) -> float:
    return DENSE_MS + (TIGHTEST_MS - DENSE_MS) * level


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        pytest.param(ResourceSample(), 0.0, id="nothing-known"),
        pytest.param(ResourceSample(cpu_pressure=0.3, memory_pressure=0.8), 0.0, id="below"),
        pytest.param(ResourceSample(cpu_pressure=0.62), 0.5, id="cpu-half"),
        pytest.param(ResourceSample(memory_pressure=0.915), 0.5, id="memory-half"),
        pytest.param(ResourceSample(cpu_pressure=0.62, memory_pressure=1.0), 1.0, id="higher-wins"),
        pytest.param(ResourceSample(cpu_pressure=math.nan), 0.0, id="nan"),
    ],
)
def test_pressure_policy_floor(sample, expected):
    assert PressurePolicy().level_floor(sample) == pytest.approx(expected)


def test_pressure_policy_can_be_turned_off():
    assert PressurePolicy(cpu_start=1, memory_start=1).level_floor(ResourceSample(cpu_pressure=1.0, memory_pressure=1.0)) == 0


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_pressure_policy_never_loosens_with_pressure(one, other, memory):
    low, high = (PressurePolicy().level_floor(ResourceSample(cpu_pressure=cpu, memory_pressure=memory)) for cpu in sorted((one, other)))
    assert low <= high


@pytest.mark.parametrize("arguments", [{"cpu_start": 0.9}, {"cpu_start": -1}, {"memory_full": 2}, {"memory_start": math.nan}], ids=repr)
def test_pressure_policy_refuses(arguments):
    with pytest.raises(InputError):
        PressurePolicy(**arguments)


@pytest.mark.parametrize("budget_ms", [0, -3, math.nan, math.inf, "12", True], ids=repr)
def test_bad_budget_is_refused(budget_ms):
    with pytest.raises(InputError, match="budget_ms"):
        check_budget_ms(budget_ms)
    with pytest.raises(InputError, match="budget_ms"):
        LatencyController(toy_frontier(), budget_ms=budget_ms)


@pytest.mark.parametrize("percentile", [0, 100, -1, math.nan, "95", False], ids=repr)
def test_bad_percentile_is_refused(percentile):
    with pytest.raises(InputError, match="percentile"):
        check_percentile(percentile)
    with pytest.raises(InputError, match="percentile"):
        LatencyController(toy_frontier(), budget_ms=5, percentile=percentile)


def test_a_refused_budget_leaves_the_old_one():
    controller = LatencyController(toy_frontier(), budget_ms=5, percentile=90)
    with pytest.raises(InputError):
        controller.set_budget(7, percentile=100)
    assert (controller.budget_ms, controller.percentile) == (5, 90)


@pytest.mark.parametrize("percentile", [1e-300, 100 - 1e-13, 50])
def test_extreme_percentiles_work(percentile):
    controller = LatencyController(toy_frontier(), budget_ms=5, percentile=percentile)
    assert 0 <= controller.next_level() <= 1


@pytest.mark.parametrize("level", [-0.01, 1.01, math.nan, "0.5", None, True], ids=repr)
def test_bad_level_is_refused(level):
    with pytest.raises(InputError, match="level"):
        check_level(level)


@pytest.mark.parametrize("level", [0, 1, 0.5])
def test_good_level_becomes_a_float(level):
    assert check_level(level) == level
    assert isinstance(check_level(level), float)
