"""Loss terms for training with gates: what the active parts cost, and how far the answers are from a teacher's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynprune.errors import CalibrationError, InputError
from dynprune.runtime.model import DynamicModel
from dynprune.training.cost import RunCost, mac_costs
from dynprune.training.costing import step_costs
from dynprune.training.distributed import mean_of_all

ANCHORS = 4
"""Levels between which costs are told apart: the loss sees one mean per anchor, 1/4, 2/4, 3/4 and 1."""
THRESHOLD_RATE = 0.05
"""Of scores per share of the cost and step: a tenth of the unit spread that scores start with in 20 steps that are off by a tenth."""
PRICE_RATE = 0.01
"""Of prices per share of the cost and step."""


class GateLoss(nn.Module):
    """A loss term that brings the cost at each level to its target, and keeps each site above a floor.

    The target falls linearly from 1 at level 0 to `target` at level 1. Samples of one level may cost more or less than it: only their
    mean counts, so that easy inputs can pay for hard ones. The term is `weight * sum over anchors of (missed^2 + price * missed)`, missed
    being the mean cost less its target, relative to the whole model's cost, plus the squares of what sites keep less than `floor` on
    average (Verelst and Tuytelaars 2020, arXiv 1912.03203, for a budget on what masks execute). Prices are Lagrange multipliers, raised
    step by step by what is missed (the method of multipliers; Nocedal and Wright, Numerical Optimization, chapter 17).

    Args:
        dm: in training mode its last call gives the masks.
        target_macs: share in (0, 1) of the multiply-adds to run at level 1; default 0.4 where no time is given.
        target_ms: the same as milliseconds for one sample, by the cost table of `calibrate`.
        weight: >= 0, default 10.
        floor: share of its groups that each site keeps at least, on average; default 0.1.

    Attributes:
        prices: by anchor; a buffer, so that `state_dict` keeps them.

    Raises:
        InputError: both targets are given, or one is out of range or cannot be met (the message says the nearest).
        CalibrationError: `target_ms` without a cost table.

    Example:
        >>> gate_loss = GateLoss(dm, target_macs=0.5)
        >>> for x, labels in loader:
        ...     dm.training_levels = sandwich_levels(len(x))
        ...     (F.cross_entropy(dm(x), labels) + gate_loss()).backward()
        ...     optimizer.step(), optimizer.zero_grad()
        ...     gate_loss.follow()
    """

    def __init__(
        self,
        dm: DynamicModel,
        *,
        target_macs: float | None = None,
        target_ms: float | None = None,
        weight: float = 10.0,
        floor: float = 0.1,
    ):
        super().__init__()
        if target_macs is not None and target_ms is not None:
            raise InputError("Give one of `target_macs` and `target_ms`, not both.")
        if not 0 <= floor < 1:
            raise InputError(f"`floor` must lie in [0, 1), got {floor!r}.")
        if not weight >= 0:
            raise InputError(f"`weight` must be >= 0, got {weight!r}.")
        self._dm = (dm,)  # in a tuple: not a submodule of the loss
        self.weight, self.floor = float(weight), float(floor)
        self._missed = torch.zeros(ANCHORS)
        self.prices: Tensor
        self.register_buffer("prices", torch.zeros(ANCHORS))
        if not dm.plan.sites:
            raise InputError("The model has no place that can be gated, so there is nothing to train; dm.explain() says why.")
        if target_ms is not None:
            if dm.costs is None or not dm.costs.fits(dm.plan):
                raise CalibrationError("`target_ms` needs to know what each step costs; call calibrate(dm, data) first.")
            self.cost = RunCost(step_costs(dm.plan, dm.costs))
            self.target = self._checked(target_ms / self.cost.whole, "target_ms", f"{target_ms:g} ms", self.cost.whole, " ms")
        else:
            self.cost = RunCost(mac_costs(dm.plan))
            share = 0.4 if target_macs is None else target_macs
            self.target = self._checked(share, "target_macs", f"{share:g}", 1.0, "")

    def forward(self, masks: Mapping[str, Tensor] | None = None, levels: Tensor | float | None = None) -> Tensor:
        """Returns the loss term, a scalar.

        Args:
            masks: site name to a 0-1 tensor (N, num_groups); default None: those of the last call of `dm` in training mode.
            levels: of the samples (N,) or of all; default None: those of that call.

        Raises:
            InputError: there was no such call.
        """
        dm = self._dm[0]
        masks = dm.masks if masks is None else masks
        levels = (dm.level if dm.training_levels is None else dm.training_levels) if levels is None else levels
        keep = {name: mask.mean(1) for name, mask in masks.items() if name in self.cost.sites}
        if not keep:
            raise InputError(
                "There are no masks: call the model in training mode at a level above 0 before the loss, for example with "
                "dm.training_levels = sandwich_levels(len(x))."
            )
        first = next(iter(keep.values()))
        levels = torch.as_tensor(levels, dtype=first.dtype, device=first.device).expand(len(first))
        excess = self.cost(keep) - (1 - levels * (1 - self.target))
        shares = torch.stack(list(keep.values()), 1)
        loss = first.new_zeros(())
        self._missed = first.new_zeros(ANCHORS)
        for number in range(ANCHORS):
            near = (1 - (levels * ANCHORS - (number + 1)).abs()).clamp_min(0)
            if near.sum() > 0:
                near = near / near.sum()
                below = (self.floor - near @ shares).clamp_min(0)
                missed = near @ excess
                self._missed[number] = missed.detach()
                loss = loss + missed.square() + self.prices[number] * missed + below.square().sum()
        return self.weight * loss

    @torch.no_grad()
    def follow(self) -> None:
        """Raises prices, and moves the threshold curves of all gates, by what the costs of the last call missed their targets by.

        To be called after every step. The penalty alone comes to rest where the task's pull on the gates balances it, at another cost
        than the target. Prices take that pull over; thresholds spread the levels apart where scores have spread. Thresholds alone
        would run a race with the scores, which all gates can raise together.

        Under `torch.distributed` all processes take the mean of what theirs missed.
        """
        missed = mean_of_all(self._missed)
        self.prices += PRICE_RATE * missed.to(self.prices)
        missed = torch.cat([missed[:1], missed])
        for site in self._dm[0].sites:
            gate = self._dm[0].gate(site.name)
            count = len(gate.curve)
            step = F.interpolate(missed[None, None], size=count, mode="linear", align_corners=True)[0, 0]
            gate.set_curve(gate.curve + THRESHOLD_RATE * step.to(gate.curve))

    def _checked(self, share: float, name: str, given: str, whole: float, unit: str) -> float:
        least = float(self.cost(dict.fromkeys(self.cost.sites, self.floor)))
        if not least <= share < 1:
            raise InputError(
                f"`{name}`={given} cannot be met: with every site at its floor of {self.floor:.0%} the model costs "
                f"{least * whole:.3g}{unit}, whole {whole:.3g}{unit}; give something between, the nearest is "
                f"{(least if share < least else 1.0) * whole:.3g}{unit}, or lower `floor`."
            )
        return share


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Returns the mean Kullback-Leibler divergence of softened classes, times the square of the temperature.

    Hinton et al. 2015, arXiv 1503.02531.

    Args:
        logits, teacher_logits: (N, classes); no gradient reaches the teacher's.
        temperature: > 0, divides both.
    """
    log_p = (logits.float() / temperature).log_softmax(-1)
    log_q = (teacher_logits.detach().float() / temperature).log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean() * temperature**2
