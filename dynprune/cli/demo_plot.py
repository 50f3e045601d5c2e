"""The demo's plot: accuracy over time per image, for levels, budgets and the dense rivals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from dynprune.cli.demo import Results


def plot(results: Results, path: Path) -> None:
    """Writes the plot of `results` to `path`; the file's ending picks the format."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    levels = results.sweep
    axes.plot([row.p50_ms for row in levels], [100 * row.accuracy for row in levels], "o-", label="fixed level (level, share skipped)")
    for number, row in enumerate(levels):
        axes.annotate(
            f"{row.level:.2f}, {row.skip_rate:.0%}",
            (row.p50_ms, 100 * row.accuracy),
            textcoords="offset points",
            xytext=(-6, 6) if number % 2 else (6, -12),  # neighbours may take the same time
            horizontalalignment="right" if number % 2 else "left",
            fontsize="small",
        )
    for number, row in enumerate(results.budgets):
        color = f"C{number + 1}"
        axes.axvline(row.budget_ms, color=color, linestyle="--", linewidth=1)
        axes.plot(row.p50_ms, 100 * row.accuracy, "D", color=color, label=f"budget {row.budget_ms:.2f} ms, {row.misses:.1%} missed")
    for (name, dense_ms), marker in zip(results.dense_ms.items(), "s^vP", strict=False):
        axes.plot(dense_ms, 100 * results.dense_accuracy, marker, color="black", label=f"{name}, dense")
    axes.set_xlabel("median time per image, ms (dashed: budgets)")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"Digits on {results.machine.cpu}, threads {results.machine.threads}", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
