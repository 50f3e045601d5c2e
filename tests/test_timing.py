"""Medians, spreads, and the order in which rivals take turns."""

import gc
import time

import pytest

from dynprune.errors import InputError
from dynprune.timing import Measurement, measure, measure_interleaved, percentiles


@pytest.mark.parametrize(
    ("values", "points", "expected"),
    [
        pytest.param([3.0], (0, 50, 100), [3.0, 3.0, 3.0], id="one"),
        pytest.param([4.0, 1.0, 3.0, 2.0], (0, 50, 100), [1.0, 2.5, 4.0], id="unsorted"),
        pytest.param(range(101), (5, 95, 99), [5, 95, 99], id="hundred"),
        pytest.param([0.0, 10.0], (25,), [2.5], id="between"),
    ],
)
def test_percentiles_interpolate(values, points, expected):
    assert percentiles(values, points) == pytest.approx(expected)


@pytest.mark.parametrize(("values", "points"), [([], (50,)), ([1.0], (101,)), ([1.0], (-1,)), ([1.0], (float("nan"),))], ids=repr)
def test_percentiles_refuse(values, points):
    with pytest.raises(InputError):
        percentiles(values, points)


@pytest.mark.parametrize(
    ("times_ms", "noisy"),
    [pytest.param([1.0, 1.01, 1.02, 1.03], False, id="quiet"), pytest.param([1.0, 1.0, 1.2, 1.4], True, id="noisy")],
)
def test_measurement_says_when_it_is_noisy(times_ms, noisy):
    assert Measurement.of(times_ms).noisy is noisy


def test_measure_times_every_call_after_the_warm_up():
    calls = []
    measurement = measure(lambda: calls.append(time.sleep(0.002)), min_seconds=0.0, min_runs=4, warmup=3)
    assert len(calls) == 7
    assert measurement.runs == 4
    assert 2.0 <= measurement.median_ms <= measurement.p95_ms


def test_measure_goes_on_for_the_time_asked():
    measurement = measure(lambda: time.sleep(0.001), min_seconds=0.02, min_runs=1, warmup=0)
    assert measurement.runs * measurement.p95_ms >= 20


@pytest.mark.parametrize("arguments", [{"min_runs": 0}, {"min_seconds": -1}, {"warmup": -1}], ids=repr)
def test_measure_refuses(arguments):
    with pytest.raises(InputError, match=next(iter(arguments))):
        measure(lambda: None, **arguments)


def test_collection_is_paused_and_then_as_before():
    seen = []
    measure(lambda: seen.append(gc.isenabled()), min_seconds=0, min_runs=1, warmup=1)
    assert seen == [False, False]
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        measure(lambda: 1 / 0)
    assert gc.isenabled()


def test_interleaved_blocks_alternate_and_drop_their_first_call():
    calls = []
    functions = {name: (lambda name=name: calls.append(name) or time.sleep(0.002)) for name in "ab"}
    result = measure_interleaved(functions, seconds=0.03, block_seconds=0.01, pause_seconds=0.0)
    blocks = [name for name, before in zip(calls, [None, *calls], strict=False) if name != before]
    assert blocks == ["a", "b"] * 3
    for name in "ab":
        assert result[name].runs == calls.count(name) - 3


def test_interleaved_pauses_before_each_block():
    start = time.perf_counter()
    measure_interleaved({"a": int, "b": int}, seconds=0.001, pause_seconds=0.02)
    assert time.perf_counter() - start >= 0.04


def test_interleaved_runs_a_function_longer_than_its_block():
    assert measure_interleaved({"slow": lambda: time.sleep(0.01)}, seconds=0.002, block_seconds=0.001)["slow"].runs == 2


@pytest.mark.parametrize(
    ("functions", "arguments"),
    [({}, {"seconds": 1}), ({"a": int}, {"seconds": 0}), ({"a": int}, {"seconds": 1, "block_seconds": 0})],
    ids=["none", "seconds0", "block0"],
)
def test_interleaved_refuses(functions, arguments):
    with pytest.raises(InputError):
        measure_interleaved(functions, **arguments)
