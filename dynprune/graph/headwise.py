"""Follows attention heads through a captured model: what keeps the heads of a value apart.

A linear layer's channels become heads where a reshape splits them, (batch, tokens, heads * features) to (batch, tokens, heads, features),
and channels again where one joins them. In between any operation may mix the features of a head, and its tokens, as long as it
treats all heads alike and none with another: products of queries and keys, softmax, rotary embeddings, norms of queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from dynprune.graph.capture import Node

LOST = -1
"""In place of the dimension of a head's features where these were mixed."""

_ELEMENTWISE = frozenset({
    "relu", "gelu", "silu", "sigmoid", "tanh", "exp", "neg", "sqrt", "rsqrt", "square", "abs", "pow", "reciprocal", "clamp", "clamp_min",
    "add", "sub", "rsub", "mul", "div", "maximum", "minimum",
})  # fmt: skip
_ALONG = frozenset({"softmax", "_softmax", "slice", "narrow", "mean", "sum", "linalg_vector_norm", "cumsum"})


@dataclass(frozen=True)
class Layout:
    """Where a value holds the channels of a space.

    Feature `c * repeat + i` (i < repeat) of dimension `dim` is channel c. With `inner` the channels stand in two dimensions: `dim` holds
    heads and `inner` the features of each, in any order and mixture, or `LOST`. With `parts`, dimension `parts` holds several such values
    beside each other.
    """

    space: int
    dim: int
    repeat: int = 1
    inner: int | None = None
    parts: int | None = None

    @property
    def is_apart(self) -> bool:
        """Whether channels stand in heads, or in parts."""
        return self.inner is not None or self.parts is not None

    def moved(self, where: Callable[[int], int]) -> Layout:
        """Returns the layout after each dimension d went to where(d)."""
        inner = self.inner if self.inner in (None, LOST) else where(self.inner)
        return replace(self, dim=where(self.dim), inner=inner, parts=None if self.parts is None else where(self.parts))


def hand_on(node: Node, source: Node, layout: Layout, shape: tuple[int | None, ...] | None) -> Layout | None:
    """Returns the layout after an operation on one value whose channels stand in heads or parts; None if it does not keep them apart.

    Args:
        node: the operation; `source` is its first argument and the only one with a layout.
        shape: of the source.
    """
    a = node.arguments
    if node.op == "getitem":
        return layout
    if shape is None:
        return None
    rank = len(shape)
    if node.op == "permute":
        return layout.moved([dim % rank for dim in a["dims"]].index)
    if node.op == "transpose":
        swap = {a["dim0"] % rank: a["dim1"] % rank, a["dim1"] % rank: a["dim0"] % rank}
        return layout.moved(lambda dim: swap.get(dim, dim))
    if node.op in ("unbind", "select"):
        gone = a["dim"] % rank
        if gone in (layout.dim, layout.inner):
            return None
        kept = replace(layout, parts=None) if gone == layout.parts else layout
        return kept.moved(lambda dim: dim - (gone < dim))
    if layout.parts is not None:
        return None
    if node.op == "unsqueeze":
        new = a["dim"] % (rank + 1)
        return layout.moved(lambda dim: dim + (dim >= new))
    if node.op in _ELEMENTWISE:
        others = [value for value in node.inputs if value is not source and value.shape is not None]
        alike = all(_same_for_all(value, layout.dim - rank) and len(value.shape) <= rank for value in others)
        return layout if alike and node.shape == shape else None
    if node.op in _ALONG:
        dims = a["dim"] if isinstance(a["dim"], list | tuple) else [a["dim"]]
        return None if layout.dim in {dim % rank for dim in dims} or not a.get("keepdim", True) else layout
    if node.op in ("layer_norm", "rms_norm"):
        return layout if layout.dim < rank - len(a["normalized_shape"]) else None
    return None


def _same_for_all(value: Node, dim: int) -> bool:
    """Whether a value that broadcasts against heads at `dim` (from the back) is the same for every head."""
    return -dim > len(value.shape) or value.shape[dim] == 1


def concatenated(node: Node, layouts: list[Layout | None]) -> Layout | None:
    """Returns the layout of values of the same heads that are joined along another dimension; None where they are not that."""
    first = layouts[0]
    if first is None or first.inner is None or any(other is None or replace(other, space=first.space) != first for other in layouts):
        return None
    dim = node.arguments["dim"] % len(node.shape)
    return first if dim != first.dim and first.parts is None else None


def product(node: Node, left: Node, first: Layout | None, right: Node, second: Layout | None) -> Layout | None:
    """Returns the layout of the matrix product of two values with heads, each head with its own; None where it is no such product."""
    if first is None or second is None or first.inner is None or second.inner is None or len(left.shape) != len(right.shape):
        return None
    rank = len(left.shape)
    if first.dim != second.dim or first.dim >= rank - 2 or left.shape[first.dim] != right.shape[second.dim]:
        return None
    return replace(first, inner=rank - 1 if second.inner == rank - 1 else LOST)
