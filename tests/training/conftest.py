"""A network that knows the task of `patterns.py`, and batches to train it further."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from patterns import Net, samples
from torch import Tensor, nn

from dynprune.runtime.model import DynamicModel
from dynprune.training import calibrate as calibration


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(calibration, "LATENCY_SECONDS", 0.002)
    monkeypatch.setattr("dynprune.runtime.profile.RUNS", 2)


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
