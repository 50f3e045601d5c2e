"""Normalisations over channels or positions of one sample.

| ATen | becomes |
| --- | --- |
| layer_norm | layer_norm over rows (tokens by channels) or over positions |
| rms_norm | rms_norm over rows or over positions |
| group_norm, instance_norm | layer_norm over the positions of each group, and affine |
| softmax | softmax over rows or over positions |
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch

from dynprune.graph.capture import Node
from dynprune.runtime import views
from dynprune.runtime.lowering.draft import Draft, as_array
from dynprune.runtime.lowering.registry import lowers
from dynprune.runtime.lowering.values import EngineValue, MergedValue, NotOnEngine, merged
from dynprune.runtime.plan import Rows, View

_OVER_ROWS, _OVER_POSITIONS = 0, 1


def _operand(view: View, dims: Sequence[int]) -> tuple[Rows, int] | None:
    """Returns the view as rows and the axis that `dims` are of them: the rows, or the positions; None where they are neither."""
    others = [d for d in range(len(view.sizes)) if d not in dims]
    along = views.collapse([view.sizes[d] for d in dims], [view.strides[d] for d in dims])
    across = views.collapse([view.sizes[d] for d in others], [view.strides[d] for d in others])
    if along is None or across is None:
        return None
    if along[1] == 1 and (across[0] == 1 or across[1] >= along[0]):
        return Rows(view.buffer, view.offset, across[0], across[1] if across[0] > 1 else along[0], along[0]), _OVER_POSITIONS
    if across[1] == 1 and along[1] >= across[0]:
        return Rows(view.buffer, view.offset, along[0], along[1], across[0]), _OVER_ROWS
    return None


def _over(draft: Draft, source: Node, dims: Sequence[int]) -> tuple[EngineValue, Rows, int]:
    """Returns the value laid out so that `dims` are its rows or its positions; copies it if need be."""
    x = draft.apart(source)
    found = _operand(x.view, dims)
    if found is None:
        x = draft.relaid(source, (*(d for d in range(len(x.view.sizes)) if d not in dims), *dims))
        found = _operand(x.view, dims)
    return x, *found


def _emit(
    draft: Draft, node: Node, op: str, x: EngineValue, rows: Rows, axis: int, dims: Sequence[int], floats: dict, constants: dict
) -> EngineValue:
    others = [d for d in range(len(x.view.sizes)) if d not in dims]
    order = (*dims, *others) if axis == _OVER_ROWS else (*others, *dims)
    view = draft.new_view(node, x.view.sizes, order, x.view.batch_dim)
    output = Rows(view.buffer, 0, rows.rows, rows.positions, rows.positions)
    step = draft.emit(op, node, [(rows, x)], output, ints={"axis": [axis]}, floats=floats, constants=constants)
    return draft.written(node, view, step)


@lowers("layer_norm", "rms_norm", positionless=True)
def layer_norm(draft: Draft, node: Node) -> EngineValue:
    arguments, x = node.arguments, draft.engine(node.args[0])
    count, rank = len(arguments["normalized_shape"]), len(x.view.sizes)
    if x.view.batch_dim > rank - count:
        raise NotOnEngine("the batch is normalised")
    constants = {}
    for name in ("weight", "bias"):
        if arguments.get(name) is not None:
            tensor = draft.constant(arguments[name])
            if tensor is None:
                raise NotOnEngine("weights that are computed")
            constants[name] = as_array(tensor).reshape(-1)
    dims = list(range(rank - count, rank))
    x, rows, axis = _over(draft, node.args[0], dims)
    eps = torch.finfo(torch.float32).eps if arguments["eps"] is None else float(arguments["eps"])
    return _emit(draft, node, node.op, x, rows, axis, dims, {"eps": [eps]}, constants)


@lowers("softmax", "_softmax")
def softmax(draft: Draft, node: Node) -> EngineValue | MergedValue:
    x, dim, first = draft.along(node.args[0], node.arguments["dim"])
    if dim is None or node.arguments.get("dtype") not in (None, torch.float32):
        raise NotOnEngine("softmax over the batch")
    x, rows, axis = _over(draft, node.args[0], [dim])
    return merged(_emit(draft, node, "softmax", x, rows, axis, [dim], {}, {}), first)


@lowers("group_norm", "instance_norm")
def group_norm(draft: Draft, node: Node) -> EngineValue:
    arguments, sizes = node.arguments, draft.sizes(node)
    if node.op == "instance_norm" and not arguments["use_input_stats"]:
        raise NotOnEngine("running statistics")
    groups = arguments["num_groups"] if node.op == "group_norm" else sizes[0]
    weights = [draft.constant(arguments[name]) for name in ("weight", "bias")]
    if any(tensor is None and arguments[name] is not None for tensor, name in zip(weights, ("weight", "bias"), strict=True)):
        raise NotOnEngine("weights that are computed")
    rows, x = draft.planar(node.args[0], 0)
    if rows.row_stride != rows.positions:
        x = draft.relaid(node.args[0], range(len(sizes)))
        rows = views.as_rows(x.view, 0)
    length = prod(sizes) // groups
    grouped = Rows(rows.buffer, rows.offset, groups, length, length)
    view = draft.new_view(node, sizes)
    draft.emit("layer_norm", node, [(grouped, x)], Rows(view.buffer, 0, groups, length, length), ints={"axis": [_OVER_POSITIONS]},
               floats={"eps": [float(arguments["eps"])]})  # fmt: skip
    if all(tensor is None for tensor in weights):
        return EngineValue(view, draft.site_of(node))
    scale, shift = (
        np.full(sizes[0], default) if t is None else t.detach().double().numpy() for t, default in zip(weights, (1.0, 0.0), strict=True)
    )
    output = draft.new_view(node, sizes)
    constants = {"scale": scale.astype(np.float32), "shift": shift.astype(np.float32)}
    reads = [(Rows(view.buffer, 0, sizes[0], rows.positions, rows.positions), EngineValue(view))]
    step = draft.emit("affine", node, reads, Rows(output.buffer, 0, sizes[0], rows.positions, rows.positions), constants=constants)
    return draft.written(node, output, step)
