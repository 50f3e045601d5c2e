"""Fits gates in closed form: what each group of channels adds for each sample, predicted from the pooled input by ridge regression.

A channel that is skipped is replaced, at each consumer, by a constant: zero, or (compensated) its mean over the samples that skip it.
What is lost is then, for one consumer, about `norm(channel - constant) * norm(its weights)`. That, relative to the same of all channels
of the sample, is what a gate learns to predict, so that the groups below a threshold are those that lose least.

On ResNet-20 (CIFAR-10, fitted on 512 images, every inner space cut by 20 %) the divergence of the outputs on 384 others was 0.068; with
absolute contributions and zeros for skipped channels 0.141, and with the true contributions in place of predicted ones 0.031.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynprune.gates.attach import Attachment
from dynprune.gates.compensation import column_norms, weight_matrix
from dynprune.gates.hooks import Visitor, pool
from dynprune.graph.sites import Site
from dynprune.training.samples import Chunk

REFERENCE_KEEP = 0.6
"""The keep ratio at which the skipped channels' means are taken; between 0.5 and 0.75 the results hardly differed."""
MEAN_ROUNDS = 3
"""Rounds of choosing what to skip and taking the means over it, starting from the means over all samples."""
COMPENSATION_COST = 1 / 16
"""Compensation costs one multiply-add per weight column and output; it is used where the consumer has this many times more."""
RIDGE = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge penalties to choose from, per sample, on standardised features."""
QUANTILE_LIMIT = 1_000_000
"""Scores that a quantile is taken from; torch.quantile takes 16 million at most."""


@dataclass
class ConsumerRecord:
    """What one consumer saw of its channels: per sample, f32 (N, num_channels).

    Attributes:
        sums, squares: over positions, of the values and their squares.
        positions: how many positions a channel has.
        norms: (num_channels,) of the consumer's weights for each channel.
        can_compensate: whether compensation is cheap beside the consumer.
    """

    sums: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)
    positions: int = 1
    norms: Tensor = field(default_factory=lambda: torch.ones(1))
    can_compensate: bool = False


@dataclass
class SiteRecord:
    """What the gate of one channels site could see and what there was to predict."""

    pooled: list[Tensor]
    consumers: list[ConsumerRecord]


@dataclass(frozen=True, eq=False)
class ChannelFit:
    """A fitted channel gate: f32 matrices of `Gate`, and the means (num_consumers, num_channels) of compensated consumers."""

    down: Tensor
    up: Tensor
    bias: Tensor
    means: Tensor
    compensated: Tensor


def record_channels(attachment: Attachment, chunks: list[Chunk]) -> dict[str, SiteRecord]:
    """Returns by name what passes at every channels site when the whole model runs `chunks`."""
    channels = [site for site in attachment.sites if site.kind == "channels"]
    recorder = _Recorder({site.name: SiteRecord([], [ConsumerRecord() for _ in site.consumers]) for site in channels})
    for chunk in chunks:
        attachment.visit(recorder, chunk.args, chunk.kwargs)
    return recorder.records


def record_pooled(attachment: Attachment, chunks: list[Chunk]) -> dict[str, Tensor]:
    """Returns by site name the pooled inputs (N, gate_channels) of all gates when the whole model runs `chunks`."""
    recorder = _Recorder({})
    for chunk in chunks:
        attachment.visit(recorder, chunk.args, chunk.kwargs)
    return {name: torch.cat(parts) for name, parts in recorder.pooled.items()}


def fit_channels(site: Site, record: SiteRecord, rank: int, *, compensate: bool) -> ChannelFit:
    """Returns the gate that predicts the groups' relative contributions best among the linear ones of this rank.

    Args:
        site: a channels site.
        record: of the samples to fit.
        rank: of the linear map.
        compensate: replace skipped channels by their means, where that is cheap, rather than by zeros. The loss on the samples that are
            fitted is then never higher, as a mean has the least squared distance.
    """
    pooled = torch.cat(record.pooled).double()
    compensated = torch.tensor([compensate and consumer.can_compensate for consumer in record.consumers])
    means = torch.zeros(len(record.consumers), site.num_channels, dtype=torch.float64)
    for index, consumer in enumerate(record.consumers):
        if compensated[index]:
            means[index] = torch.cat(consumer.sums).double().mean(0) / consumer.positions
    regression = Regression(pooled)
    for _ in range(MEAN_ROUNDS if compensated.any() else 0):
        scores = regression.predictions(_relative(_contributions(site, record, means)))
        skipped = (scores <= quantile(scores, 1 - REFERENCE_KEEP)).double().repeat_interleave(site.group_size, 1)
        for index, consumer in enumerate(record.consumers):
            if compensated[index]:
                total = (torch.cat(consumer.sums) * skipped).sum(0)
                means[index] = total / (skipped.sum(0).clamp_min(1) * consumer.positions)
    down, up, bias = regression.low_rank(_relative(_contributions(site, record, means)), rank)
    return ChannelFit(down.float(), up.float(), bias.float(), means.float(), compensated)


def quantile(scores: Tensor, share: float) -> Tensor:
    """Returns the value below which `share` of the scores (N, groups) lie; of very many, from every few samples."""
    every = -(-scores.numel() // QUANTILE_LIMIT)
    return torch.quantile(scores[::every].flatten(), share)


class Regression:
    """Ridge regressions on one set of features; the penalty is the one with the least error on the last quarter of the samples.

    Args:
        features: f64 (N, features).
    """

    def __init__(self, features: Tensor):
        self.mean = features.mean(0)
        self.scale = features.std(0, correction=0)
        self.scale = self.scale.clamp_min(1e-6 * max(1e-6, self.scale.max().item()))
        self._z = (features - self.mean) / self.scale
        self._fit_count = max(1, len(features) * 3 // 4)
        self._part = torch.linalg.svd(self._z[: self._fit_count], full_matrices=False)
        self._all = torch.linalg.svd(self._z, full_matrices=False)

    def coefficients(self, targets: Tensor) -> Tensor:
        """Returns (features, targets) for the standardised features and the centred targets (N, targets)."""
        y = targets - targets.mean(0)
        held_out, held_out_y = self._z[self._fit_count :], y[self._fit_count :]
        penalty = RIDGE[-1]
        if len(held_out):
            penalty = min(RIDGE, key=lambda p: (held_out @ _ridge(self._part, y[: self._fit_count], p) - held_out_y).square().sum().item())
        return _ridge(self._all, y, penalty)

    def predictions(self, targets: Tensor) -> Tensor:
        """Returns the fitted values (N, targets)."""
        return self._z @ self.coefficients(targets) + targets.mean(0)

    def low_rank(self, targets: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns down (rank, features), up (targets, rank) and bias (targets,) of the best map of this rank on raw features.

        Reduced-rank regression (Izenman 1975): the coefficients projected on the leading directions of the fitted values.
        """
        coefficients = self.coefficients(targets)
        _, _, directions = torch.linalg.svd(self._z @ coefficients, full_matrices=False)
        up = torch.zeros(targets.shape[1], rank, dtype=targets.dtype)
        used = min(rank, len(directions))
        up[:, :used] = directions[:used].T
        down = (coefficients @ up).T / self.scale
        return down, up, targets.mean(0) - up @ (down @ self.mean)


