"""sparsify: masks of torch.nn.utils.prune by every rule, and what the engine makes of them."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_close
from models import build, example
from torch import nn
from torch.nn.utils import prune as torch_prune

from dynprune import DynamicModel, sparsify
from dynprune.errors import CalibrationError, InputError, UnsupportedModelError


def net(hidden: int = 32) -> nn.Sequential:
    torch.manual_seed(2)
    layers = [nn.Conv2d(3, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, 8, 3, stride=2)]
    return nn.Sequential(*layers).eval()


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def zeros_of(model):
    return {name: module.weight_mask == 0 for name, module in model.named_modules() if hasattr(module, "weight_mask")}


@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_smallest_weights_go(scope):
    model = net()
    before = copy.deepcopy(model.state_dict())
    sparse, report = sparsify(model, sparsity=0.7, scope=scope, floor=0.0)
    assert report.sparsity == pytest.approx(0.7, abs=0.002)
    for name, mask in zeros_of(sparse).items():
        weight = model.get_submodule(name).weight.detach().abs()
        assert mask.all() or weight[mask].max() <= weight[~mask].min()
        if scope == "local":
            assert mask.float().mean() == pytest.approx(0.7, abs=0.01)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert f"{report.sparsity:.2%}" in str(report).splitlines()[-1]


def test_a_floor_keeps_layers_alive():
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    _, report = sparsify(model, sparsity=0.5, floor=0.05)
    assert max(layer.sparsity for layer in report.layers) <= 0.951


@pytest.mark.parametrize("pattern,n,m", [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8)])
def test_n_of_m(pattern, n, m):
    sparse, report = sparsify(net(), pattern=pattern, exclude=("0",))
    weight = sparse[2].weight.detach()
    groups = (weight != 0).movedim(1, -1).reshape(-1, m)
    assert (groups.sum(1) == n).all()
    assert report.sparsity == pytest.approx(1 - n / m)
    original = net()[2].weight.detach().abs().movedim(1, -1).reshape(-1, m)
    assert (original[groups].reshape(-1, n).sum(1) >= original.sum(1) * n / m - 1e-6).all()


def test_blocks_share_their_zeros():
    sparse, report = sparsify(net(), sparsity=0.6, pattern="4x1")
    for mask in zeros_of(sparse).values():
        blocks = mask.unflatten(0, (-1, 4))
        assert (blocks == blocks[:, :1]).all()
    assert report.sparsity == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("pattern", [None, "2:4", "4x1"])
def test_remove_makes_them_permanent_and_state_dicts_fit(pattern):
    sparse, _ = sparsify(net(), sparsity=0.5, pattern=pattern)
    assert {"2.weight_orig", "2.weight_mask"} <= set(sparse.state_dict())
    with torch.no_grad():
        want = sparse(X)
    twin = copy.deepcopy(sparse)
    for module in twin.modules():
        if torch_prune.is_pruned(module) and hasattr(module, "weight_mask"):
            torch_prune.remove(module, "weight")
    assert set(twin.state_dict()) == set(net().state_dict())
    with torch.no_grad():
        assert torch.equal(twin(X), want)


def test_masks_hold_in_training_and_add_up():
    sparse, _ = sparsify(net(), sparsity=0.5)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse(X).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        sparse(X)
    zeros = zeros_of(sparse)
    assert all((sparse.get_submodule(name).weight[mask] == 0).all() for name, mask in zeros.items())
    more, report = sparsify(sparse, sparsity=0.8)
    assert report.sparsity == pytest.approx(0.8, abs=0.01)
    assert all((zeros_of(more)[name] | ~mask).all() for name, mask in zeros.items())


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_gradual_schedule(pattern):
    seen = []

    def finetune(model):
        zeros = zeros_of(model)
        seen.append(sum(int(z.sum()) for z in zeros.values()) / sum(z.numel() for z in zeros.values()))

    _, report = sparsify(net(), sparsity=0.5, pattern=pattern, schedule="cubic", steps=3, finetune=finetune, exclude=("0",))
    assert seen == pytest.approx([0.5 * (1 - (1 - t) ** 3) for t in (1 / 3, 2 / 3, 1)], abs=0.01)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


def test_activation_criterion_looks_at_the_inputs():
    model = nn.Sequential(nn.Linear(8, 4, bias=False)).eval()
    nn.init.ones_(model[0].weight)
    x = torch.ones(16, 8) * torch.arange(1.0, 9)
    sparse, _ = sparsify(model, sparsity=0.5, criterion="activation", data=[x])
    assert (sparse[0].weight_mask == (torch.arange(8) >= 4)).all()
    grouped = nn.Sequential(nn.Conv2d(4, 8, 1, groups=2, bias=False)).eval()
    nn.init.ones_(grouped[0].weight)
    x = torch.ones(4, 4, 3, 3) * torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1)
    sparse, _ = sparsify(grouped, sparsity=0.5, criterion="activation", data=[x], scope="local")
    assert (sparse[0].weight_mask[4:] == 1).all() and (sparse[0].weight_mask[:4] == 0).all()


def test_random_follows_the_seed():
    first, again, other = (zeros_of(sparsify(net(), sparsity=0.5, criterion="random", seed=s)[0])["2"] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("removed", [False, True], ids=["masked", "removed"])
@pytest.mark.parametrize("pattern,sparsity", [(None, 0.97), ("4x1", 0.9), (None, 0.5)])
def test_engine_equals_pytorch_and_says_what_it_does(pattern, sparsity, removed):
    sparse, _ = sparsify(net(), sparsity=sparsity, pattern=pattern, scope="local")
    if removed:
        for module in sparse.modules():
            if hasattr(module, "weight_mask"):
                torch_prune.remove(module, "weight")
    dm = DynamicModel(sparse, X).eval()
    with torch.no_grad():
        assert_close(dm(X), sparse(X))
        for site in dm.sites:
            active = {site.name: [list(range(0, site.num_groups, 2)), list(range(5))]}
            assert_close(dm.run_with_active(X, active=active), dm.run_with_active(X, active=active, backend="hooked"))
    marked = [step for step in dm.plan.steps if step.ints.get("sparse") == [1]]
    assert bool(marked) == (sparsity > 0.5)
    words = "zeros, skipped" if sparsity > 0.5 else "multiplied all the same: skipping them would pay from"
    assert words in dm.explain()


def test_small_and_large_linear_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1024, 768), nn.ReLU(), nn.Linear(768, 10)).eval()
    sparse, _ = sparsify(model, sparsity=0.8, scope="local")
    x = torch.randn(3, 4, 256)
    dm = DynamicModel(sparse, x).eval()
    with torch.no_grad():
        assert_close(dm(x), sparse(x))
    assert [step.ints.get("sparse") for step in dm.plan.steps if step.op == "linear"] == [[1], None]
    assert "would not pay in this layer" in dm.explain()


def test_dense_models_are_left_alone():
    dm = DynamicModel(build("basic"), example("basic"))
    assert not any("sparse" in step.ints for step in dm.plan.steps)
    assert "Sparse weights" not in dm.explain()


@pytest.mark.parametrize(
    "options,message",
    [
        ({}, r"`sparsity` must be a share in \[0, 1\), got None"),
        ({"sparsity": 1.0}, "`sparsity` must be a share"),
        ({"sparsity": 0.5, "pattern": "4:2"}, "`pattern` must be None, 'N:M'"),
        ({"sparsity": 0.5, "pattern": "0x1"}, "`pattern` must be"),
        ({"sparsity": 0.3, "pattern": "2:4"}, "The pattern sets a sparsity of 0.5"),
        ({"sparsity": 0.5, "scope": "here"}, "`scope` must be one of"),
        ({"sparsity": 0.5, "criterion": "magic"}, "`criterion` must be one of"),
        ({"sparsity": 0.5, "floor": -1}, "`floor` must be a share"),
        ({"sparsity": 0.5, "include": ("zzz",)}, "'zzz' matches no convolution or linear layer"),
        ({"sparsity": 0.5, "exclude": ("*",)}, "leave no layer"),
        ({"sparsity": 0.5, "finetune": 1}, "`finetune` must be a callable"),
        ({"sparsity": 0.5, "schedule": "linear", "steps": 0}, "`steps` must be"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InputError, match=message):
        sparsify(net(), **options)


def test_what_cannot_be_sparsified_is_told():
    with pytest.raises(UnsupportedModelError, match="no convolution or linear layer with a weight of its own"):
        sparsify(nn.ReLU(), sparsity=0.5)
    with pytest.raises(CalibrationError, match="needs data"):
        sparsify(net(), sparsity=0.5, criterion="activation")
