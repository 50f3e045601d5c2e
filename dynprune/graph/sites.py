"""Finds where a gate can stand in a captured model, by channel dependency."""

from __future__ import annotations

from dataclasses import dataclass

from dynprune.graph.capture import Graph


@dataclass(frozen=True)
class Consumer:
    """A conv or linear module that mixes a site's channels: input feature `c * repeat + i` (i < repeat) belongs to channel c."""

    module_path: str
    node: str
    repeat: int = 1


@dataclass(frozen=True)
class Site:
    """A place where a gate can stand.

    Attributes:
        name: "channels": module path of the first producer ("layer2.0.conv1"); "branch": of the module whose branch it is ("layer2.0").
        kind: "channels" (an inner channel space) or "branch" (F of x + F(x)).
        num_channels: channels of the space; 1 for a branch.
        group_size: channels per group, consecutive; 1 for a branch.
        producers: module paths of the convs and linears whose output rows the site owns; for a branch all convs and linears inside.
        consumers: the convs and linears that read the space; for a branch empty.
        macs: multiply-adds of one sample that vanish when nothing of the site runs.
        macs_share: the same as a share of the model's, in [0, 1].
        gate_input: name of the node whose channels' means the gate reads (the first producer's input, or the branch's x).
        gate_channels: channels of that node.
        nodes: names of the nodes whose value lies in the channel space, first producer included; for a branch, every node inside it.
        mask_output: for a branch, path of the module whose output the hooked model multiplies by the mask; "" for channels.
        add_node: for a branch, the name of the addition; "" for channels.
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

    @property
    def num_groups(self) -> int:
        """How many groups the gate decides on."""
        return self.num_channels // self.group_size


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
    raise NotImplementedError
