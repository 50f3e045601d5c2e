"""Stride arithmetic: how permute, reshape, slice and broadcast change a view, and which views are rows of contiguous positions.

Everything here is per sample (the batch dimension is left out) and pure: tuples in, tuples out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from dynprune.runtime.plan import Rows, View

Sizes = tuple[int, ...]


def dense_strides(sizes: Sequence[int], order: Sequence[int] | None = None) -> Sizes:
    """Returns strides without gaps, dimensions nested in `order` (outermost first; default None: as they stand)."""
    strides, step = [0] * len(sizes), 1
    for dim in reversed(range(len(sizes)) if order is None else order):
        strides[dim], step = step, step * sizes[dim]
    return tuple(strides)


def collapse(sizes: Sequence[int], strides: Sequence[int]) -> tuple[int, int] | None:
    """Returns (size, stride) of one dimension that runs through all the given ones in order, or None where there is none."""
    size, stride = 1, 1
    for n, step in zip(reversed(sizes), reversed(strides), strict=True):
        if n == 1:
            continue
        if size == 1:
            stride = step
        elif step != size * stride:
            return None
        size *= n
    return size, stride


def reshape_strides(sizes: Sequence[int], strides: Sequence[int], new_sizes: Sequence[int]) -> Sizes | None:
    """Returns the strides of the same memory seen with `new_sizes`, or None where a copy is needed."""
    dims = [(n, s) for n, s in zip(sizes, strides, strict=True) if n != 1]
    result: list[int] = []
    taken = 0
    for group in _matching_groups([n for n, _ in dims], [n for n in new_sizes if n != 1]):
        old = dims[taken : taken + group[0]]
        taken += group[0]
        merged = collapse([n for n, _ in old], [s for _, s in old])
        if merged is None:
            return None
        result += [step * merged[1] for step in dense_strides(group[1])]
    steps = iter(result)
    return tuple(1 if n == 1 else next(steps) for n in new_sizes)


def _matching_groups(old: list[int], new: list[int]) -> list[tuple[int, list[int]]]:
    """Returns the finest split of both lists into runs of equal products, as (how many of old, the sizes of new)."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        first_i, first_j, left, right = i, j, 1, 1
        while left != right or i == first_i:
            if left <= right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        groups.append((i - first_i, new[first_j:j]))
    return groups


def numel(view: View) -> int:
    """Returns the number of elements of one sample."""
    return prod(view.sizes)


def span(view: View) -> int:
    """Returns how many elements lie from the first of the view to its last, both included."""
    return 1 + sum((n - 1) * s for n, s in zip(view.sizes, view.strides, strict=True))


def permuted(view: View, dims: Sequence[int]) -> View:
    """Returns the view with its dimensions in another order."""
    return replace(view, sizes=tuple(view.sizes[d] for d in dims), strides=tuple(view.strides[d] for d in dims))


def sliced(view: View, dim: int, start: int, length: int, step: int = 1) -> View:
    """Returns every `step`-th of a dimension, `length` in all, from `start` on."""
    sizes, strides = list(view.sizes), list(view.strides)
    offset = view.offset + start * strides[dim]
    sizes[dim], strides[dim] = length, strides[dim] * step
    return replace(view, offset=offset, sizes=tuple(sizes), strides=tuple(strides))


def expanded(view: View, sizes: Sequence[int]) -> View | None:
    """Returns the view broadcast to `sizes` (aligned right, repeated dimensions with stride 0), or None where it does not fit."""
    missing = len(sizes) - len(view.sizes)
    if missing < 0:
        return None
    strides = []
    for n, old, stride in zip(sizes, (1,) * missing + view.sizes, (0,) * missing + view.strides, strict=True):
        if old not in (1, n):
            return None
        strides.append(stride if old == n else 0)
    return replace(view, sizes=tuple(sizes), strides=tuple(strides))


def memory_order(view: View) -> tuple[int, ...]:
    """Returns the dimensions from the largest stride to the smallest; those of size 1 come last."""
    return tuple(sorted(range(len(view.sizes)), key=lambda d: (view.sizes[d] == 1, -view.strides[d], d)))


def as_rows(view: View, row_dim: int) -> Rows | None:
    """Returns the view as rows along `row_dim` with all other dimensions, in order, as contiguous positions; None where it is not so."""
    others = [d for d in range(len(view.sizes)) if d != row_dim]
    positions = collapse([view.sizes[d] for d in others], [view.strides[d] for d in others])
    if positions is None or positions[1] != 1:
        return None
    rows = view.sizes[row_dim]
    stride = view.strides[row_dim] if rows > 1 else positions[0]
    return Rows(view.buffer, view.offset, rows, stride, positions[0]) if stride >= positions[0] else None


def memory_rows(view: View) -> Rows | None:
    """Returns the view as rows in the order of its memory (the outermost dimension is the row), or None where it has inner gaps."""
    if not view.sizes:
        return Rows(view.buffer, view.offset, 1, 1, 1)
    order = memory_order(view)
    return as_rows(permuted(view, order), 0)


def rows_like(view: View, order: Sequence[int]) -> Rows | None:
    """Returns a view, possibly broadcast, as rows nested in `order`, the operand beside one whose memory order that is; None if it is not.

    A repeated row has row_stride 0; one element per row has positions 1.
    """
    if not view.sizes:
        return Rows(view.buffer, view.offset, 1, 0, 1)
    inner = permuted(view, order[1:])
    rows, row_stride = view.sizes[order[0]], view.strides[order[0]]
    row_stride = 0 if rows == 1 else row_stride
    if all(s == 0 or n == 1 for n, s in zip(inner.sizes, inner.strides, strict=True)):
        return Rows(view.buffer, view.offset, rows, row_stride, 1)
    positions = collapse(inner.sizes, inner.strides)
    if positions is None or positions[1] != 1:
        return None
    return Rows(view.buffer, view.offset, rows, row_stride, positions[0])


def is_whole(view: View, size: int) -> bool:
    """Whether the view covers `size` elements from the start of its buffer, each exactly once."""
    order = memory_order(view)
    packed = permuted(view, order)
    return view.offset == 0 and numel(view) == size and collapse(packed.sizes, packed.strides) in ((size, 1), (1, 1))


def simplified(sizes: Sequence[int], *strides: Sequence[int]) -> tuple[Sizes, list[Sizes]]:
    """Returns the fewest dimensions that visit the same elements in the same order under every one of the `strides`."""
    kept: list[list[int]] = []
    for row in zip(sizes, *strides, strict=True):
        if row[0] == 1:
            continue
        if kept and all(before == row[0] * after for before, after in zip(kept[-1][1:], row[1:], strict=True)):
            kept[-1] = [kept[-1][0] * row[0], *row[1:]]
        else:
            kept.append(list(row))
    kept = kept or [[1] + [1] * len(strides)]
    columns = [tuple(column) for column in zip(*kept, strict=True)]
    return columns[0], columns[1:]
