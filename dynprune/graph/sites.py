"""Finds where a gate can stand in a captured model, by channel dependency."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import math
from collections import defaultdict
from dataclasses import dataclass

from dynprune.errors import InputError
from dynprune.graph.branches import find_branches, is_within
from dynprune.graph.capture import Graph, Node
from dynprune.graph.channels import MIXING, PADDING, TRANSPOSED, ChannelTrace
from dynprune.graph.macs import count_macs

MIN_MACS_SHARE = 0.002
"""Sites that hold a smaller share of the model's multiply-adds are left alone: a gate would cost about what it saves."""


@dataclass(frozen=True)
class Consumer:
    """A conv or linear module that mixes a site's channels: input feature `c * repeat + i` (i < repeat) belongs to channel c."""

    module_path: str
    node: str
    repeat: int = 1
    call: int | None = None
    """Which call of the module it is, from 0; None where it runs once."""
    transposed: bool = False
    """Whether the module's weight is (in, out, ...), as GPT-2's or a transposed convolution's, rather than (out, in, ...)."""


@dataclass(frozen=True)
class Site:
    """A place where a gate can stand.

    Attributes:
        name: "channels": module path of the first producer ("layer2.0.conv1"), with its call where it runs several times ("ffn@1");
            "branch": of the module whose branch it is ("layer2.0").
        kind: "channels" (an inner channel space) or "branch" (F of x + F(x)).
        num_channels: channels of the space; 1 for a branch.
        group_size: channels per group, consecutive; 1 for a branch.
        producers: module paths of the convs and linears whose output rows the site owns; for a branch all convs and linears inside.
        consumers: the convs and linears that read the space; for a branch empty.
        macs: multiply-adds of one sample that vanish when nothing of the site runs.
        macs_share: the same as a share of the model's, in [0, 1].
        gate_input: name of the node whose channels' means the gate reads: the first producer's input, the planes before that was
            flattened, or the branch's x.
        gate_channels: channels of that node.
        nodes: names of the nodes whose value lies in the channel space, first producer included; for a branch, every node inside it.
        mask_output: for a branch, path of the module whose output the hooked model multiplies by the mask; "" for channels.
        add_node: for a branch, the name of the addition; "" for channels.
        gate_dim: the dimension of `gate_input` that holds its channels, counted from the front with the batch as 0.
        first_rows: for each of `producers`, the output rows that are channel 0; channel c owns row c after each of them. A fused layer of
            queries, keys and values has three. Empty for a branch.
        transposed: for each of `producers`, whether its weight is (in, out, ...) rather than (out, in, ...). Empty for a branch.
        calls: for each of `producers`, which call of the module it is, as in `Consumer`. Empty for a branch.
        is_heads: whether a group is an attention head: `group_size` is then the features of one, whatever was asked for.
    """

    name: str
    kind: str
    num_channels: int
    group_size: int
    producers: tuple[str, ...]
    consumers: tuple[Consumer, ...]
    macs: int
    macs_share: float
    gate_input: str
    gate_channels: int
    nodes: frozenset[str]
    mask_output: str = ""
    add_node: str = ""
    gate_dim: int = 1
    first_rows: tuple[tuple[int, ...], ...] = ()
    transposed: tuple[bool, ...] = ()
    calls: tuple[int | None, ...] = ()
    is_heads: bool = False

    @property
    def num_groups(self) -> int:
        """How many groups the gate decides on."""
        return self.num_channels // self.group_size

    @property
    def is_repeated(self) -> bool:
        """Whether one of its layers runs several times in a call of the model, so that other sites share its weight."""
        return any(call is not None for call in (*self.calls, *(consumer.call for consumer in self.consumers)))


@dataclass(frozen=True)
class Ungated:
    """A conv or linear whose output cannot be gated, or a residual addition whose branch cannot be skipped, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Sites:
    """The result of `find_sites`: what can be gated and what cannot, and the model's multiply-adds per sample."""

    sites: tuple[Site, ...]
    ungated: tuple[Ungated, ...]
    macs: int
    node_macs: dict[str, int]


