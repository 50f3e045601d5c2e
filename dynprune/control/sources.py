"""Where a `ResourceSample` comes from on Linux beyond what psutil sees: control groups, pressure stall, run queues, steal time.

Every source reads files under a root directory, "/" in earnest and a made-up one in tests. Opening a source that this machine does not
have raises; so does reading one that has vanished or makes no sense. `read` gives figures under the names of `ResourceSample`, and leaves
out those that it does not know yet, such as a rate at its first reading.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Protocol

from dynprune.control.cgroup import cgroup_directories, cgroup_quota, limit_bytes, quota_cores, read_text

Figures = dict[str, float]

MEMORY_PERIOD_S = 1.0
"""Memory fills within seconds; reading it less often than the CPU halves the monitor's own cost."""
_HELD_FRACTION = 0.7
"""Share of the container's limit held by other than reclaimable files from which hits of the limit mean a lack of memory."""
_LEAST_DEMAND = 0.01
"""Share of the interval that our threads must have been runnable before their waiting says anything."""


class Source(Protocol):
    """One place that figures come from.

    Attributes:
        name: what `dynprune doctor` calls it.
        detail: what was found, in a few words.
        period_s: seconds that a reading stays good for; 0 reads it for every sample.
    """

    name: str
    detail: str
    period_s: float

    def read(self, now_s: float) -> Figures:
        """Returns the figures of this moment; `now_s` is a monotonic clock's reading, in seconds."""


class Counter:
    """Turns a growing total into what it grew by since the last call; None at the first call and where it did not go forwards."""

    def __init__(self) -> None:
        self._last: float | None = None

    def growth(self, total: float) -> float | None:
        """Returns `total` less the total of the last call."""
        last, self._last = self._last, total
        return None if last is None or total < last else total - last


class PressureStall:
    """Share of the time in which some task was stalled on "cpu", "memory" or "io", by the growth of the kernel's total."""

    def __init__(self, root: str, kind: str) -> None:
        self.period_s = 0.0 if kind == "cpu" else MEMORY_PERIOD_S
        self.name = f"{kind} pressure stall"
        self._field = f"{kind}_stall_fraction"
        _, own = cgroup_directories(root, kind, only_version=2)
        self._path = f"{root}/proc/pressure/{kind}"
        self.detail = "of the host"
        if own and os.path.exists(f"{own[0]}/{kind}.pressure"):
            self._path = f"{own[0]}/{kind}.pressure"
            self.detail = "of this control group"
        self._stalled_us = Counter()
        self._clock = Counter()
        _total_us(self._path)

    def read(self, now_s: float) -> Figures:
        stalled_us, elapsed_s = self._stalled_us.growth(_total_us(self._path)), self._clock.growth(now_s)
        return {self._field: min(1.0, stalled_us / 1e6 / elapsed_s)} if stalled_us is not None and elapsed_s else {}


class RunQueue:
    """Share of this process's runnable thread time that its threads waited for a core: the best sign of contention there is."""

    name = "run-queue wait"
    period_s = 0.0

    def __init__(self, root: str) -> None:
        self._directory = f"{root}/proc/self/task"
        self._last: dict[str, tuple[int, int]] = {}
        self._clock = Counter()
        self.detail = f"{len(self._threads())} threads"

    def read(self, now_s: float) -> Figures:
        last, self._last = self._last, self._threads()
        elapsed_s = self._clock.growth(now_s)
        if not elapsed_s:
            return {}
        growths = [(run - last.get(thread, (0, 0))[0], wait - last.get(thread, (0, 0))[1]) for thread, (run, wait) in self._last.items()]
        ran_ns, waited_ns = sum(max(0, run) for run, _ in growths), sum(max(0, wait) for _, wait in growths)
        demand_ns = ran_ns + waited_ns
        return {"runqueue_wait_fraction": waited_ns / demand_ns if demand_ns > _LEAST_DEMAND * elapsed_s * 1e9 else 0.0}

    def _threads(self) -> dict[str, tuple[int, int]]:
        """Returns nanoseconds run and waited by thread; threads that end meanwhile are left out."""
        threads = {}
        for thread in os.listdir(self._directory):
            try:
                run, wait = read_text(f"{self._directory}/{thread}/schedstat").split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue
            threads[thread] = int(run), int(wait)
        if not threads:
            raise ValueError(f"no thread under {self._directory} has a schedstat")
        return threads


