"""Statistics: what several calls, from several threads, add up to."""

from __future__ import annotations

import dataclasses
import math
import threading

import models
import numpy as np
import pytest
import torch

from dynprune.runtime.engine import Execution
from dynprune.runtime.model import DynamicModel
from dynprune.runtime.statistics import WINDOW, StatsRecorder, Totals

AB = Totals(50.0, ("a", "b"), np.array([2, 2]))


def add(
    recorder: StatsRecorder, totals: Totals = AB, *, ran=((2, 1), (0, 1)), latency_ms: float = 10.0, missed: bool = False, **changes
) -> None:
    rows = np.array(ran, np.int64)
    done = {"macs": 60.0, "predicted_ms": 0.0, "level": 0.5, "guard_actions": 0, "engine_ms": 1.0}
    recorder.add(totals, Execution(**(done | changes), batch=rows.shape[1], rows=rows.tobytes()), latency_ms, missed)


def summary(recorder: StatsRecorder):
    return recorder.summary(level=0.25, budget_ms=None)


def test_before_the_first_call() -> None:
    stats = summary(StatsRecorder())
    assert (stats.inferences, stats.samples, stats.skip_rate, stats.site_skip_rates) == (0, 0, 0.0, {})
    assert (stats.budget_misses, stats.guard_actions, stats.level, stats.budget_ms) == (0, 0, 0.25, None)
    assert all(map(math.isnan, dataclasses.astuple(stats.latency_ms)))


def test_calls_add_up_weighted_by_their_work() -> None:
    recorder = StatsRecorder()
    add(recorder)
    add(recorder, macs=10.0, ran=[[0], [2]], level=1.0, missed=True, guard_actions=3)
    stats = recorder.summary(level=0.0, budget_ms=7.0)
    assert (stats.inferences, stats.samples, stats.budget_misses, stats.guard_actions, stats.level) == (2, 3, 1, 3, 1.0)
    assert stats.skip_rate == pytest.approx(1 - 70 / 150)
    assert stats.site_skip_rates == pytest.approx({"a": 1 - 3 / 6, "b": 1 - 3 / 6})
    assert stats.budget_ms == 7.0


def test_sites_of_different_plans_add_up_by_name() -> None:
    recorder = StatsRecorder()
    add(recorder)
    add(recorder, Totals(50.0, ("b",), np.array([2])), ran=[[1, 3]])
    add(recorder, Totals(50.0, (), np.zeros(0, int)), ran=np.zeros((0, 1), int))
    assert summary(recorder).site_skip_rates == pytest.approx({"a": 1 / 4, "b": 3 / 8})


def test_percentiles_are_over_the_last_calls() -> None:
    recorder = StatsRecorder()
    for _ in range(100):
        add(recorder, latency_ms=1e6)
    for i in range(WINDOW):
        add(recorder, latency_ms=float(i))
    latency = summary(recorder).latency_ms
    assert (latency.p50, latency.p95) == pytest.approx(((WINDOW - 1) * 0.5, (WINDOW - 1) * 0.95))
    assert latency.p99 == pytest.approx((WINDOW - 1) * 0.99)


def test_reset_forgets_everything() -> None:
    recorder = StatsRecorder()
    add(recorder)
    recorder.reset()
    assert summary(recorder).inferences == 0 and summary(recorder).level == 0.25


def test_calls_of_many_threads_are_all_counted() -> None:
    recorder = StatsRecorder()
    threads = [threading.Thread(target=lambda: [add(recorder) for _ in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = summary(recorder)
    assert (stats.inferences, stats.samples) == (4000, 8000)
    assert stats.skip_rate == pytest.approx(0.4)


@pytest.fixture(scope="module")
def dm() -> DynamicModel:
    return DynamicModel(models.build("basic"), models.example("basic"))


def test_a_frozen_summary_of_the_model(dm) -> None:
    with torch.no_grad():
        dm(*models.example("basic", 3))
    stats = dm.stats()
    assert (stats.inferences, stats.samples, stats.skip_rate) == (1, 3, 0.0)
    assert 0 < stats.latency_ms.p50 <= stats.latency_ms.p95 <= stats.latency_ms.p99
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.inferences = 5
    dm.reset_stats()
    assert dm.stats().inferences == 0


@pytest.mark.parametrize("backend", ("engine", "hooked"))
def test_groups_inside_a_skipped_branch_count_as_skipped(dm, backend: str) -> None:
    inside = next(site for site in dm.sites if site.name == "1.conv1")
    lists = {"1": [[0], []], "1.conv1": [list(range(4)), list(range(inside.num_groups))]}
    dm.reset_stats()
    with torch.no_grad():
        dm.run_with_active(*models.example("basic", 2), active=lists, backend=backend)
    rates = dm.stats().site_skip_rates
    assert rates["1"] == 0.5
    assert rates["1.conv1"] == pytest.approx(1 - 4 / (2 * inside.num_groups))
    assert rates["2"] == rates["2.conv1"] == 0


def test_a_call_that_fails_is_not_counted(dm) -> None:
    dm.reset_stats()
    with torch.no_grad(), pytest.raises(ValueError, match="channels"):
        dm(torch.zeros(1, 5, 16, 16))
    assert dm.stats().inferences == 0
