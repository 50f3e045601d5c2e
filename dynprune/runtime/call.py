"""What a call holds: its tensors, whether a graph can be captured for the rest, and when its result is due."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from dynprune.control.checks import is_number
from dynprune.errors import InputError

FAR_NS = 2**62
"""Later than any deadline, in nanoseconds."""
_PLAIN = (Tensor, type(None), bool, int, float, str)


def due_at_ns(deadline: float) -> int:
    if not is_number(deadline):
        raise InputError(f"`deadline` must be a finite number of seconds on the clock of time.monotonic(), got {deadline!r}.")
    return min(max(1, int(deadline * 1e9)), FAR_NS)


def tensors_in(leaves: Sequence[Any]) -> list[Tensor]:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        raise InputError("The model needs at least one tensor, whose dimension 0 is the batch; got none.")
    return tensors


def length_of(forward: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Returns dimension 1 of the first tensor of a call, in the order in which `forward` names its arguments; 1 where it has none."""
    given = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
    first = next((leaf for leaf in pytree.tree_leaves(list(given.values())) if isinstance(leaf, Tensor)), None)
    return first.shape[1] if first is not None and first.ndim > 1 else 1


def is_plain_call(args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether all arguments are plain, see `is_plain`."""
    for value in args:
        if not is_plain(value):
            return False
    return not kwargs or is_plain(kwargs)


def is_plain(value: Any) -> bool:
    """Whether an argument is made of nothing but tensors, values and containers that a graph can be captured for; a cache is not."""
    if isinstance(value, _PLAIN):
        return True
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    if isinstance(value, Mapping):
        return all(map(is_plain, value.values()))
    return is_dataclass(value) and all(is_plain(getattr(value, item.name)) for item in fields(value))
