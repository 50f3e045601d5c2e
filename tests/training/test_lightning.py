"""The Lightning callback trains gates and model inside somebody's own LightningModule."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from patterns import samples
from torch.nn import functional as F

from dynprune.cli.models import declare_torchvision_operators

declare_torchvision_operators()  # lightning imports torchvision through torchmetrics
pl = pytest.importorskip("lightning.pytorch", reason="the Lightning callback needs the package lightning")


@pytest.mark.filterwarnings("ignore")
def test_callback_gives_levels_and_measures_at_the_end(make_model, loader, tmp_path):
    from dynprune.integrations.lightning import GateTraining
    from dynprune.training.loss import GateLoss

    dm = make_model()
    seen = []

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.dm, self.gate_loss = dm, GateLoss(dm, target_macs=0.5)

        def training_step(self, batch, _):
            seen.append(dm.training_levels)
            return F.cross_entropy(self.dm(batch[0]), batch[1]) + self.gate_loss()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[GateTraining(dm, loader, levels=3)],
    )
    before = dm.model.head.weight.detach().clone()
    trainer.fit(Module(), torch.utils.data.DataLoader(loader, batch_size=None))
    assert len(seen) == 2 * len(loader) and all(levels.shape == (32,) for levels in seen) and not torch.equal(seen[0], seen[1])
    assert dm.training_levels is None and not dm.masks
    assert not torch.equal(before, dm.model.head.weight)
    assert len(dm.frontier.points) == 3
    dm.eval()
    dm.level = 1.0
    x, _ = samples(4, 3)
    with torch.no_grad():
        assert_close(dm(x), dm.attachment.run((x,), level=1.0)[0], factor=10)
