"""capture(): the graph computes what the model computes, knows where each node comes from, and leaves the model as it was."""

from __future__ import annotations

import copy
import operator

import models
import pytest
import torch
from helpers import assert_close
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from dynprune.errors import InputError, UnsupportedModelError
from dynprune.graph.capture import BATCH, Graph, Node, capture


def run_graph(graph: Graph, args: tuple, replace: dict[str, str] | None = None):
    """Returns the result of the graph in PyTorch; `replace` gives nodes the value of another node instead of their own."""
    tensors = iter(leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor))
    values, by_name = {}, {}
    for node in graph.nodes:
        plain_args, plain_kwargs = pytree.tree_map(lambda item: values[item] if isinstance(item, Node) else item, (node.args, node.kwargs))
        if replace and node.name in replace:
            value = by_name[replace[node.name]]
        elif node.op == "input":
            value = next(tensors)
        else:
            value = node.tensor if node.op == "constant" else node.target(*plain_args, **plain_kwargs)
        values[node] = by_name[node.name] = value
    leaves = [values[leaf] if isinstance(leaf, Node) else leaf for leaf in graph.outputs]
    return pytree.tree_unflatten(leaves, graph.out_spec)


def assert_same_results(got, want, context: str = "") -> None:
    got, want = pytree.tree_leaves(got), pytree.tree_leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        if isinstance(b, torch.Tensor):
            assert_close(a, b, context=context)
        else:
            assert a == b


def node_of(graph: Graph, op: str) -> Node:
    return next(node for node in graph.nodes if node.op == op)


@pytest.mark.parametrize("name", models.NAMES)
def test_graph_equals_model_at_other_batch_sizes(name):
    model, graph = models.captured(name)
    assert graph.dynamic_batch
    for batch in (1, 2, 5):
        with torch.no_grad():
            want = model(*models.example(name, batch, seed=7))
            assert_same_results(run_graph(graph, models.example(name, batch, seed=7)), want, f"{name}, batch {batch}")


