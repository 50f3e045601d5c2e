"""Finds residual branches: an addition x + F(x) of a captured model whose F can be skipped."""

from __future__ import annotations

from dataclasses import dataclass

from dynprune.graph.batch import batch_places, leads_with_batch
from dynprune.graph.capture import Graph, Node
from dynprune.graph.channels import MIXING, MOVES

_LINEAR = MOVES | {"mul", "div", "roll", "slice"}
"""Operations with one varying operand whose result is zero where that operand is."""


@dataclass(frozen=True)
class Branch:
    """One skippable branch.

    Attributes:
        add: the addition.
        x: the value from outside that the branch reads and the other operand is, or is computed from. The branch may read others
            too, such as an attention mask.
        nodes: every node that runs for the branch alone and after x, in execution order.
        mask_output: path of the module whose output the branch's value is a multiple of, or "" if there is none.
    """

    add: Node
    x: Node
    nodes: tuple[Node, ...]
    mask_output: str


def find_branches(graph: Graph, macs: dict[str, int]) -> tuple[list[Branch], list[Node]]:
    """Returns the branches in execution order, and the additions of a conv's or linear's value where there is none."""
    order, places = {node: i for i, node in enumerate(graph.nodes)}, batch_places(graph)
    outputs = {node for node in graph.outputs if isinstance(node, Node)}
    branches, refused = [], []
    for add in graph.nodes:
        if add.op != "add" or not _adds_two_values(add):
            continue
        sides = [_exclusive(value, add, outputs) for value in add.inputs]
        weights = [sum(macs.get(node.name, 0) for node in nodes if node.op in MIXING) for nodes in sides]
        side = weights.index(max(weights))
        if not weights[side]:
            continue
        x = _shared_source(_sources(sides[side]), add.inputs[1 - side], order)
        if x is not None and leads_with_batch(x, places):
            inside = {node for node in sides[side] if order[node] > order[x]}
            nodes = tuple(sorted(inside, key=order.__getitem__))
            branches.append(Branch(add, x, nodes, _mask_output(add.inputs[side], add, inside, graph, places)))
        else:
            refused.append(add)
    return branches, refused


def _adds_two_values(add: Node) -> bool:
    """Whether an addition is of two different values of the result's shape, unscaled."""
    values = add.inputs
    alone = len(values) == 2 and values[0] is not values[1] and add.arguments.get("alpha", 1) == 1
    return alone and all(value.varies and value.shape == add.shape for value in values)


def _exclusive(value: Node, add: Node, outputs: set[Node]) -> set[Node]:
    """Returns the nodes all of whose uses end in this operand of `add`."""
    inside: set[Node] = set()
    pending = [value]
    while pending:
        node = pending.pop()
        if node in inside or node in outputs or node.op == "input" or not node.varies:
            continue
        if all(user in inside or (user is add and node is value) for user in node.users):
            inside.add(node)
            pending += node.inputs
    return inside


def _sources(inside: set[Node]) -> set[Node]:
    """Returns the values from outside that a region reads; sizes of values count as constants."""
    read = {value for node in inside for value in node.inputs}
    return {value for value in read - inside if value.varies and value.shape is not None}


def _shared_source(sources: set[Node], other: Node, order: dict[Node, int]) -> Node | None:
    """Returns the one value of `sources` that the other operand is, or else is computed from; None where there is not just one."""
    if other in sources:
        return other
    shared = [value for value in sources if _reads(other, value, order)]
    return shared[0] if len(shared) == 1 else None


def _reads(node: Node, x: Node, order: dict[Node, int]) -> bool:
    """Whether `node` is computed from `x`."""
    seen, pending = set(), [node]
    while pending:
        node = pending.pop()
        if node is x:
            return True
        if node not in seen and order[node] > order[x]:
            seen.add(node)
            pending += node.inputs
    return False


def _mask_output(value: Node, add: Node, inside: set[Node], graph: Graph, places: dict[Node, int]) -> str:
    """Returns the path of the module to whose single output the branch's value is proportional, or ""."""
    while value in inside:
        path = value.module_path
        alone = graph.call_counts.get(path) == 1 and path in graph.tensor_modules
        if alone and leads_with_batch(value, places) and not any(is_within(other.module_path, path) for other in (add, *value.users)):
            return path
        varying = [node for node in value.inputs if node.varies and node.shape is not None]
        if len(varying) != 1 or value.op not in _LINEAR or (value.op == "div" and value.args[0] is not varying[0]):
            return ""
        value = varying[0]
    return ""


def is_within(path: str, module: str) -> bool:
    """Whether a module path is `module` or lies inside it."""
    return not module or path == module or path.startswith(module + ".")
