"""Models in bfloat16 and float16: they run on the engine in float32, closer to the exact result than PyTorch's own."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dynprune.graph.capture import capture
from dynprune.graph.widen import widened
from dynprune.runtime.model import DynamicModel

NAMES = ("basic", "mbconv_se", "two_inputs", "attention", "gpt", "windows")
HALF = (torch.bfloat16, torch.float16)
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def cast(value, dtype: torch.dtype):
    return pytree.tree_map_only(torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, value)


def error(got, want) -> float:
    """Returns the largest difference of two results, relative to the largest value of each tensor."""
    pairs = zip(pytree.tree_leaves(cast(got, torch.float64)), pytree.tree_leaves(want), strict=True)
    return max((float((a - b).abs().max() / b.abs().max()) for a, b in pairs if isinstance(b, Tensor)), default=0.0)


def built(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, tuple, dict]:
    """Returns a model in half precision, the same in float64, and a call of the first."""
    model, example = models.build(name).to(dtype), models.example(name)
    exact = copy.deepcopy(model).double()
    return model, exact, cast(example if isinstance(example, tuple) else (example,), dtype), {}


@pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_runs_on_the_engine(name: str, dtype: torch.dtype) -> None:
    model, exact, args, kwargs = built(name, dtype)
    dm = DynamicModel(model, args)
    in_pytorch = {step.torch_call.target.__name__ for step in dm.plan.steps if step.torch_call is not None}
    assert in_pytorch <= {"to.dtype", "clone.default"}
    assert [site.name for site in dm.sites] == [site.name for site in DynamicModel(models.build(name), models.example(name)).sites]
    want, got, own = exact(*cast(args, torch.float64)), dm(*args, **kwargs), model(*args, **kwargs)
    assert dm.stats().inferences == 1
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(own), strict=True):
        assert type(a) is type(b) and (not isinstance(b, Tensor) or (a.dtype, a.shape) == (b.dtype, b.shape))
    assert error(got, want) <= EPSILON[dtype]
    lists = {site.name: [list(range(0, site.num_groups, 2))] * len(args[0]) for site in dm.sites}
    hooked = dm.run_with_active(*args, active=lists, backend="hooked")
    assert error(dm.run_with_active(*args, active=lists), cast(hooked, torch.float64)) <= 8 * EPSILON[dtype]


def test_written_weights_are_followed() -> None:
    model, exact, args, _ = built("basic", torch.bfloat16)
    dm = DynamicModel(model, args)
    before = dm(*args)
    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        one.mul_(1.5)
        other.copy_(one)
    assert not torch.equal(dm(*args), before)
    assert error(dm(*args), exact(*cast(args, torch.float64))) <= EPSILON[torch.bfloat16]


class Mixed(nn.Module):
    """Half-precision weights, a norm in float32, a cast back, and a type named as a constant."""

    def __init__(self):
        super().__init__()
        self.enter, self.norm = nn.Linear(8, 12, dtype=torch.bfloat16), nn.LayerNorm(12)
        self.leave = nn.Linear(12, 8, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> dict:
        y = self.norm(self.enter(x).float()).to(torch.bfloat16)
        mask = torch.full((12,), 0.5, dtype=torch.bfloat16)
        return {"y": self.leave(y * mask), "norm": y.float(), "input": x}


def test_types_that_are_mixed() -> None:
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(3, 5, 8, dtype=torch.bfloat16)
    dm = DynamicModel(model, x)
    got, own = dm(x), model(x)
    assert {key: value.dtype for key, value in got.items()} == {key: value.dtype for key, value in own.items()}
    assert torch.equal(got["input"], x)
    for key in ("y", "norm"):
        assert error(got[key], own[key].double()) <= 2 * EPSILON[torch.bfloat16]


def test_a_float32_graph_stays_as_it_is() -> None:
    graph = capture(models.build("basic"), models.example("basic"))
    assert widened(graph) is graph
