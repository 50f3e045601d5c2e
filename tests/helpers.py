"""What tests share: the one tolerance per dtype, random active lists, and one step of the engine on numpy buffers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

TOLERANCE = {torch.float32: 1e-5}
"""Largest difference allowed, relative to the largest magnitude expected (and to 1 where that is smaller)."""

LIST_KINDS = ("empty", "one", "all", "every_second", "random")


def assert_close(got, want, dtype: torch.dtype = torch.float32, factor: float = 1.0, context: str = "") -> None:
    """Fails where `got` differs from `want` by more than the tolerance times `factor`, or has NaN or infinity where `want` has not."""
    got, want = (torch.as_tensor(x).detach().double() for x in (got, want))
    assert got.shape == want.shape, f"{context}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if got.numel() == 0:
        return
    finite = torch.isfinite(want)
    assert torch.equal(got[~finite].nan_to_num(nan=3.0), want[~finite].nan_to_num(nan=3.0)), f"{context}: NaN or infinity differ"
    scale = want[finite].abs().max().clamp_min(1.0) if finite.any() else torch.tensor(1.0)
    error = (got[finite] - want[finite]).abs()
    assert torch.isfinite(got[finite]).all(), f"{context}: {int((~torch.isfinite(got[finite])).sum())} elements are not finite"
    limit = TOLERANCE[dtype] * factor * scale
    assert (error <= limit).all(), f"{context}: differs by {error.max():.3g}, allowed {limit:.3g}; {int((error > limit).sum())} elements"


def active_list(kind: str, channels: int, rng: np.random.Generator) -> np.ndarray:
    """Returns an ascending int32 list of channels of one of LIST_KINDS, or "most": a random four fifths."""
    everything = np.arange(channels, dtype=np.int32)
    if kind == "empty":
        return everything[:0]
    if kind == "one":
        return everything[channels // 2 : channels // 2 + 1]
    if kind == "all":
        return everything
    if kind == "every_second":
        return everything[::2]
    return np.flatnonzero(rng.random(channels) < (0.8 if kind == "most" else 0.5)).astype(np.int32)


def run_step(
    isa: str,
    step: dict,
    buffers: Sequence[np.ndarray],
    *,
    sites: Sequence[int] = (),
    active: Sequence[Sequence[Sequence[int]]] = (),
    num_threads: int = 1,
    compensation: np.ndarray | None = None,
) -> None:
    """Runs one engine step in place on f32 buffers (batch, size); `sites` gives channels per site, `active` lists per site and sample."""
    from dynprune.runtime import _C

    lists = [[[int(i) for i in chosen] for chosen in site] for site in active]
    _C.StepRunner(isa, step, list(buffers), list(sites), lists, num_threads, compensation).run(1)
