"""The frontier of a calibrated model: what each level costs and keeps, on the machine where it was measured."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from dynprune.errors import CheckpointError, DynpruneError, InputError

_FORMAT = 1


@dataclass(frozen=True)
class OperatingPoint:
    """One row of a frontier: what inference at `level` costs and keeps.

    Attributes:
        level: how tight the gates are, in [0, 1].
        predicted_ms: mean over the calibration inputs of the cost table's prediction, > 0.
        latency_ms: median measured on an otherwise idle machine, > 0.
        skip_rate: share of the model's multiply-adds not executed, in [0, 1].
        accuracy: value of the calibration metric, or agreement with level 0 where there was none; higher is better.

    Raises:
        InputError: a value is not a finite number or outside its range.
    """

    level: float
    predicted_ms: float
    latency_ms: float
    skip_rate: float
    accuracy: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise InputError(f"`{field.name}` of an operating point must be a finite number, got {value!r}.")
            object.__setattr__(self, field.name, float(value))
        for name in ("level", "skip_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"`{name}` of an operating point must lie in [0, 1], got {getattr(self, name)!r}.")
        for name in ("predicted_ms", "latency_ms"):
            if getattr(self, name) <= 0:
                raise InputError(f"`{name}` of an operating point must be > 0, got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class Frontier:
    """The operating points of a model on one machine, by ascending level from 0, with times that never rise with the level.

    Measured times are noisy, so neighbours in the wrong order are replaced by their mean (pool adjacent violators, the least-squares
    monotone fit). Between points everything is interpolated linearly, beyond the last point it stays as there.

    Args:
        points: in any order, at least one, one of them at level 0, no level twice.
        machine: words that identify the machine and threads of the measurement; default "" means not known.
        num_threads: threads that the points were measured with; None where not known.
        fewer_threads: (threads, latency_ms of each point) of other numbers of threads, so that a controller can choose; default none.

    Raises:
        InputError: no point, no point at level 0, a level given twice, or times for fewer threads that do not fit the points.
    """

    points: tuple[OperatingPoint, ...]
    machine: str = ""
    num_threads: int | None = None
    fewer_threads: tuple[tuple[int, tuple[float, ...]], ...] = ()

    def __post_init__(self) -> None:
        order = sorted(range(len(self.points)), key=lambda i: self.points[i].level)
        points = [self.points[i] for i in order]
        levels = [point.level for point in points]
        if not points or levels[0] != 0:
            raise InputError(f"A frontier needs an operating point at level 0, got levels {levels}.")
        if len(set(levels)) < len(levels):
            raise InputError(f"A frontier takes each level once, got levels {levels}.")
        latencies = _non_increasing([point.latency_ms for point in points])
        predictions = _non_increasing([point.predicted_ms for point in points])
        fewer = tuple((_thread_count(count), _times(times, order)) for count, times in self.fewer_threads)
        object.__setattr__(self, "fewer_threads", fewer)
        object.__setattr__(self, "num_threads", None if self.num_threads is None else _thread_count(self.num_threads))
        object.__setattr__(
            self,
            "points",
            tuple(
                dataclasses.replace(point, latency_ms=latency_ms, predicted_ms=predicted_ms)
                for point, latency_ms, predicted_ms in zip(points, latencies, predictions, strict=True)
            ),
        )

    @cached_property
    def _levels(self) -> list[float]:
        return [point.level for point in self.points]

    @cached_property
    def _negated_ms(self) -> list[float]:
        return [-point.latency_ms for point in self.points]

    def level_for(self, ms: float) -> tuple[float, bool]:
        """Returns the lowest level whose `latency_ms` is at most `ms`, and True; or (1.0, False) where no level is that fast."""
        after = bisect_left(self._negated_ms, -ms)
        if after == len(self.points):
            return 1.0, False
        if after == 0:
            return 0.0, True
        slow, fast = self.points[after - 1], self.points[after]
        share = (slow.latency_ms - ms) / (slow.latency_ms - fast.latency_ms)
        return slow.level + share * (fast.level - slow.level), True

    def latency_ms_at(self, level: float) -> float:
        """Returns the median latency on an idle machine at `level`, in milliseconds."""
        return self._at(level, "latency_ms")

    def predicted_ms_at(self, level: float) -> float:
        """Returns the mean of the cost table's prediction at `level`, in milliseconds."""
        return self._at(level, "predicted_ms")

    def accuracy_at(self, level: float) -> float:
        """Returns the accuracy expected at `level`, in the metric's unit."""
        return self._at(level, "accuracy")

    def _at(self, level: float, name: str) -> float:
        after = bisect_right(self._levels, level)
        low, high = self.points[max(after - 1, 0)], self.points[min(after, len(self.points) - 1)]
        if high.level <= low.level:
            return getattr(low, name)
        share = (level - low.level) / (high.level - low.level)
        return getattr(low, name) + share * (getattr(high, name) - getattr(low, name))

    def with_threads(self, num_threads: int) -> Frontier:
        """Returns the frontier with the times measured at so many threads in place of the points' own.

        Raises:
            InputError: nothing was measured at that number.
        """
        times = dict(self.fewer_threads).get(num_threads)
        if times is None:
            known = [count for count, _ in self.fewer_threads]
            raise InputError(f"This frontier has no times for {num_threads} threads, only for {known}.")
        points = tuple(dataclasses.replace(point, latency_ms=ms) for point, ms in zip(self.points, times, strict=True))
        return Frontier(points, self.machine, num_threads)

    def to_json(self) -> str:
        """Returns the frontier as JSON text that `from_json` reads."""
        points = [dataclasses.asdict(point) for point in self.points]
        content = {"format": _FORMAT, "machine": self.machine, "num_threads": self.num_threads, "fewer_threads": self.fewer_threads}
        return json.dumps({**content, "points": points}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Frontier:
        """Returns the frontier that `to_json` wrote.

        Raises:
            CheckpointError: the text is damaged, of another kind, or of a newer version.
        """
        try:
            content = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"A saved frontier must be JSON text, but it does not parse ({error}); calibrate again.") from error
        if not isinstance(content, dict) or not {"format", "machine", "points"} <= content.keys():
            raise CheckpointError("A saved frontier must be an object with 'format', 'machine' and 'points'; calibrate again.")
        if content["format"] != _FORMAT:
            raise CheckpointError(f"Expected a frontier of format {_FORMAT}, got {content['format']!r}; update dynprune or calibrate.")
        try:
            if not isinstance(content["machine"], str):
                raise InputError(f"`machine` must be text, got {content['machine']!r}.")
            points = tuple(OperatingPoint(**point) for point in content["points"])
            fewer = tuple((count, tuple(times)) for count, times in content.get("fewer_threads", ()))
            return cls(points, content["machine"], content.get("num_threads"), fewer)
        except (DynpruneError, TypeError, ValueError) as error:
            raise CheckpointError(f"A saved frontier is damaged: {error} Calibrate again.") from error

    def table(self) -> str:
        """Returns the frontier as text, one line per operating point."""
        head = f"{'level':>6} {'predicted ms':>13} {'latency ms':>11} {'skip rate':>10} {'accuracy':>9}"
        rows = (
            f"{point.level:6.3f} {point.predicted_ms:13.3f} {point.latency_ms:11.3f} {point.skip_rate:10.3f} {point.accuracy:9.4f}"
            for point in self.points
        )
        return "\n".join((head, *rows))


def _thread_count(count: object) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"A number of threads of a frontier must be an int >= 1, got {count!r}.")
    return count


def _times(times: Sequence[float], order: Sequence[int]) -> tuple[float, ...]:
    """Returns the times in the order of the sorted points, never rising."""
    if len(times) != len(order) or not all(isinstance(ms, numbers.Real) and math.isfinite(ms) and ms > 0 for ms in times):
        raise InputError(f"Times for fewer threads must be one finite number > 0 per point, got {times!r} for {len(order)} points.")
    return tuple(_non_increasing([float(times[i]) for i in order]))


def _non_increasing(values: Iterable[float]) -> Sequence[float]:
    """Returns the non-increasing sequence nearest to `values` in squares: rising neighbours are pooled to their mean."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] < mean:
            previous_mean, previous_count = pools.pop()
            mean = (mean * count + previous_mean * previous_count) / (count + previous_count)
            count += previous_count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]
