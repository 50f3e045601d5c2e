"""Batch-norm statistics after pruning: what a layer sees has changed, so its mean and variance are measured again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from dynprune.errors import CalibrationError
from dynprune.pruning.evidence import evaluated
from dynprune.training.samples import Chunk, read_samples


def reestimate_batch_norm(model: nn.Module, data: Iterable[Any]) -> int:
    """Returns how many batch norms got new running statistics: the average over the batches of `data`. Nothing else is trained.

    The user's weights, modes and momenta stay as they are. A few hundred samples, in batches of 32 or more, are enough.

    Args:
        model: changed in place.
        data: iterable of batches: a tensor, a tuple of arguments, a dict of keyword arguments, or a pair of one of these and labels.

    Raises:
        CalibrationError: `data` is empty or holds NaN; the statistics stay as they were.
    """
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats and m.running_mean is not None]
    chunks = read_samples(data, labelled=False, num_inputs=1)
    _set_statistics(model, norms, chunks)
    return len(norms)


def _set_statistics(model: nn.Module, norms: list[_NormBase], chunks: list[Chunk]) -> None:
    before = [(m.running_mean.clone(), m.running_var.clone(), m.num_batches_tracked.clone(), m.momentum) for m in norms]
    with evaluated(model), torch.no_grad():
        try:
            for module in norms:
                module.reset_running_stats()
                module.momentum = None  # a plain average over the batches
                module.training = True
            for chunk in chunks:
                model(*chunk.args, **chunk.kwargs)
            if not all(torch.isfinite(m.running_var).all() and torch.isfinite(m.running_mean).all() for m in norms):
                raise CalibrationError("The statistics came out as NaN or infinity; the model's activations overflow on `data`.")
        except BaseException:
            for module, (mean, variance, count, _) in zip(norms, before, strict=True):
                module.running_mean.copy_(mean)
                module.running_var.copy_(variance)
                module.num_batches_tracked.copy_(count)
            raise
        finally:
            for module, (*_, momentum) in zip(norms, before, strict=True):
                module.momentum = momentum
                module.training = False
