"""Follows channels through a captured model: which values share a channel space, who produces it and who mixes it.

Every convolution and linear layer starts a channel space at its output. Operations that treat channels apart (batch norm,
activation, pooling, depthwise convolution, a reshape that keeps channels whole) hand it on; multiplying or adding two values joins
their spaces; a convolution or linear layer that reads it ends it. What does anything else with a space blocks it: its channels
cannot be left out. For

    y = project(se(depthwise(expand(x))))        se(h) = h * sigmoid(fc2(relu(fc1(mean(h)))))

there are two spaces that can be gated: {expand, depthwise, fc2}, read by fc1 and project; and {fc1}, read by fc2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dynprune.graph import headwise
from dynprune.graph.batch import batch_places, leads_with_batch
from dynprune.graph.capture import Graph, Node
from dynprune.graph.headwise import Layout

UNARY = frozenset({
    "relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "hardswish", "hardsigmoid", "sigmoid", "silu", "gelu", "tanh",
    "leaky_relu", "elu", "softplus", "mish", "exp", "log", "sqrt", "rsqrt", "neg", "abs", "square", "reciprocal", "erf",
})  # fmt: skip
"""Activations: one value in, one out, the same for every channel."""
POOLING = frozenset({
    "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "upsample_nearest2d",
    "upsample_bilinear2d", "upsample_bicubic2d",
})  # fmt: skip
"""Operations that take each element of a plane from others of it."""
BINARY = frozenset({"add", "sub", "rsub", "mul", "div", "maximum", "minimum"})
MOVES = frozenset({"permute", "transpose", "flatten", "unflatten", "reshape", "squeeze", "unsqueeze"})
"""Operations that only rename dimensions; they keep a space where they keep its channels whole."""
PADDING = frozenset({"pad", "constant_pad_nd"})
PER_CHANNEL = UNARY | POOLING | BINARY | MOVES | PADDING | {"batch_norm", "mean", "pow", "slice"}
"""Every operation that can hand a channel space on; a depthwise conv1d or conv2d does so too."""
TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d"})
MIXING = frozenset({"conv1d", "conv2d", "linear"}) | TRANSPOSED

_STREAM = "its channels are added to those of another branch; a residual stream stays dense"


@dataclass
class Space:
    """One channel space.

    Attributes:
        size: number of channels.
        producers: convs and linears whose output rows are its channels, in execution order.
        consumers: (node, repeat) of the convs and linears that mix its channels, in execution order.
        members: every node whose value lies in it, producers included.
        blocked: why its channels cannot be left out; empty when they can.
        head_size: channels that can only be left out together; 1 where each can alone.
        first_rows: for a producer, the output rows that are channel 0: several where it makes several values of one space, (0,) otherwise.
    """

    size: int
    producers: list[Node] = field(default_factory=list)
    consumers: list[tuple[Node, int]] = field(default_factory=list)
    members: list[Node] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)
    head_size: int = 1
    first_rows: dict[Node, tuple[int, ...]] = field(default_factory=dict)


class ChannelTrace:
    """The channel spaces of a graph.

    Attributes:
        spaces: those with a producer, in the order of their first producers.
    """

    def __init__(self, graph: Graph):
        self._parent: list[int] = []
        self._spaces: list[Space] = []
        self._layouts: dict[Node, Layout] = {}
        places = batch_places(graph)
        for node in graph.nodes:
            layout = self._visit(node)
            if layout is None:
                continue
            self._layouts[node] = layout
            self._space(layout).members.append(node)
            if node.shape is not None and not layout.is_apart and not leads_with_batch(node, places):
                self._block(layout, f"'{node.name}' has no batch dimension in front")
        for node in graph.outputs:
            if isinstance(node, Node):
                self._block(self._layouts.get(node), "it is an output of the model")
        self.spaces = tuple(space for i, space in enumerate(self._spaces) if self._find(i) == i and space.producers)

    def channel_dim(self, node: Node) -> int | None:
        """Returns the dimension of a node's value that holds channels, counted from the front; None where that is not known.

        Where no layer above tells, the first layer below does that the value reaches through elementwise operations.
        """
        pending, seen = [node], set()
        for value in pending:
            layout = self._layouts.get(value)
            if layout is not None and layout.repeat == 1 and not layout.is_apart:
                return layout.dim
            for user in value.users:
                if user.op == "batch_norm" or user.op in MIXING - {"linear"}:
                    return 1
                if user.op in ("linear", "layer_norm", "rms_norm"):
                    return len(node.shape) - 1
                if user.op in UNARY | BINARY and user.shape == node.shape and user not in seen:
                    seen.add(user)
                    pending.append(user)
        return None

    def _find(self, space: int) -> int:
        while self._parent[space] != space:
            space = self._parent[space]
        return space

    def _space(self, layout: Layout) -> Space:
        return self._spaces[self._find(layout.space)]

    def _new(self, node: Node, dim: int) -> Layout:
        self._parent.append(len(self._parent))
        self._spaces.append(Space(node.shape[dim]))
        return Layout(len(self._parent) - 1, dim)

    def _join(self, a: Layout, b: Layout) -> None:
        first, second = sorted((self._find(a.space), self._find(b.space)))
        if first == second:
            return
        self._parent[second] = first
        kept, joined = self._spaces[first], self._spaces[second]
        kept.producers += joined.producers
        kept.consumers += joined.consumers
        kept.members += joined.members
        kept.blocked += joined.blocked
        kept.first_rows |= joined.first_rows
        if kept.size != joined.size or kept.head_size != joined.head_size:
            kept.blocked.append("it is combined with channels in other groups")

    def _block(self, layout: Layout | None, reason: str) -> None:
        if layout is not None:
            self._space(layout).blocked.append(reason)

    def _visit(self, node: Node) -> Layout | None:
        """Returns the layout of a node's value from those of its inputs, and notes what the node does to their spaces."""
        if node.op in MIXING:
            return self._mix(node)
        known = [self._layouts[value] for value in node.inputs if value in self._layouts]
        if not known or node.op.startswith("sym_"):
            return None
        if node.op == "getitem" and not known[0].is_apart:
            return known[0]
        if any(layout.is_apart for layout in known) or node.op in ("chunk", "split", "split_with_sizes"):
            return self._visit_heads(node, known)
        if node.op in BINARY and "rounding_mode" not in node.kwargs:
            return self._binary(node)
        if node.op in PER_CHANNEL and len(known) == 1 and node.shape is not None and node.args[0] in self._layouts:
            layout = self._hand_on(node, node.args[0], known[0])
            if layout is not None:
                return layout
        for layout in known:
            self._block(layout, _why_blocked(node))
        return None

    def _mix(self, node: Node) -> Layout | None:
        """A convolution or linear layer: ends the space it reads and starts one, unless it is depthwise."""
        x, weight = node.arguments["input"], node.arguments["weight"]
        layout = self._layouts.get(x)
        groups = node.arguments.get("groups", 1)
        dim = len(node.shape) - 1 if node.op == "linear" else 1
        if groups > 1 and weight.shape[1] == 1 and weight.shape[0] == groups:
            if layout is not None and (layout.dim, layout.repeat) == (1, 1):
                return layout
            self._block(layout, f"depthwise '{node.name}' reads it along another dimension")
            return None
        if node.op in TRANSPOSED and (
            groups > 1 or any(size < s for size, s in zip(node.shape[2:], node.arguments["stride"], strict=True))
        ):
            self._block(layout, f"'{node.name}' is transposed and in groups, or makes fewer positions than its stride")
            return None
        if layout is not None:
            if layout.dim == dim and (layout.repeat == 1 or node.op == "linear"):
                self._space(layout).consumers.append((node, layout.repeat))
            else:
                self._block(layout, f"'{node.name}' mixes it along another dimension")
        made = self._new(node, dim)
        self._space(made).producers.append(node)
        self._space(made).first_rows[node] = (0,)
        return made

    def _visit_heads(self, node: Node, known: list[Layout]) -> Layout | None:
        """Returns the layout of what is computed from values whose channels stand in heads or parts."""
        layout, operands = None, [value for value in node.inputs if value in self._layouts]
        if node.op == "scaled_dot_product_attention":
            layout = self._attend(node)
        elif node.op in ("matmul", "bmm") and len(operands) == 2:
            layout = headwise.product(node, operands[0], known[0], operands[1], known[1])
            if layout is not None:
                self._join(*known)
        elif node.op == "cat" and len({self._find(one.space) for one in known}) == 1:
            layout = headwise.concatenated(node, [self._layouts.get(value) for value in node.args[0]])
        elif node.op in ("chunk", "split", "split_with_sizes") and not known[0].is_apart:
            layout = self._in_parts(node, operands[0], known[0])
        elif node.op in MOVES - {"permute", "transpose", "unsqueeze"}:
            layout = _joined(operands[0].shape, node.shape, known[0], self._space(known[0]))
        elif len(operands) == 1:
            layout = headwise.hand_on(node, operands[0], known[0], operands[0].shape)
        elif node.op in BINARY and len({self._find(one.space) for one in known}) == 1 and known[0].dim == known[1].dim:
            same = operands[0].shape == operands[1].shape == node.shape and None not in (known[0].inner, known[1].inner)
            layout = known[0] if same else None
        if layout is None:
            for one in known:
                self._block(one, _why_blocked(node))
        return layout

    def _attend(self, node: Node) -> Layout | None:
        """Attention: the heads of the queries are those of the result; keys and values belong to them where they have the same heads."""
        a = node.arguments
        query, key, value = (self._layouts.get(a[name]) for name in ("query", "key", "value"))
        rank = len(node.shape)
        if query is None or (query.dim, query.inner) != (rank - 3, rank - 1) or query.parts is not None:
            return None
        if isinstance(a["attn_mask"], Node) and a["attn_mask"] in self._layouts:
            return None
        for other, source in ((key, a["key"]), (value, a["value"])):
            if other is not None and (other.dim, other.inner) == (rank - 3, rank - 1) and source.shape[other.dim] == node.shape[query.dim]:
                self._join(query, other)
            else:
                self._block(other, "several heads of queries share its heads")
        return query

    def _in_parts(self, node: Node, x: Node, layout: Layout) -> Layout | None:
        """A linear layer whose output is split into equal parts: channel c of each part is channel c of one new space."""
        space, size = self._space(layout), node.args[1]
        pieces = size if isinstance(size, list | tuple) else None
        if pieces is None and isinstance(size, int):
            count = size if node.op == "chunk" else -(-x.shape[layout.dim] // size)
        elif pieces is not None and len(set(pieces)) == 1:
            count = len(pieces)
        else:
            return None
        along = node.arguments["dim"] % len(x.shape) == layout.dim
        if not along or layout.repeat != 1 or not self._divide(space, x, count):
            return None
        return layout

    def _divide(self, space: Space, x: Node, count: int) -> bool:
        """Makes a space that one linear layer produces, and only `x` leaves, one of `count` times fewer channels."""
        alone = [producer.op for producer in space.producers] == ["linear"] and not space.consumers and len(space.first_rows) == 1
        chain = all(len(member.users) == 1 for member in space.members)
        if not alone or not chain or space.size % count or space.head_size != 1 or space.first_rows[space.producers[0]] != (0,):
            return False
        space.size //= count
        space.first_rows = {space.producers[0]: tuple(range(0, space.size * count, space.size))}
        return True

    def _split_heads(self, node: Node, x: Node, layout: Layout) -> Layout | None:
        """A reshape that splits the channels into heads, or into parts of heads; None where it is none."""
        rank = len(x.shape)
        before, after = x.shape[layout.dim + 1 :], node.shape
        extra = len(after) - rank
        dims = after[layout.dim : layout.dim + extra + 1]
        fits = extra in (1, 2) and after[: layout.dim] == x.shape[: layout.dim] and after[layout.dim + extra + 1 :] == before
        if not fits or layout.repeat != 1 or None in dims or math.prod(dims) != x.shape[layout.dim]:
            return None
        space = self._space(layout)
        if space.head_size not in (1, dims[-1]):
            return None
        if extra == 2 and not self._divide(space, x, dims[0]):
            return None
        if space.size != dims[-2] * dims[-1]:
            return None
        space.head_size = dims[-1]
        return Layout(layout.space, layout.dim + extra - 1, 1, layout.dim + extra, layout.dim if extra == 2 else None)

    def _binary(self, node: Node) -> Layout | None:
        a, b = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
        first, second = (self._layouts.get(v) if isinstance(v, Node) else None for v in (a, b))
        if first is not None and second is not None and _aligned(a, first, b, second, node):
            if self._find(first.space) != self._find(second.space) and node.op not in ("mul", "div"):
                self._block(first, _STREAM)
            self._join(first, second)
            return first if a.shape == node.shape else second
        for value, layout, other, other_layout in ((a, first, b, second), (b, second, a, first)):
            if layout is not None and value.shape == node.shape and _is_per_channel(other, layout, node):
                self._block(other_layout, f"'{node.name}' applies it to all channels of another value")
                return layout
        reason = _STREAM if node.op in ("add", "sub") else f"'{node.name}' combines it with a value whose channels are unknown"
        for layout in (first, second):
            self._block(layout, reason)
        layout = first or second
        return layout if (a if first else b).shape == node.shape else None

    def _hand_on(self, node: Node, x: Node, layout: Layout) -> Layout | None:
        """Returns the layout after an operation that treats channels apart; None if this one does not."""
        if node.op in UNARY or node.op == "pow":
            plain = all(value is x or not value.varies for value in node.inputs) and node.args[0] is x
            return layout if plain else None
        if node.op in MOVES:
            return _moved(node, x, layout) or self._split_heads(node, x, layout)
        if node.op == "slice":
            return layout if node.arguments["dim"] % len(x.shape) not in (0, layout.dim) else None
        if layout.repeat != 1:
            return None
        if node.op == "batch_norm":
            running = layout.dim == 1 and not node.arguments["training"] and node.arguments["running_mean"] is not None
            return layout if running else None
        if node.op in POOLING:
            return layout if layout.dim == 1 and len(x.shape) == (4 if "2d" in node.op else 3) else None
        if node.op == "mean":
            return _after_mean(node, x, layout)
        return layout if node.op in PADDING and _pads_for_conv(node, layout) else None


def _joined(before: tuple[int | None, ...], after: tuple[int | None, ...] | None, layout: Layout, space: Space) -> Layout | None:
    """Returns the layout after a reshape that joins heads and their features to channels again, or only renames other dimensions."""
    if after is None or layout.parts is not None or layout.inner in (None, headwise.LOST):
        return None
    if layout.inner == layout.dim + 1 and before[layout.inner] == space.head_size:
        lead, rest = before[: layout.dim], before[layout.inner + 1 :]
        channels = before[layout.dim] * before[layout.inner]
        if (*lead, channels, *rest) == tuple(after):
            return Layout(layout.space, layout.dim)
        if not rest and after[-1] == channels:  # tokens regrouped on the way
            return Layout(layout.space, len(after) - 1)
    return None


def _why_blocked(node: Node) -> str:
    if node.op in ("chunk", "split", "split_with_sizes"):
        return f"'{node.name}' splits its channels"
    if node.op == "cat":
        return f"its channels are concatenated with others ('{node.name}')"
    if node.op in ("layer_norm", "rms_norm", "group_norm", "softmax"):
        return f"'{node.name}' normalises over its channels"
    if node.op in MOVES:
        return f"'{node.name}' splits, merges or moves its channels"
    return f"'{node.name}' ({node.op}) may mix its channels"


def _aligned(a: Node, first: Layout, b: Node, second: Layout, node: Node) -> bool:
    """Whether two operands hold the same channels in the same dimension (counted from the back, as broadcasting does).

    One of them may have a single position, as the scale of a squeeze-excite block has.
    """
    same_dim = first.dim - len(a.shape) == second.dim - len(b.shape)
    same_channels = first.repeat == second.repeat and a.shape[first.dim] == b.shape[second.dim]
    return same_dim and same_channels and all(v.shape == node.shape or _one_position(v, at) for v, at in ((a, first), (b, second)))


def _one_position(value: Node, layout: Layout) -> bool:
    return all(size == 1 for i, size in enumerate(value.shape) if i not in (0, layout.dim))


def _is_per_channel(other: Node | float, layout: Layout, node: Node) -> bool:
    """Whether an operand treats channels apart: a number, a constant, or a value with one channel that goes to all of them."""
    if not isinstance(other, Node):
        return True
    if other.shape is None:
        return False
    if not other.varies:
        return layout.repeat == 1
    dim = layout.dim - len(node.shape) + len(other.shape)
    return len(other.shape) == len(node.shape) and other.shape[dim] == 1


def _after_mean(node: Node, x: Node, layout: Layout) -> Layout | None:
    dims = node.arguments.get("dim")
    rank = len(x.shape)
    if not dims or {dim % rank for dim in dims} != set(range(rank)) - {0, layout.dim}:
        return None
    return Layout(layout.space, layout.dim if node.arguments["keepdim"] else 1)


def _pads_for_conv(node: Node, layout: Layout) -> bool:
    """Whether a node pads positions with zeros, as a convolution would itself, and only convolutions read it."""
    a = node.arguments
    zeros = a.get("mode", "constant") == "constant" and not a["value"]
    positions_only = len(node.shape) - len(a["pad"]) // 2 > layout.dim
    return zeros and positions_only and all(user.op in ("conv1d", "conv2d") for user in node.users)


def _moved(node: Node, x: Node, layout: Layout) -> Layout | None:
    """Returns the layout after a permute, transpose or reshape; None where it does not keep the channels whole."""
    rank, a = len(x.shape), node.arguments
    if node.op == "permute":
        return Layout(layout.space, [dim % rank for dim in a["dims"]].index(layout.dim), layout.repeat)
    if node.op == "transpose":
        swap = {a["dim0"] % rank: a["dim1"] % rank, a["dim1"] % rank: a["dim0"] % rank}
        return Layout(layout.space, swap.get(layout.dim, layout.dim), layout.repeat)
    return _reshaped(x.shape, node.shape, layout)


def _reshaped(before: tuple[int | None, ...], after: tuple[int | None, ...], layout: Layout) -> Layout | None:
    """Matches the dimensions of a reshape in blocks of equal size from the back, and finds the block with the channels.

    The channels stay whole when they are the slowest dimension of their block before, and a multiple of them is so after.
    """
    source = [i for i, size in enumerate(before) if i and size != 1]
    target = [i for i, size in enumerate(after) if i and size != 1]
    while source and target:
        low, high = [source.pop()], [target.pop()]
        while True:
            have, want = (math.prod(sizes[i] or 0 for i in block) for sizes, block in ((before, low), (after, high)))
            if have == want:
                break
            if have == 0 or want == 0 or not (source if have < want else target):
                return None
            if have < want:
                low.append(source.pop())
            else:
                high.append(target.pop())
        if layout.dim in low:
            channels, features = before[layout.dim] // layout.repeat, after[high[-1]]
            whole = low[-1] == layout.dim and features % channels == 0
            return Layout(layout.space, high[-1], features // channels) if whole else None
    return None