@pytest.mark.parametrize("name", models.NAMES)
def test_nodes_are_pure_and_consistent(name):
    graph = models.captured(name)[1]
    seen = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        assert schema is None or not schema.is_mutable, node
        assert node.op not in ("dropout", "contiguous", "clone", "alias", "detach", "view"), node
        assert seen.issuperset(node.inputs), node
        assert all(node in used.users for used in node.inputs), node
        assert node.op == "input" or node.users or node in graph.outputs, f"{node} is dead"
        assert node.varies == (node.op == "input" or any(used.varies for used in node.inputs)), node
        assert (node.shape is None) == (node.dtype is None)
        seen.add(node)
    assert len({node.name for node in graph.nodes}) == len(graph.nodes)


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("basic", {"conv2d", "batch_norm", "relu", "add", "adaptive_avg_pool2d", "flatten", "linear"}),
        ("mbconv_se", {"conv2d", "batch_norm", "relu", "silu", "hardswish", "sigmoid", "hardsigmoid", "mul"}),
        ("convnext", {"layer_norm", "gelu", "linear", "permute"}),
        ("attention", {"scaled_dot_product_attention", "layer_norm", "linear"}),
        ("in_place_view", {"conv2d", "hardswish", "relu"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_operations_stay_whole(name, whole):
    assert whole <= {node.op for node in models.captured(name)[1].nodes}


def test_batch_norm_is_whole_after_functionalisation():
    class Net(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            y[:, 0] = 0
            return y

    model = Net(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    graph = capture(model, torch.rand(2, 3, 4, 4))
    node = node_of(graph, "batch_norm")
    assert node.arguments["training"] is False and node.arguments["running_mean"].parameter_name == "1.running_mean"
    x = torch.rand(2, 3, 4, 4)
    with torch.no_grad():
        assert_same_results(run_graph(graph, (x,)), model(x))


def test_model_and_example_stay_as_they_were():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.drop = nn.BatchNorm2d(3), nn.Dropout()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            return self.drop(self.bn(x.relu_()))

    model = Net().train()
    model.bn.eval()
    x = torch.randn(4, 3, 5, 5)
    state, example, flags = copy.deepcopy(model.state_dict()), x.clone(), [module.training for module in model.modules()]
    capture(model, x)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(x, example)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nodes_know_module_parameter_and_live_tensor():
    model, graph = models.captured("basic")
    conv = next(node for node in graph.nodes if node.module_path == "1.conv1")
    weight = conv.arguments["weight"]
    assert (conv.op, weight.op, weight.parameter_name) == ("conv2d", "constant", "1.conv1.weight")
    assert weight.tensor is model[1].conv1.weight
    assert conv.arguments["groups"] == 1 and conv.arguments["bias"] is None
    assert conv.inputs == [conv.args[0], weight] and conv in weight.users
    add = node_of(graph, "add")
    assert add.module_path == "1"


def test_plain_tensor_attribute_is_a_constant():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.rand(3)

        def forward(self, x):
            return x * self.table + torch.tensor([1.0, 2.0, 3.0])

    graph = capture(Net(), torch.rand(2, 3))
    assert [node.parameter_name for node in graph.nodes if node.op == "constant"] == ["", ""]
    x = torch.rand(4, 3)
    assert torch.equal(run_graph(graph, (x,))[1], x[1] * node_of(graph, "mul").args[1].tensor + torch.tensor([1.0, 2.0, 3.0]))


def test_shapes_mark_the_batch():
    class Net(nn.Module):
        def forward(self, x):
            y = x.transpose(0, 1)
            return x + y.transpose(0, 1) + y.reshape(-1, 4).sum()

    graph = capture(Net(), torch.rand(2, 5, 4))
    shapes = {node.op: (node.shape, node.sample_size) for node in graph.nodes}
    assert shapes["input"] == shapes["add"] == ((BATCH, 5, 4), 20)
    assert next(node.shape for node in graph.nodes if node.op == "transpose") == (5, None, 4)
    assert shapes["reshape"] == ((None, 4), 20)
    assert shapes["sum"] == ((), 1)


def test_call_counts_and_tensor_modules():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    model = models.build("shared")
    model.pair = Pair()
    graph = capture(model, models.example("shared"))
    assert (graph.call_counts[""], graph.call_counts["first"], graph.call_counts["again"], graph.call_counts["pair"]) == (1, 1, 2, 0)
    assert {"first", "again", "head"} <= graph.tensor_modules
    graph = capture(nn.Sequential(nn.Linear(3, 3), Pair()), torch.rand(1, 3))
    assert "1" not in graph.tensor_modules and "0" in graph.tensor_modules


def test_module_registered_twice_counts_its_calls_at_both_paths():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model.append(model[0])
    graph = capture(model, torch.rand(1, 3))
    assert graph.call_counts["0"] == graph.call_counts["2"] == 2


def test_nested_inputs_and_outputs():
    model = models.build("two_inputs")
    image, text, _ = models.example("two_inputs", 2)
    graph = capture(model, (image,), {"text": text, "double": True})
    assert [node.shape for node in graph.inputs] == [(BATCH, 3, 16, 16), (BATCH, 8)]
    assert graph.fixed_inputs == {2: True}
    result = run_graph(graph, (image, text))
    assert isinstance(result, models.Result) and result.aux["none"] is None and result.aux["pair"][1] == 3
    with torch.no_grad():
        assert_close(result.logits, model(image, text, True).logits)


@pytest.mark.parametrize(
    ("forward", "shape", "want"),
    [
        (lambda x: (x * 2).mean(), (4, 3), ()),
        (lambda x: x.reshape(1, -1) * 2, (1, 3, 2), (BATCH, 6)),
        (lambda x: x.transpose(0, 1) * 2, (2, 3), (3, 2)),
        (lambda x: x + torch.arange(4.0)[:, None], (4, 3), (BATCH, 3)),
    ],
    ids=["mean_of_all", "view_1", "batch_moved", "batch_of_4_in_the_code"],
)
def test_fixed_batch_where_the_model_fixes_it(forward, shape, want):
    class Net(nn.Module):
        def forward(self, x):
            return forward(x)

    x = torch.rand(shape)
    graph = capture(Net(), x)
    assert not graph.dynamic_batch and graph.batch_size == shape[0]
    assert graph.outputs[0].shape == want
    assert_same_results(run_graph(graph, (x,)), forward(x))


def test_inputs_of_different_batch_sizes_fix_the_batch():
    class Net(nn.Module):
        def forward(self, x, table):
            return x @ table

    graph = capture(Net(), (torch.rand(2, 3), torch.rand(3, 5)))
    assert not graph.dynamic_batch
    assert [node.shape for node in graph.inputs] == [(BATCH, 3), (3, 5)]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.rand(2, 4), r"float32 \(2, 4\).*cannot be multiplied"),
        ((torch.rand(2, 3), torch.rand(2, 3)), "positional argument"),
        (torch.rand(0, 3), "none of them empty"),
        ((), "no tensor"),
        ("image.png", "got str"),
    ],
    ids=["wrong_shape", "too_many", "empty_batch", "nothing", "string"],
)
def test_example_that_the_model_does_not_take(example, message):
    with pytest.raises(InputError, match=message):
        capture(nn.Linear(3, 2), example)


def test_idioms_become_the_operations_that_they_are():
    model, graph = models.captured("gpt")
    assert [node.op for node in graph.nodes].count("gelu") == 2
    assert not {"addmm", "tanh", "pow"} & {node.op for node in graph.nodes}
    linear = node_of(graph, "linear")
    assert linear.module_path == "0.attn" and linear.arguments["weight"].args[0].tensor is model[0].attn.weight


class Norm(nn.Module):
    """The norm of Llama, T5 and others as transformers writes it."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x):
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_written_out_norm_becomes_one_operation(dtype):
    model, x = nn.Sequential(Norm(6), nn.RMSNorm(6)).to(dtype).eval(), torch.randn(2, 5, 6).to(dtype)
    graph = capture(model, x)
    assert [node.op for node in graph.nodes if node.op not in ("input", "constant")] == ["rms_norm", "rms_norm"]
    first = node_of(graph, "rms_norm")
    assert first.arguments["weight"].tensor is model[0].weight and first.arguments["eps"] == 1e-6
    with torch.no_grad():
        got = run_graph(graph, (x,))
        torch.testing.assert_close(got, model(x), rtol=2e-2 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)


def test_a_norm_without_its_weight_and_one_that_is_read_twice():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(3))

        def forward(self, x):
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
            return y * self.weight + y

    model, x = Net(), torch.randn(2, 4, 3)
    graph = capture(model, x)
    assert node_of(graph, "rms_norm").arguments["weight"] is None
    with torch.no_grad():
        assert_same_results(run_graph(graph, (x,)), model(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6),
        lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
        lambda x: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-6),
        lambda x: x * torch.rsqrt(x.exp().pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x.abs()),
        lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))),
        lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**2))),
        lambda x: 0.5 * x * (2 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        lambda x: torch.addmm(torch.arange(3.0), x.reshape(-1, 3), torch.eye(3)).reshape(-1, 3),
        lambda x: torch.einsum("bij,bij->bi", x, x),
        lambda x: torch.einsum("bij,bik->bijk", x, x),
        lambda x: torch.einsum("b...j,kj->b...k", x, torch.eye(3)),
    ],
    ids=[
        "cube",
        "other dimension",
        "two dimensions",
        "of another",
        "no number",
        "factor",
        "square",
        "two",
        "regrouped",
        "row products",
        "outer",
        "dots",
    ],
)
def test_what_only_looks_like_an_idiom_stays(forward):
    class Net(nn.Module):
        def forward(self, x):
            return forward(x)

    x = torch.rand(2, 2, 3)
    graph = capture(Net(), x)
    assert not {"gelu", "linear", "matmul", "rms_norm"} & {node.op for node in graph.nodes}
    assert_same_results(run_graph(graph, (x,)), forward(x))


def test_model_that_export_refuses_names_the_module():
    class Picky(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else x * 2

    with pytest.raises(
        UnsupportedModelError, match=r"data-dependent.*module 'inner\.1', at test_capture\.py:\d+ \(`return x if.*torch\.cond"
    ):
        capture(Wrapped(nn.Sequential(nn.ReLU(), Picky())), torch.rand(2, 3))


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Counter(nn.Module):
    def __init__(self, used: bool):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.used = used

    def forward(self, x):
        self.count += 1
        return x + self.count if self.used else x * 2


def test_state_that_the_result_needs_is_refused():
    with pytest.raises(UnsupportedModelError, match="overwrites"):
        capture(Wrapped(Counter(used=True)), torch.rand(2, 3))


def test_state_that_the_result_does_not_need_is_dropped():
    graph = capture(Wrapped(Counter(used=False)), torch.rand(2, 3))
    assert [node.op for node in graph.nodes] == ["input", "mul"]


def test_promotion_in_an_in_place_operation_keeps_the_type():
    class Net(nn.Module):
        def forward(self, x):
            y = x.half()
            y += x
            return y

    graph = capture(Net(), torch.rand(2, 3))
    x = torch.rand(3, 3)
    assert run_graph(graph, (x,)).dtype == torch.float16


def test_autocast_region_is_inlined():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.fc(x)

    model = Net().eval()
    graph = capture(model, torch.rand(2, 3))
    assert [node.op for node in graph.nodes if node.op != "constant"] == ["input", "linear"]


def test_copies_are_dropped_but_strides_are_respected():
    class Net(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 1).contiguous().view(x.shape[0], -1).clone() + torch.as_strided(x.clone(), (4,), (1,)).sum()

    model = Net()
    graph = capture(model, torch.rand(1, 4, 6))
    x = torch.rand(1, 4, 6)
    assert_same_results(run_graph(graph, (x,)), model(x))


def test_multihead_attention_runs_as_functions():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    graph = capture(model, torch.rand(1, 5, 16))
    x = torch.rand(3, 5, 16)
    with torch.no_grad():
        assert graph.dynamic_batch
        assert_same_results(run_graph(graph, (x,)), model(x))


def test_sizes_are_nodes_that_run_on_plain_values():
    class Net(nn.Module):
        def forward(self, x):
            return x.reshape(x.shape[0] * 2, -1).reshape(x.shape[0], -1) * 2 + F.relu(x)

    graph = capture(Net(), torch.rand(3, 4))
    sizes = [node for node in graph.nodes if node.shape is None]
    assert {node.op for node in sizes} <= {"sym_size", "mul"} and operator.mul in {node.target for node in sizes}
    x = torch.rand(5, 4)
    assert_same_results(run_graph(graph, (x,)), x * 2 + F.relu(x))
