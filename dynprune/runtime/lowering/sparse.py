"""Marks the convolutions and linear layers of a plan whose weights hold so many zeros that running the nonzeros alone is faster."""

from __future__ import annotations

import numpy as np

from dynprune.runtime.plan import Step

BLOCK = 4
"""Rows side by side with the same zeros that the sparse kernel runs as one; kSparseMaxRows of csrc/kernels.h."""
PAYS_FROM = {
    ("direct", False): 0.65,
    ("direct", True): 0.4,
    ("winograd", False): 0.9,
    ("winograd", True): 0.82,
    ("linear", False): 0.65,
}
"""Shares of zeros from which a sparse step was faster (`bench/bench_sparse.py`, AVX-512), by what the dense step is and whether rows
share their zeros. A dense Winograd convolution needs some three times fewer multiply-adds than a direct one."""
LEAST_LINEAR_WEIGHTS = 2**19
"""A smaller linear layer lies in a cache, reads its weights at full speed and gains nothing by skipping some."""
LOOK_FROM = 0.2
"""Weights with fewer zeros are called dense."""


def sparsity(step: Step) -> float:
    """Returns the share of zeros of a step's weight; 0 for a step without one."""
    weight = step.constants.get("weight")
    return 1 - np.count_nonzero(weight) / weight.size if step.op in ("conv", "linear") and weight is not None and weight.size else 0.0


def pays_from(step: Step) -> float | None:
    """Returns the share of zeros from which a step is faster sparse, or None where it never is."""
    weight = step.constants["weight"]
    if step.op == "linear":
        return PAYS_FROM["linear", False] if weight.size >= LEAST_LINEAR_WEIGHTS else None
    if step.ints["groups"] != [1]:
        return None
    small = [step.ints[name] for name in ("kernel", "stride", "dilation")] == [[3, 3], [1, 1], [1, 1]]
    winograd = small and step.ints.get("winograd") != [0]
    return PAYS_FROM["winograd" if winograd else "direct", _rows_share_zeros(weight)]


def mark_sparse(steps: tuple[Step, ...]) -> None:
    """Sets ints["sparse"] of the steps that are faster so."""
    for step in steps:
        share = sparsity(step)
        if share >= LOOK_FROM:
            least = pays_from(step)
            if least is not None and share >= least:
                step.ints["sparse"] = [1]


def describe(step: Step) -> str | None:
    """Returns what a step's zeros come to, or None for a step without any worth a word."""
    share = sparsity(step)
    if share < LOOK_FROM:
        return None
    if step.ints.get("sparse") == [1]:
        return f"{share:.1%} zeros, skipped"
    least = pays_from(step)
    gain = "skipping them would not pay in this layer" if least is None else f"skipping them would pay from {least:.0%}"
    return f"{share:.1%} zeros, multiplied all the same: {gain}"


def _rows_share_zeros(weight: np.ndarray) -> bool:
    """Whether most blocks of rows have their zeros in the same columns."""
    rows = len(weight) // BLOCK * BLOCK
    if rows == 0:
        return False
    zeros = (weight[:rows] == 0).reshape(rows // BLOCK, BLOCK, -1)
    return bool((zeros == zeros[:, :1]).all((1, 2)).mean() > 0.9)
