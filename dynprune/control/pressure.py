"""What the machine was doing, and how tight that makes the gates at least."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dynprune.control.checks import is_number
from dynprune.errors import InputError


@dataclass(frozen=True)
class ResourceSample:
    """What the machine was doing over the last interval; a figure that no source gave is None.

    A rate covers the time since the previous sample and is None in the first one. Fractions and pressures lie in [0, 1].

    Attributes:
        timestamp_s: `time.monotonic` when the sample was taken, in seconds.
        cpu_pressure: share of the CPU time wanted that would not be got: 0 on an idle machine, 0.5 where everything takes twice as long.
        memory_pressure: share of the memory in use, of the host or the container, or share of the time stalled on it: the largest.
        cpu_fraction: busy share of the host's cores, this process included.
        per_cpu_fraction: the same per core.
        own_cpu_fraction: CPU time of this process as a share of the host's cores.
        load_average: runnable tasks of the host, mean over one minute.
        steal_fraction: share of the CPU time that the hypervisor gave to others.
        runqueue_wait_fraction: share of this process's runnable thread time spent waiting for a core.
        throttled_fraction: share of the container's runnable time spent throttled by its CPU quota.
        cpu_stall_fraction, memory_stall_fraction, io_stall_fraction: share of the time in which some task was stalled (pressure stall
            information, of the container where it has its own).
        rss_bytes: resident memory of this process.
        memory_available_bytes: memory that can be had without swapping, within the container's limit.
        container_memory_fraction: memory of the container, reclaimable file pages left out, as a share of its limit.
        memory_limit_hits: how often the container's limit made the kernel reclaim memory since the last reading.
        memory_oom_kills: how many of the container's processes were killed for lack of memory since then.
        quota_cores: cores that this process may use, by affinity and by the container's quota; 1.5 means one and a half.
        host_memory_fraction: used share of the host's memory.
        swap_fraction: used share of the swap space.
        battery_fraction: charge of the battery.
        on_battery: whether the machine runs from its battery.
        temperature_celsius: hottest sensor.
    """

    timestamp_s: float | None = None
    cpu_pressure: float | None = None
    memory_pressure: float | None = None
    cpu_fraction: float | None = None
    per_cpu_fraction: tuple[float, ...] | None = None
    own_cpu_fraction: float | None = None
    load_average: float | None = None
    steal_fraction: float | None = None
    runqueue_wait_fraction: float | None = None
    throttled_fraction: float | None = None
    cpu_stall_fraction: float | None = None
    memory_stall_fraction: float | None = None
    io_stall_fraction: float | None = None
    rss_bytes: int | None = None
    memory_available_bytes: int | None = None
    container_memory_fraction: float | None = None
    memory_limit_hits: int | None = None
    memory_oom_kills: int | None = None
    quota_cores: float | None = None
    host_memory_fraction: float | None = None
    swap_fraction: float | None = None
    battery_fraction: float | None = None
    on_battery: bool | None = None
    temperature_celsius: float | None = None


@dataclass(frozen=True)
class PressurePolicy:
    """What CPU and memory pressure do to a model.

    A floor of the level is 0 up to `start` and rises linearly to 1 at `full`; the higher of the two floors holds. A `start` of 1 turns
    one off. Memory is acted on first: from `memory_lean` on the model gives back what it can do without, at the price of some speed.

    Args:
        cpu_start, cpu_full: CPU pressures; by default nothing happens until a third of the CPU time wanted goes to others.
        memory_start, memory_full: memory pressures; by default nothing happens until 85 % of the memory is in use.
        memory_lean: memory pressure from which the model runs lean, see `DynamicModel.lean`; 1 never. It ends a tenth below, after 10 s.
        cpu_under_budget: whether the CPU floor also holds under a latency budget. By default the budget alone answers to CPU load:
            a floor would skip what the budget has time for.

    Raises:
        InputError: not 0 <= start < full <= 1, unless start is 1; or `memory_lean` not in [0, 1].
    """

    cpu_start: float = 0.34
    cpu_full: float = 0.9
    memory_start: float = 0.85
    memory_full: float = 0.98
    memory_lean: float = 0.8
    cpu_under_budget: bool = False

    def __post_init__(self) -> None:
        for kind in ("cpu", "memory"):
            start, full = getattr(self, f"{kind}_start"), getattr(self, f"{kind}_full")
            if not (is_number(start) and is_number(full) and (start == 1 or 0 <= start < full <= 1)):
                raise InputError(
                    f"Expected 0 <= {kind}_start < {kind}_full <= 1 (or {kind}_start=1 for never), got {start!r} and {full!r}."
                )
        if not is_number(self.memory_lean) or not 0 <= self.memory_lean <= 1:
            raise InputError(f"`memory_lean` must be a number in [0, 1] (1 for never), got {self.memory_lean!r}.")

    def level_floor(self, sample: ResourceSample, *, under_budget: bool = False) -> float:
        """Returns the lowest level in [0, 1] to use under the pressures of `sample`; a pressure that is not known counts as none."""
        memory = _ramp(fraction(sample.memory_pressure), self.memory_start, self.memory_full)
        if under_budget and not self.cpu_under_budget:
            return memory
        return max(memory, _ramp(fraction(sample.cpu_pressure), self.cpu_start, self.cpu_full))

    def lean(self, sample: ResourceSample, *, now: bool) -> bool:
        """Returns whether to run lean under the memory pressure of `sample`, given whether the model does so now."""
        return self.memory_lean < 1 and fraction(sample.memory_pressure) >= self.memory_lean - (_LEAN_BAND if now else 0.0)


_LEAN_BAND = 0.1
"""Running lean ends this far below the pressure that it begins at."""


def fraction(value: float | None) -> float:
    """Returns `value` clamped to [0, 1]; 0 for None and NaN."""
    return 0.0 if value is None or math.isnan(value) else min(max(float(value), 0.0), 1.0)


def _ramp(value: float, start: float, full: float) -> float:
    return 0.0 if value <= start else min(1.0, (value - start) / (full - start))


def other_cores(sample: ResourceSample) -> float | None:
    """Returns how many cores' worth of time other programs took; None where the sample does not tell."""
    if sample.cpu_fraction is None or not sample.per_cpu_fraction:
        return None
    busy = fraction(sample.cpu_fraction)
    return (busy - min(fraction(sample.own_cpu_fraction), busy)) * len(sample.per_cpu_fraction)
