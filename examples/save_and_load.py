"""Save a calibration beside the weights and load it in another process: nothing is measured again."""

import tempfile
from pathlib import Path

import torch
from torch import nn

from dynprune import DynamicModel, calibrate


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 10)).eval()


images = torch.rand(64, 3, 32, 32)
dm = DynamicModel(make_model(), images[:1]).eval()
calibrate(dm, images.split(16), levels=8)
dm.level = 0.5

with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    path = Path(folder) / "gates.safetensors"
    dm.save(path)
    again = DynamicModel.load(path, make_model()).eval()
    again.level = 0.5
    assert torch.equal(dm(images[:4]), again(images[:4]))
    print(f"{path.stat().st_size / 1024:.0f} KiB hold {len(again.sites)} gates and {len(again.frontier.points)} operating points")
