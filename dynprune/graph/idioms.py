"""Spells what models write out of small operations as the one operation that it is.

| written | becomes |
| --- | --- |
| addmm(bias, x.view(-1, in), weight).view(..., out), GPT-2's linear layer | linear(x, weight.t(), bias) |
| 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) | gelu(x, approximate="tanh") |
| x rsqrt(mean(x^2) + eps) over the last dimension, times a weight | rms_norm(x, weight, eps), which casts x to float32 and back itself |
| einsum of two operands that sums over one index | matmul of the two, permuted |
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

aten = torch.ops.aten

_CASTS = frozenset({aten.to.dtype, aten._to_copy.default})
_CLOSE = 1e-6
"""Factors written in the models differ from the exact ones by rounding only."""


def restore_idioms(graph: fx.Graph) -> None:
    """Rewrites a graph of functional operations in place; nodes that nobody reads any more are removed."""
    for node in list(graph.nodes):
        if node.target is aten.addmm.default:
            _restore_linear(graph, node)
        elif node.target is aten.mul.Tensor:
            _restore_gelu(graph, node)
            _restore_rms_norm(graph, node)
        elif node.target is aten.einsum.default:
            _restore_product(graph, node)


def _restore_product(graph: fx.Graph, node: fx.Node) -> None:
    """einsum("bhid,bhjd->bhij", [a, b]) and the like; an operand without the others' leading indices, as a weight is, may come second."""
    equation, operands = node.args[0].replace(" ", ""), node.args[1]
    before, _, result = equation.partition("->")
    parts = before.split(",")
    if len(parts) != 2 or "." in equation or not result or any(len(set(part)) != len(part) for part in (*parts, result)):
        return
    first, second = map(set, parts)
    summed, shared = (first | second) - set(result), first & second & set(result)
    own, other = (sorted(letters - shared - summed, key=result.index) for letters in (first, second))
    if len(summed) != 1 or not summed <= first & second or len(other) != 1 or (len(own) != 1 and shared):
        return
    lead = sorted(shared, key=result.index)
    orders = ([*lead, *own, *summed], [*lead, *summed, *other])
    with graph.inserting_before(node):
        turned = [_permuted(graph, node, x, part, order) for x, part, order in zip(operands, parts, orders, strict=True)]
        product = graph.call_function(aten.matmul.default, tuple(turned))
        product.meta = dict(node.meta, val=turned[0].meta["val"] @ turned[1].meta["val"])
        product = _permuted(graph, node, product, [*lead, *own, *other], list(result))
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _permuted(graph: fx.Graph, place: fx.Node, x: fx.Node, order: Sequence[str], wanted: Sequence[str]) -> fx.Node:
    dims = [list(order).index(letter) for letter in wanted]
    if dims == list(range(len(dims))):
        return x
    node = graph.call_function(aten.permute.default, (x, dims))
    node.meta = dict(place.meta, val=x.meta["val"].permute(dims))
    return node


def _restore_linear(graph: fx.Graph, node: fx.Node) -> None:
    if node.kwargs or len(node.users) != 1:
        return
    bias, rows, weight = node.args
    (back,) = node.users
    if rows.target is not aten.reshape.default or back.target is not aten.reshape.default or weight.op != "placeholder":
        return
    x = rows.args[0]
    before, flat, after = (value.meta["val"].shape for value in (x, rows, back))
    if len(flat) != 2 or str(before[:-1]) != str(after[:-1]) or str(before[-1]) != str(flat[-1]):
        return
    with graph.inserting_before(back):
        turned = graph.call_function(aten.t.default, (weight,))
        turned.meta = dict(node.meta, val=weight.meta["val"].t())
        linear = graph.call_function(aten.linear.default, (x, turned, bias))
        linear.meta = dict(node.meta, val=back.meta["val"])
    back.replace_all_uses_with(linear)
    _erase_unread(graph, back)


