"""Runs torch.export on a user's model: checks the example first, frees the batch size where it can, words the refusals."""

from __future__ import annotations

import dataclasses
import inspect
import os
import traceback
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from dynprune.errors import InputError, UnsupportedModelError
from dynprune.graph.functional import drop_no_ops, replace_in_place, restore_batch_norm
from dynprune.graph.idioms import restore_idioms


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Holds every module of `model` in eval mode and gives each its own training flag back."""
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = False
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def trial_run(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, list[type]]:
    """Runs the model on copies of the example and of its buffers; returns the type of each result of each module, by path.

    A tuple of a tensor and Nones, as attention modules return, counts as a tensor.

    Raises:
        InputError: the model raised; the message carries its reason.
    """
    results: defaultdict[nn.Module, list[type]] = defaultdict(list)
    hooks = [module.register_forward_hook(lambda module, _, y: results[module].append(_type(y))) for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    copies = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    try:
        result = torch.func.functional_call(model, buffers, *copies)
    except Exception as error:
        raise InputError(
            f"The model does not take `example_inputs` ({describe((args, kwargs))}): {_reason(error)}; pass what a call of the model takes."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    _register_dataclasses(result)
    return {path: results[module] for path, module in model.named_modules(remove_duplicate=False)}


def _type(result: Any) -> type:
    alone = type(result) is tuple and len(result) > 1 and all(other is None for other in result[1:])
    return type(result[0]) if alone else type(result)


def describe(values: Any) -> str:
    """Returns the dtypes and shapes of the tensors in a nested value, for messages."""
    tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return ", ".join(f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}" for tensor in tensors)


def export_dynamic(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> ExportedProgram | None:
    """Exports with one free batch size for all inputs; returns None where the model fixes it or a result has no batch dimension."""
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if any(tensor.ndim == 0 or tensor.shape[0] != inputs[0].shape[0] for tensor in inputs):
        return None
    if inputs[0].shape[0] == 1:  # torch.export fixes sizes of 1
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.repeat(2, *(1,) * (t.ndim - 1)), (args, kwargs))
    batch = torch.export.Dim("batch")
    shapes = pytree.tree_map(lambda leaf: {0: batch} if isinstance(leaf, torch.Tensor) else None, (args, kwargs))
    try:
        bound = inspect.signature(model.forward).bind(*shapes[0], **shapes[1])
        exported = torch.export.export(model, args, kwargs, dynamic_shapes=dict(bound.arguments), strict=False)
    except Exception:
        return None  # whatever the reason, `export_static` meets it again unless the free batch size was the reason
    sizes = {leading_size(node) for node in (*input_nodes(exported), *_results(exported.graph))}
    return exported if len(sizes) == 1 and sizes.pop() is not None else None


def export_static(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> ExportedProgram:
    """Exports for the sizes of the example only.

    Raises:
        UnsupportedModelError: torch.export cannot capture the model.
    """
    try:
        return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        path = _failing_module(model, error)
        raise UnsupportedModelError(
            f"torch.export cannot capture {type(model).__name__}: {_reason(error)}{f', in module {path!r}' if path else ''}"
            f"{_failing_line(error)}; change the model there so that its path does not depend on values (torch.where, torch.cond), or "
            f"wrap a part of it that can be exported."
        ) from error


def purify(exported: ExportedProgram) -> tuple[ExportedProgram, fx.Graph]:
    """Returns the program's graph rewritten to pure operations without no-ops, and the program whose signature fits it.

    Raises:
        UnsupportedModelError: the result depends on a value that the model writes to its own state.
    """
    graph = _copy(exported.graph)
    state = frozenset(spec.arg.name for spec in exported.graph_signature.input_specs if spec.target is not None)
    written = replace_in_place(graph, state)
    if written is None:
        exported = exported.run_decompositions({})
        graph = _copy(exported.graph)
        restore_batch_norm(graph)
        written = frozenset(exported.graph_signature.buffers_to_mutate)
    output = _output(graph)
    kinds = [spec.kind for spec in exported.graph_signature.output_specs]
    output.args = (tuple(value for value, kind in zip(output.args[0], kinds, strict=True) if kind is OutputKind.USER_OUTPUT),)
    drop_no_ops(graph)
    restore_idioms(graph)
    for node in graph.nodes:
        if node.name in written:
            raise UnsupportedModelError(
                f"The result depends on a parameter or buffer that the model overwrites in eval mode (node {node.name!r}, module "
                f"{module_path(node)!r}); make that state an input and an output of the model."
            )
    return exported, graph


def input_nodes(exported: ExportedProgram) -> list[fx.Node]:
    """Returns the placeholders of the call's tensors, in order."""
    names = exported.graph_signature.user_inputs
    nodes = [node for node in exported.graph.nodes if node.op == "placeholder" and node.name in names]
    return [node for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]


def module_path(node: fx.Node) -> str:
    """Returns the path of the innermost module that ran the node; "" is the root, or that torch.export left no trace of one."""
    stack = list((node.meta.get("nn_module_stack") or {}).items())
    return stack[-1][1][0].partition("@")[0] if stack and not stack[-1][0].startswith("_empty") else ""


def leading_size(node: fx.Node) -> str | None:
    """Returns the symbol of dimension 0 of a node's value ("s0"), or None where that is a plain number or the value is no tensor."""
    value = node.meta.get("val")
    free = isinstance(value, torch.Tensor) and value.ndim > 0 and isinstance(value.shape[0], torch.SymInt)
    return str(value.shape[0]) if free else None


def _output(graph: fx.Graph) -> fx.Node:
    return next(iter(reversed(graph.nodes)))


def _results(graph: fx.Graph) -> list[fx.Node]:
    return [leaf for leaf in pytree.tree_leaves(_output(graph).args) if isinstance(leaf, fx.Node)]


def _copy(graph: fx.Graph) -> fx.Graph:
    """Returns a copy that can be rewritten; attributes are still read from the same module, and the nodes keep their names."""
    copy = fx.Graph(graph.owning_module)
    copies: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph, copies))
    for node, twin in copies.items():
        twin.name = node.name  # fx renames a copy that is called like a Python builtin, such as "input"
    return copy


def _register_dataclasses(value: Any) -> None:
    """Makes torch.export accept the plain dataclasses in a model's result."""
    for leaf in pytree.tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
            _register_dataclasses([getattr(leaf, item.name) for item in dataclasses.fields(leaf)])


def _reason(error: Exception) -> str:
    """Returns the telling part of an exception: its first line, at most 300 characters, without a full stop."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (text if len(text) <= 300 else text[:297] + "...").rstrip(".;: ")


def _failing_line(error: Exception) -> str:
    """Returns where in code that is not torch's the error came from, as ", at file.py:12 (`if x.sum() > 0:`)", or ""."""
    own = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(own)]
    if not frames:
        return ""
    last = frames[-1]
    return f", at {os.path.basename(last.filename)}:{last.lineno}" + (f" (`{last.line[:80]}`)" if last.line else "")


def _failing_module(model: nn.Module, error: Exception) -> str:
    """Returns the path of the innermost module of `model` that was running when `error` was raised, or ""."""
    paths = {id(module): path for path, module in model.named_modules()}
    where, trace = "", error.__traceback__
    while trace is not None:
        where, trace = paths.get(id(trace.tb_frame.f_locals.get("self")), "") or where, trace.tb_next
    return where
