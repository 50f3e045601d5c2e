"""A published network on the images it was published with: exact at level 0, and cheap to skip in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dynprune.runtime.model import DynamicModel
from dynprune.training.calibrate import calibrate

PUBLISHED = {"cifar_resnet20": 91.60, "cifar_resnet56": 93.40}
"""Accuracy in per cent on the 5,000 test images."""
CALIBRATION_IMAGES = 512


@pytest.fixture(scope="module")
def test_set(data) -> tuple[Tensor, Tensor]:
    images, labels = data.cifar10("test")
    return data.cifar_input(images), torch.from_numpy(labels)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def predictions(model, inputs: Tensor, batch: int = 100) -> Tensor:
    return torch.cat([model(inputs[i : i + batch]).argmax(1) for i in range(0, len(inputs), batch)])


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Returns per cent."""
    return 100 * (predicted == labels).double().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_accuracy_at_level_0(data, test_set, name: str) -> None:
    inputs, labels = test_set
    dm = DynamicModel(data.network(name), inputs[:1])
    assert all(step.torch_call is None for step in dm.plan.steps), "not all steps run on the engine"
    got = predictions(dm, inputs)
    assert dm.stats().samples == len(inputs) and dm.stats().skip_rate == 0
    assert accuracy(got, labels) == pytest.approx(PUBLISHED[name], abs=0.1)
    assert torch.equal(got, predictions(dm.model, inputs))


def test_first_images_agree_with_pytorch(data, test_set) -> None:
    inputs, labels = test_set
    dm = DynamicModel(data.network("cifar_resnet20"), inputs[:1])
    want, got = dm.model(inputs[:200]), dm(inputs[:200])
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert torch.equal(got.argmax(1), want.argmax(1))
    assert accuracy(got.argmax(1), labels[:200]) > 85


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_bfloat16_keeps_the_accuracy(data, test_set, name: str) -> None:
    inputs, labels = test_set
    dm = DynamicModel(data.network(name), inputs[:1], dtype=torch.bfloat16)
    assert accuracy(predictions(dm, inputs), labels) >= accuracy(predictions(dm.model, inputs), labels) - 0.3


@pytest.mark.slow
def test_15_per_cent_skipped_cost_at_most_one_point(data, test_set) -> None:
    inputs, labels = test_set
    images, _ = data.cifar10("train")
    chosen = np.random.default_rng(0).choice(len(images), CALIBRATION_IMAGES, replace=False)
    dm = DynamicModel(data.network("cifar_resnet56"), inputs[:1])
    frontier = calibrate(dm, data.cifar_input(images[chosen]).split(64))
    whole = predictions(dm.model, inputs)
    assert torch.equal(predictions(dm, inputs), whole), "level 0 changed"
    dm.level = next(point.level for point in frontier.points if point.skip_rate >= 0.16)
    dm.reset_stats()
    gated = accuracy(predictions(dm, inputs), labels)
    assert dm.stats().skip_rate >= 0.15
    assert gated >= accuracy(whole, labels) - 1.0, f"{gated:.2f} % at level {dm.level:.2f}, skip rate {dm.stats().skip_rate:.3f}"
