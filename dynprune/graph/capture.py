"""Captures a model as a graph whose nodes know their shape, dtype and the user's module that ran them (torch.export)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from dynprune.errors import InputError
from dynprune.graph import export
from dynprune.graph.functional import op_name, read_attribute

BATCH = -1
"""Stands for the batch size in `Node.shape`."""


@dataclass(frozen=True, eq=False)
class Node:
    """One operation of a captured model.

    Attributes:
        name: unique in the graph, as torch.export named it.
        op: "input", "constant" (a parameter, buffer or lifted tensor), or the ATen packet's name without overload and without the
            in-place underscore: "conv2d", "add", "relu", "getitem" for operator.getitem, "sym_size" ... Every `view` is a "reshape".
        target: what PyTorch calls to run it (an OpOverload or a Python function, never one that writes to its arguments); None for
            "input" and "constant".
        args, kwargs: as torch.export has them, with Nodes in place of fx nodes.
        shape: sizes; the batch dimension is BATCH, sizes that depend on it otherwise are None. None for what is not one tensor.
        dtype: None for what is not one tensor.
        module_path: dotted path of the innermost module of the user that ran the node ("" is the root).
        tensor: the live parameter or buffer behind a "constant".
        parameter_name: the name of that tensor in the model ("layer1.0.conv1.weight"), or "" for one that has none.
        sample_size: elements of the value for one sample; of the whole value where it does not depend on the batch; 0 for no tensor.
        varies: whether the value depends on the model's inputs; one that does not is computed from parameters and numbers alone.
        users: the nodes that use this one, in execution order.
    """

    name: str
    op: str
    target: Callable | None
    args: tuple
    kwargs: dict[str, Any]
    shape: tuple[int | None, ...] | None
    dtype: torch.dtype | None
    module_path: str
    tensor: torch.Tensor | None = None
    parameter_name: str = ""
    sample_size: int = 0
    varies: bool = False
    users: list[Node] = field(default_factory=list, repr=False)

    @property
    def inputs(self) -> list[Node]:
        """The nodes among args and kwargs, in order, nested lists included."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Node)]

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Every argument by its name in the operation's schema, defaults filled in; only the keyword ones where there is no schema."""
        schema = getattr(self.target, "_schema", None)
        if schema is None:
            return dict(self.kwargs)
        values = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        return values | {a.name: value for a, value in zip(schema.arguments, self.args, strict=False)} | self.kwargs

    def __repr__(self) -> str:
        shape = "" if self.shape is None else "x".join("B" if s == BATCH else "?" if s is None else str(s) for s in self.shape)
        return f"<{self.name}: {self.op}({', '.join(n.name for n in self.inputs)}) {shape} in {self.module_path or 'the root'!r}>"


