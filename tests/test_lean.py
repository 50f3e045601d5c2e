"""A model under pressure: lean running keeps the outputs, spends less memory, and comes and goes with the monitor's samples."""

from __future__ import annotations

import threading
import time

import models
import pytest
import torch
from test_executor import give_costs, wide_input, wide_model

from dynprune.control.monitor import ResourceMonitor
from dynprune.control.pressure import PressurePolicy, ResourceSample
from dynprune.errors import InputError
from dynprune.runtime import governed
from dynprune.runtime.model import DynamicModel


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def dm() -> DynamicModel:
    return DynamicModel(wide_model(), wide_input())


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.allclose(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("batch", [1, 3])
def test_lean_outputs_are_the_same(dm, batch):
    x = wide_input(batch)
    whole = dm(x)
    lists = {site.name: [list(range(0, site.num_groups, 2))] * batch for site in dm.sites if site.kind == "channels"}
    gated = dm.run_with_active(x, active=lists)
    dm.set_lean(True)
    assert dm.lean
    assert close(dm(x), whole)
    assert close(dm.run_with_active(x, active=lists), gated)
    assert dm.stats().inferences == 4
    dm.set_lean(False)
    assert not dm.lean and torch.equal(dm(x), whole)


def test_lean_engines_run_samples_one_by_one_in_one_workspace(dm):
    dm.set_lean(True)
    x = wide_input(4)
    want = dm(x)
    engine = dm.engine_for(x)
    outputs, done = engine.run([x])
    assert done.counts.shape[1] == 4 and torch.equal(outputs[0], want)
    results = [None] * 4

    def call(i: int) -> None:
        with torch.no_grad():
            results[i] = dm(x)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, want) for result in results)


def test_other_shapes_give_their_plans_back_and_come_again(dm):
    small = torch.randn(1, 3, 32, 32)
    want_small, want = dm(small), dm(wide_input())
    dm.set_lean(True)
    sessions = sorted(dm._sessions.values(), key=lambda session: session.last_used_ns)
    assert sessions[0]._plan is None and sessions[1]._plan is not None
    assert close(dm(small), want_small) and close(dm(wide_input()), want)
    assert dm(torch.randn(1, 3, 40, 40)).shape == want.shape, "a shape first seen while lean"


def test_a_lean_choice_outlives_new_gates_and_copies_are_not_lean(dm):
    dm.set_lean(True)
    give_costs(dm, ms_per_step=0.1)
    assert dm.lean and dm.engine_for(wide_input())._max_group == 1


class Reported(ResourceMonitor):
    """A monitor without a thread or sources: `report` is all it sees."""

    def start(self):
        return self

    def sample(self) -> ResourceSample:
        return self.last

    last = ResourceSample()

    def report(self, **figures) -> None:
        self.last = ResourceSample(**figures)
        for owner, listener in list(self._listeners.items()):
            listener(owner, self.last)


def test_memory_pressure_acts_on_memory_first_and_then_on_the_level(dm, monkeypatch):
    monitor = Reported()
    give_costs(dm, ms_per_step=0.1)
    dm.attach_monitor(monitor)
    dm.attach_monitor(monitor)
    dm(wide_input())
    monitor.report(memory_pressure=0.82)
    dm(wide_input())
    assert dm.lean and dm.last_call.level == 0
    monitor.report(memory_pressure=0.98)
    dm(wide_input())
    assert dm.lean and dm.last_call.level == 1
    monitor.report(memory_pressure=0.75)
    assert dm.lean, "within the band"
    monitor.report(memory_pressure=0.5)
    assert dm.lean, "calm for too short a time"
    monkeypatch.setattr(governed, "_CALM_NS", 0)
    time.sleep(0.001)
    monitor.report(memory_pressure=0.5)
    assert not dm.lean
    dm.attach_monitor(None)
    monitor.report(memory_pressure=1.0)
    assert not dm.lean, "detached"


def test_a_lean_model_at_rest_lets_go_of_its_workspaces(dm, monkeypatch):
    monitor = Reported()
    dm.attach_monitor(monitor)
    want = dm(wide_input())
    monitor.report(memory_pressure=0.82)
    monkeypatch.setattr(governed, "_CALM_NS", 0)
    time.sleep(0.001)
    monitor.report(memory_pressure=0.82)
    assert close(dm(wide_input()), want)


def test_the_policy_can_turn_lean_running_off(dm):
    monitor = Reported()
    dm.attach_monitor(monitor)
    dm.set_pressure_policy(PressurePolicy(memory_lean=1))
    monitor.report(memory_pressure=1.0)
    assert not dm.lean
    for wrong in (-0.1, 1.1, float("nan"), "0.8", None):
        with pytest.raises(InputError, match="memory_lean"):
            PressurePolicy(memory_lean=wrong)


def test_threads_follow_the_quota_unless_they_were_given():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        free, given = (DynamicModel(models.build("basic"), models.example("basic")) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    given.set_num_threads(2)
    monitor = Reported()
    for dm in (free, given):
        give_costs(dm, ms_per_step=0.1)
        dm.set_latency_budget(ms=1e6)
        dm.attach_monitor(monitor)
    monitor.report(quota_cores=1.5)
    for dm, threads in ((free, 1), (given, 2)):
        dm(*models.example("basic"))
        assert dm.num_threads == threads and dm.last_call.threads == threads


def test_a_model_goes_on_after_its_monitor_is_stopped(dm):
    monitor = ResourceMonitor(interval_s=0.01)
    dm.set_pressure_policy(PressurePolicy(cpu_start=1, memory_start=1, memory_lean=1))
    dm.attach_monitor(monitor)
    want = dm(wide_input())
    monitor.stop()
    time.sleep(0.02)
    assert torch.equal(dm(wide_input()), want)
    assert dm.stats().inferences == 2


def test_stats_tell_what_the_guard_cost(dm):
    give_costs(dm, ms_per_step=1e6)
    frontier = dm.frontier
    fast = type(frontier)(tuple(type(point)(point.level, 1e-3, 1e-3, point.skip_rate, point.accuracy) for point in frontier.points))
    dm.set_frontier(fast, dm.costs)  # expects no trouble, so that the level begins at 0 and the guard has to act
    dm(wide_input(), deadline=time.monotonic() + 3600)
    stats = dm.stats()
    assert stats.guarded_calls == 1 and stats.guard_actions >= 1
    assert stats.guard_level_raise == pytest.approx(dm.last_call.end_level)
    assert 0 < stats.guard_accuracy_cost <= 0.5
    dm.reset_stats()
    assert dm.stats().guarded_calls == 0 and dm.stats().guard_level_raise == 0 and dm.stats().guard_accuracy_cost == 0
