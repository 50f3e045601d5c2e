"""Says where the batch stands in a value that has no dimension of the batch's size, as windows do: (batch * windows, tokens, channels)."""

from __future__ import annotations

from dynprune.graph.capture import BATCH, Graph, Node

_RESHAPES = frozenset({"reshape", "view", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as"})


def batch_places(graph: Graph) -> dict[Node, int]:
    """Returns, for each value that varies, the dimension that is the batch or begins with it; values where that is unknown are missing.

    A dimension begins with the batch when sample n owns the n-th of as many equal stretches of it.
    """
    places: dict[Node, int] = {}
    for node in graph.nodes:
        place = _place(node, places)
        if place is not None:
            places[node] = place
    return places


def leads_with_batch(node: Node, places: dict[Node, int]) -> bool:
    """Whether dimension 0 of a node's value is the batch, or begins with it."""
    return bool(node.shape) and (node.shape[0] == BATCH or (node.shape[0] is None and places.get(node) == 0))


def _place(node: Node, places: dict[Node, int]) -> int | None:
    if node.shape and node.shape[0] == BATCH:
        return 0
    source = next((used for used in node.inputs if used in places), None)
    if source is None or not node.varies:
        return None
    place, arguments = places[source], node.arguments
    if node.op == "unbind":
        return _without(place, arguments["dim"], source)
    if node.op == "getitem":
        return place
    if node.shape is None:
        return place if node.op in ("chunk", "split", "split_with_sizes") else None
    if node.op in _RESHAPES:
        return 0 if place == 0 and node.shape and node.shape[0] is None else None
    if node.op == "select":
        return _without(place, arguments["dim"], source)
    if node.op == "permute":
        return [dim % len(node.shape) for dim in arguments["dims"]].index(place)
    if node.op == "transpose":
        swap = [arguments["dim0"] % len(node.shape), arguments["dim1"] % len(node.shape)]
        return swap[1 - swap.index(place)] if place in swap else place
    same = source.shape is not None and len(source.shape) == len(node.shape) and node.shape[place] is None
    return place if same else None


def _without(place: int, dim: int, source: Node) -> int | None:
    """Returns the place after dimension `dim` of the source is gone."""
    if source.shape is None:
        return None
    dim %= len(source.shape)
    return None if dim == place else place - (dim < place)
