"""Train gates and weights together, with `finetune` or in an own loop, save the tuned model and look at what the gates do."""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.nn import functional as F

from dynprune import DynamicModel, GateLoss, finetune, gate_report, sandwich_levels

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(),
    nn.Conv2d(8, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Conv2d(32, 8, 3, padding=1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
)  # fmt: skip


def gratings(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(2, (count,))
    wave = torch.sin(torch.arange(12.0)).expand(12, 12)
    patterns = torch.stack([wave, wave.T])
    return (patterns[labels] + 0.5 * torch.randn(count, 12, 12))[:, None], labels


loader = [gratings(32) for _ in range(16)]
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for x, labels in loader:
    optimizer.zero_grad()
    F.cross_entropy(model(x), labels).backward()
    optimizer.step()

model.eval()
base = copy.deepcopy(model)
dm = DynamicModel(model, torch.zeros(1, 1, 12, 12))
frontier = finetune(dm, loader, epochs=6, target_macs=0.6, gate_lr=0.01, levels=8)
print(frontier.table())
print(gate_report(dm, loader, level=0.7))

gate_loss = GateLoss(dm, target_macs=0.6)  # the same in an own loop
optimizer = torch.optim.SGD(dm.parameters(), lr=0.001)
dm.train()
for x, labels in loader[:4]:
    dm.training_levels = sandwich_levels(len(x))
    optimizer.zero_grad()
    (F.cross_entropy(dm(x), labels) + gate_loss()).backward()
    optimizer.step()
dm.training_levels = None
dm.eval()

with TemporaryDirectory() as folder:
    path = Path(folder) / "tuned.safetensors"
    dm.save(path, base=base)
    tuned = DynamicModel.load(path, base)
    x, labels = gratings(200)
    for tuned.level in (0.0, 1.0):
        with torch.no_grad():
            accuracy = (tuned(x).argmax(1) == labels).float().mean()
        print(f"level {tuned.level:.0f}: {accuracy:.1%} right, {tuned.stats().skip_rate:.0%} of the multiply-adds skipped")
        tuned.reset_stats()