class Steal:
    """Share of the CPU time that a hypervisor gave to other virtual machines."""

    name = "steal time"
    period_s = 0.0

    def __init__(self, root: str) -> None:
        self._path = f"{root}/proc/stat"
        self._stolen = Counter()
        self._total = Counter()
        self.detail = f"{self._times()[7]} ticks since start"

    def read(self, now_s: float) -> Figures:
        times = self._times()
        stolen, total = self._stolen.growth(times[7]), self._total.growth(sum(times[:8]))
        return {"steal_fraction": stolen / total} if stolen is not None and total else {}

    def _times(self) -> list[int]:
        label, *times = read_text(self._path).split("\n", 1)[0].split()
        if label != "cpu" or len(times) < 8:
            raise ValueError(f"{self._path} does not begin with the cpu line of eight times")
        return [int(time) for time in times]


class CgroupCpu:
    """Share of the container's runnable time that it spent throttled by its CPU quota (control groups of version 1 and 2)."""

    name = "container CPU quota"
    period_s = 0.0

    def __init__(self, root: str) -> None:
        self._version, directories = _directories_or_error(root, "cpu")
        quotas = [quota_cores(self._version, directory) for directory in directories]
        quota, depth = min(((quota, depth) for depth, quota in enumerate(quotas) if quota is not None), default=(None, 0))
        self._stat = f"{directories[depth]}/cpu.stat"
        if self._version == 1:
            _, accounting = _directories_or_error(root, "cpuacct")
            self._usage = f"{accounting[min(depth, len(accounting) - 1)]}/cpuacct.usage"
        self._throttled = Counter()
        self._used = Counter()
        self._times_us()
        self.detail = f"version {self._version}, " + ("no quota" if quota is None else f"{quota:g} cores")

    def read(self, now_s: float) -> Figures:
        throttled_us, used_us = self._times_us()
        throttled, used = self._throttled.growth(throttled_us), self._used.growth(used_us)
        if throttled is None or used is None:
            return {}
        return {"throttled_fraction": throttled / (throttled + used) if throttled else 0.0}

    def _times_us(self) -> tuple[float, float]:
        """Returns the totals throttled and used so far, in microseconds."""
        stat = dict(line.split() for line in read_text(self._stat).splitlines())
        if self._version == 1:
            return int(stat["throttled_time"]) / 1e3, int(read_text(self._usage)) / 1e3
        return int(stat["throttled_usec"]), int(stat["usage_usec"])


class UsableCores:
    """How many cores this process may use, by affinity and by its container's CPU quota, either of which may change at any time."""

    name = "usable cores"
    period_s = MEMORY_PERIOD_S

    def __init__(self, root: str) -> None:
        self._version, self._directories = cgroup_directories(root, "cpu")
        self.detail = f"{self._cores():g}"

    def read(self, now_s: float) -> Figures:
        return {"quota_cores": self._cores()}

    def _cores(self) -> float:
        quotas = (quota_cores(self._version, directory) for directory in self._directories)
        return min([allowed_cores(), *(quota for quota in quotas if quota is not None)])


class CgroupMemory:
    """Memory of the container against its limit (control groups of version 1 and 2); no figures where there is no limit.

    `memory_limit_hits` and `memory_oom_kills` count what happened since the last reading: how often the limit made the kernel reclaim
    (version 2: `high` and `max` of memory.events, version 1: memory.failcnt), and how often it killed a process.
    """

    name = "container memory limit"
    period_s = MEMORY_PERIOD_S

    def __init__(self, root: str) -> None:
        self._version, directories = _directories_or_error(root, "memory")
        limits = [(limit, directory) for directory in directories if (limit := limit_bytes(self._version, directory)) is not None]
        limit, self._directory = min(limits, default=(None, directories[0]))
        self._hits, self._kills = Counter(), Counter()
        self._used_bytes()
        self.detail = f"version {self._version}, " + ("no limit" if limit is None else f"{limit / 2**20:.0f} MiB")

    def read(self, now_s: float) -> Figures:
        used, limit = self._used_bytes(), limit_bytes(self._version, self._directory)
        if not limit:
            return {}
        figures = {"container_memory_fraction": min(1.0, used / limit), "memory_available_bytes": max(0, limit - used)}
        grown = zip(("memory_limit_hits", "memory_oom_kills"), (self._hits, self._kills), self._events(), strict=True)
        return figures | {name: growth for name, counter, total in grown if (growth := counter.growth(total)) is not None}

    def _events(self) -> tuple[int, int]:
        """Returns how often the limit was hit, and how many processes were killed for it; 0 where this kernel does not tell."""
        if self._version == 2:
            events = _numbers(f"{self._directory}/memory.events")
            return events.get("high", 0) + events.get("max", 0), events.get("oom_kill", 0)
        hits = _numbers(f"{self._directory}/memory.failcnt", "hits")
        return hits.get("hits", 0), _numbers(f"{self._directory}/memory.oom_control").get("oom_kill", 0)

    def _used_bytes(self) -> int:
        """Returns the bytes in use, without the file pages that the kernel drops first."""
        current, inactive = ("memory.usage_in_bytes", "total_inactive_file") if self._version == 1 else ("memory.current", "inactive_file")
        stat = dict(line.split() for line in read_text(f"{self._directory}/memory.stat").splitlines())
        return max(0, int(read_text(f"{self._directory}/{current}")) - int(stat[inactive]))


