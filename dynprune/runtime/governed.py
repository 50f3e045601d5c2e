"""How a model is governed: the level, the latency budget, deadlines, pressures, threads and memory that its calls run under."""

from __future__ import annotations

import threading
import time
import warnings
from typing import Any

import torch
from torch import nn

from dynprune.control.checks import check_level, check_percentile
from dynprune.control.controller import LatencyController
from dynprune.control.frontier import Frontier
from dynprune.control.monitor import ResourceMonitor
from dynprune.control.pressure import PressurePolicy, ResourceSample
from dynprune.control.sources import allowed_cores, thread_cap
from dynprune.errors import CalibrationError, InputError
from dynprune.gates.heads import Gate
from dynprune.runtime.costs import CostTable
from dynprune.runtime.engine import choose_isa
from dynprune.runtime.islands import Islands
from dynprune.runtime.profile import machine_name
from dynprune.runtime.reclaim import return_freed_memory
from dynprune.runtime.session import Session

_CALM_NS = 10_000_000_000
"""A model runs lean for this long after the last memory pressure; lean, it keeps the plan of a shape so long after its last call."""


class Governed(nn.Module):
    """The part of `DynamicModel` that decides how its calls run; see there.

    Attributes:
        frontier: what calibration found about levels; None before.
        costs: the measured times of the plan's steps; None before calibration.
    """

    def __init__(self):
        super().__init__()
        self.frontier: Frontier | None = None
        self.costs: CostTable | None = None
        self._level = 0.0
        self._controller: LatencyController | None = None
        self._deadlines: LatencyController | None = None
        self._monitor: ResourceMonitor | None = None
        self._policy = PressurePolicy()
        self._threads_given = False
        self._num_threads = min(torch.get_num_threads(), thread_cap())
        self._lean = False
        self._strained_ns = 0
        self._lock = threading.RLock()
        self._sessions: dict[Any, Session] = {}
        self._islands: Islands | None = None
        self._gate_of: dict[str, Gate] = {}
        self._warned: set[str] = set()

    @property
    def level(self) -> float:
        """How tight the gates are, from 0 (everything runs) to 1; under a latency budget the one that the controller uses now."""
        controller = self._controller
        return self._level if controller is None else controller.level

    @level.setter
    def level(self, level: float) -> None:
        level = check_level(level)
        if self._controller is not None:
            raise InputError("A latency budget picks the level; call set_latency_budget(None) before setting `level`.")
        self._level = level

    def set_latency_budget(self, ms: float | None = None, percentile: float = 95) -> None:
        """Keeps `percentile` percent of the calls within `ms` milliseconds from the next call on; None ends the budget.

        A budget that no level can meet is accepted: the model runs at the fastest level, says so once, and `stats()` counts the misses.

        Raises:
            InputError: `ms` is not a number > 0, or `percentile` is not inside (0, 100).
            CalibrationError: the model has no frontier yet.
        """
        if ms is None:
            self._controller = None
            return
        if self.frontier is None:
            raise CalibrationError("A latency budget needs to know what each level costs; call calibrate(dm, data) first.")
        percentile = check_percentile(percentile)
        if self._controller is None:
            self._controller = self._new_controller(ms, percentile)
        else:
            self._controller.set_budget(ms, percentile=percentile)
        self._warned.discard("budget")

    def attach_monitor(self, monitor: ResourceMonitor | None) -> None:
        """Lets `monitor` act on this model, and starts it; None detaches. Attaching the same one again changes nothing.

        CPU load tightens the gates and caps the threads at the container's quota. Memory pressure makes the model `lean` first, then
        tightens the gates; see `set_pressure_policy`.
        """
        if monitor is not None and not isinstance(monitor, ResourceMonitor):
            raise InputError(f"`monitor` must be a ResourceMonitor or None, got {type(monitor).__name__}.")
        if self._monitor is not None and monitor is not self._monitor:
            self._monitor.unsubscribe(self._on_sample)
        self._monitor = monitor
        if monitor is not None:
            monitor.subscribe(self._on_sample)
            monitor.start()

    def set_pressure_policy(self, policy: PressurePolicy) -> None:
        """Sets what the pressures that the monitor reports do to the model: level floors, and from when on it runs lean."""
        if not isinstance(policy, PressurePolicy):
            raise InputError(f"`policy` must be a PressurePolicy, got {type(policy).__name__}.")
        self._policy = policy

    def set_num_threads(self, num_threads: int) -> None:
        """Runs later calls on `num_threads` threads at most.

        The default is `torch.get_num_threads()`, but no more than the whole cores that affinity and the container's CPU quota allow, also
        where a monitor sees that these change: with more, the quota is used up early and all wait. Under a latency budget fewer may run.
        """
        if isinstance(num_threads, bool) or not isinstance(num_threads, int) or num_threads < 1:
            raise InputError(f"`num_threads` must be an int >= 1, got {num_threads!r}.")
        self._threads_given = True
        self._use_threads(num_threads)
        self._refresh_sessions(weights=False)

    @property
    def num_threads(self) -> int:
        """Threads of one call; under a latency budget the most, see `last_call`."""
        return self._num_threads

    @property
    def lean(self) -> bool:
        """Whether the model runs with as little memory as it can; a monitor sets it under memory pressure."""
        return self._lean

    def set_lean(self, lean: bool) -> None:
        """Makes the model run with as little memory as it can, or ends that; outputs stay the same up to rounding.

        Lean, repacked weights are dropped (3x3 convolutions run without Winograd's algorithm: a ResNet-50 takes some 1.4 times as long), so
        are plans and workspaces of other input shapes and idle ones; batches run one sample at a time and concurrent calls take turns.
        Calls go on meanwhile on what is there until the new engine is built.
        """
        with self._lock:
            self._lean = bool(lean)
            newest = max(self._sessions.values(), key=lambda session: session.last_used_ns, default=None)
            for session in self._sessions.values():
                if lean and session is not newest:
                    session.refresh(weights=True)
                session.set_lean(self._lean, self._gate_of, costs=self.costs, num_threads=self._num_threads)
        return_freed_memory()

    def set_frontier(self, frontier: Frontier, costs: CostTable | None) -> None:
        """Takes what a calibration found; the next call uses it."""
        self.frontier, self.costs = frontier, costs
        self._deadlines = None
        if self._controller is not None:
            budget_ms, percentile = self._controller.budget_ms, self._controller.percentile
            self._controller = self._new_controller(budget_ms, percentile)
        self._refresh_sessions(weights=False)

    @property
    def measured_here(self) -> bool:
        """Whether the frontier's times were measured on a machine of this name, for as many threads as are used now."""
        frontier = self.frontier
        if frontier is None:
            return False
        counts = {frontier.num_threads, *(count for count, _ in frontier.fewer_threads)}
        return frontier.machine == machine_name(choose_isa()) and self._num_threads in counts

    def remeasure(self, *inputs: Any) -> Frontier:
        """Measures the times of the calibrated model again on this machine, in some seconds, and returns the new frontier.

        Gates, skip rates and accuracies stay. Run it on an otherwise idle machine.

        Args:
            inputs: a typical call of one sample, for the gates to choose from; without it random channels run, as many at each level as
                calibration saw.

        Raises:
            CalibrationError: the model was not calibrated, or its file is too old to tell how much runs at each level.
        """
        from dynprune.runtime.remeasure import remeasured

        frontier, costs = remeasured(self, inputs)
        self.set_frontier(frontier, costs)
        return frontier

    def _deadline_controller(self) -> LatencyController | None:
        """Returns what picks levels for calls with a deadline but no budget; None before calibration."""
        if self._deadlines is None and self.frontier is not None:
            self._deadlines = self._new_controller(None, 95)
        return self._deadlines

    def _new_controller(self, budget_ms: float | None, percentile: float) -> LatencyController:
        options = {"percentile": percentile, "num_threads": self._num_threads, "cores": allowed_cores()}
        return LatencyController(self.frontier, budget_ms=budget_ms, **options)

    def _use_threads(self, num_threads: int) -> None:
        """Runs later calls on at most so many threads."""
        with self._lock:
            self._num_threads = num_threads
            for controller in (self._controller, self._deadlines):
                if controller is not None:
                    controller.set_num_threads(num_threads)
            for session in self._sessions.values():
                session.set_num_threads(num_threads)

    def _next_level(self, controller: LatencyController | None, batch: int, limit_ms: float) -> float:
        monitor = self._monitor
        sample = None if monitor is None else monitor.sample()
        level = self._level
        if controller is not None:
            picked = controller.next_level(sample, work=float(batch), limit_ms=limit_ms)
            level = picked if controller is self._controller else max(level, picked)
            if not controller.reachable and limit_ms >= controller.budget_ms:
                self._warn_once(
                    "budget",
                    f"No level is expected to keep the budget of {controller.budget_ms:g} ms; running at level {picked:.2g}, the fastest. "
                    "stats().budget_misses counts the misses.",
                )
        if sample is not None and not self.training:
            level = max(level, self._policy.level_floor(sample, under_budget=self._controller is not None))
        return level

    def _on_sample(self, sample: ResourceSample) -> None:
        """Acts on what the monitor saw, in its thread: threads within the quota, memory given back under pressure."""
        if not self._threads_given and sample.quota_cores is not None:
            threads = min(torch.get_num_threads(), thread_cap(sample.quota_cores))
            if threads != self._num_threads:
                self._use_threads(threads)
        now_ns = time.monotonic_ns()
        lean = self._policy.lean(sample, now=self._lean)
        if lean:
            self._strained_ns = now_ns
        if lean != self._lean and (lean or now_ns - self._strained_ns > _CALM_NS):
            self.set_lean(lean)
        elif self._lean:
            with self._lock:
                idle = [session for session in self._sessions.values() if session.last_used_ns < now_ns - _CALM_NS]
                newest = max(self._sessions.values(), key=lambda session: session.last_used_ns, default=None)
                for session in idle:
                    session.let_go(plan=session is not newest)

    def _refresh_sessions(self, *, weights: bool) -> None:
        with self._lock:
            self._islands = None
            for session in self._sessions.values():
                session.refresh(weights=weights)

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, RuntimeWarning, stacklevel=6)
