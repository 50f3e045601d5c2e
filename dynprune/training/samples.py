"""The calibration inputs: read once, checked, and cut into chunks of a size that fits in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dynprune.errors import CalibrationError

MAX_SAMPLES = 1024
"""Reading stops after this many: more does not make closed-form gates better."""
CHUNK = 64
"""Samples that run together at most; fewer where they are large, see `CHUNK_ELEMENTS`."""
CHUNK_ELEMENTS = 4_000_000
"""Input elements that run together at most: a VGG takes some 20 MB per image of 150,000."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Samples that run together.

    Attributes:
        args, kwargs: of one call of the model.
        labels: a tensor or other sliceable with one entry per sample, or None.
        size: number of samples.
    """

    args: tuple
    kwargs: dict[str, Any]
    labels: Any
    size: int

    def part(self, first: int, last: int) -> Chunk:
        """Returns samples first to last - 1."""
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: x[first:last], (self.args, self.kwargs))
        labels = None if self.labels is None else self.labels[first:last]
        return Chunk(args, kwargs, labels, last - first)


def read_samples(inputs: Iterable[Any], *, labelled: bool, num_inputs: int | None, splittable: bool = True) -> list[Chunk]:
    """Returns the samples of `inputs`, shuffled, in chunks of up to 64; at most 1024 samples.

    A batch is a tensor, a tuple or list of the model's arguments, a dict of its keyword arguments, or a pair of one of these and
    labels.

    Args:
        inputs: iterable of batches.
        labelled: whether labels are needed; then each batch is a pair.
        num_inputs: how many tensors the model takes, to recognise pairs that carry labels nobody needs; None if not known.
        splittable: False keeps the caller's batches as they are, for a model of a fixed batch size.

    Raises:
        CalibrationError: nothing usable, NaN or Inf (the message names the batch), or labels are missing.
    """
    if isinstance(inputs, Tensor | Mapping) or not isinstance(inputs, Iterable):
        raise CalibrationError(f"`inputs` must be an iterable of batches, such as a list or DataLoader, got {type(inputs).__name__}.")
    chunks: list[Chunk] = []
    total = 0
    for number, batch in enumerate(inputs):
        whole = _chunk(batch, number, labelled, num_inputs)
        _check_finite(whole, number)
        size = min(whole.size, MAX_SAMPLES - total) if splittable else whole.size
        chunks.append(whole.part(0, size))
        total += size
        if total >= MAX_SAMPLES:
            break
    if total < 2:
        raise CalibrationError(f"Calibration needs at least 2 samples, a few hundred for good gates; `inputs` held {total}.")
    return _shuffled(chunks) if splittable else chunks


def take(chunks: Sequence[Chunk], count: int, *, splittable: bool = True) -> list[Chunk]:
    """Returns the first `count` samples (or at least so many, in whole chunks, if not `splittable`)."""
    taken: list[Chunk] = []
    for chunk in chunks:
        if count > 0:
            taken.append(chunk if chunk.size <= count or not splittable else chunk.part(0, count))
            count -= chunk.size
    return taken


def split(chunks: Sequence[Chunk], *, splittable: bool = True) -> tuple[list[Chunk], list[Chunk]]:
    """Returns the samples to fit to, and those to measure on: about a quarter, or the same where there is one whole batch only."""
    if len(chunks) >= 4:
        return [c for i, c in enumerate(chunks) if i % 4 != 3], [c for i, c in enumerate(chunks) if i % 4 == 3]
    if splittable:
        bounds = [(chunk, chunk.size - max(1, chunk.size // 4)) for chunk in chunks if chunk.size > 1]
        singles = [chunk for chunk in chunks if chunk.size == 1]
        return [c.part(0, at) for c, at in bounds] + singles[1:], [c.part(at, c.size) for c, at in bounds] + singles[:1]
    return (list(chunks[:-1]), [chunks[-1]]) if len(chunks) > 1 else (list(chunks), list(chunks))


def nth_sample(chunks: Sequence[Chunk], number: int) -> Chunk:
    """Returns one sample as a batch of 1."""
    for chunk in chunks:
        if number < chunk.size:
            return chunk.part(number, number + 1)
        number -= chunk.size
    raise IndexError(number)


def _chunk(batch: Any, number: int, labelled: bool, num_inputs: int | None) -> Chunk:
    labels = None
    if labelled:
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise CalibrationError(f"With a `metric`, every batch must be a pair (inputs, labels); batch {number} is no pair.")
        batch, labels = batch
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        first = [leaf for leaf in pytree.tree_leaves(batch[0]) if isinstance(leaf, Tensor)]
        if not isinstance(batch[0], Tensor) or (num_inputs == 1 and len(first) == 1):
            batch = batch[0]
    args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else (tuple(batch) if isinstance(batch, tuple | list) else (batch,), {})
    sizes = {x.shape[0] if x.ndim else 0 for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    if len(sizes) != 1:
        raise CalibrationError(f"Every tensor of a batch must hold the same number of samples; batch {number} has {sorted(sizes)}.")
    size = sizes.pop()
    if labels is not None and len(labels) != size:
        raise CalibrationError(f"Batch {number} has {size} samples but {len(labels)} labels.")
    return Chunk(args, kwargs, labels, size)


def _check_finite(chunk: Chunk, number: int) -> None:
    for x in pytree.tree_leaves((chunk.args, chunk.kwargs)):
        if isinstance(x, Tensor) and x.is_floating_point() and not torch.isfinite(x).all():
            raise CalibrationError(f"Batch {number} of the calibration inputs holds NaN or Inf; remove or repair it.")


def _shuffled(chunks: list[Chunk]) -> list[Chunk]:
    """Returns the samples in a random but always the same order, in full chunks, those of one structure and shape together."""
    alike: dict[Any, list[Chunk]] = {}
    for chunk in chunks:
        leaves, spec = pytree.tree_flatten((chunk.args, chunk.kwargs))
        described = tuple((x.shape[1:], x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves)
        alike.setdefault((described, str(spec)), []).append(chunk)
    return [part for group in alike.values() for part in _rechunked(group)]


def _rechunked(group: list[Chunk]) -> list[Chunk]:
    leaves = [pytree.tree_leaves((chunk.args, chunk.kwargs)) for chunk in group]
    spec = pytree.tree_structure((group[0].args, group[0].kwargs))
    order = torch.randperm(sum(chunk.size for chunk in group), generator=torch.Generator().manual_seed(0))
    columns = [torch.cat(column)[order] if isinstance(column[0], Tensor) else column[0] for column in zip(*leaves, strict=True)]
    args, kwargs = pytree.tree_unflatten(columns, spec)
    if isinstance(group[0].labels, Tensor):
        labels = torch.cat([chunk.labels for chunk in group])[order]
    else:
        labels = None if group[0].labels is None else [label for chunk in group for label in chunk.labels]
        labels = labels and [labels[i] for i in order.tolist()]
    whole = Chunk(args, kwargs, labels, len(order))
    elements = sum(column[0].numel() for column in columns if isinstance(column, Tensor))
    step = max(1, min(CHUNK, CHUNK_ELEMENTS // max(1, elements)))
    return [whole.part(first, min(first + step, whole.size)) for first in range(0, whole.size, step)]
