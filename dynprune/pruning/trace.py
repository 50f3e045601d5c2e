"""Follows every single channel through a captured model, to see which entries of which parameters can only go together.

Each value of the graph gets a tensor of ids of its own shape (one sample), which says to which atom each element belongs. Operations
that only move elements (reshape, permute, concatenation, slicing, channel shuffles) are run on the ids themselves, by PyTorch. Others
have a rule here. What has no rule makes the channels that it reads stay.

The dependencies are those of DepGraph (Fang et al., CVPR 2023, arXiv 2301.12900), found by running instead of by layer type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dynprune.graph.capture import BATCH, Graph, Node
from dynprune.graph.channels import BINARY, PADDING, POOLING, UNARY
from dynprune.pruning.atoms import NONE, Atoms

_MOVES = frozenset({
    "permute", "transpose", "flatten", "unflatten", "reshape", "squeeze", "unsqueeze", "expand", "slice", "select", "unbind", "split",
    "split_with_sizes", "chunk", "getitem", "cat", "stack", "roll", "flip", "repeat", "index_select", "t", "movedim", "narrow",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
})  # fmt: skip
_PRODUCTS = frozenset({"matmul", "bmm"})
_RESIZES = frozenset({"upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"})
_STREAM = "its channels are added to channels that always stay"
_RULES: dict[str, Callable] = {}


class Trace:
    """The atoms of a captured model.

    Attributes:
        atoms: ties, pins and slices.
        shares: name of each node with multiply-adds -> ids of its output's channels; what share of them is kept scales its cost.
        attention: atom -> name of the module that ran attention on it.
    """

    def __init__(self, graph: Graph):
        self.atoms = Atoms()
        self.shares: dict[str, np.ndarray] = {}
        self.attention: dict[int, str] = {}
        self._batch = 1 if graph.dynamic_batch else graph.batch_size
        self._values: dict[Node, Any] = {}
        for node in graph.nodes:
            if node.op != "constant":
                self._values[node] = self._value(node)
        for node in graph.outputs:
            if isinstance(node, Node):
                self._pin_value(node, "it is an output of the model")

    def ids(self, node: Any) -> Tensor | None:
        """Returns the ids of a value; None for a constant or where they are not known."""
        value = self._values.get(node) if isinstance(node, Node) else None
        return value if isinstance(value, Tensor) else None

    def channels(self, node: Node, dim: int, reason: str) -> np.ndarray | None:
        """Returns the ids along a dimension, NONE for all, and all pinned, where they differ between positions; None for unknown ids."""
        ids = self.ids(node)
        if ids is None:
            return None
        dim %= ids.dim()
        vector = ids.movedim(dim, 0).reshape(ids.shape[dim], -1) if _varies_elsewhere(ids, dim) else _along(ids, dim)[:, None]
        if (vector != vector[:, :1]).any():
            self.atoms.pin(ids.numpy(), reason)
            return np.full(ids.shape[dim], NONE)
        return vector[:, 0].numpy()

    def spread(self, node: Node, dim: int, vector: np.ndarray) -> Tensor:
        """Returns ids of a node's shape that are `vector` along a dimension; sizes that depend on the batch are those of its input."""
        like = self.ids(node.args[0])
        sizes = self._sizes(node)
        if None in sizes:
            sizes = [like.shape[d] if size is None and d < like.dim() else size for d, size in enumerate(sizes)]
        shape = [1] * len(sizes)
        shape[dim] = sizes[dim]
        return torch.from_numpy(np.ascontiguousarray(vector)).view(shape).expand(sizes)

    def _sizes(self, node: Node) -> list[int]:
        return [self._batch if size == BATCH else size for size in node.shape]

    def _unknown(self, node: Node) -> Tensor | None:
        """Returns ids that are no atoms."""
        if node.shape is None:
            return None
        if None not in node.shape:
            return torch.full((), NONE).expand(self._sizes(node))
        like = next((self.ids(value) for value in node.inputs if value.shape == node.shape and self.ids(value) is not None), None)
        return None if like is None else torch.full((), NONE).expand(like.shape)

    def _pin_value(self, node: Node, reason: str) -> None:
        for leaf in pytree.tree_leaves(self._values.get(node)):
            if isinstance(leaf, Tensor):
                self.atoms.pin(_distinct(leaf), reason)

    def _value(self, node: Node) -> Any:
        if node.op == "input" or (not node.varies and node.shape is not None):
            if node.op != "t":  # what reads the transposed parameter says which of its entries go
                self._pin_parameters(node)
            return self._unknown(node)
        if node.op.startswith("sym_") or (node.shape is None and not any(self.ids(value) is not None for value in node.inputs)):
            return self._computed(node)
        if any(self._lost(value) for value in node.inputs):
            return self._stop(node, f"'{node.name}' ({node.op}) has sizes that depend on the batch")
        rule = _RULES.get(node.op)
        try:
            value = rule(self, node) if rule is not None else NotImplemented
        except (RuntimeError, TypeError, IndexError):  # arguments of a form that the rule does not know
            value = NotImplemented
        return self._stop(node, _why(node)) if value is NotImplemented else value

    def _lost(self, value: Node) -> bool:
        return value.varies and value.shape is not None and self.ids(value) is None and value.op != "constant"

    def _computed(self, node: Node) -> Any:
        """Returns a number, or the list of results of an operation that moves elements, computed from what is known."""
        try:
            known = {used: self._values.get(used) for used in node.inputs}
            args, kwargs = pytree.tree_map(lambda item: known[item] if isinstance(item, Node) else item, (node.args, node.kwargs))
            return node.target(*args, **kwargs)
        except (RuntimeError, TypeError, AttributeError, IndexError, ValueError):
            return None

    def _stop(self, node: Node, reason: str) -> Tensor | None:
        for value in node.inputs:
            self._pin_value(value, reason)
        self._pin_parameters(node)
        return self._unknown(node)

    def _pin_parameters(self, node: Node) -> None:
        for value in node.inputs:
            name, _ = parameter_of(value, 0)
            for dim, size in enumerate(value.shape if name else ()):
                self.atoms.own(*parameter_of(value, dim), np.full(size, NONE))

    def own(self, constant: Node | None, dim: int, ids: np.ndarray) -> None:
        """Notes that a parameter's entries go with ids; where the operand is computed, or has no name, the ids stay."""
        if constant is None:
            return
        name, dim = parameter_of(constant, dim)
        if name:
            self.atoms.own(name, dim, ids)
        else:
            self.atoms.pin(ids, f"'{constant.name}' is computed from parameters")


