"""Comparing a model's outputs: how far they are from others, and how often the answer is the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

TEMPERATURE = 2.0
"""Softens the classes that errors are measured on: on images that a network was trained on it is so sure that errors hardly show."""


def first_float(output: Any) -> Tensor:
    """Returns the first floating-point tensor of a model's output, as f32."""
    return next(x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()).float()


def output_errors(output: Any, reference: Any) -> Tensor:
    """Returns the error of each sample (N,): the Kullback-Leibler divergence of the classes, or the relative squared error.

    An output (N, classes), classes >= 2, is taken as logits, softened by `TEMPERATURE`.
    """
    y, y0 = first_float(output), first_float(reference)
    if y0.dim() == 2 and y0.shape[1] > 1:
        log_p0, log_p = (y0 / TEMPERATURE).log_softmax(1), (y / TEMPERATURE).log_softmax(1)
        return (log_p0.exp() * (log_p0 - log_p)).sum(1).clamp_min(0)
    y, y0 = y.flatten(1) if y.dim() > 1 else y[:, None], y0.flatten(1) if y0.dim() > 1 else y0[:, None]
    return (y - y0).square().sum(1) / y0.square().sum(1).clamp_min(1e-12)


def agreement(output: Any, reference: Any) -> float:
    """Returns the share of samples of the same class; for an output that is not (N, classes), 1 less the relative error, at least 0."""
    y, y0 = first_float(output), first_float(reference)
    if y0.dim() == 2 and y0.shape[1] > 1:
        return (y.argmax(1) == y0.argmax(1)).float().mean().item()
    return (1 - output_errors(output, reference).sqrt().clamp_max(1)).mean().item()
