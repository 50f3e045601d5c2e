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
    """

    buffer: int
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


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
        nodes: names of the graph nodes it computes.
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
    """How PyTorch runs one node: `target(*args, **kwargs)` with each `Value(name)` in args replaced by that node's value.

    Attributes:
        target, args, kwargs: of the graph node, with `Value` in place of nodes.
        result: the node's name; its value is kept under it while later steps need it.
        store: view that the result is copied to because an engine step reads it, or None.
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
    """The value of a node inside `TorchCall.args`."""

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
        arena_size: elements of arena memory that one sample needs.
        sites: the sites the engine gates.
        inputs, outputs: where each flattened input and output of the model lies.
        fixed_batch: the only batch size the plan runs, or None for any.
        ungated: (site or module name, reason) of what this plan cannot gate, beyond `Sites.ungated`.
    """

    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    arena_size: int
    sites: tuple[PlanSite, ...]
    inputs: tuple[View, ...]
    outputs: tuple[View | Value, ...]
    fixed_batch: int | None = None
    ungated: tuple[tuple[str, str], ...] = ()
