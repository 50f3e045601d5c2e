"""The plot of a scenario: latency and level over time, for every variant."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from dynprune.cli.scenario import ScenarioReport


def plot(report: ScenarioReport, path: Path) -> None:
    """Writes latency, level and load over time to `path`; the file's ending picks the format."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    latencies, levels = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for number, variant in enumerate(report.variants):
        trace = variant.trace
        latencies.plot(trace.start_s, trace.latency_ms, ".", color=f"C{number}", markersize=3, label=variant.name)
        levels.step(trace.start_s, trace.end_level, color=f"C{number}", where="post", linewidth=1)
    latencies.axhline(report.budget_ms, color="black", linestyle="--", linewidth=1, label="budget")
    first = report.variants[0].trace
    load = levels.twinx()
    load.fill_between(first.start_s, first.load, step="post", color="black", alpha=0.1)
    load.set_ylabel("cores taken by quota" if report.scenario.kind == "quota" else "busy processes")
    latencies.set_yscale("log")
    latencies.set_ylabel("latency, ms")
    levels.set_ylabel("level")
    levels.set_ylim(-0.02, 1.02)
    levels.set_xlabel("seconds")
    latencies.set_title(f"{report.model}: {report.scenario.what}", fontsize="medium")
    latencies.grid(alpha=0.3)
    latencies.legend(fontsize="small")
    figure.savefig(path, dpi=120)
