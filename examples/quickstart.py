"""Wrap a network, calibrate it without gradients or labels, and run it at several levels."""

import torch
from torch import nn

from dynprune import DynamicModel, calibrate

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(),
    nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(),
    nn.Conv2d(64, 32, 3, padding=1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
).eval()  # fmt: skip
images = torch.rand(64, 3, 32, 32)

dm = DynamicModel(model, images[:1]).eval()
calibrate(dm, images.split(16), levels=8)

with torch.no_grad():
    assert torch.allclose(dm(images[:1]), model(images[:1]), atol=1e-5)  # at level 0 nothing changes
    for level in (0.0, 0.5, 1.0):
        dm.level = level
        dm.reset_stats()
        for image in images.split(1):
            dm(image)
        stats = dm.stats()
        print(f"level {level:.1f}: {stats.skip_rate:.0%} of the multiply-adds skipped, median {stats.latency_ms.p50:.3f} ms")