def _ridge(svd: tuple[Tensor, Tensor, Tensor], y: Tensor, penalty: float) -> Tensor:
    u, s, vh = svd
    return vh.T @ ((s / (s.square() + penalty * len(y)))[:, None] * (u.T @ y))


def _contributions(site: Site, record: SiteRecord, means: Tensor) -> Tensor:
    """Returns (N, num_groups): the L2 norm of what each group adds to all consumers beyond its constant."""
    total = 0.0
    for consumer, mean in zip(record.consumers, means, strict=True):
        sums, squares = torch.cat(consumer.sums).double(), torch.cat(consumer.squares).double()
        energy = squares - 2 * mean * sums + consumer.positions * mean.square()
        total = total + energy.clamp_min(0) * consumer.norms.double().square()
    return total.reshape(len(total), site.num_groups, site.group_size).sum(2).sqrt()


def _relative(contributions: Tensor) -> Tensor:
    return contributions / contributions.norm(dim=1, keepdim=True).clamp_min(1e-30)


class _Recorder(Visitor):
    def __init__(self, records: dict[str, SiteRecord]):
        self.records = records
        self.pooled: dict[str, list[Tensor]] = {}

    def gate_input(self, site: Site, x: Tensor, channel_dim: int) -> None:
        pooled = pool(x, channel_dim)
        self.pooled.setdefault(site.name, []).append(pooled)
        if site.name in self.records:
            self.records[site.name].pooled.append(pooled)

    def consumer_input(self, site: Site, index: int, x: Tensor, channel_dim: int) -> Tensor:
        if site.name in self.records:
            consumer = self.records[site.name].consumers[index]
            rows = x.float().movedim(channel_dim, 1).reshape(x.shape[0], site.num_channels, -1)
            consumer.sums.append(rows.sum(2))
            consumer.squares.append(rows.square().sum(2))
            consumer.positions = rows.shape[2]
        return x

    def consumer_output(self, site: Site, index: int, module: torch.nn.Module, y: Tensor, channel_dim: int) -> Tensor:
        if site.name in self.records and len(self.records[site.name].consumers[index].sums) == 1:
            consumer, groups = self.records[site.name].consumers[index], getattr(module, "groups", 1)
            weight = weight_matrix(module, site.consumers[index].transposed).float()
            consumer.norms = column_norms(weight, site.num_channels, groups)
            products = weight[0].numel() * groups / site.num_channels * y[0].numel() / y.shape[channel_dim]  # per channel and output
            consumer.can_compensate = products * COMPENSATION_COST >= 1
        return y
