"""The scenario "memory": the container fills up, the model gives back memory, and what a run needs at its peak is measured."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dynprune.cli.machine import Machine, describe_machine
from dynprune.cli.neighbours import held_memory
from dynprune.cli.own_cgroup import NoCgroupError, OwnCgroup
from dynprune.cli.table import format_table

if TYPE_CHECKING:
    import torch

    from dynprune.runtime.model import DynamicModel

_RUNS = 20
_LIMIT_FACTOR = 2.0
_FILLED = 0.95
"""Share of the limit that this process and its neighbour hold together: the rest is left for building the lean engine."""
_MIB = 2**20
_WAIT_S = 15.0


@dataclass(frozen=True)
class MemoryRow:
    """Memory and time of one way to run.

    Attributes:
        name: of it.
        peak_bytes: largest resident memory of the process while it ran.
        above_bytes: the same above what the process held with the user's model alone, before anything was captured or built.
        median_ms: of a call.
        level: at its end.
    """

    name: str
    peak_bytes: int
    above_bytes: int
    median_ms: float
    level: float


@dataclass(frozen=True)
class MemoryReport:
    """What the scenario found; `reacted_s` is None where no control group could be made and the pressure was set by hand (`reason`)."""

    machine: Machine
    model: str
    rows: tuple[MemoryRow, ...]
    reacted_s: float | None
    reason: str

    def to_dict(self) -> dict[str, object]:
        """Returns plain data for JSON."""
        return asdict(self)


def run_memory(dm: DynamicModel, inputs: Sequence[tuple[torch.Tensor, ...]], *, model_name: str, base_bytes: int = 0) -> MemoryReport:
    """Returns the peak memory of PyTorch, of the engine dense, and of the engine under full memory pressure.

    The pressure comes from a control group that a neighbour fills up; where none can be made, the model is set lean and to level 1 by
    hand, and the report says why.

    Args:
        dm: calibrated, in eval mode.
        inputs: calls of the model, taken in turn.
        model_name: for the report.
        base_bytes: resident memory before the model was captured; 0 reports peaks only.
    """
    import torch

    def row(name: str, run: Callable[[tuple], object]) -> MemoryRow:
        return _measured(name, run, inputs, base_bytes, dm)

    with torch.inference_mode():
        dm.set_lean(True)  # the eager row shall not pay for packed weights
        rows = [row("PyTorch, model captured", lambda call: dm.model(*call))]
        dm.set_lean(False)
        dm.level = 0.0
        rows.append(row("engine, dense", lambda call: dm(*call)))
        dm.level = 1.0
        rows.append(row("engine, level 1", lambda call: dm(*call)))
        dm.level = 0.0
        reacted_s, reason = None, ""
        try:
            reacted_s = _under_pressure(dm, inputs, lambda: rows.append(row("engine, top pressure", lambda call: dm(*call))))
        except NoCgroupError as error:
            reason = str(error)
            dm.set_lean(True)
            dm.level = 1.0
            rows.append(row("engine, lean at level 1", lambda call: dm(*call)))
            dm.level = 0.0
            dm.set_lean(False)
    return MemoryReport(describe_machine(dm.num_threads), model_name, tuple(rows), reacted_s, reason)


def memory_text(report: MemoryReport) -> str:
    """Returns the report as a table."""
    rows = [
        [
            row.name,
            f"{row.peak_bytes / _MIB:.0f}",
            f"{row.above_bytes / _MIB:.0f}" if row.above_bytes else None,
            row.median_ms,
            f"{row.level:.2f}",
        ]
        for row in report.rows
    ]
    table = format_table(["", "peak RSS, MiB", "above model alone", "median ms", "level"], rows)
    lines = [str(report.machine), f"{report.model}, scenario memory", "", table]
    if report.reacted_s is None:
        lines.append(f"No control group here ({report.reason}); lean and level were set by hand.")
    else:
        lines.append(
            f"Lean and at level 1 {report.reacted_s:.1f} s after a neighbour began to fill the group to {_FILLED:.0%} of its limit."
        )
    return "\n".join(lines)


def _under_pressure(dm: DynamicModel, inputs: Sequence[tuple], measure: Callable[[], None]) -> float:
    """Fills a control group of our own, calls `measure` when the model has reacted, and returns how long that took, in seconds."""
    from dynprune.control.monitor import ResourceMonitor
    from dynprune.control.pressure import PressurePolicy

    with OwnCgroup("memory") as group:
        held = rss_bytes()
        limit = int(_LIMIT_FACTOR * held)
        group.set_memory_limit(limit)
        monitor = ResourceMonitor()
        try:
            dm.set_pressure_policy(PressurePolicy(cpu_start=1, memory_full=_FILLED - 0.05))
            dm.attach_monitor(monitor)
            dm(*inputs[0])
            began = time.monotonic()
            with held_memory(int(_FILLED * limit) - _charged(group)):
                while not (dm.lean and dm.last_call.end_level == 1.0):
                    if time.monotonic() - began > _WAIT_S:
                        seen = monitor.sample().memory_pressure
                        raise NoCgroupError(f"memory filled to {_FILLED:.0%} of a limit was seen as a pressure of {seen}")
                    dm(*inputs[0])
                reacted_s = time.monotonic() - began
                measure()
        finally:
            group.set_memory_limit(None)
            dm.attach_monitor(None)
            dm.set_pressure_policy(PressurePolicy())
            monitor.stop()
    return reacted_s


def rss_bytes(field: str = "VmRSS") -> int:
    """Returns the resident memory of this process; "VmHWM" for the most since `_reset_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def _charged(group: OwnCgroup) -> int:
    name = "memory.usage_in_bytes" if group.version == 1 else "memory.current"
    return int((group.path / name).read_text())


def _measured(name: str, run: Callable[[tuple], object], inputs: Sequence[tuple], base_bytes: int, dm: DynamicModel) -> MemoryRow:
    from dynprune.runtime.reclaim import return_freed_memory

    run(inputs[0])
    gc.collect()
    return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    times = []
    for number in range(_RUNS):
        began = time.perf_counter()
        run(inputs[number % len(inputs)])
        times.append((time.perf_counter() - began) * 1e3)
    peak = rss_bytes("VmHWM")
    return MemoryRow(name, peak, peak - base_bytes if base_bytes else 0, statistics.median(times), dm.last_call.end_level)