@dataclass(frozen=True, eq=False)
class Graph:
    """A captured model: nodes in execution order, and how inputs and outputs are nested.

    Attributes:
        nodes: every node, each after those it uses.
        inputs: the "input" nodes, one per tensor input, in the order of the flattened call.
        outputs: what is returned, in the order of the flattened result: a node, or the value itself where it is no tensor (None, a number).
        in_spec, out_spec: torch pytree specs of the call's (args, kwargs) and of the result.
        dynamic_batch: whether dimension 0 of every input and output is a free batch size. If not, the graph holds for the batch size
            of the example only, which BATCH then stands for.
        call_counts: how often each module of the user ran, by module path.
        tensor_modules: paths of the modules that returned one tensor at every call.
        fixed_inputs: the leaves of the flattened call that are no tensors, by position: the graph holds for these values only.
        batch_size: the batch size of the captured example.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Any, ...]
    in_spec: Any
    out_spec: Any
    dynamic_batch: bool
    call_counts: dict[str, int]
    tensor_modules: frozenset[str]
    fixed_inputs: dict[int, Any]
    batch_size: int


def capture(model: nn.Module, example_inputs: torch.Tensor | tuple, kwargs: dict[str, Any] | None = None) -> Graph:
    """Returns the graph of `model` in eval mode, as a list of pure operations on tensors.

    Convolution, linear, normalisation, activation and attention operations stay whole. In-place operations become functional ones;
    what changes nothing in eval mode (dropout, copies, identity reshapes) is gone. The batch size is free where torch.export can
    keep it so. The model is run once on a copy of the example to check it and to count the calls of its modules; its parameters,
    buffers, training flags and the example stay as they were.

    Args:
        model: any module that torch.export takes, on any device.
        example_inputs: the positional arguments of one call: a tensor or a tuple. Dimension 0 of every tensor is the batch.
        kwargs: the keyword arguments of that call; default None: there are none.

    Raises:
        InputError: `example_inputs` is neither tensor nor tuple, holds no tensor or an empty one, or the model does not take it.
        UnsupportedModelError: torch.export cannot capture the model, or the result depends on a buffer that the call overwrites;
            the message says why and where.

    Example:
        >>> graph = capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.rand(1, 3, 32, 32))
        >>> [(node.op, node.shape) for node in graph.nodes if node.op != "constant"]
        [('input', (-1, 3, 32, 32)), ('conv2d', (-1, 8, 30, 30)), ('relu', (-1, 8, 30, 30))]
    """
    args = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else example_inputs
    if not isinstance(args, (tuple, list)):
        raise InputError(f"`example_inputs` must be a tensor or a tuple of the model's arguments, got {type(args).__name__}.")
    args, kwargs = tuple(args), dict(kwargs or {})
    leaves, in_spec = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not tensors or any(tensor.numel() == 0 for tensor in tensors):
        raise InputError(f"`example_inputs` must hold tensors, none of them empty, got {export.describe(tensors) or 'no tensor'}.")

    with export.eval_mode(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export about its own parts
        calls = export.trial_run(model, args, kwargs)
        exported = export.export_dynamic(model, args, kwargs)
        dynamic = exported is not None
        exported, fx_graph = export.purify(exported if dynamic else export.export_static(model, args, kwargs))
    batch_size = tensors[0].shape[0] if tensors[0].ndim else 1
    nodes, outputs = _translate(exported, fx_graph, model, None if dynamic else batch_size)
    return Graph(
        nodes=nodes,
        inputs=tuple(node for node in nodes if node.op == "input"),
        outputs=outputs,
        in_spec=in_spec,
        out_spec=exported.call_spec.out_spec,
        dynamic_batch=dynamic,
        call_counts={path: len(results) for path, results in calls.items()},
        tensor_modules=frozenset(path for path, results in calls.items() if set(results) == {torch.Tensor}),
        fixed_inputs={i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)},
        batch_size=batch_size,
    )


def _translate(exported: ExportedProgram, graph: fx.Graph, model: nn.Module, fixed_batch: int | None) -> tuple[tuple[Node, ...], tuple]:
    """Returns our nodes for those of `graph`, and the flattened result in terms of them."""
    placeholders = export.input_nodes(exported)
    inputs = {node.name for node in placeholders}
    batch = placeholders[0].meta["val"].shape[0] if fixed_batch is None else fixed_batch
    state = _State(exported, model)
    values: dict[fx.Node, Any] = {}
    for item in graph.nodes:
        if item.op == "output":
            outputs = _replace(item.args[0], values)
        elif item.op == "call_function" or item.name in inputs:
            values[item] = _operation(item, values, batch)
        else:
            values[item] = state.read(item)
    nodes = tuple(value for item, value in values.items() if isinstance(value, Node) and (item.users or item.name in inputs))
    for node in nodes:
        for used in dict.fromkeys(node.inputs):
            used.users.append(node)
    return nodes, outputs


def _operation(item: fx.Node, values: dict[fx.Node, Any], batch: int | torch.SymInt) -> Node:
    value = item.meta.get("val")
    is_tensor, is_input = isinstance(value, torch.Tensor), item.op == "placeholder"
    varies = is_input or any(values[used].varies for used in item.all_input_nodes if isinstance(values[used], Node))
    batch = batch if varies else None
    return Node(
        name=item.name,
        op="input" if is_input else op_name(item.target),
        target=None if is_input else item.target,
        args=() if is_input else _replace(item.args, values),
        kwargs=_replace(item.kwargs, values),
        shape=_shape(value, batch) if is_tensor else None,
        dtype=value.dtype if is_tensor else None,
        module_path=export.module_path(item),
        sample_size=_sample_size(value, batch) if is_tensor else 0,
        varies=varies,
    )


class _State:
    """What stands behind the placeholders of an exported program that are no tensor of the call."""

    def __init__(self, exported: ExportedProgram, model: nn.Module):
        self._specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
        self._constants = exported.constants
        self._named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]

    def read(self, item: fx.Node) -> Any:
        """Returns a "constant" Node for a tensor, and the value itself for anything else (an int of the call, a sub-graph).

        A parameter with several names (tied or shared) gets the one under the module that uses it.
        """
        spec = self._specs.get(item.name)
        if spec is None:
            value = read_attribute(item)
        elif spec.target is None:
            value = item.meta.get("val")
        else:
            value = dict(self._named).get(spec.target, self._constants.get(spec.target))
        if not isinstance(value, torch.Tensor):
            return value
        names = [name for name, tensor in self._named if tensor is value]
        paths = {export.module_path(user) for user in item.users}
        name = next((name for name in names if name.rpartition(".")[0] in paths), next(iter(names), ""))
        return Node(item.name, "constant", None, (), {}, tuple(value.shape), value.dtype, "", value, name, value.numel())


def _replace(value: Any, values: dict[fx.Node, Any]) -> Any:
    """Returns `value` with what stands in `values` in place of fx nodes, in plain lists, tuples and dicts."""
    if isinstance(value, fx.Node):
        return values[value]
    if isinstance(value, tuple):
        return tuple(_replace(item, values) for item in value)
    if isinstance(value, list):
        return [_replace(item, values) for item in value]
    if isinstance(value, dict):
        return {key: _replace(item, values) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_replace(item, values) for item in (value.start, value.stop, value.step)))
    return value


def _shape(value: torch.Tensor, batch: int | torch.SymInt | None) -> tuple[int | None, ...]:
    """Returns the sizes of `value`; dimension 0 is BATCH where it equals `batch`, a size in symbols otherwise None."""
    sizes = [size if isinstance(size, int) else None for size in value.shape]
    if sizes and batch is not None and str(value.shape[0]) == str(batch):
        sizes[0] = BATCH
    return tuple(sizes)


def _sample_size(value: torch.Tensor, batch: int | torch.SymInt | None) -> int:
    """Returns the elements of `value` per sample, taken from the sizes of the example."""
    numel = value.numel()
    if isinstance(numel, torch.SymInt):
        return (numel.node.hint or 0) // batch.node.hint if isinstance(batch, torch.SymInt) else 0
    return numel // batch if isinstance(batch, int) else numel