def _restore_gelu(graph: fx.Graph, node: fx.Node) -> None:
    for half, other in (node.args, node.args[::-1]) if len(node.args) == 2 else ():
        x = _times(half, 0.5)
        tanh = _plus_number(other, 1.0)
        if x is None or tanh is None or tanh.target is not aten.tanh.default:
            continue
        inner = _times(tanh.args[0], math.sqrt(2 / math.pi))
        if inner is None or inner.target is not aten.add.Tensor or inner.kwargs or len(inner.args) != 2:
            continue
        cubes = [_times(value, 0.044715) for value in inner.args if value is not x]
        if len(cubes) != 1 or cubes[0] is None or cubes[0].target is not aten.pow.Tensor_Scalar or tuple(cubes[0].args) != (x, 3.0):
            continue
        with graph.inserting_before(node):
            gelu = graph.call_function(aten.gelu.default, (x,), {"approximate": "tanh"})
            gelu.meta = dict(node.meta)
        node.replace_all_uses_with(gelu)
        _erase_unread(graph, node)
        return


def _restore_rms_norm(graph: fx.Graph, node: fx.Node) -> None:
    """The product with the reciprocal of the root mean square; or that of a norm, which nothing else reads, with its weight."""
    for x, other in (node.args, node.args[::-1]) if len(node.args) == 2 else ():
        if not all(isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor) for value in (x, other)):
            continue
        size = x.meta["val"].shape[-1:]
        norm, eps = _uncast(x), _eps_of_norm(x, other)
        if eps is not None:
            args = (x, list(size), None, eps)
        elif norm.target is aten.rms_norm.default and norm.args[2] is None and len(norm.users) == len(x.users) == 1:
            source = _uncast(norm.args[0])
            weight = other.meta["val"]
            if tuple(weight.shape) != tuple(size) or not source.meta["val"].dtype == weight.dtype == node.meta["val"].dtype:
                continue
            args = (source, norm.args[1], other, norm.args[3])
        else:
            continue
        with graph.inserting_before(node):
            whole = graph.call_function(aten.rms_norm.default, args)
            whole.meta = dict(node.meta)
        node.replace_all_uses_with(whole)
        _erase_unread(graph, node)
        return


def _eps_of_norm(x: fx.Node, factor: fx.Node) -> float | None:
    """Returns eps where `factor` is rsqrt(mean(x^2) + eps) over the last dimension; None if it is not that."""
    if factor.target is not aten.rsqrt.default or not isinstance(factor.args[0], fx.Node) or not isinstance(x.meta["val"].shape[-1], int):
        return None
    total = factor.args[0]
    if total.target is not aten.add.Tensor or total.kwargs or len(total.args) != 2 or not isinstance(total.args[1], float):
        return None
    mean, eps = total.args
    last = (-1, x.meta["val"].dim() - 1)
    if (
        mean.target is not aten.mean.dim
        or mean.kwargs
        or tuple(mean.args[2:]) != (True,)
        or mean.args[1][0] not in last
        or len(mean.args[1]) > 1
    ):
        return None
    square = mean.args[0]
    return eps if square.target is aten.pow.Tensor_Scalar and tuple(square.args) == (x, 2) else None


def _uncast(node: fx.Node) -> fx.Node:
    """Returns what a node was cast from, or the node itself."""
    return node.args[0] if node.target in _CASTS else node


def _times(node: object, factor: float) -> fx.Node | None:
    """Returns x of a node x * factor; None if it is not that."""
    if not isinstance(node, fx.Node) or node.target is not aten.mul.Tensor or len(node.args) != 2:
        return None
    for x, number in (node.args, node.args[::-1]):
        if isinstance(x, fx.Node) and isinstance(number, int | float) and math.isclose(number, factor, rel_tol=_CLOSE):
            return x
    return None


def _plus_number(node: object, number: float) -> fx.Node | None:
    """Returns x of a node x + number; None if it is not that."""
    if not isinstance(node, fx.Node) or node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    for x, added in (node.args, node.args[::-1]):
        if isinstance(x, fx.Node) and isinstance(added, int | float) and added == number:
            return x
    return None


def _erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    """Removes a node, and what only it read."""
    if node.users or node.op != "call_function":
        return
    read = node.all_input_nodes
    graph.erase_node(node)
    for value in read:
        _erase_unread(graph, value)
