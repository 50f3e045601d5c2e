"""Operations that reduce over positions.

| ATen | becomes |
| --- | --- |
| mean over dimensions, adaptive_avg_pool to one position, avg_pool2d over the whole plane | mean; a 1x1 conv where it runs over rows |
| sum over dimensions | mean and affine |
| linalg_vector_norm (2) | the same of the squares, then a square root |
| max_pool2d, max_pool1d, avg_pool2d, avg_pool1d | pool |
| adaptive_avg_pool, adaptive_max_pool (1d, 2d) | adaptive_pool |
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np

from dynprune.graph.capture import Node
from dynprune.runtime import views
from dynprune.runtime.lowering.draft import Draft
from dynprune.runtime.lowering.elementwise import ACTIVATIONS
from dynprune.runtime.lowering.registry import lowers, pair
from dynprune.runtime.lowering.values import EngineValue, ListValue, MergedValue, NotOnEngine, merged
from dynprune.runtime.plan import Rows

_MAX, _AVERAGE = 0, 1


def _mean(draft: Draft, node: Node, source: Node, dims: list[int], keep: bool) -> EngineValue:
    """Returns the mean over per-sample dimensions; dimensions of one element are only dropped."""
    x = draft.apart(source)
    kept = [d for d in range(len(x.view.sizes)) if d not in dims]
    sizes = tuple(1 if d in dims else n for d, n in enumerate(x.view.sizes) if keep or d not in dims)
    batch = x.view.batch_dim
    if not keep:
        batch -= sum(d < batch for d in dims)
    if all(x.view.sizes[d] == 1 for d in dims):
        strides = tuple(s for d, s in enumerate(x.view.strides) if keep or d not in dims)
        return draft.viewed(node, x, replace(x.view, sizes=sizes, strides=strides, batch_dim=batch))
    rows = _rows_over(x, kept, dims)
    if rows is None and (across := _rows_of(x, kept, dims)) is not None and x.site < 0 and draft.site_of(node) < 0:
        return _mean_of_rows(draft, node, x, across, sizes, batch)
    if rows is None:
        x = draft.relaid(source, (*kept, *dims))
        rows = _rows_over(x, kept, dims)
    view = draft.new_view(node, sizes, None, batch)
    step = draft.emit("mean", node, [(rows, x)], Rows(view.buffer, 0, rows.rows, 1, 1), ints={"scatter": [0]})
    return draft.written(node, view, step)


def _rows_of(x: EngineValue, kept: list[int], dims: list[int]) -> Rows | None:
    """Returns the value as rows through `dims` by contiguous positions through the kept dimensions, or None where it does not lie so."""
    outer = views.collapse([x.view.sizes[d] for d in dims], [x.view.strides[d] for d in dims])
    inner = views.collapse([x.view.sizes[d] for d in kept], [x.view.strides[d] for d in kept])
    if outer is None or inner is None or inner[1] != 1 or outer[1] < inner[0] or inner[0] == 1:
        return None
    return Rows(x.view.buffer, x.view.offset, outer[0], outer[1], inner[0])


def _mean_of_rows(draft: Draft, node: Node, x: EngineValue, rows: Rows, sizes: tuple[int, ...], batch: int) -> EngineValue:
    """Emits the mean over rows as a 1x1 convolution to one channel; sums over tokens' features without bringing them into a line."""
    view = draft.new_view(node, sizes, None, batch)
    ints = {"in_size": [rows.rows, 1, rows.positions], "out_size": [1, 1, rows.positions], "kernel": [1, 1], "stride": [1, 1]}
    ints |= {"padding": [0, 0, 0, 0], "dilation": [1, 1], "groups": [1]}
    constants = {"weight": np.full((1, rows.rows), 1 / rows.rows, np.float32), "bias": np.zeros(1, np.float32)}
    step = draft.emit("conv", node, [(rows, x)], Rows(view.buffer, 0, 1, rows.positions, rows.positions), ints=ints, constants=constants)
    return draft.written(node, view, step)


def _rows_over(x: EngineValue, kept: list[int], dims: list[int]) -> Rows | None:
    """Returns the value as rows through the kept dimensions by contiguous positions through `dims`, or None where it does not lie so."""
    outer = views.collapse([x.view.sizes[d] for d in kept], [x.view.strides[d] for d in kept])
    inner_dims = sorted(dims, key=lambda d: -x.view.strides[d])
    inner = views.collapse([x.view.sizes[d] for d in inner_dims], [x.view.strides[d] for d in inner_dims])
    if outer is None or inner is None or inner[1] != 1 or (outer[0] > 1 and outer[1] < inner[0]):
        return None
    return Rows(x.view.buffer, x.view.offset, outer[0], outer[1] if outer[0] > 1 else inner[0], inner[0])


def _reduced_dims(draft: Draft, node: Node) -> tuple[list[int], int | None]:
    """Returns the per-sample dimensions that a node reduces, and `MergedValue.first` of its result."""
    dims = node.arguments.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    found = [draft.along(node.args[0], d) for d in dims or ()]
    sample = [dim for _, dim, _ in found]
    if not sample or None in sample or node.arguments.get("dtype") is not None:
        raise NotOnEngine("a reduction over the batch")
    first = found[0][2]
    if first is not None and not node.arguments["keepdim"]:
        raise NotOnEngine("a batch that shares a dimension with others")
    return sample, first


@lowers("mean")
def mean(draft: Draft, node: Node) -> EngineValue | MergedValue:
    dims, first = _reduced_dims(draft, node)
    return merged(_mean(draft, node, node.args[0], dims, node.arguments["keepdim"]), first)


