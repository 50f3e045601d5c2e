"""A small task that a small network learns in seconds: which of four patterns a noisy image shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dynprune.runtime.model import DynamicModel
from dynprune.training import calibrate as calibration


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


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(calibration, "LATENCY_SECONDS", 0.002)
    monkeypatch.setattr("dynprune.training.costing.RUNS", 2)


@pytest.fixture(scope="session")
def trained_state() -> dict[str, Tensor]:
    """Weights of a `Net` that knows the task."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for step in range(60):
            x, labels = samples(64, step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), labels).backward()
            optimizer.step()
        return net.state_dict()


@pytest.fixture
def make_model(trained_state) -> Callable[[], DynamicModel]:
    """Returns a function that wraps a fresh copy of the trained network."""

    def make() -> DynamicModel:
        net = Net()
        net.load_state_dict(trained_state)
        return DynamicModel(net.eval(), torch.zeros(1, 1, 8, 8))

    return make


@pytest.fixture
def loader() -> list[tuple[Tensor, Tensor]]:
    return [samples(32, 100 + i) for i in range(8)]
