"""Operations that treat each element alone, and constants per channel.

| ATen | becomes |
| --- | --- |
| relu, relu6, hardtanh, clamp, hardswish, hardsigmoid, sigmoid, silu, gelu, tanh | activation of the step before, else unary |
| leaky_relu, prelu (one slope), elu, softplus, mish, exp, log, sqrt, rsqrt, neg | the same |
| abs, square, pow (2, 1/2, -1/2, -1), reciprocal, erf | the same |
| pow (3), addcmul of constants | two binary steps; multiplication and addition of the constants |
| add, sub, rsub, mul, div with a number or a constant per channel | folded into the weights before, else affine |
| add of two values | residual of the convolution that wrote one of them, else binary |
| add, sub, mul, div, maximum, minimum of two values or with any other constant | binary |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np

from dynprune.graph.capture import Node
from dynprune.runtime import views
from dynprune.runtime.lowering.draft import Draft
from dynprune.runtime.lowering.registry import lowers
from dynprune.runtime.lowering.values import EngineValue, NotOnEngine
from dynprune.runtime.plan import Rows

ACTIVATIONS = (
    "none", "clamp", "hardswish", "hardsigmoid", "sigmoid", "silu", "gelu", "gelu_tanh", "tanh", "leaky_relu", "elu", "exp", "softplus",
    "mish", "sqrt", "rsqrt", "neg", "abs", "square", "reciprocal", "erf", "log",
)  # fmt: skip
"""The order of `Activation` in csrc/base/types.h."""

BINARY_KINDS = ("add", "sub", "mul", "div", "max", "min")
"""The order of ints["kind"] of a binary step."""

_PLAIN = frozenset(ACTIVATIONS) - {"none", "clamp", "gelu", "gelu_tanh", "leaky_relu", "elu", "softplus"}
_POWERS = {2: "square", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal", 1: "none"}
_ACTIVATED = frozenset({"conv", "linear", "depthwise", "affine", "binary"})


def _activation_of(draft: Draft, node: Node) -> tuple[str, float, float]:
    """Returns (kind, low, high) of the activation that a node is."""
    arguments = node.arguments
    if node.op in _PLAIN:
        return node.op, 0.0, 0.0
    match node.op:
        case "relu":
            return "clamp", 0.0, inf
        case "relu6":
            return "clamp", 0.0, 6.0
        case "hardtanh":
            return "clamp", float(arguments["min_val"]), float(arguments["max_val"])
        case "clamp" | "clamp_min" | "clamp_max" | "clip":
            low, high = arguments.get("min"), arguments.get("max")
            if all(bound is None or isinstance(bound, int | float) for bound in (low, high)):
                return "clamp", -inf if low is None else float(low), inf if high is None else float(high)
        case "gelu":
            return ("gelu_tanh" if arguments["approximate"] == "tanh" else "gelu"), 0.0, 0.0
        case "leaky_relu":
            return "leaky_relu", float(arguments["negative_slope"]), 0.0
        case "prelu":
            slope = draft.constant(arguments["weight"])
            if slope is not None and slope.numel() == 1:
                return "leaky_relu", float(slope), 0.0
        case "elu":
            if arguments["scale"] == 1 and arguments["input_scale"] == 1:
                return "elu", float(arguments["alpha"]), 0.0
        case "softplus":
            if arguments["beta"] == 1 and arguments["threshold"] == 20:
                return "softplus", 0.0, 0.0
        case "pow":
            if arguments.get("exponent") == 3:
                return "cube", 0.0, 0.0
            if arguments.get("exponent") in _POWERS:
                return _POWERS[arguments["exponent"]], 0.0, 0.0
    raise NotOnEngine("an activation, or parameters of one, without a kernel")


_PARAMETRIC = (
    "relu",
    "relu6",
    "hardtanh",
    "clamp",
    "clamp_min",
    "clamp_max",
    "clip",
    "gelu",
    "leaky_relu",
    "prelu",
    "elu",
    "softplus",
    "pow",
)


@lowers(*_PLAIN, *_PARAMETRIC, positionless=True)
def activate(draft: Draft, node: Node) -> EngineValue:
    kind, low, high = _activation_of(draft, node)
    if kind == "cube":
        return _cubed(draft, node)
    x = draft.engine(node.args[0])
    if kind == "none":
        return draft.viewed(node, x, x.view)
    ints, floats = {"activation": [ACTIVATIONS.index(kind)]}, {"activation": [low, high]}
    step = x.step
    if step is not None and step.op in _ACTIVATED and "activation" not in step.ints and x.site == draft.site_of(node):
        step.ints |= ints
        step.floats |= floats
        step.nodes.append(node.name)
        return draft.written(node, x.view, step)
    x = draft.dense(node.args[0])
    rows = views.memory_rows(x.view)
    if rows.positions == 1 and rows.row_stride == 1 and x.site < 0:
        rows = replace(rows, rows=1, row_stride=rows.rows, positions=rows.rows)
    view = draft.new_view(node, x.view.sizes, views.memory_order(x.view), x.view.batch_dim)
    output = Rows(view.buffer, 0, rows.rows, rows.positions, rows.positions)
    step = draft.emit("unary", node, [(rows, x)], output, ints=ints, floats=floats)
    return draft.written(node, view, step)


def _cubed(draft: Draft, node: Node) -> EngineValue:
    x = draft.dense(node.args[0])
    draft.values[node] = _binary(draft, node, x, node.args[0], "mul", False, None)
    return _binary(draft, node, x, node, "mul", False, None)


@lowers("addcmul", positionless=True)
def addcmul(draft: Draft, node: Node) -> EngineValue:
    addend, left, right = node.args[:3]
    if node.arguments.get("value", 1) != 1:
        raise NotOnEngine("a scaled product")
    constants = [_constant_operand(draft, item) for item in (addend, left, right)]
    source, factor = (right, constants[1]) if constants[1] is not None else (left, constants[2])
    if constants[0] is None or factor is None:
        raise NotOnEngine("three values")
    draft.values[node] = _with_constant(draft, node, source, factor, "mul", reverse=False)
    return _with_constant(draft, node, node, constants[0], "add", reverse=False)


def scale_rows(draft: Draft, node: Node, source: Node, row_dim: int, scale: np.ndarray, shift: np.ndarray) -> EngineValue:
    """Returns source * scale + shift, one scale and shift per index of `row_dim`: folded into the step before, else an affine step."""
    x = draft.apart(source)
    step = x.step
    if step is not None and step.is_open and x.site == draft.site_of(node):
        same_rows = views.memory_order(x.view)[0] == row_dim and len(scale) == x.view.sizes[row_dim] == step.output.rows
        if len(scale) == 1 or same_rows:
            step.scale = step.scale * scale
            step.shift = step.shift * scale + shift
            step.nodes.append(node.name)
            return draft.written(node, x.view, step)
    rows, x = draft.planar(source, row_dim)
    view = draft.new_view(node, x.view.sizes, (row_dim, *(d for d in range(len(x.view.sizes)) if d != row_dim)), x.view.batch_dim)
    constants = {"scale": np.ones(rows.rows, np.float32), "shift": np.zeros(rows.rows, np.float32)}
    step = draft.emit("affine", node, [(rows, x)], Rows(view.buffer, 0, rows.rows, rows.positions, rows.positions), constants=constants)
    step.scale, step.shift = step.scale * scale, step.shift + shift
    return draft.written(node, view, step)


@lowers("add", "sub", "rsub", "mul", "div", "maximum", "minimum", "max", "min", positionless=True)
def combine(draft: Draft, node: Node) -> EngineValue:
    left, right = _operands(node)
    kind = {"rsub": "sub", "maximum": "max", "minimum": "min"}.get(node.op, node.op)
    if node.op == "rsub":
        left, right = right, left
    constants = [_constant_operand(draft, item) for item in (left, right)]
    if constants[0] is not None:
        return _with_constant(draft, node, right, constants[0], kind, reverse=True)
    if constants[1] is not None:
        return _with_constant(draft, node, left, constants[1], kind, reverse=False)
    return _of_two(draft, node, left, right, kind)


def _operands(node: Node) -> tuple[Any, Any]:
    arguments = node.arguments
    if len(node.args) < 2 or arguments.get("alpha", 1) != 1 or arguments.get("rounding_mode") is not None:
        raise NotOnEngine("alpha or rounding, or a reduction")
    if node.op in ("max", "min") and not (isinstance(node.args[1], Node) and node.shape is not None):
        raise NotOnEngine("a reduction")
    return node.args[0], node.args[1]


def _constant_operand(draft: Draft, item: Any) -> np.ndarray | None:
    """Returns a number or constant tensor as a f64 array that broadcasts against samples with batch, or None for what is neither."""
    if isinstance(item, bool) or not isinstance(item, int | float | Node):
        raise NotOnEngine("an operand that is neither number nor tensor")
    if not isinstance(item, Node):
        return np.float64(item).reshape(())
    tensor = draft.constant(item)
    return None if tensor is None else tensor.detach().double().cpu().numpy()


def _with_constant(draft: Draft, node: Node, source: Node, constant: np.ndarray, kind: str, *, reverse: bool) -> EngineValue:
    x = draft.engine(source)
    if len(source.shape) == len(x.view.sizes):  # the batch shares a dimension, which `x` has apart
        shared = constant.ndim - len(source.shape) + source.shape.index(None)
        if shared >= 0 and constant.shape[shared] != 1:
            raise NotOnEngine("a constant along a dimension that the batch shares")
        constant = np.expand_dims(constant, shared) if shared >= 0 else constant
    sizes = _without_batch(constant, x.view.batch_dim, len(x.view.sizes) + 1)
    constant = constant.reshape(sizes)
    if np.broadcast(constant, np.empty(x.view.sizes, np.bool_)).shape != x.view.sizes:
        raise NotOnEngine("a constant larger than the value")
    varying = [d + len(x.view.sizes) - len(sizes) for d, n in enumerate(sizes) if n > 1]
    row_dim = varying[0] if varying else next(iter(views.memory_order(x.view)), None)
    if len(varying) <= 1 and row_dim is not None and views.as_rows(x.view, row_dim) and _is_affine(kind, reverse):
        scale, shift = _as_affine(constant.reshape(-1), kind, reverse)
        return scale_rows(draft, node, source, row_dim, scale, shift)
    return _binary_with_constant(draft, node, source, constant, kind, reverse)


def _without_batch(constant: np.ndarray, batch_dim: int, rank: int) -> tuple[int, ...]:
    """Returns the constant's sizes as they broadcast against one sample."""
    sizes = list(constant.shape)
    batch = batch_dim - (rank - len(sizes))
    if len(sizes) > rank or (batch >= 0 and sizes[batch] != 1):
        raise NotOnEngine("a constant with a batch of its own")
    return tuple(n for d, n in enumerate(sizes) if d != batch)


