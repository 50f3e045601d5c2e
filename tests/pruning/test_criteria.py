"""The criteria against their definitions, on networks where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import build, example
from networks import quick, two_layers
from torch import nn
from torch.nn import functional as F

from dynprune.graph.capture import capture
from dynprune.pruning.criteria import CRITERIA, score_space
from dynprune.pruning.evidence import Evidence
from dynprune.pruning.spaces import Anatomy
from dynprune.training.samples import read_samples


def scores(model, x, criterion, **evidence):
    (space,) = Anatomy(capture(model, x), coupled=False).spaces
    return score_space(criterion, space, Evidence(model, **evidence))


def test_norms_are_those_of_the_filters():
    model, x = two_layers(), torch.randn(1, 4)
    np.testing.assert_allclose(scores(model, x, "l1"), 4 * np.arange(1, 7))
    np.testing.assert_allclose(scores(model, x, "l2"), 2 * np.arange(1, 7))


def test_fpgm_is_the_distance_to_all_others():
    distances = [sum(2.0 * abs(i - j) for j in range(6)) for i in range(6)]
    np.testing.assert_allclose(scores(two_layers(), torch.randn(1, 4), "fpgm"), distances, rtol=1e-6)


def test_bn_scale_is_the_absolute_weight():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    model[1].weight.data = torch.tensor([1.0, -3.0, 0.5, 2.0])
    np.testing.assert_allclose(scores(model, torch.randn(1, 3, 5, 5), "bn_scale"), [1, 3, 0.5, 2])


def test_activation_is_what_the_consumer_makes_of_the_channel():
    model, x = two_layers(), torch.rand(16, 4)
    hidden = torch.relu(model[0](x)).double()
    want = hidden.square().mean(0).sqrt() * model[2].weight.double().norm(dim=0)
    np.testing.assert_allclose(scores(model, x[:1], "activation", chunks=read_samples([x], labelled=False, num_inputs=1)), want.detach())


def test_taylor_is_the_first_order_loss_of_a_neuron():
    model, x = two_layers(), torch.rand(16, 4)
    labels = torch.randint(2, (16,))
    chunks = read_samples([(x, labels)], labelled=True, num_inputs=1)
    got = scores(model, x[:1], "taylor", chunks=chunks, loss=F.cross_entropy)
    factors = torch.ones(6, requires_grad=True)
    order = chunks[0]
    loss = F.cross_entropy(model[2](torch.relu(model[0](order.args[0])) * factors), order.labels)
    (gradient,) = torch.autograd.grad(loss, factors)
    np.testing.assert_allclose(got, gradient.square().numpy(), rtol=1e-4, atol=1e-12)


def test_random_follows_the_seed():
    model, x = two_layers(), torch.randn(1, 4)
    first, again, other = (scores(model, x, "random", seed=seed) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_a_callable_ranks():
    model, x = two_layers(), torch.randn(1, 4)
    _, report = quick(model, x, keep_ratio=0.5, criterion=lambda space, evidence: torch.arange(space.size, 0, -1))
    assert report.recipe.kept["0.weight"][0] == [0, 1, 2]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_on_a_network(criterion):
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(4, 3, 16, 16, generator=generator), torch.randint(10, (4,), generator=generator)) for _ in range(2)]
    options = {"data": data, "loss": F.cross_entropy, "criterion": criterion, "target_macs": 0.6}
    small, report = quick(build("grouped"), example("grouped"), coupled=True, exclude=("2.se.*",), **options)
    again, same = quick(build("grouped"), example("grouped"), coupled=True, exclude=("2.se.*",), **options)
    assert report.recipe == same.recipe
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), again.state_dict().values(), strict=True))
    assert all(p.requires_grad and p.grad is None for p in small.parameters())
