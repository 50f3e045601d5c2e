"""prune on a real network: in one shot, without training, a fifth of the multiply-adds goes for little."""

from __future__ import annotations

import pytest

from dynprune import prune, reestimate_batch_norm


@pytest.mark.slow
def test_resnet56_in_one_shot(data):
    (images, labels), (seen, _) = data.cifar10("test"), data.cifar10("train")
    inputs, batches = data.cifar_input(images[:500]), list(data.cifar_input(seen[:256]).split(64))
    model = data.network("cifar_resnet56")
    whole = data.accuracy(model, inputs, labels[:500])
    small, report = prune(model, inputs[:1], target_macs=0.8, criterion="activation", data=batches, measure=False)
    reestimate_batch_norm(small, batches)
    assert report.macs_after <= 0.8 * report.macs_before
    assert data.accuracy(small, inputs, labels[:500]) >= whole - 3.0
