"""Which single weights stay: anywhere, N of every M inputs, or in blocks of output channels that share their zeros."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from dynprune.errors import InputError


@dataclass(frozen=True)
class Pattern:
    """A rule about where zeros may stand.

    Attributes:
        n, m: of every m consecutive input channels (at one output and kernel tap) at most n are not zero; 0 for no such rule.
        block: output channels, consecutive, that share their zeros.
    """

    n: int = 0
    m: int = 0
    block: int = 1

    @property
    def fixed_sparsity(self) -> float | None:
        """The share of zeros that the pattern itself sets, or None."""
        return 1 - self.n / self.m if self.m else None


def parse_pattern(text: str | None) -> Pattern:
    """Returns the pattern that "2:4" (N of every M inputs stay) or "4x1" (blocks of 4 output channels) spells; None is unstructured.

    Raises:
        InputError: another form, or numbers that make no pattern.
    """
    if text is None:
        return Pattern()
    found = re.fullmatch(r"(\d+)(:|x)(\d+)", text) if isinstance(text, str) else None
    first, second = (int(found[1]), int(found[3])) if found else (0, 0)
    if found and found[2] == ":" and 0 < first < second:
        return Pattern(first, second)
    if found and found[2] == "x" and first >= 1 and second == 1:
        return Pattern(block=first)
    raise InputError(f"`pattern` must be None, 'N:M' with 0 < N < M (such as '2:4'), or 'Bx1' (such as '4x1'), got {text!r}.")


def reduce_blocks(scores: Tensor, block: int) -> Tensor:
    """Returns one score per decision, 1-d: the mean of `block` consecutive outputs; outputs that fill no block stand alone."""
    whole = scores.shape[0] // block * block
    return torch.cat([scores[:whole].unflatten(0, (-1, block)).mean(1).flatten(), scores[whole:].flatten()])


def expand_blocks(decisions: Tensor, shape: torch.Size, block: int) -> Tensor:
    """Returns a mask of a weight's shape from one entry per decision, in the order of `reduce_blocks`."""
    whole = shape[0] // block * block
    blocks = decisions[: whole // block * shape[1:].numel()].view(whole // block, *shape[1:]).repeat_interleave(block, 0)
    return torch.cat([blocks, decisions[whole // block * shape[1:].numel() :].view(shape[0] - whole, *shape[1:])])


def n_of_m_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """Returns a 0-1 mask: of every m consecutive inputs the n with the highest scores; inputs that fill no m all stay."""
    moved = scores.movedim(1, -1)
    whole = moved.shape[-1] // pattern.m * pattern.m
    mask = torch.ones_like(moved)
    if whole:
        groups = moved[..., :whole].unflatten(-1, (-1, pattern.m))
        top = groups.topk(pattern.n, -1).indices
        mask[..., :whole] = torch.zeros_like(groups).scatter_(-1, top, 1.0).flatten(-2)
    return mask.movedim(-1, 1).contiguous()


def threshold_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Returns a 0-1 mask without the share `sparsity` of lowest scores, rounded; of equal ones the first go."""
    mask = torch.ones(scores.numel(), dtype=scores.dtype)
    mask[torch.argsort(scores.flatten(), stable=True)[: round(sparsity * scores.numel())]] = 0
    return mask.view_as(scores)
