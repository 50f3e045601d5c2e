"""Lowers a captured graph and its sites to a plan: walks the nodes once, lays values out, puts gates where they stand, places the memory.

What the engine runs is in the tables of `lowering/attention.py`, `elementwise.py`, `mixing.py`, `normalize.py`, `pooling.py`,
`products.py`, `resample.py`, `shapes.py` and `transposed.py`. Every other node - an operation not listed, another type than float32, sizes
that depend on the batch, samples that are mixed - is run by PyTorch between the engine's steps, on the same memory.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dynprune.graph.capture import BATCH, Graph, Node
from dynprune.graph.sites import Sites
from dynprune.runtime.lowering import attention, elementwise, mixing, normalize, pooling, products, resample, shapes, transposed
from dynprune.runtime.lowering.assemble import assemble, settle_outputs
from dynprune.runtime.lowering.draft import Draft
from dynprune.runtime.lowering.gating import Gates, check_branches
from dynprune.runtime.lowering.registry import HANDLERS, POSITIONLESS
from dynprune.runtime.lowering.sparse import mark_sparse
from dynprune.runtime.lowering.uniform import batch_uniform
from dynprune.runtime.lowering.values import ConstantValue, DraftValue, EngineValue, MergedValue, NotOnEngine, TorchValue
from dynprune.runtime.plan import Plan, View
from dynprune.runtime.views import dense_strides

_NEW_TENSORS = frozenset({"new_zeros", "new_ones", "new_full"})  # take from their argument no more than the dtype
_TABLES = (attention, elementwise, mixing, normalize, pooling, products, resample, shapes, transposed)  # importing them fills HANDLERS


def lower(graph: Graph, sites: Sites) -> Plan:
    """Returns the plan that computes `graph` and gates those of `sites` that the engine can; the others are in `Plan.ungated`.

    Weights that nothing was folded into share memory with the model's parameters, so a plan is only good for the weights it was
    lowered with.

    Args:
        graph: a captured model. Where its batch size is not free, PyTorch runs every node and nothing is gated.
        sites: what `find_sites(graph)` found, or a part of it.
    """
    kept, ungated, uniform = sites.sites, [], batch_uniform(graph)
    if not graph.dynamic_batch:
        ungated = [(site.name, f"the model only takes a batch of {graph.batch_size}, so PyTorch runs it") for site in kept]
        kept = ()
    while True:
        draft = Draft(graph, kept, sites.node_macs)
        draft.values.update(uniform)
        inputs = [_enter_input(draft, node) for node in graph.inputs]
        _walk(draft)
        outputs = settle_outputs(draft)
        check_branches(draft)
        if not draft.dropped:
            plan = assemble(draft, inputs, outputs, None if graph.dynamic_batch else graph.batch_size, ungated)
            mark_sparse(plan.steps)
            return plan
        ungated += [(kept[i].name, reason) for i, reason in sorted(draft.dropped.items())]
        kept = tuple(site for i, site in enumerate(kept) if i not in draft.dropped)


def _enter_input(draft: Draft, node: Node) -> View:
    """Gives an input of the model its buffer and its value, and returns where it lies."""
    has_batch = bool(node.shape) and node.shape[0] == BATCH
    sizes = node.shape[1:] if has_batch else node.shape
    elements = prod(sizes) * (2 if node.dtype == torch.int64 else 1)  # of f32
    view = View(draft.new_buffer(node.name, elements, "input"), 0, sizes, dense_strides(sizes))
    if has_batch and node.dtype == torch.int64:
        draft.indices[node] = view
    readable = has_batch and draft.graph.dynamic_batch and node.dtype == torch.float32
    draft.values[node] = EngineValue(view) if readable else TorchValue(None)
    return view


def _walk(draft: Draft) -> None:
    """Gives every node a value, in order, and emits the steps and gates on the way."""
    gates = Gates(draft)
    for node in draft.graph.nodes:
        if node.op == "constant":
            draft.values[node] = ConstantValue(node.tensor)
            continue
        gates.before(node)  # of one too whose value is known: a branch may begin with a mask that only it reads
        if node.op != "input" and node not in draft.values:
            draft.values[node] = _value_of(draft, node)
            products.follow_indices(draft, node)


def _value_of(draft: Draft, node: Node) -> DraftValue:
    """Returns the value of a node: computed now if no input changes it, else by the engine if it can, else by PyTorch."""
    if _is_constant(draft, node):
        return _computed(draft, node)
    handler = HANDLERS.get(node.op)
    if handler is not None and draft.graph.dynamic_batch and node.dtype in (None, torch.float32):
        try:
            if node.op not in POSITIONLESS:
                return handler(draft, node)
            with draft.parted(node) as first:
                value = handler(draft, node)
            return value if first is None else MergedValue(value, first)
        except NotOnEngine:
            pass
    return draft.torch_step(node)


def _is_constant(draft: Draft, node: Node) -> bool:
    if node.op in _NEW_TENSORS and len(node.inputs) == 1 and node.shape is not None and not {None, BATCH}.intersection(node.shape):
        return True
    values = [draft.values[used] for used in node.inputs]
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return not random and all(isinstance(value, ConstantValue) and not value.repeats for value in values)


def _computed(draft: Draft, node: Node) -> ConstantValue:
    def tensor_of(item: Any) -> Any:
        if not isinstance(item, Node):
            return item
        value = draft.values[item]
        return value.value if isinstance(value, ConstantValue) else torch.empty(0, dtype=item.dtype)

    args, kwargs = pytree.tree_map(tensor_of, (node.args, node.kwargs))
    with torch.no_grad():
        return ConstantValue(node.target(*args, **kwargs))
