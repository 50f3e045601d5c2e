"""Values that depend on the batch size alone and are the same for every sample: expanded masks and position numbers.

A decoder builds its causal mask with dozens of integer operations on tensors that hold nothing of the input but its batch size. They
are evaluated here, once, for two batch sizes: what comes out the same for both, and for every sample of each, is a constant.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dynprune.graph.capture import BATCH, Graph, Node
from dynprune.runtime.lowering.values import ConstantValue

_READ_SIZES_ONLY = frozenset({
    "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like", "new_empty_strided",
})  # fmt: skip
"""Operations whose result does not depend on what the tensor given first holds."""
_UNFILLED = frozenset({"new_empty", "empty_like", "empty", "new_empty_strided"})
_PROBES = (2, 3)
MAX_ELEMENTS = 1 << 24
"""Larger values are not evaluated ahead."""


def batch_uniform(graph: Graph) -> dict[Node, ConstantValue]:
    """Returns the values that depend on the batch size at most and are equal for all samples; only of graphs with a free batch size."""
    if not graph.dynamic_batch:
        return {}
    first, second = (_evaluate(graph, batch) for batch in _PROBES)
    found = {}
    for node in graph.nodes:
        if node.varies and isinstance(first.get(node), torch.Tensor) and isinstance(second.get(node), torch.Tensor):
            value = _constant(node, first[node], second[node])
            if value is not None:
                found[node] = value
    return found


def _evaluate(graph: Graph, batch: int) -> dict[Node, Any]:
    """Returns what every node that depends on sizes alone is at this batch size; what cannot be evaluated is left out."""
    values: dict[Node, Any] = {}
    for node in graph.nodes:
        if node.op == "constant":
            values[node] = node.tensor
        elif node.op == "sym_size":
            source, dim = node.args
            if source.shape is not None and source.shape[dim] == BATCH:
                values[node] = batch
        elif node.op != "input" and _is_evaluated(node, values):
            args, kwargs = pytree.tree_map(lambda item: _operand(item, values, batch), (node.args, node.kwargs))
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    values[node] = node.target(*args, **kwargs)
            except Exception:
                continue
    return values


def _is_evaluated(node: Node, values: dict[Node, Any]) -> bool:
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    needed = node.inputs
    if node.op in _READ_SIZES_ONLY and node.args[0].shape is not None and None not in node.args[0].shape:
        needed = [used for used in needed if used is not node.args[0]]
    small = node.sample_size <= MAX_ELEMENTS
    return not random and small and node.op not in _UNFILLED and all(used in values for used in needed)


def _operand(item: Any, values: dict[Node, Any], batch: int) -> Any:
    if not isinstance(item, Node):
        return item
    if item in values:
        return values[item]
    return torch.zeros([batch if size == BATCH else size for size in item.shape], dtype=item.dtype)


def _constant(node: Node, first: torch.Tensor, second: torch.Tensor) -> ConstantValue | None:
    if first.dtype != second.dtype or first.ndim != second.ndim:
        return None
    if first.shape == second.shape:
        return ConstantValue(first) if torch.equal(first, second) else None
    if node.shape and node.shape[0] == BATCH and first.shape[1:] == second.shape[1:]:
        row = first[:1]
        if torch.equal(row.expand_as(first), first) and torch.equal(row.expand_as(second), second):
            return ConstantValue(row.clone(), repeats=True)
    return None
