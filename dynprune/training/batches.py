"""Training batches: what a loader may yield, and the checks before a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dynprune.errors import InputError


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch as the trainer takes it.

    Attributes:
        args, kwargs: of one call of the model.
        labels: what the loss compares with, or None.
        teacher: the teacher's output, computed beforehand, or None.
        size: number of samples.
    """

    args: tuple
    kwargs: dict[str, Any]
    labels: Any
    teacher: Tensor | None
    size: int

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on `device`."""
        moved = pytree.tree_map_only(Tensor, lambda x: x.to(device), (self.args, self.kwargs, self.labels, self.teacher))
        return Batch(*moved, self.size)


def as_batch(item: Any, name: str) -> Batch:
    """Returns what a loader yielded as a `Batch`.

    Args:
        item: (inputs, labels) or (inputs, labels, teacher's output). Inputs are a tensor, a tuple of the model's arguments or a dict of
            its keyword arguments; labels may be None.
        name: of the batch, for messages.

    Raises:
        InputError: it is none of these, holds NaN or Inf, or its parts differ in their number of samples.
    """
    if not isinstance(item, tuple | list) or len(item) not in (2, 3):
        raise InputError(f"The loader must yield (inputs, labels) or (inputs, labels, teacher's output); {name} is no such tuple.")
    inputs, labels, teacher = item if len(item) == 3 else (*item, None)
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    args = () if kwargs else tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not leaves:
        raise InputError(f"{name} holds no tensor; the loader must yield (inputs, labels).")
    for x in leaves:
        if x.is_floating_point() and not torch.isfinite(x).all():
            raise InputError(f"{name} holds NaN or Inf; remove or repair it.")
    counted = [*leaves, *(x for x in pytree.tree_leaves((labels, teacher)) if isinstance(x, Tensor))]
    sizes = {x.shape[0] if x.ndim else 0 for x in counted}
    if len(sizes) != 1 or 0 in sizes:
        raise InputError(
            f"Inputs, labels and teacher's output of a batch must hold equally many samples, >= 1; {name} has {sorted(sizes)}."
        )
    return Batch(args, kwargs, labels, teacher, sizes.pop())


def check_classes(labels: Any, logits: Any, name: str, ignored: int = -100) -> None:
    """Raises InputError where `labels` are not classes of `logits` (N, classes, ...).

    Args:
        labels: int64 (N, ...), each in [0, classes) or `ignored`.
        logits: the model's output.
        name: of the batch, for messages.
        ignored: label that cross entropy leaves out.
    """
    if not (isinstance(logits, Tensor) and logits.dim() >= 2 and isinstance(labels, Tensor)):
        raise InputError(
            f"Without `loss`, the model must return one tensor of logits (N, classes) and labels must be a tensor; {name} gave "
            f"{type(logits).__name__} and {type(labels).__name__}. Pass `loss`, a callable (output, labels) -> scalar."
        )
    if labels.is_floating_point():
        return
    classes = logits.shape[1]
    bad = (labels != ignored) & ((labels < 0) | (labels >= classes))
    if bad.any():
        raise InputError(f"Labels must lie in [0, {classes}), the model's classes; {name} holds {labels[bad][0].item()}.")