def _is_affine(kind: str, reverse: bool) -> bool:
    return kind in ("add", "sub", "mul") or (kind == "div" and not reverse)


def _as_affine(constant: np.ndarray, kind: str, reverse: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns (scale, shift) of value `kind` constant, or of constant `kind` value."""
    one, zero = np.ones_like(constant), np.zeros_like(constant)
    match kind:
        case "add":
            return one, constant
        case "sub":
            return (-one, constant) if reverse else (one, -constant)
        case "mul":
            return constant, zero
    return 1.0 / constant, zero


def _binary_with_constant(draft: Draft, node: Node, source: Node, constant: np.ndarray, kind: str, reverse: bool) -> EngineValue:
    x = draft.dense(source)
    order = views.memory_order(x.view)
    rows = views.memory_rows(x.view)
    full = constant.reshape((1,) * (len(x.view.sizes) - constant.ndim) + constant.shape).transpose(order)
    leading = full.shape[0] if full.ndim else 1
    inner = full.shape[1:]
    if any(n > 1 for n in inner):
        full = np.broadcast_to(full, (leading, *(x.view.sizes[d] for d in order[1:])))
    operand = np.ascontiguousarray(full.reshape(leading, -1), dtype=np.float32)
    return _emit_binary(draft, node, x, [(rows, x)], kind, reverse, {"operand": operand})


def _of_two(draft: Draft, node: Node, left: Node, right: Node, kind: str) -> EngineValue:
    values = draft.engine(left), draft.engine(right)
    sizes = tuple(np.broadcast_shapes(*(value.view.sizes for value in values)))
    rank = len(sizes) + 1
    if len({value.view.batch_dim + rank - len(value.view.sizes) - 1 for value in values}) != 1:
        raise NotOnEngine("batches in different places")
    if kind == "add":
        fused = _as_residual(draft, node, left, right)
        if fused is not None:
            return fused
    full = [value.view.sizes == sizes for value in values]
    if not any(full):
        left_view = views.expanded(values[0].view, sizes)
        view = draft.new_view(node, sizes, None, rank - 1 - len(values[0].view.sizes) + values[0].view.batch_dim)
        draft.copy(node, replace(values[0], view=left_view), view)
        first = EngineValue(view)
        return _binary(draft, node, first, right, kind, False, None)
    branch = _branch_of_addition(draft, node)
    inside = branch is not None and left.name in draft.sites[branch].nodes
    swap = full[1] and (inside or not full[0])
    if inside and not swap:
        draft.drop(branch, f"'{node.name}' broadcasts what the branch is added to")
    first, second = (right, left) if swap else (left, right)
    return _binary(draft, node, draft.dense(first), second, kind, swap and kind in ("sub", "div"), branch)


def _binary(draft: Draft, node: Node, a: EngineValue, second: Node, kind: str, reverse: bool, branch: int | None) -> EngineValue:
    order = views.memory_order(a.view)
    b = draft.engine(second)
    rows = views.rows_like(views.expanded(b.view, a.view.sizes), order)
    if rows is None and b.view.sizes == a.view.sizes:
        b = draft.relaid(second, order)
        rows = views.rows_like(b.view, order)
    elif rows is None:
        view = draft.new_view(node, a.view.sizes, order, a.view.batch_dim)
        draft.copy(node, replace(b, view=views.expanded(b.view, a.view.sizes)), view)
        b, rows = EngineValue(view), views.rows_like(view, order)
    value = _emit_binary(draft, node, a, [(views.memory_rows(a.view), a), (rows, b)], kind, reverse, {})
    if branch is not None:
        step = draft.steps[-1]
        step.branches |= {branch}
        step.ints["handover"] = [0]
    return value


def _emit_binary(
    draft: Draft,
    node: Node,
    a: EngineValue,
    reads: Sequence[tuple[Rows, EngineValue]],
    kind: str,
    reverse: bool,
    constants: dict[str, np.ndarray],
) -> EngineValue:
    rows = reads[0][0]
    view = draft.new_view(node, a.view.sizes, views.memory_order(a.view), a.view.batch_dim)
    output = Rows(view.buffer, 0, rows.rows, rows.positions, rows.positions)
    ints = {"kind": [BINARY_KINDS.index(kind)], "reverse": [int(reverse)]}
    step = draft.emit("binary", node, reads, output, ints=ints, constants=constants)
    return draft.written(node, view, step)


def _branch_of_addition(draft: Draft, node: Node) -> int | None:
    """Returns the branch site whose result the node adds to its input, or None."""
    return next((i for i, site in enumerate(draft.sites) if site.kind == "branch" and site.add_node == node.name), None)


def _as_residual(draft: Draft, node: Node, left: Node, right: Node) -> EngineValue | None:
    """Adds one operand to the convolution that wrote the other, or returns None where neither was written by one that is still open."""
    branch = _branch_of_addition(draft, node)
    candidates = [(left, right), (right, left)]
    if branch is not None:
        candidates = [pair for pair in candidates if pair[0].name in draft.sites[branch].nodes]
    candidates = [pair for pair in candidates if _takes_residual(draft, *pair)]
    if not candidates:
        return None
    main, other = max(candidates, key=lambda pair: draft.steps.index(draft.engine(pair[0]).step))
    value, residual = draft.engine(main), draft.engine(other)
    step, order = value.step, views.memory_order(value.view)
    if residual.site >= 0:
        return None
    rows = views.rows_like(residual.view, order)
    if rows is None or (rows.rows, rows.positions) != (step.output.rows, step.output.positions) or rows.row_stride == 0:
        rows = views.rows_like(draft.relaid(other, order).view, order)
    step.inputs.append(rows)
    step.nodes.append(node.name)
    draft.steps.remove(step)  # it now runs after what wrote the residual
    draft.steps.append(step)
    return draft.written(node, value.view, step)


def _takes_residual(draft: Draft, main: Node, other: Node) -> bool:
    value, residual = draft.engine(main), draft.engine(other)
    step = value.step
    is_open = step is not None and step.op == "conv" and step.is_open and step.out_site < 0
    is_open = is_open and views.memory_rows(value.view).rows == step.output.rows
    return is_open and main is not other and residual.view.sizes == value.view.sizes
