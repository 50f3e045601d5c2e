"""Products of two values that both depend on the input.

| ATen | becomes |
| --- | --- |
| matmul, bmm of two values | matmul, lanes along whichever operand's memory is contiguous |
| embedding of an input of int64, or of a part of one that is contiguous | embedding |
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dynprune.graph.capture import Node
from dynprune.runtime import views
from dynprune.runtime.lowering import mixing
from dynprune.runtime.lowering.draft import Draft, as_array, extent
from dynprune.runtime.lowering.registry import lowers
from dynprune.runtime.lowering.values import EngineValue, MergedValue, NotOnEngine, merged
from dynprune.runtime.plan import Rows, View

_MAX_BATCH_RANK = 4


@lowers("matmul", "mm", "bmm")
def matmul(draft: Draft, node: Node) -> EngineValue | MergedValue:
    left, right = node.args[:2]
    if node.op != "bmm" and draft.constant(right) is not None:
        with draft.parted(node) as first:
            value = mixing.matrix_product(draft, node)
        return merged(value, first)
    first = draft.shared_dimension((left, right))
    return merged(product(draft, node, draft.apart(left), draft.apart(right)), first)


def product(draft: Draft, node: Node, left: EngineValue, right: EngineValue) -> EngineValue:
    """Emits the product over the last dimension of `left` and the last but one of `right`; the dimensions before are matrices."""
    a, b = left.view, right.view
    rank = max(len(a.sizes), len(b.sizes))
    if min(len(a.sizes), len(b.sizes)) < 2 or a.batch_dim + rank - len(a.sizes) != b.batch_dim + rank - len(b.sizes):
        raise NotOnEngine("vectors, or batches in different places")
    if a.batch_dim > len(a.sizes) - 2 or a.sizes[-1] != b.sizes[-2]:
        raise NotOnEngine("a product over the batch")
    lead = _broadcast(a.sizes[:-2], b.sizes[:-2])
    left_lead, right_lead = (views.expanded(_leading(view), lead) for view in (a, b))
    rows, inner, columns = a.sizes[-2], a.sizes[-1], b.sizes[-1]
    across = a.strides[-2] == 1 and rows > 1 and b.strides[-1] != 1  # lanes along the rows of the left operand
    order = (*range(len(lead)), rank - 1, rank - 2) if across else tuple(range(rank))
    view = draft.new_view(node, (*lead, rows, columns), order, a.batch_dim + rank - len(a.sizes))
    batch, strides = views.simplified(lead, left_lead.strides, right_lead.strides, view.strides[:-2])
    left_strides, right_strides, out_strides = strides
    if len(batch) > _MAX_BATCH_RANK:
        raise NotOnEngine(f"matrices over more than {_MAX_BATCH_RANK} dimensions")
    ints = {"batch": list(batch), "inner": [inner]}
    if across:
        ints |= {"rows": [columns], "positions": [rows]}
        ints |= {"left_strides": [*right_strides, b.strides[-1], b.strides[-2]], "right_strides": [*left_strides, a.strides[-1], 1]}
        ints |= {"out_strides": [*out_strides, view.strides[-1], 1]}
        reads = [(extent(b), right), (extent(a), left)]
    else:
        ints |= {"rows": [rows], "positions": [columns]}
        ints |= {
            "left_strides": [*left_strides, a.strides[-2], a.strides[-1]],
            "right_strides": [*right_strides, b.strides[-2], b.strides[-1]],
        }
        ints |= {"out_strides": [*out_strides, view.strides[-2], 1]}
        reads = [(extent(a), left), (extent(b), right)]
    step = draft.emit("matmul", node, reads, extent(view), ints=ints)
    return draft.written(node, view, step)


def _leading(view: View) -> View:
    return replace(view, sizes=view.sizes[:-2], strides=view.strides[:-2])


def _broadcast(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(first, second))
    except RuntimeError:
        raise NotOnEngine("sizes that do not broadcast sample by sample") from None


@lowers("embedding")
def embedding(draft: Draft, node: Node) -> EngineValue:
    table, indices = draft.constant(node.args[0]), node.args[1]
    if table is None or table.dtype != torch.float32 or not isinstance(indices, Node) or indices not in draft.indices:
        raise NotOnEngine("numbers that are no input of the model, or a table that is computed")
    source, sizes = draft.indices[indices], draft.sizes(node)
    rank = len(sizes)
    view = draft.new_view(node, sizes, (rank - 1, *range(rank - 1)))
    tokens = views.numel(view) // sizes[-1]
    reads = [(Rows(source.buffer, 2 * source.offset, 1, 2 * tokens, 2 * tokens), EngineValue(source))]
    output = Rows(view.buffer, 0, sizes[-1], tokens, tokens)
    step = draft.emit("embedding", node, reads, output, ints={"entries": [table.shape[0]]}, constants={"table": as_array(table)})
    return draft.written(node, view, step)


def follow_indices(draft: Draft, node: Node) -> None:
    """Notes where the part of an int64 input lies that a node selects, if it is contiguous; for other readers PyTorch makes it too."""
    source = node.args[0] if node.args else None
    view, arguments = draft.indices.get(source) if isinstance(source, Node) else None, node.arguments
    if view is None or node.op not in ("select", "slice") or node.shape is None or node.dtype != torch.int64:
        return
    dim = arguments["dim"] % len(source.shape) - 1
    if dim < 0:
        return
    size = view.sizes[dim]
    if node.op == "select":
        part = views.sliced(view, dim, arguments["index"] % size, 1)
        part = replace(part, sizes=part.sizes[:dim] + part.sizes[dim + 1 :], strides=part.strides[:dim] + part.strides[dim + 1 :])
    else:
        first, last, step = slice(arguments["start"], arguments["end"], arguments["step"]).indices(size)
        part = views.sliced(view, dim, first, max(0, last - first)) if step == 1 else None
    if part is not None and views.numel(part) and views.collapse(part.sizes, part.strides) in ((views.numel(part), 1), (1, 1)):
        draft.indices[node] = part
