"""Gates alone: the threshold curve, the one definition of active, gradients, and the per-channel views of a consumer's weight."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from helpers import assert_close
from torch import nn
from torch.nn import functional as F

from dynprune.errors import InputError
from dynprune.gates.compensation import column_norms, compensation_matrix
from dynprune.gates.heads import BranchGate, ChannelGate, gate_key


def random_gate(in_channels: int = 6, num_groups: int = 8) -> ChannelGate:
    gate = ChannelGate(in_channels, num_groups).eval()
    nn.init.normal_(gate.down)
    gate.set_curve(torch.tensor([-2.0, -1.0, 0.0, 3.0]))
    return gate


@pytest.mark.parametrize(
    ("level", "expected"), [(0.0, -math.inf), (1 / 3, -1.0), (0.5, -0.5), (2 / 3, 0.0), (0.9, 2.1), (1.0, 3.0)], ids=lambda v: f"{v:.2f}"
)
def test_threshold_interpolates_the_curve(level, expected):
    assert random_gate().threshold(level) == pytest.approx(expected, abs=1e-6)


def test_level_zero_runs_everything_whatever_the_curve_says():
    gate = random_gate()
    gate.set_curve(torch.tensor([1e6, 1e6]))
    assert gate.mask(torch.randn(3, 6), 0.0).eq(1).all()
    assert gate.mask(torch.randn(3, 6), 1e-6).eq(0).all()


def test_new_gate_ranks_by_static_score_and_ignores_its_input():
    gate = ChannelGate(5, 16, static_score=torch.arange(16.0)).eval()
    first, other = gate.mask(torch.randn(1, 5), 1.0), gate.mask(torch.randn(1, 5), 1.0)
    assert first.equal(other)
    assert first[0].nonzero().flatten().tolist() == [12, 13, 14, 15]
    assert gate.mask(torch.randn(1, 5), 1e-9).eq(1).all()
    assert not gate.calibrated


def test_new_branch_gate_never_skips():
    gate = BranchGate(5).eval()
    assert all(gate.mask(torch.randn(2, 5), level).eq(1).all() for level in (0.0, 0.5, 1.0))


def test_a_higher_level_never_activates_a_group():
    gate = random_gate()
    pooled = torch.randn(50, 6)
    masks = [gate.mask(pooled, i / 20) for i in range(21)]
    assert all((after <= before).all() for before, after in pairwise(masks))
    assert 0 < masks[-1].sum() < masks[1].sum() < masks[0].sum()


def test_training_and_eval_share_one_definition_of_active():
    gate = random_gate()
    pooled = torch.randn(20, 6)
    assert gate.train().mask(pooled, 0.5).detach().equal(gate.eval().mask(pooled, 0.5))


def test_training_gradient_is_the_sigmoids():
    gate = random_gate().train()
    gate.temperature = 0.5
    pooled = torch.randn(4, 6)
    gate.mask(pooled, 0.5).sum().backward()
    soft = torch.sigmoid((gate.score(pooled) - gate.threshold(0.5)) / 0.5)
    assert_close(gate.bias.grad, (soft * (1 - soft) / 0.5).sum(0))
    assert gate.down.grad.abs().sum() > 0


def test_new_gate_can_learn_to_read_its_input():
    gate = ChannelGate(6, 8).train()
    gate.mask(torch.randn(4, 6), 0.5).sum().backward()
    assert gate.down.grad.abs().sum() > 0, "both factors of the linear map are zero, so neither gets a gradient"


def test_score_is_f32_under_autocast():
    gate = random_gate()
    pooled = torch.randn(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.linear(F.linear(pooled, gate.down), gate.up, gate.bias)
        inside = gate.score(pooled)
    assert plain.dtype == torch.bfloat16, "autocast would lower the precision"
    assert inside.equal(gate.score(pooled))


def test_curve_becomes_non_decreasing():
    gate = random_gate()
    gate.set_curve(torch.tensor([0.0, 2.0, 1.0, 3.0]))
    assert gate.curve.tolist() == [0, 2, 2, 3]


@pytest.mark.parametrize("curve", [[1.0], [0.0, math.nan], [0.0, math.inf]], ids=["one", "nan", "inf"])
def test_curve_must_be_finite_and_have_two_levels(curve):
    with pytest.raises(InputError, match="two or more finite"):
        random_gate().set_curve(torch.tensor(curve))


def test_state_of_another_number_of_levels_loads():
    saved, loaded = random_gate(), ChannelGate(6, 8)
    loaded.load_state_dict(saved.state_dict())
    assert loaded.curve.equal(saved.curve)
    assert loaded.threshold(0.5) == saved.threshold(0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0, "num_groups": 4}, "in_channels"),
        ({"in_channels": 4, "num_groups": 4, "rank": 0}, "rank"),
        ({"in_channels": 4, "num_groups": 4, "static_score": torch.zeros(3)}, "static_score"),
        ({"in_channels": 4, "num_groups": 4, "num_channels": 6}, "num_channels"),
    ],
    ids=["in_channels", "rank", "static_score", "num_channels"],
)
def test_wrong_sizes_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        ChannelGate(**arguments)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_compensation_matrix_is_what_constant_channels_add(groups):
    conv = nn.Conv2d(8, 12, 3, groups=groups, bias=False)
    means = torch.randn(8)
    matrix = compensation_matrix(conv.weight, means, groups)
    for channel in range(8):
        x = torch.zeros(1, 8, 5, 5)
        x[:, channel] = means[channel]
        assert_close(matrix[:, channel], conv(x)[0, :, 1, 1], context=f"channel {channel}")


def test_compensation_matrix_of_a_linear_layer_after_a_flatten():
    linear = nn.Linear(4 * 6, 5, bias=False)
    means = torch.randn(4)
    assert_close(compensation_matrix(linear.weight, means).sum(1), linear(means.repeat_interleave(6)))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_column_norms_are_those_of_the_weights_that_read_a_channel(groups):
    weight = nn.Conv2d(8, 12, 3, groups=groups).weight
    norms = column_norms(weight, 8, groups)
    per_group, outputs = 8 // groups, 12 // groups
    for channel in range(8):
        group, inside = divmod(channel, per_group)
        assert_close(norms[channel], weight[group * outputs : (group + 1) * outputs, inside].norm())


def test_gate_keys_are_distinct_and_fit_a_module_dict():
    names = ["", "layer1.0.conv1", "layer1", "keys", "values", "training", "type"]
    gates = nn.ModuleDict({gate_key(name): BranchGate(2) for name in names})
    assert len(gates) == len(names)
    assert gate_key("layer1.0.conv1") == "layer1/0/conv1"
