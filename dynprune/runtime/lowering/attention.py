"""Attention over planar heads.

| ATen | becomes |
| --- | --- |
| scaled_dot_product_attention | attention, for heads by tokens by features per sample, with a constant mask or a causal one |
"""

from __future__ import annotations

import math

import numpy as np
import torch

from dynprune.graph.capture import Node
from dynprune.runtime import views
from dynprune.runtime.lowering.draft import Draft, as_array
from dynprune.runtime.lowering.registry import lowers
from dynprune.runtime.lowering.values import EngineValue, NotOnEngine
from dynprune.runtime.plan import Rows, View

_HEADS, _TOKENS, _FEATURES = 0, 1, 2


@lowers("scaled_dot_product_attention")
def scaled_dot_product_attention(draft: Draft, node: Node) -> EngineValue:
    arguments = node.arguments
    operands = [arguments[name] for name in ("query", "key", "value")]
    query, key, value = (draft.sizes(operand) for operand in operands)
    if len(query) != 3 or arguments.get("enable_gqa") or not query[_HEADS] == key[_HEADS] == value[_HEADS]:
        raise NotOnEngine("attention over other than heads, tokens and features, or over shared keys")
    if arguments["dropout_p"]:
        raise NotOnEngine("dropout")
    constants = {}
    if arguments["attn_mask"] is not None:
        constants["mask"] = _mask(draft.constant(arguments["attn_mask"]), query[_TOKENS], key[_TOKENS])
    reads = [_planar_heads(draft, operand) for operand in operands]
    view = draft.new_view(node, (*query[:2], value[_FEATURES]), (_HEADS, _FEATURES, _TOKENS))
    scale = arguments.get("scale")
    step = draft.emit(
        "attention",
        node,
        reads,
        _head_rows(view),
        ints={"heads": [query[_HEADS]], "causal": [int(bool(arguments["is_causal"]))]},
        floats={"scale": [1 / math.sqrt(query[_FEATURES]) if scale is None else float(scale)]},
        constants=constants,
    )
    return draft.written(node, view, step)


def _planar_heads(draft: Draft, node: Node) -> tuple[Rows, EngineValue]:
    """Returns the node's value as rows of heads times features by tokens; copies it if need be."""
    x = draft.engine(node, (_HEADS, _FEATURES, _TOKENS))
    rows = _head_rows(x.view) if x.view.batch_dim == 0 else None
    if rows is None:
        x = draft.relaid(node, (_HEADS, _FEATURES, _TOKENS))
        if x.view.batch_dim != 0:
            raise NotOnEngine("a batch that does not stand in front")
        rows = _head_rows(x.view)
    return rows, x


def _head_rows(view: View) -> Rows | None:
    heads, tokens, features = view.sizes
    across = views.collapse((heads, features), (view.strides[_HEADS], view.strides[_FEATURES]))
    if across is None or (tokens > 1 and view.strides[_TOKENS] != 1) or across[1] < tokens:
        return None
    return Rows(view.buffer, view.offset, across[0], across[1], tokens)


def _mask(mask: torch.Tensor | None, queries: int, keys: int) -> np.ndarray:
    """Returns what is added to the scores, (keys, queries); raises NotOnEngine for a mask that depends on the input or on the head."""
    if mask is None or mask.dim() < 2 or any(n != 1 for n in mask.shape[:-2]):
        raise NotOnEngine("a mask that depends on the input or the head")
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    return as_array(mask.float().expand(*mask.shape[:-2], queries, keys).reshape(queries, keys).T.contiguous())
