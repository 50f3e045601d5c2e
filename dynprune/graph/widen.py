"""Rewrites a graph of half-precision values to one in float32, which is what the engine computes in.

Weights become float32, casts between these types do nothing, inputs are widened where the call hands them over and results narrowed
where it returns them. What lies between is then rounded less than PyTorch rounds it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dynprune.graph.capture import Graph, Node

HALF = frozenset({torch.bfloat16, torch.float16})
_FLOATS = HALF | {torch.float32}
_CASTS = frozenset({"to", "_to_copy", "type_as"})


def widened(graph: Graph) -> Graph:
    """Returns `graph` itself where no value is bfloat16 or float16, else the same in float32.

    Nodes keep their names; an input's name is then that of its float32 value.
    """
    if not any(node.dtype in HALF for node in graph.nodes):
        return graph
    nodes: list[Node] = []
    values: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op == "input":
            half = node.dtype in HALF
            given = replace(node, name=f"{node.name}_given" if half else node.name, users=[])
            nodes.append(given)
            values[node] = _cast(given, node.name, torch.float32, nodes) if half else given
        else:
            values[node] = _in_float32(node, values)
            nodes.append(values[node])
    returned: dict[Node, Node] = {}
    for node in dict.fromkeys(output for output in graph.outputs if isinstance(output, Node)):
        returned[node] = (
            values[node] if node.dtype == values[node].dtype else _cast(values[node], f"{node.name}_returned", node.dtype, nodes)
        )
    for node in nodes:
        for used in dict.fromkeys(node.inputs):
            used.users.append(node)
    outputs = tuple(returned[output] if isinstance(output, Node) else output for output in graph.outputs)
    return replace(graph, nodes=tuple(nodes), inputs=tuple(node for node in nodes if node.op == "input"), outputs=outputs)


def _cast(node: Node, name: str, dtype: torch.dtype, nodes: list[Node]) -> Node:
    cast = replace(
        node,
        name=name,
        op="to",
        target=torch.ops.aten.to.dtype,
        args=(node, dtype),
        kwargs={},
        dtype=dtype,
        tensor=None,
        parameter_name="",
        users=[],
    )
    nodes.append(cast)
    return cast


def _is_cast(node: Node) -> bool:
    """Whether a node does no more than change between float types that are all float32 here."""
    source = node.args[0] if node.args else None
    return node.op in _CASTS and isinstance(source, Node) and source.dtype in _FLOATS and node.dtype in _FLOATS


def _in_float32(node: Node, values: dict[Node, Node]) -> Node:
    def wide(item: Any) -> Any:
        return values.get(item, item) if isinstance(item, Node) else torch.float32 if item in HALF else item

    op, target = node.op, node.target
    args, kwargs = pytree.tree_map(wide, (node.args, node.kwargs), is_leaf=lambda item: isinstance(item, torch.dtype))
    if _is_cast(node):
        op, target, args, kwargs = "alias", torch.ops.aten.alias.default, args[:1], {}
    half = node.dtype in HALF
    return replace(
        node,
        op=op,
        target=target,
        args=args,
        kwargs=kwargs,
        dtype=torch.float32 if half else node.dtype,
        tensor=node.tensor.float() if half and node.tensor is not None else node.tensor,
        users=[],
    )
