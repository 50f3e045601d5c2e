"""Batch-norm statistics, taken anew from data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynprune.errors import InputError
from dynprune.runtime.model import DynamicModel
from dynprune.training.batches import Batch
from dynprune.training.levels import sandwich_levels


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Returns the modules of `model` that keep batch-norm statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.running_mean is not None]


@torch.no_grad()
def reestimate_batch_norm(dm: DynamicModel, batches: Iterable[Batch], *, level: float | None = None, seed: int = 0) -> None:
    """Replaces the running statistics of every batch norm by their means over `batches`.

    After training they are averages over weights that no longer exist; the means over a few thousand samples are exact for the weights
    as they are (Yu and Huang 2019, arXiv 1903.05134, section 3.2).

    Args:
        dm: in place; its training mode is left as it was.
        batches: of the size used in training; all count alike.
        level: of all samples; default None takes the mix of `sandwich_levels`, as training does.
        seed: of the mix.

    Raises:
        InputError: `batches` is empty.
    """
    norms = batch_norms(dm.model)
    if not norms:
        return
    generator = torch.Generator().manual_seed(seed)
    kept = [(m.running_mean.clone(), m.running_var.clone(), m.num_batches_tracked.clone()) for m in norms]
    count = 0
    with _statistics_only(dm, norms):
        for m in norms:
            m.reset_running_stats()
        for batch in batches:
            mixed = sandwich_levels(batch.size, generator=generator)
            levels = mixed if level is None else torch.full_like(mixed, level)
            dm.attachment.run(batch.args, batch.kwargs, level=levels)
            count += 1
    if count == 0:
        for m, state in zip(norms, kept, strict=True):
            for buffer, value in zip((m.running_mean, m.running_var, m.num_batches_tracked), state, strict=True):
                buffer.copy_(value)
        raise InputError("Batch-norm statistics need at least one batch, got none.")


@contextmanager
def _statistics_only(dm: DynamicModel, norms: list[_BatchNorm]) -> Iterator[None]:
    """Everything in eval mode but the batch norms, which average evenly over what they see."""
    modes = [(m, m.training) for m in dm.modules()]
    momenta = [m.momentum for m in norms]
    dm.eval()
    for m in norms:
        m.training, m.momentum = True, None
    try:
        yield
    finally:
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
        for m, training in modes:
            m.training = training
