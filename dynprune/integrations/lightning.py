"""Training with gates in PyTorch Lightning (2.x, package `lightning`): a callback that does what `finetune` does around the steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils import _pytree as pytree

from dynprune.runtime.model import DynamicModel
from dynprune.training.batches import as_batch
from dynprune.training.batchnorm import reestimate_batch_norm
from dynprune.training.calibrate import measure_frontier
from dynprune.training.levels import sandwich_levels
from dynprune.training.loss import GateLoss
from dynprune.training.samples import read_samples
from dynprune.training.sensitivity import Metric


class GateTraining(Callback):
    """Gives each sample of a training batch its level, and lets thresholds follow the module's `GateLoss`.

    At the end it takes batch-norm statistics anew and measures the frontier.

    The module's own `training_step` computes the loss, with a `GateLoss` among its terms; calibrate the model before, so that the
    gates start from a fit.

    Args:
        dm: the DynamicModel that the module trains.
        data: batches (inputs, labels), for the statistics and the frontier after training; default None leaves both as they are.
        levels: operating points of the frontier, default 32.
        metric: of the frontier, as for `calibrate`.
        seed: of the levels.

    Example:
        >>> class Net(LightningModule):
        ...     def __init__(self, dm):
        ...         super().__init__()
        ...         self.dm, self.gate_loss = dm, GateLoss(dm, target_macs=0.5)
        ...     def training_step(self, batch, _):
        ...         return F.cross_entropy(self.dm(batch[0]), batch[1]) + self.gate_loss()
        >>> Trainer(callbacks=[GateTraining(dm, loader)]).fit(Net(dm), loader)
    """

    def __init__(
        self, dm: DynamicModel, data: Iterable[Any] | None = None, *, levels: int = 32, metric: Metric | None = None, seed: int = 0
    ):
        super().__init__()
        self.dm, self.data, self.levels, self.metric = dm, data, levels, metric
        self._generator = torch.Generator().manual_seed(seed)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.dm.train()  # Lightning leaves modules in the mode that they came in

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        first = next(leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))
        self.dm.training_levels = sandwich_levels(first.shape[0], generator=self._generator, device=pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.dm.training_levels = None
        for module in pl_module.modules():
            if isinstance(module, GateLoss):
                module.follow()

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        self.dm.training_levels = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.dm.masks = {}
        if self.data is None:
            return
        device = pl_module.device
        self.dm.to("cpu").eval()
        reestimate_batch_norm(self.dm, [as_batch(item, f"Batch {i}") for i, item in enumerate(self.data)])
        chunks = read_samples(
            self.data,
            labelled=self.metric is not None,
            num_inputs=len(self.dm.graph.inputs),
            splittable=self.dm.graph.dynamic_batch,
        )
        measure_frontier(self.dm, chunks, levels=self.levels, metric=self.metric, report=lambda share, what: None)
        self.dm.to(device)
