"""Watches the machine in a background thread and says how short CPU time and memory are. The only file that imports psutil."""

from __future__ import annotations

import functools
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import NamedTuple

import psutil

from dynprune.control.checks import is_number
from dynprune.control.pressure import ResourceSample
from dynprune.control.sources import MEMORY_PERIOD_S, Counter, Figures, Source, cpu_quota, file_sources, pressures
from dynprune.errors import InputError

_SLOW_PERIOD_S = 10.0
"""Batteries and sensors change slowly and may take milliseconds to read."""
_BROKEN = (OSError, ValueError, LookupError, ArithmeticError, AttributeError, TypeError, psutil.Error)
"""What a source raises that this machine lacks, that vanished, or that reads garbage."""


class SourceState(NamedTuple):
    """One line of `ResourceMonitor.sources`.

    Attributes:
        name: of the source, in plain words.
        available: whether its figures are in the samples.
        detail: what was found, or why it is not available.
    """

    name: str
    available: bool
    detail: str


class ResourceMonitor:
    """Samples the machine's load every `interval_s` seconds in a background thread.

    Sources that this machine does not have are left out; one that fails later is dropped with one warning, and the rest goes on. The
    thread is started by `start` or by entering the monitor as a context; it ends with `stop`, with the monitor's last reference and with
    the interpreter. In a forked child it starts again at the first `sample`. Without the thread, `sample` reads the sources itself when
    the last sample is older than the interval.

    Args:
        interval_s: time between samples in seconds, > 0.
        root: directory that stands for "/", for tests; psutil's figures are always the host's.

    Raises:
        InputError: `interval_s` is not a finite number > 0.

    Example:
        >>> with ResourceMonitor() as monitor:
        ...     pressure = monitor.sample().cpu_pressure
    """

    def __init__(self, interval_s: float = 0.2, *, root: str = "/") -> None:
        if not is_number(interval_s) or interval_s <= 0:
            raise InputError(f"`interval_s` must be a finite number of seconds > 0, got {interval_s!r}.")
        self.interval_s = float(interval_s)
        self._root = str(root).rstrip("/")
        self._wanted = False
        self._listeners: weakref.WeakKeyDictionary[object, Callable] = weakref.WeakKeyDictionary()
        self._forget_process()
        _MONITORS.add(self)

    def start(self) -> ResourceMonitor:
        """Takes a first sample and starts the thread, unless it runs; returns the monitor."""
        with self._lock:
            self._wanted = True
            if self._sample is None:
                self._refresh()
            if self._thread is None or not self._thread.is_alive():
                self._stop = threading.Event()
                self._finalizer = weakref.finalize(self, self._stop.set)
                arguments = (weakref.ref(self), self._stop, self.interval_s)
                self._thread = threading.Thread(target=_keep_sampling, args=arguments, name="dynprune-monitor", daemon=True)
                self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the thread, if it runs, and waits until it has ended."""
        with self._lock:
            thread, self._thread, self._wanted = self._thread, None, False
            self._finalizer()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def __enter__(self) -> ResourceMonitor:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def sample(self) -> ResourceSample:
        """Returns the latest sample; only the first call, or one without the thread, reads the sources itself (under a millisecond)."""
        thread = self._thread
        if self._sample is None or thread is None or not thread.is_alive():
            self._sample_here()
        return self._sample

    def subscribe(self, listener: Callable[[ResourceSample], object]) -> None:
        """Calls `listener` with every new sample, in the thread that takes it, as long as the listener's object lives.

        Args:
            listener: a method; only a weak reference is kept. One that raises is dropped with a warning; one known already is not called
                twice.
        """
        self._listeners[listener.__self__] = listener.__func__

    def unsubscribe(self, listener: Callable[[ResourceSample], object]) -> None:
        """Calls `listener` no more."""
        self._listeners.pop(listener.__self__, None)

    def sources(self) -> list[SourceState]:
        """Returns what figures can come from on this machine, and what cannot and why, in the order of reading."""
        self.sample()
        return list(self._states.values())

    def _forget_process(self) -> None:
        """Sets the state of a monitor that has not looked at this process yet."""
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._finalizer: Callable[[], object] = self._stop.set
        self._thread: threading.Thread | None = None
        self._sample: ResourceSample | None = None
        self._opened: dict[str, Source] | None = None
        self._states: dict[str, SourceState] = {}
        self._figures: dict[str, tuple[float, Figures]] = {}

    def _sample_here(self) -> None:
        with self._lock:
            if self._wanted and self._thread is None:
                self.start()
            elif self._sample is None or time.monotonic() - self._sample.timestamp_s >= self.interval_s:
                self._refresh()

    def _refresh(self) -> None:
        """Reads every source that is due and makes the next sample."""
        with self._lock:
            if self._opened is None:
                self._open()
            now_s = time.monotonic()
            failures = []
            for name, source in list(self._opened.items()):
                read_s, _ = self._figures.get(name, (None, {}))
                if read_s is not None and now_s - read_s < source.period_s:
                    continue
                try:
                    self._figures[name] = now_s, source.read(now_s)
                except _BROKEN as error:
                    del self._opened[name]
                    self._figures.pop(name, None)
                    self._states[name] = SourceState(name, False, f"dropped: {_reason(error)}")
                    failures.append(f"The resource monitor goes on without its source {name!r}: {_reason(error)}.")
            self._sample = _compose([figures for _, figures in self._figures.values()], now_s, self._wanted_share)
        for owner, listener in list(self._listeners.items()):
            try:
                listener(owner, self._sample)
            except Exception as error:  # whatever a listener does, the monitor goes on
                self._listeners.pop(owner, None)
                failures.append(f"The resource monitor calls a listener no more, which failed with {type(error).__name__}: {error}")
        for failure in failures:
            warnings.warn(failure, RuntimeWarning, stacklevel=2)

    def _open(self) -> None:
        cores = psutil.cpu_count() or 1
        self._wanted_share = min(1.0, cpu_quota(self._root) / cores)
        self._opened = {}
        for name, open_source in _openers(self._root):
            try:
                source = open_source()
            except _BROKEN as error:
                self._states[name] = SourceState(name, False, _reason(error))
            else:
                self._opened[name] = source
                self._states[name] = SourceState(name, True, source.detail)


class HostCpu:
    """Busy share of every core, and of this process, by the growth of their times (`psutil.cpu_percent` keeps a state per thread)."""

    name = "CPU load"
    period_s = 0.0

    def __init__(self) -> None:
        self._cores = [(Counter(), Counter()) for _ in psutil.cpu_times(percpu=True)]
        self._own = Counter()
        self._clock = Counter()
        self.detail = f"{len(self._cores)} cores"

    def read(self, now_s: float) -> Figures:
        shares = []
        for (busy_s, total_s), times in zip(self._cores, psutil.cpu_times(percpu=True), strict=True):
            total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
            busy = busy_s.growth(total - times.idle - getattr(times, "iowait", 0.0))
            all_s = total_s.growth(total)
            if busy is not None and all_s:
                shares.append(min(1.0, busy / all_s))
        own_s, elapsed_s = self._own.growth(time.process_time()), self._clock.growth(now_s)
        if len(shares) < len(self._cores) or own_s is None or not elapsed_s:
            return {}
        return {
            "cpu_fraction": sum(shares) / len(shares),
            "per_cpu_fraction": tuple(shares),
            "own_cpu_fraction": min(1.0, own_s / elapsed_s / len(shares)),
        }


class PsutilSource:
    """A source that is one function of psutil; opening it reads it once."""

    def __init__(self, name: str, figures: Callable[[], Figures], period_s: float = 0.0) -> None:
        self.name = name
        self.period_s = period_s
        self._figures = figures
        self.detail = ", ".join(f"{field}={value:.4g}" for field, value in figures().items())

    def read(self, now_s: float) -> Figures:
        return self._figures()


def _host_memory() -> Figures:
    memory = psutil.virtual_memory()
    return {"host_memory_fraction": memory.percent / 100, "memory_available_bytes": memory.available}


def _swap() -> Figures:
    return {"swap_fraction": psutil.swap_memory().percent / 100}


def _own_memory() -> Figures:
    return {"rss_bytes": psutil.Process().memory_info().rss}


def _load_average() -> Figures:
    return {"load_average": psutil.getloadavg()[0]}


def _battery() -> Figures:
    battery = psutil.sensors_battery()
    if battery is None:
        raise ValueError("this machine has no battery")
    return {"battery_fraction": battery.percent / 100, "on_battery": battery.power_plugged is False}


def _temperature() -> Figures:
    readings = [reading.current for chip in psutil.sensors_temperatures().values() for reading in chip]
    if not readings:
        raise ValueError("this machine shows no temperature sensor")
    return {"temperature_celsius": max(readings)}


def _openers(root: str) -> list[tuple[str, Callable[[], Source]]]:
    """Returns the name of every source and what opens it, in the order of reading."""
    psutil_sources = [
        ("memory", _host_memory, MEMORY_PERIOD_S),
        ("swap", _swap, _SLOW_PERIOD_S),
        ("own memory", _own_memory, MEMORY_PERIOD_S),
        ("load average", _load_average, MEMORY_PERIOD_S),
        ("battery", _battery, _SLOW_PERIOD_S),
        ("temperature", _temperature, _SLOW_PERIOD_S),
    ]
    return [
        ("CPU load", HostCpu),
        *((name, functools.partial(PsutilSource, name, figures, period_s)) for name, figures, period_s in psutil_sources),
        *file_sources(root),
    ]


def _compose(readings: list[Figures], now_s: float, wanted_share: float) -> ResourceSample:
    figures = {name: value for reading in readings for name, value in reading.items()}
    available = [reading["memory_available_bytes"] for reading in readings if "memory_available_bytes" in reading]
    figures["memory_available_bytes"] = min(available, default=None)
    cpu_pressure, memory_pressure = pressures(figures, wanted_share)
    return ResourceSample(timestamp_s=now_s, cpu_pressure=cpu_pressure, memory_pressure=memory_pressure, **figures)


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _keep_sampling(monitor_reference: weakref.ref[ResourceMonitor], stop: threading.Event, interval_s: float) -> None:
    """Refreshes the monitor until it is stopped or gone. Holds no reference to it while waiting."""
    while not stop.wait(interval_s):
        monitor = monitor_reference()
        if monitor is None:
            return
        monitor._refresh()
        del monitor


def _forget_parent() -> None:
    for monitor in list(_MONITORS):
        monitor._forget_process()


_MONITORS: weakref.WeakSet[ResourceMonitor] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
