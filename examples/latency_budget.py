"""Keep a latency budget while the machine's load is watched, and change the budget on the way."""

import torch
from torch import nn

from dynprune import DynamicModel, ResourceMonitor, calibrate


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))


torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), Block(48), Block(48), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)).eval()
images = torch.rand(64, 3, 32, 32)
dm = DynamicModel(model, images[:1]).eval()
frontier = calibrate(dm, images.split(16), levels=8)

slowest, fastest = frontier.points[0].latency_ms, frontier.points[-1].latency_ms
with torch.no_grad(), ResourceMonitor() as monitor:
    dm.attach_monitor(monitor)
    for budget_ms in (2 * slowest, (slowest + fastest) / 2):
        dm.set_latency_budget(ms=budget_ms)
        dm.reset_stats()
        for image in images.split(1):
            dm(image)
        stats = dm.stats()
        print(
            f"budget {stats.budget_ms:.3f} ms: p95 {stats.latency_ms.p95:.3f} ms, {stats.budget_misses} of {stats.inferences} missed, "
            f"level {stats.level:.2f}, {stats.skip_rate:.0%} skipped"
        )
    dm.attach_monitor(None)
