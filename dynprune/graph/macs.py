"""Counts the multiply-adds of a captured model, per node and sample."""

from __future__ import annotations

from dynprune.graph.capture import Graph, Node


def count_macs(graph: Graph) -> dict[str, int]:
    """Returns the multiply-adds of one sample for each convolution, linear, matrix product and attention, by node name."""
    macs = {node.name: _node_macs(node) for node in graph.nodes}
    return {name: count for name, count in macs.items() if count}


def _node_macs(node: Node) -> int:
    a = node.arguments
    if node.op in ("conv1d", "conv2d", "conv3d"):
        return node.sample_size * _product(a["weight"].shape[1:])
    if node.op in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
        return a["input"].sample_size * _product(a["weight"].shape[1:])
    if node.op == "linear":
        return node.sample_size * _last_size(a["input"])
    if node.op in ("matmul", "bmm", "mm", "baddbmm", "addmm"):
        return node.sample_size * _last_size(node.inputs[-2])
    if node.op == "scaled_dot_product_attention":
        keys = a["key"].shape[-2] or 0
        return (a["query"].sample_size + node.sample_size) * keys
    return 0


def _last_size(node: Node) -> int:
    return node.shape[-1] or 0


def _product(sizes: tuple[int | None, ...]) -> int:
    result = 1
    for size in sizes:
        result *= size or 0
    return result
