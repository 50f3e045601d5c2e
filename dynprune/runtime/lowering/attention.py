"""Attention over planar heads.

| ATen | becomes |
| --- | --- |
| scaled_dot_product_attention | attention: heads by tokens by features, any mask, shared keys; dimensions before are groups of heads |
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dynprune.graph.capture import Node
from dynprune.runtime import views
from dynprune.runtime.lowering.draft import Draft, as_array
from dynprune.runtime.lowering.registry import lowers
from dynprune.runtime.lowering.values import ConstantValue, EngineValue, MergedValue, NotOnEngine, merged
from dynprune.runtime.plan import Rows, View


@lowers("scaled_dot_product_attention")
def scaled_dot_product_attention(draft: Draft, node: Node) -> EngineValue | MergedValue:
    arguments = node.arguments
    operands = [arguments[name] for name in ("query", "key", "value")]
    first = draft.shared_dimension(operands)
    views_of = [draft.apart(operand).view for operand in operands]
    query, key, value = (view.sizes for view in views_of)
    if min(map(len, (query, key, value))) < 2 or len({len(query), len(key), len(value)}) != 1:
        raise NotOnEngine("attention over other than heads, tokens and features")
    if query[:-3] != key[:-3] or key[:-2] != value[:-2] or any(view.batch_dim > len(query) - 2 for view in views_of):
        raise NotOnEngine("leading dimensions that differ")
    if arguments["dropout_p"]:
        raise NotOnEngine("dropout")
    outer, heads, key_heads = math.prod(query[:-3]), math.prod(query[-3:-2]), math.prod(key[-3:-2])
    if heads % key_heads or (heads != key_heads and not arguments.get("enable_gqa")):
        raise NotOnEngine("fewer heads in the keys")
    reads = [_planar_heads(draft, operand) for operand in operands]
    mask, constants = _mask(draft, node, first, reads[0][1].view, query, key[-2]), {}
    if isinstance(mask, np.ndarray):
        constants["mask"] = mask
    elif mask is not None:
        reads.append(mask)
    tokens, features = len(query) - 2, len(query) - 1
    lead = tuple(range(tokens))
    view = draft.new_view(node, (*query[:-1], value[-1]), (*lead, features, tokens), reads[0][1].view.batch_dim)
    scale = arguments.get("scale")
    ints = {"outer": [outer], "heads": [heads], "causal": [int(bool(arguments["is_causal"]))]}
    if key_heads != heads:
        ints["key_heads"] = [key_heads]
    floats = {"scale": [1 / math.sqrt(query[-1]) if scale is None else float(scale)]}
    step = draft.emit("attention", node, reads, _head_rows(view), ints=ints, floats=floats, constants=constants)
    result = draft.written(node, view, step)
    return merged(result, first)


def _planar_heads(draft: Draft, node: Node) -> tuple[Rows, EngineValue]:
    """Returns the node's value as rows of heads times features by tokens; copies it if need be."""
    rank = len(node.shape) - 1
    x = draft.apart(node) if isinstance(draft.values[node], MergedValue) else draft.engine(node, (*range(rank - 2), rank - 1, rank - 2))
    rows = _head_rows(x.view)
    if rows is None:
        rank = len(x.view.sizes)
        x = draft.relaid(node, (*range(rank - 2), rank - 1, rank - 2))
        rows = _head_rows(x.view)
    return rows, x


def _head_rows(view: View) -> Rows | None:
    *lead, tokens, features = view.sizes
    *lead_strides, token_stride, feature_stride = view.strides
    across = views.collapse((*lead, features), (*lead_strides, feature_stride))
    if across is None or (tokens > 1 and token_stride != 1) or across[1] < tokens:
        return None
    return Rows(view.buffer, view.offset, across[0], across[1], tokens)


def _mask(
    draft: Draft, node: Node, first: int | None, query_view: View, query: tuple[int, ...], keys: int
) -> np.ndarray | tuple[Rows, EngineValue] | None:
    """Returns what is added to the scores: an array (keys or heads * keys, queries), or such rows of a mask that depends on the input."""
    mask = node.arguments["attn_mask"]
    if mask is None:
        return None
    lead, queries = query[:-2], query[-2]
    value = draft.values[mask]
    if isinstance(value, ConstantValue) and isinstance(value.value, Tensor):
        return _constant_mask(additive(value.value), first, query_view.batch_dim, lead, queries, keys)
    if first is not None or query_view.batch_dim != 0 or len(lead) != 1 or mask.shape is None or len(mask.shape) != 4:
        raise NotOnEngine("a mask that depends on the input, over other than heads, queries and keys")
    if mask.shape[1] not in (1, *lead) or mask.shape[2] not in (1, queries) or mask.shape[3] != keys:
        raise NotOnEngine("a mask of other sizes")
    x = draft.called(mask, additive, f"{mask.name}_added")
    heads = mask.shape[1]
    view = draft.new_view(mask, (heads, keys, queries))
    source = views.permuted(x.view, (0, 2, 1))
    draft.copy(mask, replace(x, view=views.expanded(source, (heads, keys, queries))), view)
    return Rows(view.buffer, 0, heads * keys, queries, queries), EngineValue(view)


def additive(mask: Tensor) -> Tensor:
    """Returns the mask in the form that is added to the scores: minus infinity where a boolean one is False."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
    return mask.float()


def _constant_mask(mask: Tensor, first: int | None, batch_dim: int, lead: tuple[int, ...], queries: int, keys: int) -> np.ndarray:
    """Returns (keys, queries), or where heads differ (heads * keys, queries); `mask` broadcasts against the scores with their batch."""
    rank = len(lead) + 3 - (first is not None)  # of the scores
    mask = mask.reshape((1,) * (rank - mask.dim()) + tuple(mask.shape))
    if first is not None:  # one dimension stands for the batch and a neighbour
        if mask.shape[first] != 1:
            raise NotOnEngine("a mask along a dimension that the batch shares")
        mask = mask.unsqueeze(first)
    if mask.shape[batch_dim] != 1:
        raise NotOnEngine("a mask with a batch of its own")
    mask = mask.squeeze(batch_dim)
    distinct = next((d for d, n in enumerate(mask.shape[:-2]) if n != 1), len(lead))  # from here on heads have masks of their own
    mask = mask.expand(*(1,) * distinct, *lead[distinct:], queries, keys)
    return as_array(mask.transpose(-1, -2).reshape(-1, queries))
