"""Per-channel views of a consumer's weight: what a skipped channel would have added, and how strongly each channel is read."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn


def weight_matrix(module: nn.Module, transposed: bool) -> Tensor:
    """Returns a module's weight as (out_channels, in_channels / groups, ...), without history; `transposed` says that it is (in, out, ...).

    That of a transposed convolution is divided by its stride: so large a share of the taps meets at an output, on average.
    """
    weight = module.weight.detach()
    if not transposed:
        return weight
    return weight.transpose(0, 1) / prod(getattr(module, "stride", (1,)))


def compensation_matrix(weight: Tensor, means: Tensor, groups: int = 1) -> Tensor:
    """Returns V (out_channels, num_channels): what channel c adds to output k when it is everywhere at its mean.

    Zero padding is not accounted for: V is the same at the border.

    Args:
        weight: (out_channels, in_channels / groups, ...) of a convolution or linear layer; dimensions past the second are taps. The
            several inputs per channel of a linear layer after a flatten count as taps.
        means: (num_channels,) mean of each channel of the space.
        groups: of the convolution.
    """
    channels = means.shape[0]
    sums = _taps(weight, channels, groups).sum(2)
    if groups == 1:
        return sums * means
    outputs = weight.shape[0]
    spread = sums.new_zeros(groups, outputs // groups, groups, channels // groups)
    index = torch.arange(groups, device=sums.device)
    spread[index, :, index] = sums.view(groups, outputs // groups, channels // groups)
    return spread.view(outputs, channels) * means


def column_norms(weight: Tensor, num_channels: int, groups: int = 1) -> Tensor:
    """Returns (num_channels,): the L2 norm of all weights that read a channel. Arguments as for `compensation_matrix`."""
    squares = _taps(weight, num_channels, groups).square().sum(2)
    return squares.view(groups, -1, num_channels // groups).sum(1).reshape(num_channels).sqrt()


def _taps(weight: Tensor, num_channels: int, groups: int) -> Tensor:
    return weight.reshape(weight.shape[0], num_channels // groups, -1)
