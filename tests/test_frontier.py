"""Frontiers are monotone, invert themselves, and survive JSON; damaged text does not."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynprune.control.frontier import Frontier, OperatingPoint
from dynprune.errors import CheckpointError, InputError

milliseconds = st.floats(0.01, 1e4)


def frontier_of(*latencies_ms: float, machine: str = "") -> Frontier:
    """Returns a frontier with these latencies at equally spaced levels."""
    last = max(1, len(latencies_ms) - 1)
    return Frontier(tuple(OperatingPoint(i / last, 0.9 * ms, ms, 0.5 * i / last, 1.0) for i, ms in enumerate(latencies_ms)), machine)


def test_points_are_sorted_by_level():
    points = [OperatingPoint(level, 1, 2 - level, level, 1.0) for level in (0.5, 1.0, 0.0)]
    assert [point.level for point in Frontier(tuple(points)).points] == [0.0, 0.5, 1.0]


def test_rising_neighbours_are_pooled_to_their_mean():
    assert [point.latency_ms for point in frontier_of(10, 6, 8, 4).points] == [10, 7, 7, 4]
    assert [point.latency_ms for point in frontier_of(1, 2, 6).points] == [3, 3, 3]


@given(st.lists(milliseconds, min_size=1, max_size=12))
def test_times_never_rise_and_keep_their_mean(latencies_ms):
    pooled = [point.latency_ms for point in frontier_of(*latencies_ms).points]
    assert pooled == sorted(pooled, reverse=True)
    assert sum(pooled) == pytest.approx(sum(latencies_ms))


@given(st.lists(milliseconds, min_size=1, max_size=12), milliseconds)
def test_level_for_is_the_lowest_that_fits(latencies_ms, ms):
    frontier = frontier_of(*latencies_ms)
    level, fits = frontier.level_for(ms)
    assert 0 <= level <= 1
    assert fits == (frontier.latency_ms_at(1.0) <= ms)
    if fits:
        assert frontier.latency_ms_at(level) <= ms * (1 + 1e-9)
        if level > 0:
            assert frontier.latency_ms_at(level - 1e-3 * level) >= ms * (1 - 1e-9)
    else:
        assert level == 1


@given(st.lists(milliseconds, min_size=1, max_size=12), milliseconds, milliseconds)
def test_more_time_never_tightens(latencies_ms, one_ms, other_ms):
    frontier = frontier_of(*latencies_ms)
    assert frontier.level_for(max(one_ms, other_ms))[0] <= frontier.level_for(min(one_ms, other_ms))[0]


@pytest.mark.parametrize(("level", "expected"), [(0, 10), (0.25, 8), (0.5, 6), (0.75, 5), (1, 4)])
def test_between_points_is_linear(level, expected):
    frontier = frontier_of(10, 6, 4)
    assert frontier.latency_ms_at(level) == pytest.approx(expected)
    assert frontier.predicted_ms_at(level) == pytest.approx(0.9 * expected)


def test_level_between_points():
    assert frontier_of(10, 6, 4).level_for(8) == (0.25, True)


def test_beyond_the_last_point_stays_as_there():
    frontier = Frontier((OperatingPoint(0, 2, 2, 0, 1), OperatingPoint(0.5, 1, 1, 0.5, 0.9)))
    assert frontier.latency_ms_at(0.8) == 1
    assert frontier.accuracy_at(1.0) == 0.9


@given(st.lists(milliseconds, min_size=1, max_size=12), st.text(max_size=20))
def test_json_round_trip(latencies_ms, machine):
    frontier = frontier_of(*latencies_ms, machine=machine)
    assert Frontier.from_json(frontier.to_json()) == frontier


def _without(key: str) -> str:
    content = json.loads(frontier_of(2, 1).to_json())
    del content[key]
    return json.dumps(content)


def _with(**changes: object) -> str:
    return json.dumps(json.loads(frontier_of(2, 1).to_json()) | changes)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param(frontier_of(2, 1).to_json()[:-9], id="truncated"),
        pytest.param("[1, 2]", id="list"),
        pytest.param("[" * 100_000, id="deep"),
        pytest.param(None, id="none"),
        pytest.param(_without("points"), id="no-points"),
        pytest.param(_without("machine"), id="no-machine"),
        pytest.param(_with(format=99), id="newer"),
        pytest.param(_with(points=[]), id="zero-points"),
        pytest.param(_with(points=3), id="points-number"),
        pytest.param(_with(points=[{"level": 0}]), id="half-a-point"),
        pytest.param(_with(points=["level"]), id="point-text"),
        pytest.param(_with(points=[{**json.loads(frontier_of(1).to_json())["points"][0], "latency_ms": "1"}]), id="text-latency"),
        pytest.param(_with(points=[{**json.loads(frontier_of(1).to_json())["points"][0], "latency_ms": float("nan")}]), id="nan"),
        pytest.param(_with(machine=3), id="machine-number"),
    ],
)
def test_damaged_json_is_refused(text):
    with pytest.raises(CheckpointError, match=r"(?i)calibrate"):
        Frontier.from_json(text)


@pytest.mark.parametrize(
    "values",
    [
        (-0.1, 1, 1, 0, 1),
        (1.1, 1, 1, 0, 1),
        (float("nan"), 1, 1, 0, 1),
        (0, 0, 1, 0, 1),
        (0, 1, -1, 0, 1),
        (0, 1, 1, 1.5, 1),
        (0, 1, 1, 0, float("inf")),
        (0, 1, None, 0, 1),
        (True, 1, 1, 0, 1),
    ],
    ids=str,
)
def test_operating_point_refuses(values):
    with pytest.raises(InputError):
        OperatingPoint(*values)


@pytest.mark.parametrize("levels", [(), (0.5, 1.0), (0.0, 0.5, 0.5)], ids=str)
def test_frontier_refuses(levels):
    with pytest.raises(InputError, match="level"):
        Frontier(tuple(OperatingPoint(level, 1, 1, 0, 1) for level in levels))


def test_table_has_a_line_per_point():
    assert frontier_of(10, 6.25, 4).table().splitlines()[2].split() == ["0.500", "5.625", "6.250", "0.250", "1.0000"]


def test_times_of_fewer_threads_are_kept_in_the_order_of_the_points():
    points = tuple(OperatingPoint(level, 1, 2 - level, level, 1.0) for level in (1.0, 0.0, 0.5))
    frontier = Frontier(points, "here", 4, ((2, (3.0, 5.0, 4.0)), (1, (6.0, 8.0, 9.0))))
    assert dict(frontier.fewer_threads) == {2: (5.0, 4.0, 3.0), 1: (8.5, 8.5, 6.0)}
    two = frontier.with_threads(2)
    assert [point.latency_ms for point in two.points] == [5.0, 4.0, 3.0] and two.num_threads == 2
    assert Frontier.from_json(frontier.to_json()) == frontier
    with pytest.raises(InputError, match="no times for 3 threads"):
        frontier.with_threads(3)


@pytest.mark.parametrize("fewer", [(1, (1.0,)), (0, (1.0, 1.0)), (True, (1.0, 1.0)), (1, (1.0, -1.0)), (1, (1.0, float("nan")))])
def test_wrong_times_of_fewer_threads_are_refused(fewer):
    with pytest.raises(InputError, match="threads"):
        Frontier((OperatingPoint(0, 1, 1, 0, 1), OperatingPoint(1, 1, 1, 0, 1)), "", 2, (fewer,))
