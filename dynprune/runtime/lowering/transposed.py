"""Transposed convolutions, as ordinary convolutions of the input.

| ATen | becomes |
| --- | --- |
| conv_transpose1d, conv_transpose2d | one conv for each remainder of the output's place modulo the stride, its results copied in between |

Output y = s j + r sums in[j + c - t] * weight[a + s t] with a = (r + padding) mod s, c = (r + padding) div s: for each r a convolution of
the whole input with every s-th tap, reversed. Nothing is multiplied by inserted zeros.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from dynprune.graph.capture import Node
from dynprune.runtime import views
from dynprune.runtime.lowering.draft import Draft, as_array
from dynprune.runtime.lowering.registry import lowers, pair
from dynprune.runtime.lowering.values import EngineValue, NotOnEngine
from dynprune.runtime.plan import Rows


@dataclass(frozen=True)
class _Phase:
    """The outputs r, r + stride, ... of one axis: the taps they read, and the padding of the convolution that makes them."""

    first: int
    count: int
    taps: tuple[int, ...]
    before: int
    after: int


def _phases(inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> list[_Phase]:
    phases = []
    for r in range(min(stride, outputs)):
        start, ahead = (r + padding) % stride, (r + padding) // stride
        taps = tuple(range(start, kernel, stride))[::-1]
        count = -(-(outputs - r) // stride)
        phases.append(_Phase(r, count, taps, len(taps) - 1 - ahead, count - 1 + ahead - (inputs - 1)))
    return phases


@lowers("conv_transpose1d", "conv_transpose2d")
def conv_transpose(draft: Draft, node: Node) -> EngineValue:
    arguments, out_sizes, source = node.arguments, draft.sizes(node), node.args[0]
    weight, bias = draft.constant(arguments["weight"]), draft.constant(arguments["bias"])
    if weight is None or (bias is None and arguments["bias"] is not None):
        raise NotOnEngine("weights that are computed")
    flat, groups = node.op == "conv_transpose1d", arguments["groups"]
    in_sizes = draft.sizes(source)
    if any(n != 1 for n in pair(arguments["dilation"], 1)) or len(in_sizes) != (2 if flat else 3):
        raise NotOnEngine("dilated taps, or an input without batch")
    kernel, plane = ([1, *weight.shape[2:]], (1, in_sizes[1])) if flat else (list(weight.shape[2:]), in_sizes[1:])
    stride, padding = pair(arguments["stride"], 1), pair(arguments["padding"], 0)
    stride, padding = ([1, stride[-1]], [0, padding[-1]]) if flat else (stride, padding)
    out_size = [out_sizes[0], 1, out_sizes[1]] if flat else list(out_sizes)
    axes = [_phases(plane[d], out_size[1 + d], kernel[d], stride[d], padding[d]) for d in (0, 1)]
    if any(not phase.taps for phases in axes for phase in phases):
        raise NotOnEngine("outputs that no input reaches")

    inputs, outputs = in_sizes[0], out_sizes[0]
    weights = as_array(weight).reshape(groups, inputs // groups, outputs // groups, *kernel).swapaxes(1, 2)
    weights = weights.reshape(outputs, inputs // groups, *kernel)
    biases = np.zeros(outputs, np.float32) if bias is None else as_array(bias)
    whole = draft.new_view(node, out_size)
    for y, x in itertools.product(*axes):
        taps = weights[:, :, y.taps][:, :, :, x.taps]
        part = _phase_conv(draft, node, source, (y, x), taps, biases, groups, plane, len(axes[0]) * len(axes[1]))
        if len(axes[0]) == len(axes[1]) == 1:
            whole = part.view
            break
        target = views.sliced(whole, 1, y.first, y.count, stride[0])
        draft.copy(node, part, views.sliced(target, 2, x.first, x.count, stride[1]))
    view = whole if not flat else views.permuted(views.sliced(whole, 1, 0, 1), (0, 2))
    return EngineValue(view, draft.site_of(node))


def _phase_conv(
    draft: Draft,
    node: Node,
    source: Node,
    phase: tuple[_Phase, _Phase],
    weight: np.ndarray,
    bias: np.ndarray,
    groups: int,
    plane: tuple[int, ...],
    phases: int,
) -> EngineValue:
    """Emits the convolution of one of several phases; what it leaves out at the input's border is cut off before."""
    outputs, kernel = len(weight), list(weight.shape[2:])
    rows, x = draft.planar(source, 0)
    cut = [(min(0, axis.before), min(0, axis.after)) for axis in phase]
    in_plane = list(plane)
    if any(n for axis in cut for n in axis):
        borders = cut if len(x.view.sizes) == 3 else cut[1:]
        x = replace(draft.pad(node, x, [(0, 0), *borders], 0.0), site=x.site)
        in_plane = [n + before + after for n, (before, after) in zip(plane, cut, strict=True)]
        rows = views.as_rows(x.view, 0)
    before, after = ([max(0, n) for n in (phase[0].before, phase[1].before)], [max(0, n) for n in (phase[0].after, phase[1].after)])
    view = draft.new_view(node, (outputs, phase[0].count, phase[1].count))
    positions = phase[0].count * phase[1].count
    ints = {"in_size": [rows.rows, *in_plane], "out_size": [outputs, phase[0].count, phase[1].count], "kernel": kernel, "stride": [1, 1]}
    ints |= {"padding": [*before, *after], "dilation": [1, 1]}
    depthwise = groups == rows.rows == outputs and groups > 1
    if not depthwise:
        ints |= {"groups": [groups], "phases": [phases]}
    constants = {"weight": np.ascontiguousarray(weight.reshape(outputs, -1)), "bias": bias}
    output = Rows(view.buffer, 0, outputs, positions, positions)
    draft.emit("depthwise" if depthwise else "conv", node, [(rows, x)], output, ints=ints, constants=constants)
    return EngineValue(view, draft.site_of(node))