def parameter_of(operand: Node, dim: int) -> tuple[str, int]:
    """Returns the name of the parameter that an operand is, or is the transpose of, and which of its dimensions `dim` is; or ""."""
    if operand.op == "t" and not operand.varies:
        return operand.args[0].parameter_name, 1 - dim
    return (operand.parameter_name if operand.op == "constant" else ""), dim


def _distinct(ids: Tensor) -> np.ndarray:
    return _compact(ids).numpy()


def _compact(*ids: Tensor) -> Any:
    """Returns tensors of one shape without the dimensions along which all of them repeat (stride 0)."""
    for dim in range(ids[0].dim()):
        if all(x.stride(dim) == 0 for x in ids):
            ids = tuple(x.narrow(dim, 0, min(1, x.shape[dim])) for x in ids)
    return ids[0] if len(ids) == 1 else ids


def _along(ids: Tensor, dim: int) -> Tensor:
    return ids[tuple(slice(None) if d == dim else 0 for d in range(ids.dim()))]


def _varies_elsewhere(ids: Tensor, dim: int) -> bool:
    return any(stride != 0 and size > 1 for d, (stride, size) in enumerate(zip(ids.stride(), ids.shape, strict=True)) if d != dim)


def _why(node: Node) -> str:
    if node.op in ("layer_norm", "rms_norm", "group_norm", "softmax"):
        return f"'{node.name}' normalises over its channels"
    return f"'{node.name}' ({node.op}) may mix its channels"


def _rule(*ops: str) -> Callable:
    def register(function: Callable) -> Callable:
        _RULES.update(dict.fromkeys(ops, function))
        return function

    return register


@_rule(*_MOVES)
def _move(trace: Trace, node: Node) -> Any:
    moved = trace._computed(node)
    if moved is None or any(value.op == "constant" and value.shape for value in node.inputs):
        return NotImplemented
    return moved


@_rule("linear")
def _linear(trace: Trace, node: Node) -> Any:
    a = node.arguments
    return _mix(trace, node, len(node.shape) - 1, len(a["input"].shape) - 1, (0, 1))


