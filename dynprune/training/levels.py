"""Which level each sample of a training batch runs at."""

from __future__ import annotations

import torch
from torch import Tensor

from dynprune.errors import InputError

WHOLE_SHARE, TIGHTEST_SHARE = 0.125, 0.25
"""Shares of a batch at level 0 and at the tightest; the others get random levels. The whole model has the least to learn."""


def sandwich_levels(
    batch_size: int, *, tightest: float = 1.0, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Returns one level per sample, f32 (batch_size,): an eighth at 0, a quarter at `tightest`, the rest between, in random order.

    The sandwich rule (Yu and Huang 2019, arXiv 1903.05134) trains the widest, the narrowest and random networks in each step. It runs
    the batch once for each; here one run serves all, each sample at its own level. Batch norm then takes its statistics over the mix,
    so that one set of them serves every level.

    Args:
        batch_size: >= 1. Below 8 none runs at 0, of 1 to 3 samples the levels are all random.
        tightest: in (0, 1], default 1; a schedule can raise it from a small level while the weights adapt.
        generator: on CPU; default None uses PyTorch's global one.
        device: of the result.

    Raises:
        InputError: `batch_size` is below 1, or `tightest` outside (0, 1].
    """
    if batch_size < 1:
        raise InputError(f"`batch_size` must be >= 1, got {batch_size}.")
    if not 0 < tightest <= 1:
        raise InputError(f"`tightest` must lie in (0, 1], got {tightest!r}.")
    levels = tightest * torch.rand(batch_size, generator=generator)
    order = torch.randperm(batch_size, generator=generator)
    whole, tight = int(WHOLE_SHARE * batch_size), int(TIGHTEST_SHARE * batch_size)
    levels[order[:whole]] = 0.0
    levels[order[whole : whole + tight]] = tightest
    return levels.to(device)
