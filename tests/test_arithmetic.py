"""`exact=True` leaves Winograd's algorithm out, `dtype` is that of weights and products; the model and its outputs stay as they are."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers import assert_close
from safetensors import safe_open
from torch import nn

from dynprune import DynamicModel, InputError


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
    net, x = make_net(), torch.randn(1, 8, 28, 28)
    dm = DynamicModel(net, x, exact=True)
    dm.save(tmp_path / "gates.safetensors")
    assert copy.deepcopy(dm).arithmetic.exact
    assert DynamicModel.load(tmp_path / "gates.safetensors", net).arithmetic.exact


def rounded(net: nn.Module) -> nn.Module:
    """Returns a copy whose convolutions and linear layers compute on bfloat16 values, with sums and everything else in float32."""
    net = copy.deepcopy(net)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data = layer.weight.data.bfloat16().float()
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, args: (args[0].bfloat16().float(),))
    return net


@pytest.fixture
def classifier() -> nn.Module:
    features = [nn.Conv2d(8, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 24, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*features, nn.Linear(24, 50), nn.ReLU(), nn.Linear(50, 10)).eval()


def test_bfloat16_rounds_weights_and_planes_and_nothing_else(classifier):
    x = torch.randn(3, 8, 20, 20)
    dm = DynamicModel(classifier, x, dtype=torch.bfloat16, exact=True)
    with torch.no_grad():
        y, whole = dm(x), classifier(x)
        assert y.dtype == torch.float32
        assert_close(y, rounded(classifier)(x), factor=100)  # a sum in another order may round to the other neighbour
        assert (y - whole).abs().max() > 1e-4 * whole.abs().max(), "nothing was rounded"
        assert (y - whole).abs().max() < 2e-2 * whole.abs().max()
        assert torch.equal(classifier(x), whole)


def test_bfloat16_follows_lists_and_written_weights(classifier):
    x = torch.randn(2, 8, 20, 20)
    dm = DynamicModel(classifier, x, dtype=torch.bfloat16)
    active = {site.name: [range(0, site.num_groups, 3), range(5)] for site in dm.sites}
    with torch.no_grad():
        hooked = dm.run_with_active(x, active=active, backend="hooked")
        assert_close(dm.run_with_active(x, active=active), hooked, factor=2000)
        classifier[0].weight.mul_(2)
        assert_close(dm(x), classifier(x), factor=2000)


def test_bfloat16_is_kept_by_copies_and_files(classifier, tmp_path):
    x = torch.randn(1, 8, 20, 20)
    dm = DynamicModel(classifier, x, dtype=torch.bfloat16)
    dm.save(tmp_path / "gates.safetensors")
    loaded = DynamicModel.load(tmp_path / "gates.safetensors", classifier)
    with safe_open(tmp_path / "gates.safetensors", "pt") as file:
        assert json.loads(file.metadata()["dynprune"])["format"] == 3, "older versions would run it in float32"
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(dm)(x), dm(x))
        assert torch.equal(loaded(x), dm(x))
        assert not torch.equal(loaded(x), DynamicModel(classifier, x)(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, "bfloat16"])
def test_other_types_are_refused(classifier, dtype):
    with pytest.raises(InputError, match=r"`dtype` must be torch.float32 or torch.bfloat16, got"):
        DynamicModel(classifier, dtype=dtype)
