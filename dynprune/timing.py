"""The one clock of the project: times functions, alone or interleaved with their rivals, and says when the machine was noisy."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynprune.errors import InputError

NOISY_ABOVE = 0.1
"""A measurement whose interquartile range is more than this share of its median is called noisy."""


@dataclass(frozen=True)
class Measurement:
    """How long the runs of one function took.

    Attributes:
        median_ms: the middle run.
        iqr_ms: interquartile range, the 75th less the 25th percentile.
        p95_ms: the 95th percentile.
        runs: how many runs were timed, warm-up left out.
        noisy: whether `iqr_ms / median_ms` is above 0.1, so that the median should be measured again on a quieter machine.
    """

    median_ms: float
    iqr_ms: float
    p95_ms: float
    runs: int
    noisy: bool

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Measurement:
        """Returns the summary of at least one run, each in milliseconds."""
        low, median, high, p95 = percentiles(times_ms, (25, 50, 75, 95))
        return cls(median, high - low, p95, len(times_ms), high - low > NOISY_ABOVE * median)


def percentiles(values: Iterable[float], points: Sequence[float] = (50, 95, 99)) -> list[float]:
    """Returns the percentiles of `values` at `points`, interpolating linearly between neighbours.

    Args:
        values: at least one number, in any order and unit.
        points: percentages in [0, 100]; default median, 95th and 99th.

    Raises:
        InputError: `values` is empty, or a point lies outside [0, 100].
    """
    ordered = sorted(values)
    if not ordered:
        raise InputError("`values` must hold at least one number to have percentiles, got none.")
    return [_percentile(ordered, point) for point in points]


def _percentile(ordered: Sequence[float], point: float) -> float:
    if not 0 <= point <= 100:
        raise InputError(f"A percentile must lie in [0, 100], got {point!r}.")
    position = (len(ordered) - 1) * point / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def measure(fn: Callable[[], Any], *, min_seconds: float = 0.2, min_runs: int = 5, warmup: int = 2) -> Measurement:
    """Returns how long `fn()` takes, run after run, until both minima are reached.

    Garbage collection waits meanwhile, as a collection would be charged to whichever run it falls into.

    Args:
        fn: called without arguments; its result is dropped.
        min_seconds: time to spend on timed runs at least, in seconds.
        min_runs: number of timed runs at least, >= 1.
        warmup: calls before the first timed one.

    Raises:
        InputError: `min_runs` < 1, or a negative number.
    """
    if min_runs < 1 or min_seconds < 0 or warmup < 0:
        got = f"min_runs={min_runs}, min_seconds={min_seconds}, warmup={warmup}"
        raise InputError(f"measure needs min_runs >= 1, min_seconds >= 0 and warmup >= 0, got {got}.")
    with _collection_paused():
        for _ in range(warmup):
            fn()
        return Measurement.of(_timed_runs(fn, min_seconds, min_runs))


def measure_interleaved(
    functions: Mapping[str, Callable[[], Any]], *, seconds: float, block_seconds: float = 0.25, pause_seconds: float = 0.05
) -> dict[str, Measurement]:
    """Returns how long each function takes, measured in turns so that a change of the machine's speed hits all alike.

    The functions take turns in blocks. The first call of a block is not counted, and a pause stands between blocks: the threads of
    the previous function may spin on for a while and would take the cores of the next one.

    Args:
        functions: name to function, called without arguments.
        seconds: time to spend on timed runs of *each* function, in seconds; at least one block of each is run.
        block_seconds: length of one block, in seconds; a block holds at least one timed run.
        pause_seconds: pause between blocks, in seconds.

    Raises:
        InputError: no function was given, or a duration is not positive (`pause_seconds` may be 0).

    Example:
        >>> both = measure_interleaved({"ours": lambda: sum(range(100)), "theirs": lambda: sum(range(200))}, seconds=0.5)
        >>> ratio = both["theirs"].median_ms / both["ours"].median_ms
    """
    if not functions:
        raise InputError("measure_interleaved needs at least one function, got none.")
    if not (seconds > 0 and block_seconds > 0 and pause_seconds >= 0):
        raise InputError(
            f"Durations must be > 0, got seconds={seconds!r}, block_seconds={block_seconds!r}, pause_seconds={pause_seconds!r}."
        )
    block_seconds = min(block_seconds, seconds)
    times_ms: dict[str, list[float]] = {name: [] for name in functions}
    with _collection_paused():
        for _ in range(math.ceil(seconds / block_seconds)):
            for name, fn in functions.items():
                time.sleep(pause_seconds)
                fn()
                times_ms[name] += _timed_runs(fn, block_seconds, min_runs=1)
    return {name: Measurement.of(times) for name, times in times_ms.items()}


def _timed_runs(fn: Callable[[], Any], min_seconds: float, min_runs: int) -> list[float]:
    """Returns the milliseconds of each run, of at least `min_runs` runs and `min_seconds` in all."""
    times_ms: list[float] = []
    clock = time.perf_counter_ns
    begin = end = clock()
    while len(times_ms) < min_runs or end - begin < min_seconds * 1e9:
        start = clock()
        fn()
        end = clock()
        times_ms.append((end - start) / 1e6)
    return times_ms


@contextlib.contextmanager
def _collection_paused() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
