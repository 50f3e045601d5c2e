"""The gates: one score per channel group or branch from the pooled input, and the one definition of "active": score > threshold."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynprune.errors import InputError

DEFAULT_LEVELS = 32
MAX_RANK = 32


class Gate(nn.Module):
    """Scores the groups of one site: `score = up @ (down @ pooled) + bias`; a group is active when its score exceeds the threshold.

    The threshold is a function of the level, the same for all groups of the site: a stored curve, non-decreasing, interpolated
    linearly. At level 0 everything is active, whatever the curve says.

    A new gate ignores its input (`down` is zero): it ranks groups by `static_score` until `calibrate` or training fills it.

    Args:
        in_channels: channels of the pooled input.
        num_groups: scores to give.
        rank: inner size of the linear map, >= 1; None for the smallest of in_channels, num_groups and 32.
        static_score: (num_groups,) initial bias, for example norms of weights; None for zeros.

    Attributes:
        down, up, bias: f32 parameters of shape (rank, in_channels), (num_groups, rank), (num_groups,).
        curve: f32 buffer (levels,), the threshold at level i / (levels - 1).
        calibrated: bool buffer (), whether `calibrate` has fitted this gate.
        keep_frequency: f32 buffer (levels, num_groups), how often each group was active on the calibration inputs at each level; (0,
            num_groups) before a calibration.
        temperature: width of the sigmoid whose slope stands for the step's in training, > 0 and at most 1, in units of the score.

    Raises:
        InputError: a size is below 1, or `static_score` has another shape.
    """

    def __init__(self, in_channels: int, num_groups: int, rank: int | None = None, static_score: Tensor | None = None):
        super().__init__()
        rank = min(in_channels, num_groups, MAX_RANK) if rank is None else rank
        for name, value in (("in_channels", in_channels), ("num_groups", num_groups), ("rank", rank)):
            if value < 1:
                raise InputError(f"A gate's `{name}` must be >= 1, got {value}.")
        if static_score is None:
            static_score = torch.zeros(num_groups)
        elif static_score.shape != (num_groups,):
            raise InputError(f"`static_score` must have shape ({num_groups},), got {tuple(static_score.shape)}.")
        self.down = nn.Parameter(torch.zeros(rank, in_channels))
        self.up = nn.Parameter(torch.empty(num_groups, rank))
        nn.init.normal_(self.up, std=rank**-0.5)  # not zero: with both factors zero no gradient would reach either
        self.bias = nn.Parameter(static_score.detach().float().clone())
        self.temperature = 1.0
        self.register_buffer("curve", initial_curve(self.bias.detach()))
        self.register_buffer("calibrated", torch.tensor(False))
        self.register_buffer("keep_frequency", torch.zeros(0, num_groups))

    @property
    def in_channels(self) -> int:
        """Channels of the pooled input."""
        return self.down.shape[1]

    @property
    def num_groups(self) -> int:
        """How many groups the gate decides on."""
        return self.bias.shape[0]

    def score(self, pooled: Tensor) -> Tensor:
        """Returns the scores (N, num_groups), f32, of `pooled` (N, in_channels): how much each group matters for each sample."""
        with torch.autocast(pooled.device.type, enabled=False):
            return F.linear(F.linear(pooled.float(), self.down), self.up, self.bias)

    def threshold(self, level: float) -> float:
        """Returns the score above which a group is active at `level` in [0, 1]: minus infinity at level 0."""
        if level <= 0:
            return float("-inf")
        return float(_at_level(self.curve.double(), level))

    def frequency(self, level: float) -> Tensor | None:
        """Returns how often each group is active at `level`, (num_groups,) in [0, 1]; None where no calibration has counted it."""
        return _at_level(self.keep_frequency, level) if len(self.keep_frequency) else None

    def record_frequency(self, keep_frequency: Tensor) -> None:
        """Keeps what a calibration counted: (levels, num_groups), two or more levels."""
        if keep_frequency.dim() != 2 or len(keep_frequency) < 2 or keep_frequency.shape[1] != self.num_groups:
            raise InputError(f"`keep_frequency` must have shape (levels >= 2, {self.num_groups}), got {tuple(keep_frequency.shape)}.")
        self.keep_frequency = keep_frequency.detach().to(self.bias)

    def thresholds(self, levels: Tensor) -> Tensor:
        """Returns `threshold` of each of `levels` (N,), f32 (N,); levels above 1 count as 1."""
        position = levels.to(self.curve).clamp(0, 1) * (len(self.curve) - 1)
        index = position.long().clamp_max(len(self.curve) - 2)
        low, high = self.curve[index], self.curve[index + 1]
        return torch.where(levels > 0, low + (position - index) * (high - low), float("-inf"))

    def mask(self, pooled: Tensor, level: float | Tensor) -> Tensor:
        """Returns a 0-1 tensor (N, num_groups), f32: 1 where a group is active.

        In training mode the values are the same 0 and 1 and the gradient is that of sigmoid((score - threshold) / temperature): the
        straight-through estimator of Bengio et al. 2013 (arXiv 1308.3432).

        Args:
            pooled: (N, in_channels).
            level: of all samples, or one for each (N,).

        Raises:
            InputError: `level` holds another number of levels than there are samples.
        """
        if isinstance(level, Tensor) and level.shape != pooled.shape[:1]:
            raise InputError(f"Levels must be one per sample, {len(pooled)} here, got shape {tuple(level.shape)}.")
        score = self.score(pooled)
        threshold = self.thresholds(level)[:, None] if isinstance(level, Tensor) else self.threshold(level)
        hard = (score > threshold).to(score.dtype)
        if not self.training:
            return hard
        soft = torch.sigmoid((score - threshold) / self.temperature)
        return hard + (soft - soft.detach())

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        """Multiplies scores and thresholds by `factor` > 0, so that the same groups are active."""
        self.up.mul_(factor)
        self.bias.mul_(factor)
        self.curve.mul_(factor)

    def set_curve(self, curve: Tensor) -> None:
        """Replaces the thresholds by `curve` (levels,), made non-decreasing by a running maximum."""
        if curve.dim() != 1 or len(curve) < 2 or not torch.isfinite(curve).all():
            raise InputError(f"`curve` must hold two or more finite thresholds, got {curve}.")
        if curve.shape != self.curve.shape:
            self.curve = self.curve.new_empty(curve.shape)
        self.curve.copy_(torch.cummax(curve.detach().to(self.curve), 0).values)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        curve = state_dict.get(prefix + "curve")
        if curve is not None and curve.dim() == 1 and len(curve) >= 2:
            self.curve = self.curve.new_empty(curve.shape)  # the number of levels is the calibration's choice
        frequency = state_dict.setdefault(prefix + "keep_frequency", self.keep_frequency[:0])  # files of older versions lack it
        if frequency.dim() == 2 and frequency.shape[1] == self.num_groups:
            self.keep_frequency = self.keep_frequency.new_empty(frequency.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ChannelGate(Gate):
    """The gate of an inner channel space; also holds what stands in for its skipped channels.

    Args:
        in_channels, num_groups, rank, static_score: as for `Gate`.
        num_channels: channels of the space, a multiple of num_groups; None for num_groups.
        num_consumers: how many modules read the space.

    Attributes:
        channel_means: f32 buffer (num_consumers, num_channels), what each channel is, on average, for each consumer when skipped.
        compensated: bool buffer (num_consumers,), whether a consumer's output gets what skipped channels would add at these means.
        token_curves: f32 buffer (2, levels), for steps of one token the magnitude above which an input of the producers, and one of the
            consumers, counts at each level; see `runtime.thinning`. (2, 0) where no calibration has set it.
    """

    def __init__(
        self,
        in_channels: int,
        num_groups: int,
        rank: int | None = None,
        static_score: Tensor | None = None,
        *,
        num_channels: int | None = None,
        num_consumers: int = 1,
    ):
        super().__init__(in_channels, num_groups, rank, static_score)
        num_channels = num_groups if num_channels is None else num_channels
        if num_channels < num_groups or num_channels % num_groups:
            raise InputError(f"`num_channels` must be a multiple of num_groups={num_groups}, got {num_channels}.")
        self.register_buffer("channel_means", torch.zeros(num_consumers, num_channels))
        self.register_buffer("compensated", torch.zeros(num_consumers, dtype=torch.bool))
        self.register_buffer("token_curves", torch.zeros(2, 0))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        curves = state_dict.setdefault(prefix + "token_curves", self.token_curves[:, :0])  # files of older versions lack it
        if curves.dim() == 2 and len(curves) == 2:
            self.token_curves = self.token_curves.new_empty(curves.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class BranchGate(Gate):
    """The gate of a residual branch: one score, the branch's worth for this input. A new one never skips.

    Args:
        in_channels: channels of x, the input of the branch.
        rank: as for `Gate`; the map to one score needs no more than 1.
    """

    def __init__(self, in_channels: int, rank: int | None = None):
        super().__init__(in_channels, 1, rank)
        self.curve.fill_(self.bias.item() - 1.0)


def _at_level(table: Tensor, level: float) -> Tensor:
    """Returns row `level` in [0, 1] of a table of two or more rows, the first for level 0 and the last for 1, interpolated linearly."""
    position = min(max(level, 0.0), 1.0) * (len(table) - 1)
    index = min(int(position), len(table) - 2)
    low, high = table[index].detach(), table[index + 1].detach()
    return low + (position - index) * (high - low)


def initial_curve(static_score: Tensor, levels: int = DEFAULT_LEVELS) -> Tensor:
    """Returns thresholds (levels,) that run all groups just above level 0 and the quarter with the highest `static_score` at level 1."""
    curve = torch.quantile(static_score.double(), torch.linspace(0, 0.75, levels, dtype=torch.float64)).float()
    curve[0] = curve[0] - 1e-3 * max(1.0, curve[0].abs().item())
    return curve


def gate_key(site_name: str) -> str:
    """Returns the key of a site's gate in an `nn.ModuleDict`, which takes neither dots nor the names of its own attributes."""
    key = site_name.replace(".", "/")
    return key if key and not hasattr(_EMPTY, key) else key + "/"


_EMPTY = nn.ModuleDict()
