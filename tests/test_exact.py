"""`exact=True` leaves Winograd's algorithm out; without it results stay within the house tolerance."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from torch import nn

from dynprune import DynamicModel


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)).eval()


@pytest.mark.parametrize("exact", [False, True])
def test_output_equals_the_model(exact):
    net, x = make_net(), torch.randn(2, 8, 28, 28)
    dm = DynamicModel(net, x, exact=exact)
    with torch.no_grad():
        assert_close(dm(x), net(x))


def test_exact_spreads_a_nan_no_further_than_pytorch():
    net, x = make_net(), torch.randn(1, 8, 28, 28)
    x[0, 3, 13, 13] = float("nan")
    with torch.no_grad():
        want = net(x).isnan()
        assert torch.equal(DynamicModel(net, x, exact=True)(x).isnan(), want)
        assert DynamicModel(net, x)(x).isnan()[want].all(), "a NaN must not get lost either"


def test_copies_and_files_stay_exact(tmp_path):
    import copy

    net, x = make_net(), torch.randn(1, 8, 28, 28)
    dm = DynamicModel(net, x, exact=True)
    dm.save(tmp_path / "gates.safetensors")
    assert copy.deepcopy(dm).arithmetic.exact
    assert DynamicModel.load(tmp_path / "gates.safetensors", net).arithmetic.exact