def find_sites(graph: Graph, *, include: tuple[str, ...] = ("*",), exclude: tuple[str, ...] = (), group_size: int = 1) -> Sites:
    """Returns where gates can stand in a captured model, and for every other layer and residual addition why none can.

    A "channels" site is an inner channel space: what some convs or linears produce, other convs or linears read, and nothing else
    sees. A "branch" site is F in an addition x + F(x). Dependencies are those of structured pruning (Fang et al., DepGraph: Towards
    Any Structural Pruning, CVPR 2023), with residual streams left dense.

    Args:
        graph: from `capture`.
        include: shell patterns of site names; a site must match one. Default: all.
        exclude: shell patterns of site names; a site must match none. Default: none.
        group_size: channels per group, >= 1; it must divide the channels of every site. Default 1.

    Raises:
        InputError: a pattern matches no site, or `group_size` does not divide the channels of one.

    Example:
        >>> sites = find_sites(capture(resnet18, torch.rand(1, 3, 224, 224)))
        >>> [(site.name, site.kind, site.num_channels) for site in sites.sites[:2]]
        [('layer1.0.conv1', 'channels', 64), ('layer1.0', 'branch', 1)]
    """
    if not isinstance(group_size, int) or group_size < 1:
        raise InputError(f"`group_size` must be a whole number >= 1, got {group_size!r}.")
    macs = count_macs(graph)
    trace = ChannelTrace(graph)
    found, ungated = _channel_sites(graph, trace, macs, group_size)
    branches, without = _branch_sites(graph, trace, macs, {site.name for site in found})
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    candidates = sorted(found + branches, key=lambda site: min(order[name] for name in site.nodes))
    ungated += without

    sites = []
    chosen = _select([site.name for site in candidates], [item.name for item in ungated], include, exclude)
    for site in candidates:
        if site.name not in chosen:
            ungated.append(Ungated(site.name, "left out by `include` or `exclude`"))
        elif site.macs_share < MIN_MACS_SHARE:
            ungated.append(Ungated(site.name, f"too small: {site.macs_share:.2%} of the model's multiply-adds would not pay for a gate"))
        elif site.num_channels % site.group_size:
            raise InputError(
                f"Site {site.name!r} has {site.num_channels} output channels, not a multiple of group_size={group_size}; "
                f"pass group_size={math.gcd(site.num_channels, group_size)} or exclude it."
            )
        else:
            sites.append(site)
    return Sites(tuple(sites), tuple(ungated), sum(macs.values()), macs)


def _channel_sites(graph: Graph, trace: ChannelTrace, macs: dict[str, int], group_size: int) -> tuple[list[Site], list[Ungated]]:
    sites, ungated, calls = [], [], _module_calls(graph)
    for space in trace.spaces:
        readers = [node for node, _ in space.consumers]
        reason = next(
            itertools.chain(
                space.blocked,
                filter(None, (_module_problem(node, calls) for node in (*space.producers, *readers))),
                [] if readers else ["no conv or linear reads it"],
            ),
            None,
        )
        if reason is not None:
            ungated += [Ungated(node.module_path or node.name, reason) for node in space.producers]
            continue
        first = space.producers[0]
        gate_input, gate_dim = _gate_input(first)
        gone = sum(macs.get(node.name, 0) for node in {*space.members, *readers})
        sites.append(
            Site(
                name=first.module_path if calls[first] is None else f"{first.module_path}@{calls[first]}",
                kind="channels",
                num_channels=space.size,
                group_size=group_size if space.head_size == 1 else space.head_size,
                producers=tuple(node.module_path for node in space.producers),
                consumers=tuple(
                    Consumer(node.module_path, node.name, repeat, calls[node], _is_transposed(node)) for node, repeat in space.consumers
                ),
                macs=gone,
                macs_share=_share(gone, macs),
                gate_input=gate_input.name,
                gate_channels=gate_input.shape[gate_dim],
                nodes=frozenset(node.name for node in space.members),
                gate_dim=gate_dim,
                first_rows=tuple(space.first_rows[node] for node in space.producers),
                transposed=tuple(map(_is_transposed, space.producers)),
                calls=tuple(calls[node] for node in space.producers),
                is_heads=space.head_size > 1,
            )
        )
    return sites, ungated


def _gate_input(first: Node) -> tuple[Node, int]:
    """Returns the value whose means the gate of a producer reads, and its channel dimension; behind a flatten, the planes before it."""
    x = first.arguments["input"]
    if first.op != "linear":
        return x, 1
    planes = x.args[0] if x.op in ("flatten", "reshape") else None
    whole = planes is not None and planes.shape is not None and len(planes.shape) == 4 and len(x.shape) == 2
    if whole and None not in planes.shape and math.prod(planes.shape[1:]) == x.shape[1]:
        return planes, 1
    return x, len(x.shape) - 1


