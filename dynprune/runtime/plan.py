"""The plan: what the engine runs, as plain frozen data that prints itself as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Buffer:
    """Memory of one value for one sample.

    Attributes:
        name: the node that wrote it first.
        kind: "arena" (placed by `place_buffers`), "input" (the caller's tensor), "output" (the tensor returned).
        size: elements of one sample.
        offset: elements from the start of a sample's arena; 0 unless kind is "arena".
    """

    name: str
    kind: str
    size: int
    offset: int = 0


@dataclass(frozen=True)
class View:
    """A strided window on a buffer: how a value of the model lies in memory. Sizes and strides leave the batch dimension out.

    Views are free: permute, reshape, slice, unbind and concatenation of neighbours change the view, not the memory.
    `batch_dim` is where the batch stands among the dimensions of the model's tensor.
    """

    buffer: int
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    batch_dim: int = 0


@dataclass(frozen=True)
class Rows:
    """An operand of an engine step: `rows` channels of `positions` contiguous elements, `row_stride` apart (0 repeats one row)."""

    buffer: int
    offset: int
    rows: int
    row_stride: int
    positions: int


@dataclass(frozen=True, eq=False)
class Step:
    """One line of a plan.

    Attributes:
        op: the engine's operation ("conv", "depthwise", ...), or "torch" for a node that PyTorch runs.
        name: the module path, or the node's name where there is none.
        inputs, output: operands of an engine step; empty and None for "torch".
        ints, floats, constants: attributes by name: lists of ints, lists of floats, f32 C-contiguous arrays.
        in_site, out_site: index into `Plan.sites` of the site whose active list the rows of inputs/output follow, or -1.
        branches: indices of the branch sites that skip this step.
        macs: multiply-adds of one sample when everything runs.
        nodes: names of the graph nodes it computes; none for a "copy", "fill", "gate" or the "mean" before a gate.
        torch_call: for "torch": what the engine calls; see `TorchCall`.
    """

    op: str
    name: str
    inputs: tuple[Rows, ...] = ()
    output: Rows | None = None
    ints: dict[str, list[int]] = field(default_factory=dict)
    floats: dict[str, list[float]] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    in_site: int = -1
    out_site: int = -1
    branches: tuple[int, ...] = ()
    macs: int = 0
    nodes: tuple[str, ...] = ()
    torch_call: TorchCall | None = None


@dataclass(frozen=True, eq=False)
class TorchCall:
    """How PyTorch runs one node: `target(*args, **kwargs)`, after each `Value` and `View` in args and kwargs was replaced by a tensor.

    Attributes:
        target, args, kwargs: of the graph node. In place of nodes stand a `View` (memory of the engine, handed over as a strided tensor
            with the batch at `batch_dim`), a `Value` (an earlier result, or an input of the call as the caller passed it) or a tensor
            (a parameter or constant). They may be nested in lists, tuples and dicts.
        result: the node's name; its value is kept under it while later steps need it.
        store: view that the result is copied to because an engine step or an output reads it, or None.
        last_use: names whose values may be dropped after this call.
    """

    target: Callable
    args: tuple
    kwargs: dict[str, Any]
    result: str
    store: View | None = None
    last_use: tuple[str, ...] = ()


@dataclass(frozen=True)
class Value:
    """The tensor (or other object) that PyTorch made for the node of this name, or that the caller passed for this input."""

    name: str


@dataclass(frozen=True)
class PlanSite:
    """What the engine knows of a site: its index in `Plan.sites` is its number in the steps."""

    name: str
    kind: str
    num_channels: int
    group_size: int


@dataclass(frozen=True, eq=False)
class Plan:
    """A lowered model for one set of per-sample input shapes and any batch size.

    Attributes:
        steps: in execution order. A "gate" step stands before the first step that its site owns.
        buffers: `View.buffer` and `Rows.buffer` index them.
        arena_size: elements of arena memory that one sample needs, a multiple of 16.
        sites: the sites the engine gates.
        inputs: where each flattened input of the model lies; the buffer has the input's name, under which a `Value` finds it too.
        outputs: where each flattened output lies: a `View` on an "output" buffer, contiguous; a `Value`; or the object itself where
            the model returns what is no tensor (None, a number).
        fixed_batch: the only batch size the plan runs, or None for any.
        ungated: (site name, reason) of what this plan cannot gate, beyond `Sites.ungated`.
    """

    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    arena_size: int
    sites: tuple[PlanSite, ...]
    inputs: tuple[View, ...]
    outputs: tuple[Any, ...]
    fixed_batch: int | None = None
    ungated: tuple[tuple[str, str], ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-adds of one sample when everything runs."""
        return sum(step.macs for step in self.steps)

    def to_spec(self) -> dict[str, Any]:
        """Returns what the C++ engine is built from: nested dicts, lists and numpy arrays.

        Keys: "arena_size"; "buffers": (kind, size, offset) each; "sites": (kind, num_channels, group_size) each; "steps": dicts with op,
        name, inputs and output as (buffer, offset, rows, row_stride, positions), ints, floats, constants, in_site, out_site, branches
        and macs.
        A step that PyTorch runs has op "torch" and neither operands nor attributes.
        """
        return {
            "arena_size": self.arena_size,
            "buffers": [(buffer.kind, buffer.size, buffer.offset) for buffer in self.buffers],
            "sites": [(site.kind, site.num_channels, site.group_size) for site in self.sites],
            "steps": [_step_spec(step) for step in self.steps],
        }

    def __str__(self) -> str:
        total = max(self.macs, 1)
        header = ("step", "op", "name", "input", "output", "site", "share", "runs on")
        table = [header, *(_describe(i, step, self.sites, total) for i, step in enumerate(self.steps))]
        widths = [max(len(line[column]) for line in table) for column in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
        lines += [f"not gated: {name}: {reason}" for name, reason in self.ungated]
        return "\n".join(lines)


def _step_spec(step: Step) -> dict[str, Any]:
    return {
        "op": step.op,
        "name": step.name,
        "inputs": [_row_spec(rows) for rows in step.inputs],
        "output": None if step.output is None else _row_spec(step.output),
        "ints": step.ints,
        "floats": step.floats,
        "constants": step.constants,
        "in_site": step.in_site,
        "out_site": step.out_site,
        "branches": list(step.branches),
        "macs": step.macs,
    }


def _row_spec(rows: Rows) -> tuple[int, int, int, int, int]:
    return (rows.buffer, rows.offset, rows.rows, rows.row_stride, rows.positions)


def _describe(index: int, step: Step, sites: tuple[PlanSite, ...], total_macs: int) -> tuple[str, ...]:
    """Returns the cells of a step's line in the table."""
    owners = []
    if step.op == "gate":
        owners.append(f"decides {sites[step.ints['site'][0]].name}")
    if step.in_site >= 0:
        owners.append(f"reads {sites[step.in_site].name}")
    if step.out_site >= 0:
        owners.append(f"writes {sites[step.out_site].name}")
    owners += [f"if {sites[branch].name}" for branch in step.branches]
    return (
        str(index),
        step.nodes[-1] if step.op == "torch" else step.op,
        step.name,
        " ".join(_shape(rows) for rows in step.inputs),
        _shape(step.output),
        ", ".join(owners),
        f"{100 * step.macs / total_macs:.1f} %" if step.macs else "",
        "PyTorch" if step.op == "torch" else "engine",
    )


def _shape(rows: Rows | None) -> str:
    return "" if rows is None else f"{rows.rows}x{rows.positions}"