def _numbers(path: str, name: str = "") -> dict[str, int]:
    """Returns the "name number" lines of a file of the kernel, or its one number under `name`; nothing where there is no such file."""
    try:
        text = read_text(path)
    except FileNotFoundError:
        return {}
    return {name: int(text)} if name else {key: int(value) for key, value in (line.split() for line in text.splitlines())}


def _directories_or_error(root: str, controller: str) -> tuple[int, list[str]]:
    version, directories = cgroup_directories(root, controller)
    if not directories:
        raise ValueError(f"no control group with {controller!r} is mounted")
    return version, directories


def _total_us(path: str) -> int:
    """Returns the "some" total of a pressure file, in microseconds."""
    line = read_text(path).split("\n", 1)[0]
    if not line.startswith("some ") or "total=" not in line:
        raise ValueError(f"{path} does not begin with a 'some ... total=' line")
    return int(line.rpartition("total=")[2])


def cpu_quota(root: str = "/") -> float:
    """Returns how many cores this process may use, by affinity and by the quota of its container; 1.5 means one and a half."""
    quota = cgroup_quota(root)
    return allowed_cores() if quota is None else min(allowed_cores(), quota)


def thread_cap(quota_cores: float | None = None) -> int:
    """Returns the most threads that a run should use: the whole cores within affinity and quota, at least 1.

    One thread more than the quota has whole cores uses it up before its period ends, and then every thread waits for the rest of it.

    Args:
        quota_cores: cores that may be used; None asks the system.
    """
    return max(1, int(cpu_quota() if quota_cores is None else quota_cores))


def allowed_cores() -> float:
    """Returns how many cores the system's affinity lets this process use."""
    return float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def file_sources(root: str) -> list[tuple[str, Callable[[], Source]]]:
    """Returns the name of every source of this file and what opens it under `root`, in the order of reading."""
    return [
        *((kind.name, partial(kind, root)) for kind in (RunQueue, Steal, CgroupCpu, UsableCores, CgroupMemory)),
        *((f"{kind} pressure stall", partial(PressureStall, root, kind)) for kind in ("cpu", "memory", "io")),
    ]


def pressures(figures: Figures, wanted_share: float) -> tuple[float | None, float | None]:
    """Returns the CPU and the memory pressure that the figures of one sample amount to, each in [0, 1], or None where nothing is known.

    CPU pressure p means that p of the CPU time wanted is not got, so that everything takes 1 / (1 - p) times as long. It is the
    largest of what was met (waiting, throttling, steal, stalls) and of what an inference on all our cores would meet: the load of
    others beyond the cores that stay free. Memory pressure is the largest share in use or stalled on; it is 1 where the kernel killed a
    process of the container, or had to reclaim at the limit although most of the memory is not files that it drops first.

    Args:
        figures: by the names of `ResourceSample`.
        wanted_share: the cores that this process may use as a share of the host's.
    """
    cpu = [figures[name] for name in ("runqueue_wait_fraction", "throttled_fraction", "steal_fraction") if name in figures]
    if "cpu_stall_fraction" in figures:
        stalled = figures["cpu_stall_fraction"]
        cpu.append(stalled / (1 + stalled))
    if "cpu_fraction" in figures:
        others = figures["cpu_fraction"] - figures.get("own_cpu_fraction", 0.0)
        excess = max(0.0, others + wanted_share - 1)
        cpu.append(excess / (wanted_share + excess))
    memory_names = ("container_memory_fraction", "host_memory_fraction", "memory_stall_fraction")
    memory = [figures[name] for name in memory_names if name in figures]
    hit = figures.get("memory_limit_hits") and figures.get("container_memory_fraction", 0.0) >= _HELD_FRACTION
    if hit or figures.get("memory_oom_kills"):
        memory.append(1.0)
    return max(cpu, default=None), max(memory, default=None)
