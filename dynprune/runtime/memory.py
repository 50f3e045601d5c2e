"""Places buffers with known lifetimes in one arena."""

from __future__ import annotations

from collections.abc import Sequence

ALIGNMENT = 16
"""Offsets and the arena's size are multiples of this many elements (64 bytes of f32): a cache line, a whole AVX-512 vector."""

SLACK = 16
"""Elements at the arena's end that no buffer holds, so that a full vector may be read at the last element."""


def place_buffers(sizes: Sequence[int], lifetimes: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Returns the offset of each buffer, and the arena's size, so that buffers alive at the same step do not overlap.

    Greedy by size: from the largest buffer to the smallest, each goes to the tightest gap among those already placed that live at the
    same time (Pisarchyk and Lee, "Efficient memory management for deep neural net inference", 2020).

    Args:
        sizes: elements of each buffer.
        lifetimes: the first and the last step, both included, at which each holds a value.

    Returns:
        Offsets in elements, multiples of `ALIGNMENT`, and the arena's size in elements with `SLACK` at the end.

    Example:
        >>> place_buffers([32, 32, 32], [(0, 1), (1, 2), (2, 3)])
        ([0, 32, 0], 80)
    """
    offsets = [0] * len(sizes)
    placed: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], lifetimes[i])):
        first, last = lifetimes[item]
        alive = [(offsets[i], offsets[i] + _aligned(sizes[i])) for i in placed if lifetimes[i][0] <= last and first <= lifetimes[i][1]]
        offsets[item] = _tightest_gap(sorted(alive), _aligned(sizes[item]))
        placed.append(item)
    end = max((offset + _aligned(size) for offset, size in zip(offsets, sizes, strict=True)), default=0)
    return offsets, end + SLACK


def _tightest_gap(taken: list[tuple[int, int]], size: int) -> int:
    """Returns the start of the smallest gap between the sorted `taken` ranges that holds `size`; what lies behind them always does."""
    best, best_room, end = None, None, 0
    for begin, stop in taken:
        room = begin - end
        if room >= size and (best_room is None or room < best_room):
            best, best_room = end, room
        end = max(end, stop)
    return end if best is None else best


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
