"""Counts what a model's inferences executed and how long they took."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dynprune.timing import percentiles

WINDOW = 10_000
"""Latency percentiles are over at most this many of the last calls."""


@dataclass(frozen=True)
class LatencyPercentiles:
    """Milliseconds of a call; NaN before the first."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Stats:
    """What a `DynamicModel` did since it was made or `reset_stats()` was called.

    Attributes:
        inferences: calls.
        samples: inputs in all calls together.
        skip_rate: share of the model's multiply-adds not executed, over all samples; gates' own included in the model's.
        site_skip_rates: by site name, the share of its groups (for a branch: of the samples) that did not run.
        latency_ms: percentiles over the last 10,000 calls.
        budget_ms: the budget now, or None.
        budget_misses: calls that took longer than the budget they ran under.
        guard_actions: how often a gate raised the level inside a call to meet the deadline.
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
    level: float


class StatsRecorder:
    """Adds up calls, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._inferences = self._samples = self._misses = self._guard_actions = 0
            self._macs = self._all_macs = 0.0
            self._ran: dict[str, float] = {}
            self._could_run: dict[str, float] = {}
            self._latencies_ms: deque[float] = deque(maxlen=WINDOW)
            self._level: float | None = None

    def add(
        self,
        *,
        samples: int,
        latency_ms: float,
        macs: float,
        all_macs: float,
        rows: Mapping[str, tuple[float, float]],
        level: float,
        missed: bool,
        guard_actions: int,
    ) -> None:
        """Counts one call.

        Args:
            samples: in the call's batch.
            latency_ms: of the call.
            macs, all_macs: multiply-adds executed, and of the whole model, for the batch.
            rows: by site name, how many rows ran in the batch and how many there were.
            level: at the end of the call.
            missed: whether it took longer than its budget.
            guard_actions: how often the deadline raised the level.
        """
        with self._lock:
            self._inferences += 1
            self._samples += samples
            self._misses += missed
            self._guard_actions += guard_actions
            self._macs += macs
            self._all_macs += all_macs
            self._latencies_ms.append(latency_ms)
            self._level = level
            for name, (ran, total) in rows.items():
                self._ran[name] = self._ran.get(name, 0.0) + ran
                self._could_run[name] = self._could_run.get(name, 0.0) + total

    def summary(self, *, level: float, budget_ms: float | None) -> Stats:
        """Returns the statistics so far; `level` stands in before the first call."""
        with self._lock:
            latencies = list(self._latencies_ms)
            return Stats(
                inferences=self._inferences,
                samples=self._samples,
                skip_rate=1.0 - self._macs / self._all_macs if self._all_macs else 0.0,
                site_skip_rates={name: 1.0 - self._ran[name] / total for name, total in self._could_run.items() if total},
                latency_ms=LatencyPercentiles(*(percentiles(latencies) if latencies else [float("nan")] * 3)),
                budget_ms=budget_ms,
                budget_misses=self._misses,
                guard_actions=self._guard_actions,
                level=level if self._level is None else self._level,
            )


def rows_of_sites(names: list[str], totals: np.ndarray, counts: np.ndarray) -> dict[str, tuple[float, float]]:
    """Returns by site name how many rows ran in a batch and how many there were; `counts` is (sites, batch), `totals` (sites,)."""
    ran = counts.sum(1).tolist()
    could = (totals * counts.shape[1]).tolist()
    return dict(zip(names, zip(ran, could)))
