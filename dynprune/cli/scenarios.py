"""The scripted loads that a budget is kept under, and how a model is served while one runs."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dynprune.cli.neighbours import BusyNeighbours
from dynprune.cli.own_cgroup import OwnCgroup
from dynprune.cli.trace import Trace

NAMES = ("idle", "beside", "step", "ramp", "burst", "quota", "memory")
_RISE, _FALL = 0.25, 0.65
"""Shares of the scenario's time at which a load comes and goes."""
_BURST_S = (0.2, 0.8)


@dataclass(frozen=True)
class Scenario:
    """A load over time.

    Attributes:
        name: of `NAMES`.
        what: one line on it.
        changes: (seconds from the begin, load from then on), ascending; the load is 0 before the first.
        kind: "neighbours", where the load is a number of busy processes, or "quota", where it is the cores taken away.
    """

    name: str
    what: str
    changes: tuple[tuple[float, float], ...] = ()
    kind: str = "neighbours"

    @property
    def most(self) -> float:
        """The largest load."""
        return max((load for _, load in self.changes), default=0)


def make_scenario(name: str, seconds: float, cores: int, *, neighbours: int | None = None) -> Scenario:
    """Returns the scenario of a name; "memory" has no load over time and is run by `memory_scenario`.

    Args:
        name: of `NAMES` but "memory".
        seconds: it lasts.
        cores: of the machine.
        neighbours: busy processes in "beside", "step" and "burst"; default None for one per core.
    """
    hogs = cores if neighbours is None else neighbours
    rise, fall = _RISE * seconds, _FALL * seconds
    if name == "idle":
        return Scenario(name, "nobody else runs")
    if name == "beside":
        return Scenario(name, f"{hogs} busy processes all the time", ((0.0, hogs),))
    if name == "step":
        return Scenario(name, f"{hogs} busy processes from {rise:.1f} s to {fall:.1f} s", ((rise, hogs), (fall, 0)))
    if name == "ramp":
        steps = [*range(1, 2 * cores + 1), *range(2 * cores - 1, -1, -1)]
        changes = tuple((seconds * (i + 1) / (len(steps) + 1), load) for i, load in enumerate(steps))
        return Scenario(name, f"up to {2 * cores} busy processes, one more or less every {seconds / (len(steps) + 1):.1f} s", changes)
    if name == "burst":
        chance, changes, now_s, load = random.Random(1), [], _BURST_S[1], 0
        while now_s < seconds:
            load = 0 if load else hogs
            changes.append((now_s, load))
            now_s += chance.uniform(*_BURST_S)
        return Scenario(name, f"{hogs} busy processes that come and go every {_BURST_S[0]:g} to {_BURST_S[1]:g} s", tuple(changes))
    if name == "quota":
        taken = cores / 2
        what = f"a CPU quota of {cores - taken:g} of {cores} cores from {rise:.1f} s to {fall:.1f} s"
        return Scenario(name, what, ((rise, taken), (fall, 0.0)), "quota")
    raise ValueError(name)


@dataclass(frozen=True)
class Call:
    """What is told of one inference: level at its begin and end, and threads."""

    level: float
    end_level: float
    threads: int


Way = Callable[[], contextlib.AbstractContextManager[Callable[[int], Call]]]
"""Opens a way to run a model; its function runs the inference of a number."""


def serve(way: Way, scenario: Scenario, seconds: float, gap_s: float, cores: int) -> Trace:
    """Returns the trace of running a model some way, one inference after the other, `gap_s` apart, while the scenario goes on.

    The way is opened in the scenario's control group, as in a container, so that a monitor of its own finds the group's quota.

    Raises:
        NoCgroupError: the scenario needs a control group that cannot be made.
    """
    trace = Trace()
    with _load_setter(scenario, cores) as set_load, way() as call:
        changes = list(scenario.changes)
        load = 0.0
        for number in range(3):
            call(number)
        begin = time.perf_counter()
        while (now_s := time.perf_counter() - begin) < seconds:
            while changes and changes[0][0] <= now_s:
                load = changes.pop(0)[1]
                set_load(load)
            began = time.perf_counter()
            done = call(len(trace))
            latency_ms = (time.perf_counter() - began) * 1e3
            trace.add(began - begin, latency_ms, done.level, done.end_level, done.threads, load)
            time.sleep(gap_s)
    return trace


@contextlib.contextmanager
def _load_setter(scenario: Scenario, cores: int) -> Iterator[Callable[[float], None]]:
    if scenario.kind == "neighbours":
        with BusyNeighbours(int(scenario.most)) as neighbours:
            yield lambda load: neighbours.set(int(load))
    else:
        with OwnCgroup("cpu") as group:
            yield lambda taken: group.set_cpu_quota(cores - taken if taken else None)
