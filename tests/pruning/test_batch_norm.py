"""Batch-norm statistics measured again: the average over the batches, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from models import build
from torch import nn

from dynprune import reestimate_batch_norm
from dynprune.errors import CalibrationError


def test_statistics_are_the_average_over_the_batches():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    model[1].momentum = 0.3
    weights = copy.deepcopy(list(model.parameters()))
    x = torch.randn(128, 3, 5, 5) * 3 + 1
    assert reestimate_batch_norm(model, [x]) == 1
    with torch.no_grad():
        y = model[0](x)
    torch.testing.assert_close(model[1].running_mean, y.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model[1].running_var, y.var((0, 2, 3)), rtol=0.05, atol=0.05)
    assert model[1].momentum == 0.3 and model.training and model[1].training and model[2].training
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_without_batch_norms_nothing_happens():
    assert reestimate_batch_norm(nn.Linear(3, 2), [torch.randn(4, 3)]) == 0


@pytest.mark.parametrize("data,message", [([], "at least 2 samples"), ([torch.full((4, 3, 16, 16), float("inf"))], "NaN or Inf")])
def test_bad_data_changes_nothing(data, message):
    model = build("basic")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=message):
        reestimate_batch_norm(model, data)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_overflow_puts_the_old_statistics_back():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        reestimate_batch_norm(model, [torch.full((8, 3), 1e3)])
    assert (model[1].running_mean == 0).all() and (model[1].running_var == 1).all()
