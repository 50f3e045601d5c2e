"""Rewrites an exported graph until every node is a pure function of its arguments, and drops what changes nothing.

torch.export keeps in-place operations (`relu_`, `x += y`). They are replaced by their functional twins here where that is plainly
right: nothing that shares memory with the written value is read afterwards. The rest (a write through a view) needs torch's own
functionalisation, `ExportedProgram.run_decompositions({})`; `needs_decomposition` says so. It is not always used because it takes
several times longer than the export and spells batch norm, dropout and flatten in other words.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

aten = torch.ops.aten

_DROPOUT = frozenset({"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"})
_COPIES = frozenset({"alias", "detach", "contiguous", "clone", "lift_fresh_copy", "lift_fresh", "positive"})
_CASTS = frozenset({"to", "_to_copy", "type_as"})
_RESHAPES = frozenset({"reshape", "flatten", "unflatten", "expand", "expand_as", "broadcast_to", "slice", "narrow", "squeeze"})
_POOLS = frozenset({"adaptive_avg_pool2d", "adaptive_avg_pool1d", "adaptive_max_pool1d"})
_READS_STRIDES = frozenset({"as_strided", "view_as_complex", "view_as_real"})


def op_name(target: Callable | str) -> str:
    """Returns the name of what a node calls, without overload and without the in-place underscore: "conv2d", "getitem"."""
    name = target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def written_argument(node: fx.Node) -> fx.Node | None:
    """Returns the node whose value `node` overwrites, or None if it overwrites nothing."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return None
    for argument, value in zip(schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return value
    return None


def _functional_twin(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """Returns `aten.relu.default` for `aten.relu_.default`, or None where torch has no such operation."""
    packet = getattr(getattr(torch.ops, target.namespace), op_name(target), None)
    return getattr(packet, target._overloadname, None) if target._schema.name.endswith("_") else None


def _aliased(node: fx.Node) -> list[fx.Node]:
    """Returns the arguments of `node` that its value may share memory with."""
    if node.op != "call_function":
        return []
    schema = getattr(node.target, "_schema", None)
    if schema is None or op_name(node.target) in _DROPOUT:
        return list(node.all_input_nodes)
    if any(result.alias_info is not None for result in schema.returns):
        return [value for value in node.args[:1] if isinstance(value, fx.Node)]
    return []


def replace_in_place(graph: fx.Graph, state: frozenset[str]) -> frozenset[str] | None:
    """Replaces every in-place operation by its functional twin.

    Args:
        graph: of a torch.export program; changed in place.
        state: names of the placeholders that are parameters, buffers and constants of the model.

    Returns:
        The names of the nodes that hold a value the model wrote to its state; None when the graph needs torch's own
        functionalisation, because a view of a written value is read after the write or because it holds sub-graphs. The graph is
        then only partly rewritten.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    sharing: dict[fx.Node, set[fx.Node]] = {}
    written_state = set()
    for node in list(graph.nodes):
        written = written_argument(node)
        if written is None:
            if node.op == "get_attr" and isinstance(read_attribute(node), torch.nn.Module):
                return None
            sharing[node] = {node}.union(*(sharing[argument] for argument in _aliased(node)))
            for other in sharing[node]:
                sharing[other] = sharing[node]
            continue
        twin = _functional_twin(node.target)
        later_reads = any(order[user] > order[node] for other in sharing[written] - {written} for user in other.users)
        if twin is None or later_reads or _promotes(node, written):
            return None
        node.target = twin
        sharing[node] = {node}
        if written.name in state | written_state:
            written_state.add(node.name)
        written.replace_all_uses_with(node, delete_user_cb=lambda user, at=order[node]: order[user] > at)
    return frozenset(written_state)


def read_attribute(node: fx.Node) -> object:
    """Returns what a "get_attr" node reads from the exported module."""
    value = node.graph.owning_module
    for part in node.target.split("."):
        value = getattr(value, part)
    return value


def _promotes(node: fx.Node, written: fx.Node) -> bool:
    """Whether the functional twin may return another dtype than the value that is written to."""
    values = [n.meta.get("val") for n in node.all_input_nodes]
    kinds = {v.dtype for v in values if isinstance(v, torch.Tensor) and v.dtype.is_floating_point}
    return not kinds <= {written.meta["val"].dtype}


def restore_batch_norm(graph: fx.Graph) -> None:
    """Spells the batch norm that `run_decompositions` leaves as `batch_norm` again."""
    for node in list(graph.nodes):
        if node.target is not aten._native_batch_norm_legit_no_training.default:
            continue
        x, weight, bias, mean, variance, momentum, eps = node.args
        for user in list(node.users):
            if user.target is operator.getitem and user.args[1] == 0:
                user.target = aten.batch_norm.default
                user.args = (x, weight, bias, mean, variance, False, momentum, eps, False)


def drop_no_ops(graph: fx.Graph) -> None:
    """Removes nodes that hand on their first argument unchanged (dropout in eval, identity reshapes, copies), and dead nodes.

    A removed copy may have changed strides, so `view` becomes `reshape`, which takes any; copies that feed an operation that reads
    strides stay.
    """
    for node in list(graph.nodes):
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        if node.op == "call_function" and _is_no_op(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    live = set()
    for node in reversed(graph.nodes):
        if node.op in ("output", "placeholder") or node in live:
            live.update(node.all_input_nodes)
    for node in reversed(list(graph.nodes)):
        if node.op not in ("output", "placeholder") and node not in live:
            graph.erase_node(node)


def _is_no_op(node: fx.Node) -> bool:
    name = op_name(node.target)
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if name in _DROPOUT:
        return not (node.args[2] if len(node.args) > 2 else node.kwargs["train"])
    if name in _COPIES:
        return not any(op_name(user.target) in _READS_STRIDES for user in node.users)
    if name in _CASTS:
        return before.dtype == after.dtype and before.device == after.device
    return name in _RESHAPES | _POOLS and _sizes(before) == _sizes(after)


def _sizes(value: torch.Tensor) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape)