def _is_transposed(node: Node) -> bool:
    return node.arguments["weight"].op == "t" or node.op in TRANSPOSED


def _weight(node: Node) -> Node:
    """Returns the parameter that is the weight of a conv or linear."""
    weight = node.arguments["weight"]
    return weight.args[0] if weight.op == "t" else weight


def _module_calls(graph: Graph) -> dict[Node, int | None]:
    """Returns which call of its module each conv or linear is, None where that runs once; without those that are not one per call."""
    runs: defaultdict[str, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op in MIXING:
            runs[node.module_path].append(node)
    calls: dict[Node, int | None] = {}
    for path, nodes in runs.items():
        weights = {_weight(node) for node in nodes}
        readers = {reader for weight in weights for user in weight.users for reader in (user.users if user.op == "t" else [user])}
        if len(weights) == 1 and readers == set(nodes) and graph.call_counts.get(path) == len(nodes):
            calls |= {node: i if len(nodes) > 1 else None for i, node in enumerate(nodes)}
    return calls


def _module_problem(node: Node, calls: dict[Node, int | None]) -> str | None:
    """Returns why a module of the user cannot stand for this conv or linear; None if one can."""
    path, a = node.module_path, node.arguments
    name = repr(path or node.name)
    if _weight(node).parameter_name != f"{path}.weight" or (a["bias"] is not None and a["bias"].op != "constant"):
        return f"{name} is a functional {node.op}, not a module with a weight of its own"
    if node not in calls:
        return f"{name} shares its weight with another module, or does not run at every call of its own"
    source = a["input"].args[0] if a["input"].op in PADDING else a["input"]
    if any(is_within(other.module_path, path) for other in (source, *node.users)):
        return f"{name} does more than its {node.op}"
    return None


def _branch_sites(graph: Graph, trace: ChannelTrace, macs: dict[str, int], names: set[str]) -> tuple[list[Site], list[Ungated]]:
    """Returns the branch sites and the additions without one; `names` are taken."""
    branches, refused = find_branches(graph, macs)
    ungated = [Ungated(add.module_path or add.name, "neither operand is a branch of what the other is computed from") for add in refused]
    sites: list[Site] = []
    for branch in branches:
        place = branch.add.module_path
        gate_dim = trace.channel_dim(branch.x)
        if not branch.mask_output:
            ungated.append(Ungated(place or branch.add.name, "no module of its own returns the branch as one tensor"))
            continue
        if gate_dim is None or branch.x.shape[gate_dim] is None:
            ungated.append(Ungated(place or branch.add.name, f"the channels of the branch's input '{branch.x.name}' are unknown"))
            continue
        name = place if place and place not in names else f"{place}.{branch.mask_output.rpartition('.')[2]}".lstrip(".")
        name = name if name not in names else branch.add.name
        names = names | {name}
        gone = sum(macs.get(node.name, 0) for node in branch.nodes)
        sites.append(
            Site(
                name=name,
                kind="branch",
                num_channels=1,
                group_size=1,
                producers=tuple(node.module_path or node.name for node in branch.nodes if node.op in MIXING),
                consumers=(),
                macs=gone,
                macs_share=_share(gone, macs),
                gate_input=branch.x.name,
                gate_channels=branch.x.shape[gate_dim],
                nodes=frozenset(node.name for node in branch.nodes),
                mask_output=branch.mask_output,
                add_node=branch.add.name,
                gate_dim=gate_dim,
            )
        )
    return sites, ungated


def _share(gone: int, macs: dict[str, int]) -> float:
    total = sum(macs.values())
    return gone / total if total else 0.0


def _select(names: list[str], ungated: list[str], include: tuple[str, ...], exclude: tuple[str, ...]) -> set[str]:
    """Returns the names that match `include` and not `exclude`; refuses a pattern that matches nothing."""
    include, exclude = ((patterns,) if isinstance(patterns, str) else tuple(patterns) for patterns in (include, exclude))
    for pattern in (*include, *exclude):
        if pattern == "*" or fnmatch.filter(names, pattern):
            continue
        if fnmatch.filter(ungated, pattern):
            raise InputError(f"{pattern!r} names a place that cannot be gated anyway; `find_sites(graph).ungated` says why.")
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
        raise InputError(
            f"{pattern!r} matches no site; expected a site's name or a pattern of names, for example {', '.join(map(repr, near))}."
        )
    chosen = {name for pattern in include for name in fnmatch.filter(names, pattern)}
    return chosen - {name for pattern in exclude for name in fnmatch.filter(names, pattern)}
