"""Operations that move or look at values without computing: views are free, concatenation along channels too where it can be.

| ATen | becomes |
| --- | --- |
| alias | the same view |
| permute, transpose, t, mT, movedim | another view |
| reshape, view, flatten, unflatten, squeeze, unsqueeze | another view, or a copy where strides do not allow it |
| slice, narrow, select, split, split_with_sizes, chunk, unbind, expand, getitem | another view |
| cat | operands are written straight into their part of the result, else copied |
| pad, constant_pad_nd | padding of the convolution that follows, else fill and copy |
| pixel_shuffle | one copy |
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from dynprune.graph.capture import BATCH, Node
from dynprune.runtime import views
from dynprune.runtime.lowering.draft import Draft
from dynprune.runtime.lowering.registry import dim_of_sample, lowers
from dynprune.runtime.lowering.values import ConstantValue, EngineValue, ListValue, MergedValue, NotOnEngine, PaddedValue, merged
from dynprune.runtime.plan import View


def _reordered(draft: Draft, node: Node, dims: list[int]) -> EngineValue | MergedValue:
    """Returns the first argument with its dimensions, the batch among them, in the order `dims`."""
    x, known = draft.apart(node.args[0]), draft.values[node.args[0]]
    merged = known.first if isinstance(known, MergedValue) else None
    if merged is not None:  # in terms of the tensor in which batch and neighbour are apart
        dims = [whole for d in dims for whole in ((d, d + 1) if d == merged else (d + (d > merged),))]
    batch = x.view.batch_dim
    sample = [dim_of_sample(d, len(dims), batch) for d in dims if d != batch]
    value = draft.viewed(node, x, replace(views.permuted(x.view, sample), batch_dim=dims.index(batch)))
    return value if merged is None else MergedValue(value, dims.index(merged))


def _rank(node: Node) -> int:
    if node.shape is None:
        raise NotOnEngine("no tensor")
    return len(node.shape)


@lowers("alias", positionless=True)
def alias(draft: Draft, node: Node) -> EngineValue:
    x = draft.engine(node.args[0])
    return draft.viewed(node, x, x.view)


@lowers("permute")
def permute(draft: Draft, node: Node) -> EngineValue | MergedValue:
    rank = _rank(node)
    return _reordered(draft, node, [d % rank for d in node.arguments["dims"]])


@lowers("transpose", "swapaxes", "swapdims", "t", "mT")
def transpose(draft: Draft, node: Node) -> EngineValue | MergedValue:
    dims = list(range(_rank(node)))
    first, second = {"t": (0, 1), "mT": (-2, -1)}.get(node.op) or node.args[1:]
    dims[first], dims[second] = dims[second], dims[first]
    return _reordered(draft, node, dims)


@lowers("movedim")
def movedim(draft: Draft, node: Node) -> EngineValue | MergedValue:
    rank = _rank(node)
    source, target = ([d % rank for d in ([dims] if isinstance(dims, int) else dims)] for dims in node.args[1:])
    order = [d for d in range(rank) if d not in source]
    for to, dim in sorted(zip(target, source, strict=True)):
        order.insert(to, dim)
    return _reordered(draft, node, order)


@lowers("reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
def reshape(draft: Draft, node: Node) -> EngineValue | MergedValue:
    x = draft.apart(node.args[0])
    sizes, batch, merged = _sizes_apart(node, x.view)
    strides = views.reshape_strides(x.view.sizes, x.view.strides, sizes)
    if strides is None:
        outermost, rank = views.memory_order(x.view)[0], len(x.view.sizes)
        order = (outermost, *(d for d in range(rank) if d != outermost))
        if views.reshape_strides(x.view.sizes, views.dense_strides(x.view.sizes, order), sizes) is None:
            order = tuple(range(rank))
        x = draft.relaid(node.args[0], order)
        strides = views.reshape_strides(x.view.sizes, x.view.strides, sizes)
    value = draft.viewed(node, x, replace(x.view, sizes=sizes, strides=strides, batch_dim=batch))
    return value if merged is None else MergedValue(value, merged)


def _sizes_apart(node: Node, view: View) -> tuple[tuple[int, ...], int, int | None]:
    """Returns (per-sample sizes, batch_dim, None) of a reshape of `view`.

    Where one dimension of the result is batch times k, the sizes have k apart and the third is the first of those two dimensions.
    """
    free = [d for d, n in enumerate(node.shape or ()) if n is None or n == BATCH]
    if len(free) != 1:
        raise NotOnEngine("sizes that depend on the batch")
    batch = free[0]
    sizes = tuple(n for d, n in enumerate(node.shape) if d != batch)
    before, old_before = prod(sizes[:batch]), prod(view.sizes[: view.batch_dim])
    inner, rest = divmod(views.numel(view), prod(sizes))
    if rest == 0 and inner == 1 and before == old_before:
        return sizes, batch, None
    apart = (*sizes[:batch], inner, *sizes[batch:])
    if rest == 0 and inner > 1 and node.shape[batch] is None:
        if before == old_before:
            return apart, batch, batch
        if before * inner == old_before:
            return apart, batch + 1, batch
    raise NotOnEngine("the batch is mixed with other dimensions")


@lowers("slice", "narrow")
def slice_(draft: Draft, node: Node) -> EngineValue | MergedValue:
    arguments = node.arguments
    start, step = arguments["start"] or 0, arguments.get("step", 1)
    x, dim, first = draft.along(node.args[0], arguments["dim"])
    if node.op == "narrow":
        end = start + arguments["length"] if isinstance(start, int) and isinstance(arguments["length"], int) else start
    else:
        end = arguments["end"]
    if dim is None:
        if start == 0 and step == 1 and (end is None or end == torch.iinfo(torch.int64).max):
            return merged(draft.viewed(node, x, x.view), first)
        raise NotOnEngine("a part of the batch")
    if not isinstance(start, int) or not isinstance(end, int | None):
        raise NotOnEngine("bounds that depend on the input")
    start, end, step = slice(start, end, step).indices(x.view.sizes[dim])
    length = len(range(start, end, step))
    if length == 0:
        raise NotOnEngine("an empty slice")
    return merged(draft.viewed(node, x, views.sliced(x.view, dim, start, length, step), whole=False), first)


def _selected(view: View, dim: int, index: int, batch_dim: int) -> View:
    """Returns one element of a per-sample dimension, which is gone from the view."""
    one = views.sliced(view, dim, index, 1)
    keep = [d for d in range(len(view.sizes)) if d != dim]
    return replace(views.permuted(one, keep), batch_dim=batch_dim)


@lowers("select", "unbind")
def select(draft: Draft, node: Node) -> EngineValue | MergedValue | ListValue:
    x, dim, first = draft.along(node.args[0], node.arguments["dim"])
    if dim is None:
        raise NotOnEngine("a part of the batch")
    batch = x.view.batch_dim - (dim < x.view.batch_dim)
    if first is not None:
        first -= dim < first
    if node.op == "unbind":
        parts = [_selected(x.view, dim, i, batch) for i in range(x.view.sizes[dim])]
        return _several(draft, node, x, parts, first)
    index = node.arguments["index"]
    if not isinstance(index, int):
        raise NotOnEngine("an index that depends on the input")
    return merged(draft.viewed(node, x, _selected(x.view, dim, index % x.view.sizes[dim], batch), whole=False), first)


@lowers("split", "split_with_sizes", "chunk")
def split(draft: Draft, node: Node) -> ListValue:
    x, dim, first = draft.along(node.args[0], node.arguments["dim"])
    if dim is None:
        raise NotOnEngine("a part of the batch")
    total, size = x.view.sizes[dim], node.args[1]
    if node.op == "chunk":
        size = -(-total // size)
    lengths = [min(size, total - i) for i in range(0, total, size)] if isinstance(size, int) else list(size)
    parts, start = [], 0
    for length in lengths:
        parts.append(views.sliced(x.view, dim, start, length))
        start += length
    return _several(draft, node, x, parts, first)


def _several(draft: Draft, node: Node, x: EngineValue, parts: list[View], first: int | None) -> ListValue:
    if x.site != draft.site_of(node):
        draft.drop(x.site, f"'{node.name}' splits its channels")
    return ListValue(tuple(merged(EngineValue(part, draft.site_of(node)), first) for part in parts))


@lowers("getitem")
def getitem(draft: Draft, node: Node) -> EngineValue | MergedValue | ConstantValue:
    source, index = node.args
    value = draft.values[source] if isinstance(source, Node) else None
    if not isinstance(value, ListValue) or not isinstance(index, int) or value.items[index] is None:
        raise NotOnEngine("a result that the engine does not compute")
    return value.items[index]


@lowers("expand", "expand_as", "broadcast_to")
def expand(draft: Draft, node: Node) -> EngineValue | MergedValue | ConstantValue:
    if isinstance(known := draft.values.get(node.args[0]), MergedValue):
        return _expanded_apart(draft, node, known)
    sizes, constant = draft.sizes(node), draft.constant(node.args[0])
    if constant is not None:
        full = constant.reshape((1,) * (len(node.shape) - constant.ndim) + tuple(constant.shape))
        if full.shape[0] != 1:
            raise NotOnEngine("a constant with a batch of its own")
        return ConstantValue(full, repeats=True)
    x = draft.engine(node.args[0])
    if x.view.batch_dim != 0 or len(x.view.sizes) != len(sizes):
        raise NotOnEngine("the batch moves")
    return draft.viewed(node, x, views.expanded(x.view, sizes), whole=False)


def _expanded_apart(draft: Draft, node: Node, value: MergedValue) -> MergedValue:
    x, first = value.base, value.first
    if len(node.shape) != len(x.view.sizes) or node.shape[first] is not None:
        raise NotOnEngine("the batch moves")
    full = [*node.shape[:first], None, None, *node.shape[first + 1 :]]
    del full[x.view.batch_dim]
    sizes = [old if new is None else new for old, new in zip(x.view.sizes, full, strict=True)]
    return MergedValue(draft.viewed(node, x, views.expanded(x.view, sizes), whole=False), first)


@lowers("pad", "constant_pad_nd")
def pad(draft: Draft, node: Node) -> EngineValue | PaddedValue:
    amounts, fill = node.args[1], node.arguments.get("value") or 0
    if node.arguments.get("mode", "constant") != "constant" or not all(isinstance(n, int | float) for n in (*amounts, fill)):
        raise NotOnEngine("padding that is not constant")
    sizes = draft.sizes(node)
    borders = [(before, after) for before, after in zip(amounts[::2], amounts[1::2], strict=True)][::-1]
    if len(borders) > len(sizes):
        raise NotOnEngine("padding along the batch")
    borders = [(0, 0)] * (len(sizes) - len(borders)) + borders
    if not any(n for border in borders for n in border):
        x = draft.engine(node.args[0])
        return draft.viewed(node, x, x.view)
    if fill == 0 and _is_padding_of_convolutions(draft, node, borders):
        draft.engine(node.args[0])
        (top, bottom), (left, right) = borders[1:]
        return PaddedValue(node.args[0], top, left, bottom, right)
    x = draft.engine(node.args[0])
    if x.view.batch_dim != 0:
        raise NotOnEngine("the batch is not in front")
    return draft.pad(node, x, borders, float(fill))


def _is_padding_of_convolutions(draft: Draft, node: Node, borders: list[tuple[int, int]]) -> bool:
    """Whether all readers of a padded value are 2d convolutions, and could pad the value themselves."""
    is_plane = len(borders) == 3 and borders[0] == (0, 0) and all(n >= 0 for border in borders for n in border)
    only_convs = all(user.op == "conv2d" and user.args[0] is node for user in node.users) and draft.uses[node] == len(node.users)
    return is_plane and only_convs and not isinstance(draft.values[node.args[0]], PaddedValue)


def _are_heads(draft: Draft, sites: set[int]) -> bool:
    return all(site >= 0 and draft.sites[site].is_heads for site in sites)


@lowers("cat", "concat", "concatenate")
def cat(draft: Draft, node: Node) -> EngineValue:
    operands = list(node.args[0])
    sizes = draft.sizes(node)
    dim = dim_of_sample(node.arguments["dim"], len(node.shape), 0)
    values = [draft.engine(operand) for operand in operands if isinstance(operand, Node)]
    if dim is None or len(values) != len(operands) or any(value.view.batch_dim for value in values):
        raise NotOnEngine("not along one dimension of each sample")
    sites = {draft.site_of(node), *(value.site for value in values)}
    for site in sites if len(sites) > 1 or not _are_heads(draft, sites) else ():
        draft.drop(site, f"'{node.name}' concatenates it with other channels")
    largest = max(values, key=lambda value: views.numel(value.view)).view
    if views.as_rows(largest, dim):
        whole, start = draft.concatenation(node, dim)
    else:
        whole, start = draft.new_view(node, sizes, views.memory_order(largest)), 0
    offset = start
    for operand in operands:
        length = draft.engine(operand).view.sizes[dim]
        draft.place(node, operand, views.sliced(whole, dim, offset, length))
        offset += length
    return EngineValue(views.sliced(whole, dim, start, sizes[dim]), draft.site_of(node))


@lowers("pixel_shuffle")
def pixel_shuffle(draft: Draft, node: Node) -> EngineValue:
    factor = node.args[1]
    x = draft.engine(node.args[0])
    if len(x.view.sizes) != 3 or x.view.batch_dim != 0:
        raise NotOnEngine("not a batch of planes")
    channels, height, width = x.view.sizes
    c, h, w = x.view.strides
    inner = (channels // factor**2, height, factor, width, factor)
    source = replace(x.view, sizes=inner, strides=(c * factor**2, h, c * factor, w, c))
    return _rewritten(draft, node, x, source)


def _rewritten(draft: Draft, node: Node, x: EngineValue, source: View) -> EngineValue:
    """Copies `source`, a view of x, to new row-major memory and returns that as the node's value."""
    view = draft.new_view(node, source.sizes)
    draft.copy(node, replace(x, view=source), view)
    sizes = draft.sizes(node)
    return EngineValue(replace(view, sizes=sizes, strides=views.dense_strides(sizes)), draft.site_of(node))
