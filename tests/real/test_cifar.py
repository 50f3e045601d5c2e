"""A real network on real images: ResNet-56 on CIFAR-10 keeps its published accuracy on the engine and stands 15 % of its work skipped."""

from __future__ import annotations

import pytest
import torch

from dynprune import DynamicModel, calibrate

NETWORK = "cifar_resnet56"
PUBLISHED_PERCENT = 93.39  # on all 10,000 test images; the 5,000 here give 93.40
BATCH = 125


@pytest.fixture(scope="module")
def test_images(data):
    images, labels = data.cifar10("test")
    return data.cifar_input(images), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def dm(data):
    return DynamicModel(data.network(NETWORK), torch.zeros(1, 3, 32, 32)).eval()


def predictions(model, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(batch).argmax(1) for batch in inputs.split(BATCH)])


def percent(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * (predicted == labels).double().mean().item()


def test_level_0_has_the_published_accuracy_and_the_models_own_predictions(data, dm, test_images):
    inputs, labels = test_images
    dm.level = 0.0
    on_engine = predictions(dm, inputs)
    assert abs(percent(on_engine, labels) - PUBLISHED_PERCENT) < 0.3
    in_pytorch = predictions(data.network(NETWORK), inputs[:1000])
    assert torch.equal(on_engine[:1000], in_pytorch)


def test_skipping_15_percent_costs_at_most_one_point(data, dm, test_images):
    inputs, labels = test_images
    dense = percent(predictions(dm, inputs), labels)
    images, _ = data.cifar10("train")
    training_images = data.cifar_input(images[:512])
    frontier = calibrate(dm, training_images.split(64))
    dm.level = min(point.level for point in frontier.points if point.skip_rate >= 0.16)
    dm.reset_stats()
    gated = percent(predictions(dm, inputs), labels)
    stats = dm.stats()
    assert stats.skip_rate >= 0.15
    assert gated >= dense - 1.0, f"{gated:.2f} % at {100 * stats.skip_rate:.1f} % skipped, {dense:.2f} % dense"
