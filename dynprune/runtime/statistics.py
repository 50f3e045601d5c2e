"""Counts what a model's inferences executed and how long they took."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dynprune.runtime.engine import Execution
from dynprune.timing import percentiles

WINDOW = 10_000
"""Latency percentiles are over at most this many of the last calls."""
_MAX_PENDING = 64
"""This many calls are added up at once, their rows in one operation: call by call it would take ten times as long."""


@dataclass(frozen=True)
class LatencyPercentiles:
    """Milliseconds of a call; NaN before the first."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, eq=False)
class Totals:
    """Multiply-adds of one sample of the whole model, and the names and rows of the plan's sites."""

    macs: float
    sites: tuple[str, ...]
    rows: np.ndarray


class LastCall(NamedTuple):
    """How the last call on the engine ran.

    Attributes:
        level: where it began.
        end_level: where the deadline left it.
        threads: of the call.
        engine_ms: how much of its time passed in the engine's steps; the rest is Python and PyTorch.
    """

    level: float
    end_level: float
    threads: int
    engine_ms: float


@dataclass(frozen=True)
class Stats:
    """What a `DynamicModel` did since it was made or `reset_stats()` was called.

    Attributes:
        inferences: calls.
        samples: inputs in all calls together.
        skip_rate: share of the model's multiply-adds not executed, over all samples; those of the gates count on neither side. A call
            that PyTorch runs but for parts counts as many as the captured one in proportion to its length, dimension 1 of its first tensor.
        site_skip_rates: by site name, the share of its groups (for a branch: of the samples) that did not run; by "inputs of " and the
            name of a layer, the share of inputs that it left out of single tokens.
        latency_ms: percentiles over the last 10,000 calls.
        budget_ms: the budget now, or None.
        budget_misses: calls that took longer than the budget or deadline they ran under.
        guard_actions: how often a gate raised the level inside a call to meet the deadline.
        guarded_calls: calls in which that happened.
        guard_level_raise: by how much the level rose in those calls, on average; 0 where there were none.
        guard_accuracy_cost: expected accuracy at the level where those calls began less that where they ended, on average, in the unit of
            the frontier's accuracy: what the guard cost at most, as part of each call had run before; 0 where there were none.
        level: of the last call at its end; before the first the level now set.
    """

    inferences: int
    samples: int
    skip_rate: float
    site_skip_rates: dict[str, float]
    latency_ms: LatencyPercentiles
    budget_ms: float | None
    budget_misses: int
    guard_actions: int
    guarded_calls: int
    guard_level_raise: float
    guard_accuracy_cost: float
    level: float


class StatsRecorder:
    """Adds up calls, from any thread.

    Args:
        num_threads: what `last_call` gives before the first call.

    Attributes:
        last: the level where the last call began, what it executed (None before the first) and its threads, for `last_call`; set by
            whoever runs calls. `reset` leaves it.
    """

    def __init__(self, num_threads: int = 1) -> None:
        self._lock = threading.Lock()
        self.last: tuple[float, Execution | None, int] = (0.0, None, num_threads)
        self.reset()

    @property
    def last_call(self) -> LastCall:
        """How the last call ran."""
        level, done, threads = self.last
        return LastCall(level, 0.0, threads, 0.0) if done is None else LastCall(level, done.level, threads, done.engine_ms)

    def reset(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._inferences = self._samples = self._misses = self._guard_actions = self._guarded_calls = 0
            self._level_raise = self._accuracy_cost = 0.0
            self._macs = self._all_macs = 0.0
            self._rows: dict[tuple[str, ...], np.ndarray] = {}
            self._pending: list[tuple[Totals, Execution, float, bool]] = []
            self._latencies_ms: deque[float] = deque(maxlen=WINDOW)
            self._level: float | None = None

    def add(self, totals: Totals, done: Execution, latency_ms: float, missed: bool) -> None:
        """Counts one call.

        Args:
            totals: of the plan that ran.
            done: what it executed.
            latency_ms: of the call.
            missed: whether it took longer than its budget.
        """
        self._pending.append((totals, done, latency_ms, missed))
        if len(self._pending) >= _MAX_PENDING:
            with self._lock:
                self._add_up()

    def add_parts(
        self,
        parts: Sequence[tuple[Totals, np.ndarray]],
        *,
        samples: int,
        latency_ms: float,
        macs: float,
        all_macs: float,
        level: float,
        missed: bool,
    ) -> None:
        """Counts one call of which only parts ran on the engine.

        Args:
            parts: of each its totals and what ran of its sites, as for `add`.
            all_macs: multiply-adds of the whole call for the batch.
            samples, latency_ms, macs, level, missed: as for `add`.
        """
        with self._lock:
            self._add_up()
            self._inferences += 1
            self._samples += samples
            self._misses += missed
            self._macs += macs
            self._all_macs += all_macs
            self._latencies_ms.append(latency_ms)
            self._level = level
            for totals, ran in parts:
                self._add_rows(totals, ran.sum(1), ran.shape[1])

    def _add_up(self) -> None:
        pending = self._pending[:]
        del self._pending[: len(pending)]  # calls of other threads append meanwhile
        groups: defaultdict[tuple[Totals, int], list[Execution]] = defaultdict(list)
        for totals, done, latency_ms, missed in pending:
            groups[totals, done.batch].append(done)
            self._latencies_ms.append(latency_ms)
            self._misses += missed
            self._level = done.level
        for (totals, batch), calls in groups.items():
            columns = Execution(*zip(*calls, strict=True))
            samples = len(calls) * batch
            self._inferences += len(calls)
            self._samples += samples
            self._macs += sum(columns.macs)
            self._all_macs += totals.macs * samples
            self._guard_actions += sum(columns.guard_actions)
            self._add_rows(totals, np.frombuffer(b"".join(columns.rows), np.int64).reshape(len(calls), -1, batch).sum((0, 2)), samples)

    def _add_rows(self, totals: Totals, rows: np.ndarray, samples: int) -> None:
        self._rows[totals.sites] = self._rows.get(totals.sites, 0) + np.stack((rows, totals.rows * samples))

    def add_guarded(self, level_raise: float, accuracy_cost: float) -> None:
        """Counts one call whose level the deadline raised, and the accuracy expected to be lost by it at most."""
        with self._lock:
            self._guarded_calls += 1
            self._level_raise += level_raise
            self._accuracy_cost += accuracy_cost

    def summary(self, *, level: float, budget_ms: float | None) -> Stats:
        """Returns the statistics so far; `level` stands in before the first call."""
        with self._lock:
            self._add_up()
            latencies = list(self._latencies_ms)
            rows: dict[str, np.ndarray] = {}
            for names, table in self._rows.items():
                for name, column in zip(names, table.T, strict=True):
                    rows[name] = rows.get(name, 0) + column
            return Stats(
                inferences=self._inferences,
                samples=self._samples,
                skip_rate=1.0 - self._macs / self._all_macs if self._all_macs else 0.0,
                site_skip_rates={name: 1.0 - float(ran / could) for name, (ran, could) in rows.items()},
                latency_ms=LatencyPercentiles(*(percentiles(latencies) if latencies else [float("nan")] * 3)),
                budget_ms=budget_ms,
                budget_misses=self._misses,
                guard_actions=self._guard_actions,
                guarded_calls=self._guarded_calls,
                guard_level_raise=self._level_raise / max(1, self._guarded_calls),
                guard_accuracy_cost=self._accuracy_cost / max(1, self._guarded_calls),
                level=level if self._level is None else self._level,
            )