@lowers("sum")
def sum_(draft: Draft, node: Node) -> EngineValue | MergedValue:
    dims, first = _reduced_dims(draft, node)
    value = _mean(draft, node, node.args[0], dims, node.arguments["keepdim"])
    return merged(_times_count(draft, node, value, node.args[0], dims), first)


def _times_count(draft: Draft, node: Node, value: EngineValue, source: Node, dims: list[int], activation: str = "none") -> EngineValue:
    """Returns activation(value * n), where n elements of `source` were averaged."""
    count = prod(draft.apart(source).view.sizes[d] for d in dims)
    if count == 1 and activation == "none":
        return value
    if (step := value.step) is not None and step.is_open:
        step.scale, step.shift = step.scale * count, step.shift * count
    else:
        length = views.numel(value.view)
        rows = Rows(value.view.buffer, value.view.offset, 1, length, length)
        view = draft.new_view(node, value.view.sizes, None, value.view.batch_dim)
        constants = {"scale": np.full(1, count, np.float32), "shift": np.zeros(1, np.float32)}
        step = draft.emit("affine", node, [(rows, value)], replace(rows, buffer=view.buffer, offset=0), constants=constants)
        value = draft.written(node, view, step)
    if activation != "none":
        step.ints["activation"], step.floats["activation"] = [ACTIVATIONS.index(activation)], [0.0, 0.0]
    return value


@lowers("linalg_vector_norm")
def vector_norm(draft: Draft, node: Node) -> EngineValue | MergedValue:
    arguments, source = node.arguments, node.args[0]
    if arguments["ord"] != 2:
        raise NotOnEngine("another norm than the Euclidean")
    dims, first = _reduced_dims(draft, node)
    x = draft.dense(source)
    rows = views.memory_rows(x.view)
    view = draft.new_view(node, x.view.sizes, views.memory_order(x.view), x.view.batch_dim)
    output = Rows(view.buffer, 0, rows.rows, rows.positions, rows.positions)
    floats = {"activation": [0.0, 0.0]}
    draft.emit("unary", node, [(rows, x)], output, ints={"activation": [ACTIVATIONS.index("square")]}, floats=floats)
    draft.values[node] = merged(EngineValue(view, draft.site_of(node)), first)
    value = _mean(draft, node, node, dims, arguments["keepdim"])
    return merged(_times_count(draft, node, value, source, dims, "sqrt"), first)


def _planes(draft: Draft, node: Node, dims: int) -> tuple[list[int], list[int]]:
    """Returns [C, H, W] of the input and of the result of a pooling over `dims` dimensions; a 1d one has H = 1."""
    x = draft.engine(node.args[0])
    if len(x.view.sizes) != dims + 1 or x.view.batch_dim != 0:
        raise NotOnEngine("an input without batch")
    out = list(node.shape[1:]) if node.shape is not None else [x.view.sizes[0], *pair(node.args[1])[-dims:]]
    if None in out:
        raise NotOnEngine("sizes that depend on the batch")
    inner = list(x.view.sizes)
    return ([inner[0], 1, inner[1]], [out[0], 1, out[1]]) if dims == 1 else (inner, out)


@lowers("max_pool2d", "max_pool1d", "avg_pool2d", "avg_pool1d")
def pool(draft: Draft, node: Node) -> EngineValue:
    arguments, dims = node.arguments, 1 if node.op.endswith("1d") else 2
    in_size, out_size = _planes(draft, node, dims)
    average = node.op.startswith("avg")

    def plane(value: int | list[int], default: int) -> list[int]:
        return [default, pair(value)[-1]] if dims == 1 else pair(value)

    kernel = plane(arguments["kernel_size"], 1)
    stride = plane(arguments["stride"], 1) if arguments["stride"] else kernel
    padding, dilation = plane(arguments["padding"], 0), plane(arguments.get("dilation", 1), 1)
    if average and kernel == in_size[1:] and out_size[1:] == [1, 1] and not any(padding) and arguments.get("divisor_override") is None:
        return _mean(draft, node, node.args[0], list(range(1, dims + 1)), True)
    ints = {"mode": [_AVERAGE if average else _MAX], "in_size": in_size, "out_size": out_size, "kernel": kernel, "stride": stride}
    ints |= {"padding": padding * 2, "dilation": dilation}
    ints |= {"count_include_pad": [int(arguments.get("count_include_pad", True))], "divisor": [arguments.get("divisor_override") or 0]}
    return _emit_planes(draft, node, "pool", ints, out_size)


@lowers("adaptive_avg_pool2d", "adaptive_avg_pool1d", "adaptive_max_pool2d", "adaptive_max_pool1d")
def adaptive_pool(draft: Draft, node: Node) -> EngineValue | ListValue:
    dims, average = (1 if node.op.endswith("1d") else 2), "avg" in node.op
    in_size, out_size = _planes(draft, node, dims)
    if average and out_size[1:] == [1, 1]:
        return _mean(draft, node, node.args[0], list(range(1, dims + 1)), True)
    ints = {"mode": [_AVERAGE if average else _MAX], "in_size": in_size, "out_size": out_size}
    value = _emit_planes(draft, node, "adaptive_pool", ints, out_size)
    return value if average else ListValue((value, None))


def _emit_planes(draft: Draft, node: Node, op: str, ints: dict[str, list[int]], out_size: list[int]) -> EngineValue:
    rows, x = draft.planar(node.args[0], 0)
    sizes = out_size if len(x.view.sizes) == 3 else [out_size[0], out_size[2]]
    view = draft.new_view(node, sizes)
    positions = out_size[1] * out_size[2]
    step = draft.emit(op, node, [(rows, x)], Rows(view.buffer, 0, out_size[0], positions, positions), ints=ints)
    return draft.written(node, view, step)
