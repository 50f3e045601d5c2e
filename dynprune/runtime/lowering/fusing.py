"""Finds steps that the engine may run as one: expand (1x1) - depthwise - project (1x1), as in inverted residuals, or two of the three."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from dynprune.runtime.lowering.values import DraftStep
from dynprune.runtime.plan import Rows


def mark_fused(
    steps: Sequence[DraftStep], readers: Counter[int], writers: Counter[int], is_arena: Callable[[int], bool], place: Callable[[Rows], Rows]
) -> dict[int, int]:
    """Marks the last of each such group with ints["fused"], the number of steps before it; the engine then decides whether it pays.

    Args:
        steps: in execution order.
        readers, writers: how many steps (and outputs of the model) read and write each buffer.
        is_arena: whether a buffer is the engine's own.
        place: an operand with its buffer and offset resolved.

    Returns:
        For each step before the last of its group, the last one's index: what it reads must stay until then.
    """

    def hands_on(first: DraftStep, second: DraftStep) -> bool:
        """Whether nothing but `second` reads what `first` writes."""
        written, read = place(first.output), place(second.inputs[0])
        alone = is_arena(written.buffer) and readers[written.buffer] == writers[written.buffer] == 1
        same = first.out_site == second.in_site and first.branches == second.branches
        return alone and same and written == read and len(first.inputs) == 1

    until: dict[int, int] = {}
    for i, step in enumerate(steps):
        if step.op != "depthwise":
            continue
        before = steps[i - 1] if i > 0 and i - 1 not in until else None
        expands = before is not None and _is_pointwise(before) and hands_on(before, step)
        first = i - 1 if expands else i
        last = i + 1 if i + 1 < len(steps) and _is_pointwise(steps[i + 1]) and hands_on(step, steps[i + 1]) else i
        if first < last:
            steps[last].ints["fused"] = [last - first]
            until.update(dict.fromkeys(range(first, last), last))
    return until


def _is_pointwise(step: DraftStep) -> bool:
    ints = step.ints
    one = ints.get("kernel") == ints.get("stride") == ints.get("groups", [1]) * 2 == [1, 1]
    return step.op == "conv" and one and not any(ints["padding"]) and "fused" not in ints