@_rule("conv1d", "conv2d", "conv3d")
def _conv(trace: Trace, node: Node) -> Any:
    a, groups = node.arguments, node.arguments["groups"]
    weight = a["weight"]
    if groups == 1:
        return _mix(trace, node, 1, 1, (0, 1))
    channels = trace.channels(a["input"], 1, f"'{node.name}' mixes it along another dimension")
    if channels is None:
        return NotImplemented
    if weight.shape[1] == 1:
        out = np.repeat(channels, weight.shape[0] // groups)
        trace.own(weight, 0, out)
        trace.own(a["bias"], 0, out)
    else:
        out = _grouped(trace, node, channels, groups)
    trace.shares[node.name] = out
    return trace.spread(node, 1, out)


def _grouped(trace: Trace, node: Node, channels: np.ndarray, groups: int) -> np.ndarray:
    """Every group loses the same places, so that all stay of one size."""
    weight, reason = node.arguments["weight"], f"'{node.name}' reads it in {groups} groups, whose places go together"
    inputs = channels.reshape(groups, -1)
    out = trace.atoms.create(weight.shape[0], node.module_path or node.name)
    places = out.reshape(groups, -1)
    for ids in (inputs, places):
        trace.atoms.tie(ids, ids[:1], reason)
    trace.own(weight, 1, inputs[0])
    trace.own(weight, 0, out)
    trace.own(node.arguments["bias"], 0, out)
    return out


@_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(trace: Trace, node: Node) -> Any:
    a = node.arguments
    weight = a["weight"]
    if a["groups"] == 1:
        return _mix(trace, node, 1, 1, (1, 0))
    channels = trace.channels(a["input"], 1, f"'{node.name}' mixes it along another dimension")
    if channels is None or weight.shape[1] != 1 or weight.shape[0] != a["groups"]:
        return NotImplemented
    trace.own(weight, 0, channels)
    trace.own(a["bias"], 0, channels)
    trace.shares[node.name] = channels
    return trace.spread(node, 1, channels)


def _mix(trace: Trace, node: Node, out_dim: int, in_dim: int, weight_dims: tuple[int, int]) -> Any:
    """A layer that mixes channels: ends those that it reads and makes new ones. `weight_dims`: of its outputs and its inputs."""
    a = node.arguments
    channels = trace.channels(a["input"], in_dim, f"'{node.name}' mixes it along another dimension")
    if channels is None:
        return NotImplemented
    out = trace.atoms.create(a["weight"].shape[weight_dims[0]], node.module_path or node.name)
    trace.own(a["weight"], weight_dims[0], out)
    trace.own(a["weight"], weight_dims[1], channels)
    trace.own(a["bias"], 0, out)
    trace.shares[node.name] = out
    return trace.spread(node, out_dim, out)


@_rule("batch_norm")
def _batch_norm(trace: Trace, node: Node) -> Any:
    a = node.arguments
    channels = trace.channels(a["input"], 1, f"'{node.name}' normalises it along another dimension")
    if channels is None or a["training"] or a["running_mean"] is None:
        return NotImplemented
    for name in ("weight", "bias", "running_mean", "running_var"):
        trace.own(a[name], 0, channels)
    return trace.ids(a["input"])


@_rule(*UNARY, "pow", "dropout", "to", "clone", "contiguous", "masked_fill")
def _unary(trace: Trace, node: Node) -> Any:
    x = node.args[0]
    alone = all(value is x or not value.varies for value in node.inputs)
    return trace.ids(x) if alone and trace.ids(x) is not None and x.shape == node.shape else NotImplemented


@_rule("prelu")
def _prelu(trace: Trace, node: Node) -> Any:
    x, weight = node.args
    if weight.sample_size > 1:
        channels = trace.channels(x, 1, f"'{node.name}' acts along another dimension")
        if channels is None:
            return NotImplemented
        trace.own(weight, 0, channels)
    return trace.ids(x)


@_rule("softmax", "_softmax")
def _softmax(trace: Trace, node: Node) -> Any:
    """Along positions or keys it keeps channels apart."""
    ids = trace.ids(node.args[0])
    dim = node.arguments["dim"]
    same = ids is not None and bool((ids == ids.narrow(dim, 0, 1)).all())
    return ids if same else NotImplemented


@_rule(*POOLING, *_RESIZES, *PADDING, "mean", "amax", "adaptive_max_pool2d")
def _positions(trace: Trace, node: Node) -> Any:
    """What only combines positions: channels are those of the dimension in which the ids vary."""
    ids = trace.ids(node.args[0])
    if ids is None:
        return NotImplemented
    varying = [d for d in range(1, ids.dim()) if bool((ids != ids.narrow(d, 0, 1)).any())]
    if not varying:
        return trace._unknown(node) if bool((ids == NONE).all()) else NotImplemented
    if len(varying) > 1 or len(node.shape) > ids.dim():
        return NotImplemented
    dim, channels = varying[0], _along(ids, varying[0]).numpy()
    if node.op in ("mean", "amax"):
        return _reduced(trace, node, ids, dim, channels)
    if node.op in PADDING and ids.shape[dim] != node.shape[dim]:
        return _padded_channels(trace, node, dim, channels)
    return trace.spread(node, dim, channels) if node.shape[dim] == ids.shape[dim] else NotImplemented


def _reduced(trace: Trace, node: Node, ids: Tensor, dim: int, channels: np.ndarray) -> Any:
    dims = node.arguments["dim"]
    dims = {d % ids.dim() for d in ([dims] if isinstance(dims, int) else dims or range(ids.dim()))}
    if dim in dims or 0 in dims:
        return NotImplemented
    after = dim if node.arguments["keepdim"] else dim - sum(d < dim for d in dims)
    if None in node.shape:
        return NotImplemented
    return trace.spread(node, after, channels)


def _padded_channels(trace: Trace, node: Node, dim: int, channels: np.ndarray) -> Any:
    """Zero channels beside the true ones, as in the shortcuts of the CIFAR ResNets."""
    pad = node.arguments["pad"]
    at = 2 * (len(node.shape) - 1 - dim)
    if at + 1 >= len(pad) or min(pad[at : at + 2]) < 0:
        return NotImplemented
    return trace.spread(node, dim, np.pad(channels, tuple(pad[at : at + 2]), constant_values=NONE))


@_rule(*BINARY)
def _binary(trace: Trace, node: Node) -> Any:
    operands = [value for value in node.inputs if value.shape is not None]
    varying = [trace.ids(value) for value in operands if value.varies]
    if node.shape is None or not varying or any(ids is None for ids in varying):
        return NotImplemented
    sizes = torch.broadcast_shapes(*(ids.shape for ids in varying), *(value.shape for value in operands if not value.varies))
    dims = sorted({len(sizes) - ids.dim() + d for ids in varying for d in range(ids.dim()) if bool((ids != ids.narrow(d, 0, 1)).any())})
    whole = [ids for ids in varying if all(_size_at(ids.shape, d, len(sizes)) == sizes[d] for d in dims)]
    if not whole:
        return NotImplemented
    result = whole[0].broadcast_to(sizes)
    for ids in varying:
        if not any(ids is one for one in whole):
            trace.atoms.pin(_distinct(ids), f"'{node.name}' applies it to all channels of another value")
        elif ids is not whole[0]:
            _tie(trace, node, result, ids.broadcast_to(sizes))
    for value in operands:
        if not value.varies and not _with_constant(trace, value, result, dims):
            return NotImplemented
    return result


def _size_at(shape: tuple[int, ...], dim: int, rank: int) -> int:
    """Returns the size that a value of some rank has along a dimension of a result of rank `rank`."""
    at = dim - rank + len(shape)
    return shape[at] if at >= 0 else 1


def _tie(trace: Trace, node: Node, first: Tensor, second: Tensor) -> None:
    first, second = (ids.numpy() for ids in _compact(first, second))
    if node.op not in ("mul", "div"):
        different = first != second
        trace.atoms.streams.update(np.unique(np.stack((first[different], second[different]))).tolist())
    trace.atoms.tie(first, second, _STREAM)


def _with_constant(trace: Trace, constant: Node, result: Tensor, dims: list[int]) -> bool:
    """Whether a parameter fits the channels that it is combined with, one entry each or one for all."""
    touched = [d for d in dims if _size_at(constant.shape, d, result.dim()) > 1]
    if not touched:
        return True
    if len(dims) > 1:
        return False
    trace.own(constant, touched[0] - result.dim() + len(constant.shape), _along(result, touched[0]).numpy())
    return True


@_rule("scaled_dot_product_attention")
def _attention(trace: Trace, node: Node) -> Any:
    a = node.arguments
    query, key, value = (trace.ids(a[name]) for name in ("query", "key", "value"))
    if query is None or key is None or value is None or not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return NotImplemented
    mask = a["attn_mask"]
    if mask is not None and mask.varies:
        trace._pin_value(mask, f"'{node.name}' adds it to all heads")
    return _heads(trace, node, (query, key, value), value)


@_rule(*_PRODUCTS)
def _product(trace: Trace, node: Node) -> Any:
    """A product of two values that vary: for each index of the leading dimensions everything that takes part goes together."""
    first, second = (trace.ids(value) for value in node.args[:2])
    if first is None or second is None or first.dim() < 3 or first.shape[:-2] != second.shape[:-2]:
        return NotImplemented
    return _heads(trace, node, (first, second), second)


def _heads(trace: Trace, node: Node, operands: tuple[Tensor, ...], value: Tensor) -> Tensor:
    lead = value.shape[:-2]
    flat = [ids.reshape(lead.numel(), -1) for ids in operands]
    together = torch.cat([ids if ids.stride(0) == 0 else torch.unique(ids, dim=1) for ids in flat], 1).numpy()
    trace.atoms.tie(together, together[:, :1], f"'{node.name}' multiplies it with channels that always stay")
    found = set(np.unique(together).tolist()) - {NONE}
    trace.atoms.heads |= found
    trace.attention |= {atom: node.module_path for atom in found}
    out = torch.from_numpy(together[:, :1].reshape(*lead, 1, 1))
    trace.shares[node.name] = out.numpy().reshape(-1)
    return out.expand(*lead, operands[0].shape[-2], value.shape[-1])
