"""Operations that take each element of the result from a few others of the same plane.

| ATen | becomes |
| --- | --- |
| upsample_nearest, linear, bilinear, bicubic (1d, 2d), with or without antialiasing, enlarging or reducing | resample |
| roll | one copy per piece that stays together |
| stack | operands are written straight into their part of the result, else copied |
"""

from __future__ import annotations

import itertools
from math import prod
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from dynprune.graph.capture import Node
from dynprune.runtime import views
from dynprune.runtime.lowering.draft import Draft
from dynprune.runtime.lowering.registry import dim_of_sample, lowers
from dynprune.runtime.lowering.values import EngineValue, MergedValue, NotOnEngine, merged
from dynprune.runtime.plan import Rows

MAX_PROBE = 1 << 26
"""Elements of the largest tensor that PyTorch is asked to resample for the weights."""


@lowers(
    "upsample_nearest1d", "upsample_nearest2d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
)  # fmt: skip
def upsample(draft: Draft, node: Node) -> EngineValue:
    sizes, in_sizes = draft.sizes(node), draft.sizes(node.args[0])
    flat = len(in_sizes) == 2
    if len(in_sizes) not in (2, 3) or prod(in_sizes[1:]) * max(in_sizes[1:]) > MAX_PROBE or len([n for n in node.inputs if n.varies]) != 1:
        raise NotOnEngine("no batch of planes, or very large ones")
    rows, x = draft.planar(node.args[0], 0)
    view = draft.new_view(node, sizes)
    in_size = [in_sizes[0], 1, in_sizes[1]] if flat else list(in_sizes)
    out_size = [sizes[0], 1, sizes[1]] if flat else list(sizes)
    ints, constants = {"in_size": in_size, "out_size": out_size}, {}
    for name, dim in (("y", None if flat else 1), ("x", 1 if flat else 2)):
        matrix = np.ones((1, 1), np.float32) if dim is None else _axis_weights(draft, node, dim, in_sizes)
        ints[f"{name}_index"], constants[f"{name}_weight"] = _taps(matrix)
    positions = out_size[1] * out_size[2]
    step = draft.emit(
        "resample", node, [(rows, x)], Rows(view.buffer, 0, out_size[0], positions, positions), ints=ints, constants=constants
    )
    return draft.written(node, view, step)


def _axis_weights(draft: Draft, node: Node, dim: int, sizes: tuple[int, ...]) -> np.ndarray:
    """Returns (outputs, inputs): the weight of each input along one dimension of the plane, asked of PyTorch itself by unit impulses."""
    impulses = torch.eye(sizes[dim]).reshape(1, sizes[dim], *(n if d == dim else 1 for d, n in enumerate(sizes) if d))
    probe = impulses.expand(1, sizes[dim], *sizes[1:])

    def operand(item: Any) -> Any:
        if not isinstance(item, Node):
            return item
        return probe.contiguous() if item is node.args[0] else draft.values[item].value

    args, kwargs = pytree.tree_map(operand, (node.args, node.kwargs))
    with torch.no_grad():
        result = node.target(*args, **kwargs)[0]
    if result.dim() == 3:  # constant along the other dimension
        result = result.select(3 - dim, 0)
    return result.T.contiguous().numpy()


def _taps(matrix: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Returns the inputs that each output reads, `count` for each, and their weights (outputs, count)."""
    count = max(1, int((matrix != 0).sum(1).max()))
    order = np.sort(np.argsort(matrix == 0, axis=1, kind="stable")[:, :count], axis=1)
    return order.reshape(-1).tolist(), np.ascontiguousarray(np.take_along_axis(matrix, order, 1))


@lowers("roll")
def roll(draft: Draft, node: Node) -> EngineValue | MergedValue:
    shifts, dims = node.args[1], node.arguments["dims"]
    x, _, first = draft.along(node.args[0], -1)
    sample = [draft.along(node.args[0], d)[1] for d in dims]
    if not sample or None in sample or not all(isinstance(n, int) for n in shifts):
        raise NotOnEngine("a roll of the batch, or of all elements")
    view = draft.new_view(node, x.view.sizes, views.memory_order(x.view), x.view.batch_dim)
    pieces = []
    for dim, shift in zip(sample, shifts, strict=True):
        size = x.view.sizes[dim]
        shift %= size
        pieces.append([(dim, start, to, length) for start, to, length in ((0, shift, size - shift), (size - shift, 0, shift)) if length])
    for piece in itertools.product(*pieces):
        source, target = x.view, view
        for dim, start, to, length in piece:
            source, target = views.sliced(source, dim, start, length), views.sliced(target, dim, to, length)
        draft.copy(node, EngineValue(source, x.site), target)
    return merged(EngineValue(view, draft.site_of(node)), first)


@lowers("stack")
def stack(draft: Draft, node: Node) -> EngineValue:
    operands, sizes = list(node.args[0]), draft.sizes(node)
    dim = dim_of_sample(node.arguments["dim"], len(node.shape), 0)
    values = [draft.engine(operand) for operand in operands]
    if dim is None or any(value.view.batch_dim for value in values):
        raise NotOnEngine("not along one dimension of each sample")
    for value in values:
        draft.drop(value.site, f"'{node.name}' stacks it with other channels")
    inner = [d if d < dim else d + 1 for d in views.memory_order(values[0].view)]
    view = draft.new_view(node, sizes, (dim, *inner))
    for i, operand in enumerate(operands):
        one = views.sliced(view, dim, i, 1)
        draft.place(node, operand, views.permuted(one, [d for d in range(len(sizes)) if d != dim]))
    return EngineValue(view, draft.site_of(node))
