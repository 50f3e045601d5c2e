"""The number of threads is chosen with the level: fewer beside busy neighbours, and back again."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprune.control.arms import Arm, other_load
from dynprune.control.controller import LatencyController
from dynprune.control.frontier import Frontier, OperatingPoint
from dynprune.control.pressure import ResourceSample
from dynprune.errors import InputError

TWO_MS, ONE_MS = 10.0, 16.0
"""At level 0 on two threads and on one; level 1 takes a third."""


def frontier() -> Frontier:
    def ms(level: float, whole: float) -> float:
        return whole * (1 - 2 / 3 * level)

    levels = [i / 16 for i in range(17)]
    points = tuple(OperatingPoint(level, ms(level, TWO_MS), ms(level, TWO_MS), level / 2, 1 - level / 10) for level in levels)
    return Frontier(points, "here", 2, ((1, tuple(ms(level, ONE_MS) for level in levels)),))


def latency_ms(level: float, threads: int, others: int, chance: random.Random) -> float:
    """Two cores, each runnable thread its share: two threads wait for each other's core, one has a core to itself beside one other."""
    whole = (TWO_MS if threads == 2 else ONE_MS) * (1 - 2 / 3 * level)
    wanted = threads + others
    slow = max(1.0, wanted / 2) * (chance.uniform(1.0, 1.8) if wanted > 2 else 1.0)
    return whole * slow * chance.uniform(1.0, 1.03)


def serve(controller: LatencyController, count: int, others: int, sampled: bool, budget_ms: float) -> tuple[list[int], float]:
    """Returns the threads of each inference, and the share of misses after the first ten."""
    chance = random.Random(3)
    threads, missed = [], 0
    for i in range(count):
        sample = ResourceSample(cpu_fraction=0.5 + others / 2, own_cpu_fraction=0.5, per_cpu_fraction=(0.5, 0.5)) if sampled else None
        level = controller.next_level(sample)
        used = controller.threads
        ms = latency_ms(level, used, others, chance)
        usual = controller.frontier.predicted_ms_at(level)
        controller.observe(ms, usual, level=level, threads=used)
        threads.append(used)
        missed += i >= 10 and ms > budget_ms
    return threads, missed / (count - 10)


@pytest.mark.parametrize("sampled", [True, False])
def test_one_thread_beside_one_neighbour_and_two_again_when_it_leaves(sampled):
    controller = LatencyController(frontier(), budget_ms=14.0, num_threads=2, cores=2)
    assert set(serve(controller, 60, 0, sampled, 14.0)[0]) == {2}
    beside, misses = serve(controller, 400, 1, sampled, 14.0)
    assert beside.count(1) > 350
    assert misses <= 0.05
    back = serve(controller, 600, 0, sampled, 14.0)[0]
    assert back[-100:].count(2) > 90
    if sampled:
        assert back[5:].count(2) > 550, "a sample tells at once that the neighbour left"


def test_threads_that_come_back_are_not_expected_to_be_as_slow_as_when_they_left():
    """The guard of the first inference on them goes by the pace."""
    controller = LatencyController(frontier(), budget_ms=14.0, num_threads=2, cores=2)
    serve(controller, 60, 0, True, 14.0)
    assert set(serve(controller, 60, 1, True, 14.0)[0][10:]) == {1}
    controller.next_level(ResourceSample(cpu_fraction=0.5, own_cpu_fraction=0.5, per_cpu_fraction=(0.5, 0.5)))
    assert controller.threads == 2
    assert controller.pace < 1.1


def test_a_spike_on_two_threads_is_tried_again_on_two():
    controller = LatencyController(frontier(), budget_ms=14.0, num_threads=2, cores=2)
    serve(controller, 60, 0, False, 14.0)
    level = controller.next_level()
    assert (level, controller.threads) == (0.0, 2)
    controller.observe(2 * TWO_MS, TWO_MS, level=level, threads=2)
    tighter = controller.next_level()
    assert tighter > 0.3 and controller.threads == 2
    ms = TWO_MS * (1 - 2 / 3 * tighter)
    controller.observe(ms, ms, level=tighter, threads=2)
    assert (controller.next_level(), controller.threads) == (0.0, 2)


def test_two_threads_beside_two_neighbours():
    """One thread of three would get two thirds of a core, two of four get a whole one."""
    controller = LatencyController(frontier(), budget_ms=30.0, num_threads=2, cores=2)
    beside, _ = serve(controller, 300, 2, True, 30.0)
    assert beside.count(2) > 250


def test_a_budget_that_two_threads_keep_leaves_them():
    controller = LatencyController(frontier(), budget_ms=60.0, num_threads=2, cores=2)
    assert set(serve(controller, 200, 1, True, 60.0)[0]) == {2}


def test_where_nothing_fits_the_faster_number_of_threads_runs():
    """Beside three neighbours two threads take 2.5 times as long at a fair share of the cores, and one thread twice as long."""
    sample = ResourceSample(cpu_fraction=1.0, own_cpu_fraction=0.0, per_cpu_fraction=(1.0, 1.0))
    for one_ms, threads in ((30.0, 2), (9.0, 1)):
        points = tuple(OperatingPoint(level, TWO_MS, TWO_MS - level, level / 2, 1 - level) for level in (0.0, 1.0))
        either = Frontier(points, "here", 2, ((1, (one_ms, one_ms - 1)),))
        controller = LatencyController(either, budget_ms=1.0, num_threads=2, cores=2)
        controller.next_level(sample)
        assert not controller.reachable
        assert controller.threads == threads


def test_fewer_threads_than_measured():
    controller = LatencyController(frontier(), budget_ms=14.0, num_threads=1, cores=2)
    assert controller.threads == 1
    assert controller.next_level() > 0, "one thread takes 16 ms"
    controller.set_num_threads(2)
    controller.set_budget(14.0)
    assert controller.next_level() == 0 and controller.threads == 2
    for wrong in (0, True, 1.5):
        with pytest.raises(InputError, match="num_threads"):
            controller.set_num_threads(wrong)


def test_threads_that_were_not_measured_take_the_times_there_are():
    controller = LatencyController(frontier(), budget_ms=14.0, num_threads=4, cores=4)
    assert controller.threads == 4 and controller.next_level() == 0


@given(st.floats(0, 1), st.floats(0, 1), st.lists(st.tuples(st.floats(1, 100), st.integers(1, 2)), max_size=80))
@settings(deadline=None, max_examples=60)
def test_more_pressure_never_loosens(one, other, history):
    levels = []
    for pressure in sorted((one, other)):
        controller = LatencyController(frontier(), budget_ms=14.0, num_threads=2, cores=2)
        for ms, threads in history:
            controller.next_level()
            controller.observe(ms, 9.0, threads=threads)
        levels.append(controller.next_level(ResourceSample(cpu_pressure=pressure)))
    assert levels[0] <= levels[1]


@given(st.integers(1, 16), st.floats(0, 4))
def test_other_load_is_what_slows_down_so(threads, others):
    cores = 4.0
    slowdown = max(1.0, (threads + others) / cores)
    if slowdown > 1:
        assert other_load(math.log(slowdown), threads, cores) == pytest.approx(others, abs=1e-6)


def test_few_threads_beside_others_are_expected_to_spread_less():
    arms = [Arm(2, frontier()), Arm(1, frontier().with_threads(1))]
    for arm in arms:
        arm.margin = 1.64
        arm.expect_beside(1.0, 2.0, 0.0, 0.0, 0.1)
    two, one = arms
    assert one.expected < 1.3 < 1.6 < two.expected
