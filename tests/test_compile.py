"""torch.compile of a DynamicModel: one operator for the whole model, whatever nests its inputs and outputs."""

from __future__ import annotations

import gc

import models
import pytest
import torch
from torch import Tensor, nn

from dynprune.runtime.model import DynamicModel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about its own parts


class Nested(nn.Module):
    """Takes a keyword and returns a dict with a value that is no tensor."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor, *, scale: Tensor, twice: bool = False) -> dict:
        y = self.conv2(self.conv1(x).relu()) * scale
        return {"y": y * 2 if twice else y, "none": None, "same": x, "mean": y.mean((2, 3))}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    with torch.no_grad():
        yield


def test_a_compiled_model_is_one_operator_in_one_graph() -> None:
    dm = DynamicModel(models.build("basic"), models.example("basic"))
    dm.level = 0.5
    graphs = []

    def backend(graph: torch.fx.GraphModule, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(dm, backend=backend, fullgraph=True)
    x = torch.randn(3, 3, 16, 16)
    before = dm.stats().inferences
    assert torch.equal(compiled(x), dm(x))
    assert dm.stats().inferences == before + 2
    calls = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert calls[0] is torch.ops.dynprune.run


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_any_batch_and_image_size(backend: str) -> None:
    dm = DynamicModel(models.build("mbconv_se"), models.example("mbconv_se"))
    compiled = torch.compile(lambda x: dm(x).softmax(1), backend=backend)
    for shape in ((2, 3, 16, 16), (5, 3, 16, 16), (2, 3, 24, 24)):
        x = torch.randn(shape)
        assert torch.allclose(compiled(x), dm.model(x).softmax(1), atol=1e-5)


def test_keywords_and_nested_results() -> None:
    x, scale = torch.randn(2, 3, 8, 8), torch.rand(2, 1, 1, 1)
    dm = DynamicModel(Nested().eval(), {"x": x, "scale": scale})
    compiled = torch.compile(dm, fullgraph=True, backend="aot_eager")
    got, want = compiled(x=x, scale=scale), dm.model(x, scale=scale)
    assert list(got) == list(want) and got["none"] is None
    for name in ("y", "same", "mean"):
        assert torch.allclose(got[name], want[name], atol=1e-5)


def test_a_call_of_another_form_leaves_the_compiled_graph() -> None:
    x, scale = torch.randn(2, 3, 8, 8), torch.rand(2, 1, 1, 1)
    dm = DynamicModel(Nested().eval(), {"x": x, "scale": scale})
    compiled = torch.compile(dm, backend="aot_eager")
    assert torch.allclose(compiled(x=x, scale=scale, twice=True)["y"], dm.model(x, scale=scale, twice=True)["y"], atol=1e-5)


def test_gradients_flow_through_a_compiled_model_in_training() -> None:
    dm = DynamicModel(models.build("basic"), models.example("basic")).train()
    compiled = torch.compile(dm, backend="eager")
    with torch.enable_grad():
        compiled(torch.randn(2, 3, 16, 16)).sum().backward()
    assert dm.model[0][0].weight.grad.abs().sum() > 0


def test_the_operator_is_a_good_citizen() -> None:
    dm = DynamicModel(models.build("basic"), models.example("basic"))
    torch.library.opcheck(torch.ops.dynprune.run.default, (dm.number, [torch.randn(3, 3, 16, 16)]))


def test_the_operator_does_not_keep_a_model_alive() -> None:
    from dynprune.runtime import ops

    dm = DynamicModel(models.build("basic"), models.example("basic"))
    number = dm.number
    assert number in ops._models
    del dm
    gc.collect()
    assert number not in ops._models
