"""Batch-norm statistics taken anew."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_close
from patterns import samples
from torch import nn

from dynprune.errors import InputError
from dynprune.runtime.model import DynamicModel
from dynprune.training.batches import as_batch
from dynprune.training.batchnorm import batch_norms, reestimate_batch_norm


def batches(count: int = 3) -> list:
    return [as_batch(samples(16, i), f"Batch {i}") for i in range(count)]


def test_whole_model_gets_the_mean_statistics_of_the_batches(make_model):
    dm = make_model()
    reestimate_batch_norm(dm, batches(), level=0.0)
    twin = make_model().model
    first = twin.block1.bn1
    seen = []
    first.register_forward_hook(lambda module, args, y: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches():
            twin(*batch.args)
    means = torch.stack([x.mean((0, 2, 3)) for x in seen])
    assert_close(dm.model.block1.bn1.running_mean, means.mean(0), factor=10)
    assert_close(dm.model.block1.bn1.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0), factor=10)


def test_tight_levels_have_other_statistics_and_modes_are_left_as_they_were(make_model):
    dm = make_model()
    momenta = [m.momentum for m in batch_norms(dm.model)]
    dm.train()
    dm.model.block1.eval()
    modes = [m.training for m in dm.modules()]
    reestimate_batch_norm(dm, batches(), level=0.0)
    whole = dm.model.block1.bn2.running_var.clone()
    reestimate_batch_norm(dm, batches(), level=1.0)
    assert not torch.allclose(whole, dm.model.block1.bn2.running_var)
    assert [m.training for m in dm.modules()] == modes and [m.momentum for m in batch_norms(dm.model)] == momenta


def test_mixed_statistics_are_the_same_for_the_same_seed(make_model):
    first, second, other = make_model(), make_model(), make_model()
    for dm, seed in ((first, 1), (second, 1), (other, 2)):
        reestimate_batch_norm(dm, batches(), seed=seed)
    assert torch.equal(first.model.block2.bn2.running_var, second.model.block2.bn2.running_var)
    assert not torch.equal(first.model.block2.bn2.running_var, other.model.block2.bn2.running_var)


def test_engine_follows_new_statistics(make_model):
    dm = make_model()
    x, _ = samples(4, 50)
    dm.level = 0.9
    with torch.no_grad():
        before = dm(x)
        reestimate_batch_norm(dm, batches())
        after = dm(x)
    assert (before - after).abs().max() > 1e-3
    assert_close(after, dm.attachment.run((x,), level=0.9)[0], factor=10)


def test_no_batches_leave_the_statistics_alone(make_model):
    dm = make_model()
    before = copy.deepcopy(dm.model.state_dict())
    with pytest.raises(InputError, match="at least one batch"):
        reestimate_batch_norm(dm, [])
    assert all(torch.equal(value, before[name]) for name, value in dm.model.state_dict().items())


def test_models_without_batch_norm_are_left_alone():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    dm = DynamicModel(net, torch.zeros(1, 4))
    reestimate_batch_norm(dm, [])
