"""Cut a network to half of its multiply-adds, save it, put gates on top, and freeze a level into a plain network again."""

import tempfile
from pathlib import Path

import torch
from torch import nn

from dynprune import DynamicModel, calibrate, load_pruned, prune, save_pruned, sparsify


def make_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(64, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip


images = torch.rand(64, 3, 32, 32)
batches = images.split(16)

# Static first: what no input needs much. `finetune=` would be called with the smaller network, to train it.
small, report = prune(make_network(), images[:1], target_macs=0.5, criterion="activation", data=batches)
print(report)

with tempfile.TemporaryDirectory() as folder:
    save_pruned(Path(folder) / "small.safetensors", small, report.recipe)
    small = load_pruned(Path(folder) / "small.safetensors", make_network())

# Gates for the rest, which depends on the input.
dm = DynamicModel(small, images[:1]).eval()
calibrate(dm, batches, levels=4)
print(f"level 1 skips {dm.frontier.points[-1].skip_rate:.0%} of what is left")

# And back to a plain network without gates, for ONNX or torch.export.
frozen = dm.freeze(level=1.0, min_frequency=0.5)
print(f"frozen: {sum(p.numel() for p in frozen.parameters())} of {report.params_before} parameters")

# Single weights: masks of torch.nn.utils.prune. The plan says where the engine skips them.
sparse, masks = sparsify(make_network(), sparsity=0.9, pattern="4x1", exclude=("0",))
print(f"masks: {masks.sparsity:.0%} zeros")
print("\n".join(line for line in DynamicModel(sparse, images[:1]).explain().splitlines() if "zeros" in line))
