"""How much the output suffers: the error measure, and each site's error when it alone is gated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dynprune.gates.attach import Attachment, Masking
from dynprune.gates.hooks import pool
from dynprune.graph.sites import Site
from dynprune.training.outputs import agreement, output_errors
from dynprune.training.samples import Chunk
from dynprune.training.scores import ChannelFit, Regression, quantile

Metric = Callable[[Any, Any], float]

KEEP_RATIOS = (0.75, 0.5, 0.25)
"""Where a channels site is measured; in between see `Sensitivity`."""


def channel_errors(attachment: Attachment, site: Site, pooled: Tensor, chunks: list[Chunk], references: list[Any]) -> dict[float, float]:
    """Returns the mean output error by keep ratio when one channels site, whose gate is fitted, is gated alone.

    Args:
        attachment: of the model.
        site: a channels site.
        pooled: (N, gate_channels) inputs of the gate; thresholds are quantiles of their scores.
        chunks: samples to measure on.
        references: the whole model's outputs for them.
    """
    scores = attachment.gate(site.name).score(pooled)
    thresholds = {keep: quantile(scores, 1 - keep).item() for keep in KEEP_RATIOS}
    return {keep: _losses(attachment, site, threshold, chunks, references).mean().item() for keep, threshold in thresholds.items()}


def fit_branch(attachment: Attachment, site: Site, pooled: Tensor, chunks: list[Chunk], references: list[Any]) -> None:
    """Fits the gate of a branch to the logarithm of each sample's output error when it skips the branch.

    Args:
        attachment, site, chunks, references: as for `channel_errors`.
        pooled: (N, gate_channels), the gate's inputs for `chunks`.
    """
    loss = _losses(attachment, site, float("inf"), chunks, references).double()
    target = (loss + 1e-3 * loss.mean() + 1e-12).log()
    gate = attachment.gate(site.name)
    fitted = Regression(pooled.double()).low_rank(target[:, None], gate.down.shape[0])
    for parameter, value in zip((gate.down, gate.up, gate.bias), fitted, strict=True):
        parameter.copy_(value)


def branch_errors(attachment: Attachment, site: Site, pooled: Tensor, chunks: list[Chunk], references: list[Any]) -> dict[float, float]:
    """Returns the mean output error by keep ratio of a branch with a fitted gate; arguments as for `fit_branch`.

    As samples do not depend on each other, one run without the branch gives the error at any keep ratio.
    """
    loss = _losses(attachment, site, float("inf"), chunks, references)
    skipped = loss[attachment.gate(site.name).score(pooled)[:, 0].argsort()].cumsum(0) / len(loss)
    return {1 - share: skipped[max(0, round(share * len(loss)) - 1)].item() for share in (0.25, 0.5, 0.75)}


def joint_agreement(attachment: Attachment, chunks: list[Chunk], keep: Mapping[str, float], references: list[Any]) -> float:
    """Returns the agreement with `references` when all sites keep their ratios of each chunk; arguments as for `joint_thresholds`."""
    values = []
    for chunk, reference in zip(chunks, references, strict=True):
        masking, _ = _masking_by_quantile(attachment, keep)
        values.append(agreement(attachment.visit(masking, chunk.args, chunk.kwargs), reference) * chunk.size)
    return sum(values) / sum(chunk.size for chunk in chunks)


def joint_thresholds(attachment: Attachment, chunks: list[Chunk], keep: Mapping[str, float]) -> dict[str, Tensor]:
    """Returns the thresholds at which each site keeps its ratio while all sites before it are gated likewise; mean over chunks.

    Args:
        attachment: of the model, with fitted gates.
        chunks: samples whose scores' quantiles are taken.
        keep: keep ratio by site name; a site that keeps all is not gated and has no threshold.
    """
    masking, found = _masking_by_quantile(attachment, keep)
    for chunk in chunks:
        attachment.visit(masking, chunk.args, chunk.kwargs)
    return {name: torch.stack(values).mean() for name, values in found.items()}


def _masking_by_quantile(attachment: Attachment, keep: Mapping[str, float]) -> tuple[Masking, dict[str, list[Tensor]]]:
    """Returns a visitor that keeps each site's ratio of the chunk at hand, and where it notes the thresholds that do so."""
    found: dict[str, list[Tensor]] = {}

    def choose(site: Site, x: Tensor, channel_dim: int) -> Tensor | None:
        if keep.get(site.name, 1.0) >= 1:
            return None
        score = attachment.gate(site.name).score(pool(x, channel_dim))
        threshold = quantile(score, 1 - keep[site.name])
        found.setdefault(site.name, []).append(threshold)
        return (score > threshold).float()

    return Masking(attachment, choose), found


def apply_fit(gate: torch.nn.Module, fit: ChannelFit) -> None:
    """Writes a fit to a channel gate."""
    for name in ("down", "up", "bias"):
        getattr(gate, name).copy_(getattr(fit, name))
    gate.channel_means.copy_(fit.means)
    gate.compensated.copy_(fit.compensated)


def _run_at(attachment: Attachment, chunk: Chunk, gated: Site, threshold: float) -> Any:
    """Returns the output when one site alone is gated, at this threshold."""

    def choose(site: Site, x: Tensor, channel_dim: int) -> Tensor | None:
        if site.name != gated.name:
            return None
        return (attachment.gate(site.name).score(pool(x, channel_dim)) > threshold).float()

    return attachment.visit(Masking(attachment, choose), chunk.args, chunk.kwargs)


def _losses(attachment: Attachment, site: Site, threshold: float, chunks: list[Chunk], references: list[Any]) -> Tensor:
    """Returns the output error (N,) of each sample when one site alone is gated, at this threshold."""
    runs = zip(chunks, references, strict=True)
    return torch.cat([output_errors(_run_at(attachment, chunk, site, threshold), reference) for chunk, reference in runs])
