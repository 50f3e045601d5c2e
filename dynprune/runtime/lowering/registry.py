"""The table of ATen operations that the engine knows: name -> function(draft, node) -> value of the node."""

from __future__ import annotations

from collections.abc import Callable

from dynprune.graph.capture import Node
from dynprune.runtime.lowering.draft import Draft
from dynprune.runtime.lowering.values import DraftValue

Handler = Callable[[Draft, Node], DraftValue]

HANDLERS: dict[str, Handler] = {}
"""A handler returns the node's value, or raises `NotOnEngine` to leave the node to PyTorch; until then it emits no more than copies."""

POSITIONLESS: set[str] = set()
"""Operations for which a batch that shares a dimension with a neighbour makes no difference."""


def lowers(*ops: str, positionless: bool = False) -> Callable[[Handler], Handler]:
    """Enters the decorated function as the handler of these operations; `positionless` ones only know the last dimension, or none."""

    def enter(handler: Handler) -> Handler:
        for op in ops:
            HANDLERS[op] = handler
        POSITIONLESS.update(ops if positionless else ())
        return handler

    return enter


def dim_of_sample(dim: int, rank: int, batch_dim: int) -> int | None:
    """Returns which per-sample dimension a (possibly negative) dimension of the model's tensor is, or None for the batch."""
    dim = dim % rank
    return None if dim == batch_dim else dim - (dim > batch_dim)


def pair(value: int | list[int] | tuple[int, ...], default: int = 0) -> list[int]:
    """Returns two numbers for what PyTorch takes as one number, one in a list, two, or an empty list (then `default` twice)."""
    numbers = [value] if isinstance(value, int) else list(value)
    return {0: [default, default], 1: numbers * 2}.get(len(numbers), numbers)
