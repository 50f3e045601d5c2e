"""Thresholds for steps of one token: quantiles of the magnitudes that the layers of token MLPs read (TEAL, arXiv 2408.14690)."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from dynprune.gates.attach import Attachment
from dynprune.gates.hooks import Visitor
from dynprune.graph.sites import Site
from dynprune.training.samples import Chunk, take

SEQUENCES = 64
"""Samples that are read: a quantile needs no more."""
MAGNITUDES = 4_000_000
"""Of one layer's inputs, from every few of them; torch.quantile takes 16 million at most."""


def set_token_curves(attachment: Attachment, chunks: list[Chunk], *, splittable: bool = True) -> None:
    """Sets the `token_curves` of token MLPs: at each level every layer keeps the same share of its inputs in a step of one token.

    That is the share of their neurons that these MLPs keep, on average, for sequences at this level. (In a character Llama of four
    layers, at 0.25 kept, the same share for all cost 0.20 nats per character; shares as sequences have them 0.21 to 0.23.)

    Args:
        attachment: of a model whose gates know their `keep_frequency`.
        chunks: sequences to take the magnitudes from.
        splittable: see `read_samples`.
    """
    reader = _Reader(attachment)
    for chunk in take(chunks, SEQUENCES, splittable=splittable):
        attachment.visit(reader, chunk.args, chunk.kwargs)
    gates = {name: attachment.gate(name) for name in reader.magnitudes}
    if not gates:
        return
    keep = torch.stack([gate.keep_frequency.double().mean(1) for gate in gates.values()]).mean(0).cummin(0).values
    for name, gate in gates.items():
        curves = [torch.quantile(_sample(parts), 1 - keep) for parts in reader.magnitudes[name]]
        gate.token_curves = torch.where(keep >= 1, -1.0, torch.stack(curves)).float()


class _Reader(Visitor):
    """Collects, by site, the magnitudes of what producers and consumers of token MLPs read."""

    def __init__(self, attachment: Attachment):
        self._names = {site.name for site in attachment.sites if _is_token_mlp(attachment.model, site)}
        self.magnitudes: defaultdict[str, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))

    def gate_input(self, site: Site, x: Tensor, channel_dim: int) -> None:
        self._keep(site, 0, x)

    def consumer_input(self, site: Site, index: int, x: Tensor, channel_dim: int) -> Tensor:
        self._keep(site, 1, x)
        return x

    def _keep(self, site: Site, place: int, x: Tensor) -> None:
        if site.name in self._names and x.dim() == 3:
            self.magnitudes[site.name][place].append(x.abs().flatten())


def _is_token_mlp(model: nn.Module, site: Site) -> bool:
    """Whether linear layers alone make and read the neurons of a site."""
    layers = (*site.producers, *(consumer.module_path for consumer in site.consumers))
    return site.kind == "channels" and not site.is_heads and all(_is_linear(model.get_submodule(path)) for path in layers)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # of transformers: a linear layer


def _sample(parts: list[Tensor]) -> Tensor:
    """Returns the magnitudes as f64, at most `MAGNITUDES` of them."""
    together = torch.cat(parts)
    return together[:: -(-together.numel() // MAGNITUDES)].double()
