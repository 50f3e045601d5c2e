"""A small task that a small network learns in seconds: which of four gratings a noisy image shows."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.block1, self.block2 = Block(8, 16), Block(8, 16)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block2(self.block1(torch.relu(self.stem(x)))).mean((2, 3)))


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns images (count, 1, 8, 8) of one of four gratings under noise, and which one it is (count,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    patterns = torch.stack([torch.sin(row), torch.sin(column), torch.sin(row + column), torch.sin(2 * row)])
    return (patterns[labels] + 0.7 * torch.randn(count, 8, 8, generator=generator))[:, None], labels
