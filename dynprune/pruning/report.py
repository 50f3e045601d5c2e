"""What a pruning did: which layers were cut, and what that costs and saves."""

from __future__ import annotations

from dataclasses import dataclass

from dynprune.pruning.recipe import Recipe


@dataclass(frozen=True)
class Cut:
    """One space or branch before and after.

    Attributes:
        name: module path of the first layer that makes the channels, of the attention, or of the block whose branch it is.
        kind: "channels", "neurons", "heads", "coupled" or "branches".
        before, after: channels, heads, or 1 and 0 for a branch.
    """

    name: str
    kind: str
    before: int
    after: int


@dataclass(frozen=True)
class PruneReport:
    """The report of `prune`; `str(report)` is a table.

    Attributes:
        cuts: every space that could be cut, in the order of the model, and the branches that are gone.
        refused: (layer, reason) of what could not be cut.
        keep_ratio: share of the classes (channels, neurons, heads, branches) that the cuts kept of those that could go.
        params_before, params_after: numbers of parameters.
        macs_before, macs_after: multiply-adds of one sample.
        ms_before, ms_after: milliseconds of one call with the example inputs on this machine, median; None if not measured.
        runtime: what they were measured with: "engine" or "eager".
        loss_before, loss_after: mean loss over the data; None without data and loss.
        predicted_loss: first-order estimate of the loss after the cuts; None likewise, and for more rounds than one.
        recipe: the cuts as data; see `Recipe`, `save_pruned`.
    """

    cuts: tuple[Cut, ...]
    refused: tuple[tuple[str, str], ...]
    keep_ratio: float
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    recipe: Recipe
    ms_before: float | None = None
    ms_after: float | None = None
    runtime: str = "engine"
    loss_before: float | None = None
    loss_after: float | None = None
    predicted_loss: float | None = None

    def __str__(self) -> str:
        rows = [["layer", "kind", "before", "after", "kept"]]
        rows += [[c.name or "(root)", c.kind, str(c.before), str(c.after), f"{c.after / c.before:.0%}"] for c in self.cuts]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += ["", _change("parameters", self.params_before / 1e6, self.params_after / 1e6, "M")]
        lines.append(_change("multiply-adds", self.macs_before / 1e6, self.macs_after / 1e6, "M"))
        if self.ms_before is not None and self.ms_after is not None:
            lines.append(_change(f"latency ({self.runtime})", self.ms_before, self.ms_after, "ms"))
        if self.loss_before is not None and self.loss_after is not None:
            predicted = "" if self.predicted_loss is None else f", predicted {self.predicted_loss:.4f}"
            lines.append(f"loss: {self.loss_before:.4f} -> {self.loss_after:.4f}{predicted}")
        if self.refused:
            lines += ["", "Not cut:", *(f"  {name or '(root)'}: {reason}" for name, reason in self.refused)]
        return "\n".join(lines)


def _change(what: str, before: float, after: float, unit: str) -> str:
    return f"{what}: {before:.3f} -> {after:.3f} {unit} ({after / before - 1:+.1%})" if before else f"{what}: 0"
