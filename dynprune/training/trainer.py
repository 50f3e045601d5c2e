"""The training loop of `finetune`: one optimisation step after another, stopped at the first that is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dynprune.errors import InputError, TrainingError
from dynprune.runtime.model import DynamicModel
from dynprune.training.batches import Batch, as_batch, check_classes
from dynprune.training.distributed import rank_and_world
from dynprune.training.levels import sandwich_levels
from dynprune.training.loss import GateLoss, distillation_loss

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""
ANNEAL = 0.2
"""Share of the steps in which the tightest level of a batch rises from `LOOSEST` to 1."""
LOOSEST = 0.4
MAX_GRAD_NORM = 10.0
"""Of the model's gradient, and of the gates'."""


@dataclass(frozen=True)
class Recipe:
    """How to train; see `finetune`."""

    train: tuple[str, ...]
    epochs: int
    lr: float
    gate_lr: float
    weight_decay: float
    distill: float
    temperature: float
    seed: int
    autocast: bool


class Trainer:
    """Trains a `DynamicModel` epoch by epoch.

    Args:
        dm: in place, with gates that are fitted and scaled.
        gate_loss: the cost term.
        recipe: how.
        teacher: gives soft targets where the loader does not; None for no teacher.
        loss: callable (output, labels) -> scalar, or None for cross entropy.
        steps_per_epoch: of the loader; the schedules run over `epochs` times as many.
    """

    def __init__(
        self,
        dm: DynamicModel,
        gate_loss: GateLoss,
        recipe: Recipe,
        *,
        teacher: nn.Module | None,
        loss: Callable[[Any, Any], Tensor] | None,
        steps_per_epoch: int,
    ):
        self.dm, self.gate_loss, self.recipe, self.teacher, self.loss = dm, gate_loss, recipe, teacher, loss
        self.steps_per_epoch = steps_per_epoch
        self.step = 0
        self.tightest = LOOSEST
        self._device = next((p.device for p in dm.parameters()), torch.device("cpu"))
        self._trained = [p for p in dm.model.parameters() if p.requires_grad] if "model" in recipe.train else []
        self._gates = list(dm.gates.parameters()) if "gates" in recipe.train else []
        self.optimizers = _optimizers(self._trained, self._gates, recipe)
        self._generator = torch.Generator()
        self.rank, self._world = rank_and_world()
        self._module: nn.Module = DistributedDataParallel(dm) if self._world > 1 else dm

    def train_epoch(self, epoch: int, loader: Iterable[Any], report: Callable[[int, dict[str, float]], None]) -> dict[str, float]:
        """Runs one epoch and returns its means of the terms of the loss.

        Args:
            epoch: from 0; with the seed it determines all random numbers, so that a resumed run goes on as it would have.
            loader: yields the batches.
            report: called after each step with the number of batches done in this epoch and the means so far.

        Raises:
            InputError: a batch is not what the model or the loss takes, or there was none.
            TrainingError: the loss or a gradient is not finite; weights and statistics are those after the last good step.
        """
        seed = self.recipe.seed * 1_000_003 + epoch * 1009 + self.rank
        torch.manual_seed(seed)
        self._generator.manual_seed(seed)
        self._set_modes()
        sums: dict[str, float] = {}
        count = 0
        for count, item in enumerate(loader, 1):
            batch = as_batch(item, f"Batch {count - 1} of epoch {epoch}").to(self._device)
            terms = self._step(batch, f"batch {count - 1} of epoch {epoch}")
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value
            report(count, {name: value / count for name, value in sums.items()})
        if count == 0:
            raise InputError("The loader yielded no batch; it must yield at least one (inputs, labels) per epoch.")
        return {name: value / count for name, value in sums.items()}

    def _step(self, batch: Batch, name: str) -> dict[str, float]:
        self._set_schedules()
        kept = _copies(list(self.dm.model.buffers()))
        levels = sandwich_levels(batch.size, tightest=self.tightest, generator=self._generator, device=self._device)
        self.dm.training_levels = levels
        try:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self.recipe.autocast):
                output = self._module(*batch.args, **batch.kwargs)
                terms = self._terms(output, batch, name)
            total = sum(terms.values())
            values = {key: term.item() for key, term in terms.items()}
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            self._check_finite(all(math.isfinite(value) for value in values.values()), "loss", values, name)
            total.backward()
            norms = [nn.utils.clip_grad_norm_(group, MAX_GRAD_NORM) for group in (self._trained, self._gates) if group]
            self._check_finite(all(bool(torch.isfinite(norm)) for norm in norms), "gradient", values, name)
        except BaseException:
            _restore(list(self.dm.model.buffers()), kept)
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            raise
        finally:
            self.dm.training_levels = None
            self.dm.masks = {}
        for optimizer in self.optimizers:
            optimizer.step()
        if self._gates:
            self.gate_loss.follow()
        self.step += 1
        return values

    def _terms(self, output: Any, batch: Batch, name: str) -> dict[str, Tensor]:
        distill = self.recipe.distill
        soft = batch.teacher
        if soft is None and self.teacher is not None and distill > 0:
            with torch.no_grad():
                soft = self.teacher(*batch.args, **batch.kwargs)
        terms = {}
        hard_weight = 1.0 - (distill if soft is not None else 0.0)
        if batch.labels is not None and hard_weight > 0:
            if self.loss is None:
                check_classes(batch.labels, output, name)
            task = (self.loss or F.cross_entropy)(output.float() if isinstance(output, Tensor) else output, batch.labels)
            terms["task"] = hard_weight * task
        if soft is not None:
            terms["distill"] = distill * distillation_loss(output, soft, self.recipe.temperature)
        if not terms:
            raise InputError(f"There is nothing to learn from: {name} has no labels, and there is no teacher.")
        terms["gates"] = self.gate_loss()
        return terms

    def _set_modes(self) -> None:
        """Training mode for the gates always, for the model where it is trained: a frozen model keeps its statistics and no dropout."""
        self.dm.train()
        if "model" not in self.recipe.train:
            self.dm.model.eval()

    def _set_schedules(self) -> None:
        done = self.step / max(1, self.recipe.epochs * self.steps_per_epoch)
        factor = min(1.0, (done + 1e-3) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        self.tightest = min(1.0, LOOSEST + (1 - LOOSEST) * done / ANNEAL)

    def _check_finite(self, finite: bool, what: str, values: dict[str, float], name: str) -> None:
        """Raises TrainingError where `finite` is False on any process."""
        if self._world > 1:
            failed = torch.tensor([float(not finite)], device=self._device)
            torch.distributed.all_reduce(failed)
            finite = failed.item() == 0
        if not finite:
            shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
            raise TrainingError(
                f"The {what} is not finite at step {self.step} ({name}: {shown}); the weights are those before that step. Lower the "
                "learning rate or look at that batch."
            )


def _optimizers(model: list[nn.Parameter], gates: list[nn.Parameter], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """SGD for the model, without weight decay on biases and norms; Adam for the gates, whose gradients differ in size by site."""
    optimizers: list[torch.optim.Optimizer] = []
    if model:
        groups = [
            {"params": [p for p in model if p.dim() > 1], "weight_decay": recipe.weight_decay, "initial_lr": recipe.lr},
            {"params": [p for p in model if p.dim() <= 1], "weight_decay": 0.0, "initial_lr": recipe.lr},
        ]
        optimizers.append(torch.optim.SGD([g for g in groups if g["params"]], lr=recipe.lr, momentum=0.9, nesterov=True))
    if gates:
        optimizers.append(torch.optim.Adam([{"params": gates, "initial_lr": recipe.gate_lr}], lr=recipe.gate_lr))
    return optimizers


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [x.clone() for x in tensors]


@torch.no_grad()
def _restore(tensors: list[Tensor], kept: list[Tensor]) -> None:
    for x, value in zip(tensors, kept, strict=True):
        x.copy_(value)
