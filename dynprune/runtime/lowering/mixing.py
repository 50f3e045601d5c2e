"""Operations that mix channels, and what folds into them.

| ATen | becomes |
| --- | --- |
| conv2d, conv1d | conv; depthwise; linear where the result is one position and the kernel covers its whole input |
| linear, and addmm, mm, matmul (`products.py`) with a constant matrix | linear (one position per sample), else a 1x1 conv over the tokens |
| batch_norm | folded into the weights of the convolution or linear before it, else affine |
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import torch

from dynprune.graph.capture import Node
from dynprune.runtime import views
from dynprune.runtime.lowering.draft import Draft, as_array
from dynprune.runtime.lowering.elementwise import scale_rows
from dynprune.runtime.lowering.registry import lowers, pair
from dynprune.runtime.lowering.values import EngineValue, MergedValue, NotOnEngine, PaddedValue, merged
from dynprune.runtime.plan import Rows


def _weight_and_bias(draft: Draft, node: Node) -> tuple[torch.Tensor, np.ndarray]:
    weight, bias = draft.constant(node.arguments["weight"]), draft.constant(node.arguments["bias"])
    if weight is None or weight.dtype != torch.float32 or (bias is None and node.arguments["bias"] is not None):
        raise NotOnEngine("weights that are computed, or not float32")
    return weight, np.zeros(weight.shape[0], np.float32) if bias is None else as_array(bias)


@lowers("conv2d", "conv1d")
def conv(draft: Draft, node: Node) -> EngineValue:
    weight, bias = _weight_and_bias(draft, node)
    out_sizes, source, arguments = draft.sizes(node), node.args[0], node.arguments
    flat = node.op == "conv1d"
    kernel = list(weight.shape[2:])
    stride, dilation = _plane(arguments["stride"], 1, flat), _plane(arguments["dilation"], 1, flat)
    kernel = [1, *kernel] if flat else kernel
    padding = _padding(arguments["padding"], kernel, dilation, flat)
    padded = draft.values[source]
    if isinstance(padded, PaddedValue):
        source = padded.source
        padding = [a + b for a, b in zip(padding, (padded.top, padded.left, padded.bottom, padded.right), strict=True)]
    in_sizes = draft.sizes(source)
    if len(in_sizes) != (2 if flat else 3):
        raise NotOnEngine("an input without batch")
    in_size = [in_sizes[0], 1, in_sizes[1]] if flat else list(in_sizes)
    out_size = [out_sizes[0], 1, out_sizes[1]] if flat else list(out_sizes)
    groups = arguments["groups"]
    if groups == 1 and out_size[1:] == [1, 1] and kernel == in_size[1:] and not any(padding):
        return _one_position(draft, node, source, weight, bias, out_sizes)

    rows, x = draft.planar(source, 0)
    view = draft.new_view(node, out_sizes)
    ints = {"in_size": in_size, "out_size": out_size, "kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    depthwise = groups == in_size[0] == out_size[0] and groups > 1
    if not depthwise:
        ints["groups"] = [groups]
    constants = {"weight": as_array(weight).reshape(len(weight), -1), "bias": bias}
    output = Rows(view.buffer, 0, out_size[0], out_size[1] * out_size[2], out_size[1] * out_size[2])
    step = draft.emit("depthwise" if depthwise else "conv", node, [(rows, x)], output, ints=ints, constants=constants)
    return draft.written(node, view, step)


def _plane(value: int | list[int], default: int, flat: bool) -> list[int]:
    """Returns (y, x) for a parameter of a convolution; a 1d one runs along x."""
    numbers = pair(value, default)
    return [default, numbers[-1]] if flat else numbers


def _padding(padding: int | str | list[int], kernel: list[int], dilation: list[int], flat: bool) -> list[int]:
    """Returns top, left, bottom, right."""
    if padding == "valid":
        return [0, 0, 0, 0]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2]
    return _plane(padding, 0, flat) * 2


@lowers("linear", positionless=True)
def linear(draft: Draft, node: Node) -> EngineValue:
    weight, bias = _weight_and_bias(draft, node)
    site = draft.sites[draft.site_of(node)] if draft.site_of(node) >= 0 else None
    starts = site.first_rows[site.producers.index(node.module_path)] if site is not None else (0,)
    if starts == (0,):
        return _features(draft, node, node.args[0], weight, bias)
    return _in_parts(draft, node, weight, bias, starts, site.num_channels)


def _in_parts(draft: Draft, node: Node, weight: torch.Tensor, bias: np.ndarray, starts: tuple[int, ...], channels: int) -> EngineValue:
    """Emits one linear layer for each of several values of one gated space that a fused layer makes; each is compact in its own part."""
    source = draft.engine(node.args[0], _channels_outermost(node.args[0])).view
    last = len(source.sizes) - 1
    tokens = prod(source.sizes[:-1])
    whole = draft.new_view(node, (*source.sizes[:-1], len(weight)), (last, *range(last)), source.batch_dim)
    parts = [_features(draft, node, node.args[0], weight[i : i + channels], bias[i : i + channels]) for i in starts]
    for i, part in zip(starts, parts, strict=True):
        draft.buffers[part.view.buffer].parent = whole.buffer
        draft.buffers[part.view.buffer].parent_offset = i * tokens
    return EngineValue(whole, draft.site_of(node))


@lowers("addmm", positionless=True)
def matrix_product(draft: Draft, node: Node) -> EngineValue:
    source, factor = node.args[1:3] if node.op == "addmm" else node.args[:2]
    weight, bias = draft.constant(factor), draft.constant(node.args[0]) if node.op == "addmm" else None
    if weight is None or weight.ndim != 2 or weight.dtype != torch.float32 or node.arguments.get("alpha", 1) != 1:
        raise NotOnEngine("two factors that depend on the input")
    if node.op == "addmm" and (bias is None or bias.shape != weight.shape[1:] or node.arguments["beta"] != 1):
        raise NotOnEngine("a sum that is no bias")
    return _features(draft, node, source, weight.t(), np.zeros(weight.shape[1], np.float32) if bias is None else as_array(bias))


def _features(draft: Draft, node: Node, operand: Node, weight: torch.Tensor, bias: np.ndarray) -> EngineValue:
    """Emits a linear layer over the last dimension of `operand`, weight (out, in)."""
    source = draft.engine(operand, _channels_outermost(operand)).view
    last = len(source.sizes) - 1
    if last < 0 or source.batch_dim == last + 1 or weight.ndim != 2:
        raise NotOnEngine("the batch is the feature dimension")
    out_sizes, tokens = (*source.sizes[:-1], weight.shape[0]), prod(source.sizes[:-1])
    if tokens == 1:
        return _one_position(draft, node, operand, weight, bias, out_sizes)
    rows, x = draft.planar(operand, last)
    view = draft.new_view(node, out_sizes, (last, *range(last)), x.view.batch_dim)
    ints = {"in_size": [weight.shape[1], 1, tokens], "out_size": [weight.shape[0], 1, tokens], "kernel": [1, 1], "stride": [1, 1]}
    ints |= {"padding": [0, 0, 0, 0], "dilation": [1, 1], "groups": [1]}
    output = Rows(view.buffer, 0, weight.shape[0], tokens, tokens)
    step = draft.emit("conv", node, [(rows, x)], output, ints=ints, constants={"weight": as_array(weight), "bias": bias})
    return draft.written(node, view, step)


def _channels_outermost(node: Node) -> tuple[int, ...]:
    """Returns the order of memory in which the last dimension is the outermost."""
    rank = len(node.shape or ()) - 1
    return (rank - 1, *range(rank - 1))


def _one_position(
    draft: Draft, node: Node, source: Node, weight: torch.Tensor, bias: np.ndarray, out_sizes: tuple[int, ...]
) -> EngineValue:
    """Emits a matrix-vector product over all features of a sample, in the order of the weight's columns."""
    x = draft.engine(source)
    features = views.numel(x.view)
    if views.collapse(x.view.sizes, x.view.strides) not in ((features, 1), (1, 1)):
        x = draft.relaid(source, range(len(x.view.sizes)))
    channels = draft.sites[x.site].num_channels if x.site >= 0 else features
    repeat = features // channels
    ints = {"in_features": [features], "out_features": [len(weight)], "repeat": [repeat]}
    view = replace(draft.new_view(node, out_sizes), batch_dim=x.view.batch_dim)
    constants = {"weight": as_array(weight).reshape(len(weight), -1), "bias": bias}
    reads = [(Rows(x.view.buffer, x.view.offset, features, 1, 1), x)]
    step = draft.emit("linear", node, reads, Rows(view.buffer, 0, len(weight), 1, 1), ints=ints, constants=constants)
    return draft.written(node, view, step)


@lowers("batch_norm")
def batch_norm(draft: Draft, node: Node) -> EngineValue | MergedValue:
    arguments = node.arguments
    mean, variance = draft.constant(arguments["running_mean"]), draft.constant(arguments["running_var"])
    if arguments["training"] or mean is None or variance is None:
        raise NotOnEngine("statistics of the batch")
    scale = 1.0 / np.sqrt(variance.detach().double().numpy() + arguments["eps"])
    if arguments["weight"] is not None:
        scale = scale * draft.constant(arguments["weight"]).detach().double().numpy()
    shift = -mean.detach().double().numpy() * scale
    if arguments["bias"] is not None:
        shift = shift + draft.constant(arguments["bias"]).detach().double().numpy()
    _, dim, first = draft.along(node.args[0], 1)
    if dim is None:
        raise NotOnEngine("the batch in place of the channels")
    return merged(scale_rows(draft, node, node.args[0], dim, scale, shift), first)
