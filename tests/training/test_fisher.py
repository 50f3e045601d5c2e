"""How much the answer depends on each output channel of a consumer."""

from __future__ import annotations

import pytest
import torch
from conftest import samples
from helpers import assert_close
from torch import nn

from dynprune.runtime.model import DynamicModel
from dynprune.training.fisher import consumer_importance
from dynprune.training.samples import read_samples
from dynprune.training.scores import record_channels


def chunks_of(count: int = 40) -> list:
    return read_samples([samples(count, 0)], labelled=False, num_inputs=1)


def test_importance_is_the_root_mean_squared_gradient_of_a_linear_answer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1)).eval()
    dm = DynamicModel(net, torch.zeros(1, 4), include=["0"])
    x = torch.randn(32, 4)
    (got,) = consumer_importance(dm.attachment, read_samples([x], labelled=False, num_inputs=1)).values()
    hidden = net[3](net[2](net[1](net[0](x)))).detach()
    want = (net[4].weight.detach() * (1 - hidden**2)).square().sum(0).sqrt()
    assert_close(got, want, factor=10)


def test_an_output_that_nobody_reads_does_not_matter(make_model):
    dm = make_model()
    with torch.no_grad():
        dm.model.block2.bn2.weight[3] = 0
    importance = consumer_importance(dm.attachment, chunks_of())
    assert set(importance) == {("block1.conv1", 0), ("block2.conv1", 0)}
    assert importance["block2.conv1", 0][3] == 0 and (importance["block2.conv1", 0] > 0).sum() >= 6
    assert all(p.grad is None for p in dm.parameters())


def test_weights_into_it_do_not_count(make_model):
    dm = make_model()
    with torch.no_grad():
        dm.model.block2.bn2.weight.zero_()
        dm.model.block2.bn2.weight[0] = 1
    with torch.no_grad():
        records = record_channels(dm.attachment, chunks_of(), consumer_importance(dm.attachment, chunks_of()))
    norms = records["block2.conv1"].consumers[0].norms
    weight = dm.model.block2.conv2.weight.detach()[0].square().sum((1, 2)).sqrt()
    assert_close(norms / norms.norm(), weight / weight.norm(), factor=10)


@pytest.mark.parametrize("splittable", (True, False))
def test_whole_chunks_give_what_parts_give(make_model, splittable):
    dm = make_model()
    importance = consumer_importance(dm.attachment, chunks_of(24), splittable=splittable)
    again = consumer_importance(dm.attachment, chunks_of(24), splittable=splittable)
    assert all(torch.equal(importance[key], again[key]) for key in importance)
