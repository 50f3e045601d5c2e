"""How much the model's answer depends on each output channel of the layers that read gated channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynprune.gates.attach import Attachment
from dynprune.gates.hooks import Visitor
from dynprune.graph.sites import Site
from dynprune.training.outputs import TEMPERATURE, first_float
from dynprune.training.samples import Chunk

FISHER_SAMPLES = 128
"""Samples whose gradients are taken."""
PART = 8
"""Samples that run together, as gradients keep every activation in memory."""

Importance = dict[tuple[str, int], Tensor]
"""Site name and index of a consumer: f32 (out_channels,)."""


def consumer_importance(attachment: Attachment, chunks: Sequence[Chunk], *, splittable: bool = True) -> Importance:
    """Returns the root of the mean squared gradient of the answer's log-likelihood by each output channel of every consumer.

    This is the diagonal of the Fisher information (Theis et al. 2018, arXiv 1801.05787): a small error e in channel k costs about
    `sum over k of (importance_k * e_k)^2` in divergence of the classes. The answer is drawn from the model's own, softened classes, so
    no labels are needed; an output that is not (N, classes) is projected on random signs.

    Args:
        attachment: of the model, in eval mode; no parameter gets a gradient.
        chunks: samples; the first 128 are used.
        splittable: False runs whole chunks, for a model of a fixed batch size.
    """
    generator = torch.Generator().manual_seed(0)
    sums: Importance = {}
    done = 0
    for chunk in chunks:
        for first in range(0, chunk.size, PART if splittable else chunk.size):
            if done >= FISHER_SAMPLES:
                break
            part = chunk.part(first, first + PART) if splittable else chunk
            probes = _Probes()
            with torch.enable_grad():
                output = attachment.visit(probes, part.args, part.kwargs)
                gradients = torch.autograd.grad(_log_likelihood(first_float(output), generator), list(probes.zeros.values()))
            for (key, dim), gradient in zip(probes.zeros, gradients, strict=True):
                squares = gradient.float().square().movedim(dim, 0).flatten(1).sum(1)
                sums[key] = sums.get(key, 0.0) + squares
            done += part.size
    return {key: squares.sqrt() for key, squares in sums.items()}


class _Probes(Visitor):
    """Adds zeros to the output of every consumer, whose gradients are those of the output."""

    def __init__(self) -> None:
        self.zeros: dict[tuple[tuple[str, int], int], Tensor] = {}

    def consumer_output(self, site: Site, index: int, module: nn.Module, y: Tensor, channel_dim: int) -> Tensor:
        zeros = torch.zeros_like(y, requires_grad=True)
        self.zeros[(site.name, index), channel_dim] = zeros
        return y + zeros


def _log_likelihood(output: Tensor, generator: torch.Generator) -> Tensor:
    if output.dim() == 2 and output.shape[1] > 1:
        log_p = (output / TEMPERATURE).log_softmax(1)
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(output.device)
        return log_p.gather(1, drawn).sum()
    signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
    return (output * signs).sum()
