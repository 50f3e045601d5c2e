"""The plan while it is drafted: values of the nodes seen so far, and the ways to read a value, lay it out and emit a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from dynprune.graph.capture import BATCH, Graph, Node
from dynprune.graph.sites import Site
from dynprune.runtime import views
from dynprune.runtime.lowering.values import (
    ConstantValue,
    DraftBuffer,
    DraftStep,
    DraftValue,
    EngineValue,
    MergedValue,
    NotOnEngine,
    PaddedValue,
    TorchValue,
)
from dynprune.runtime.plan import Rows, TorchCall, Value, View

MAX_COPY_RANK = 6
_MIXING = frozenset({"conv", "linear"})  # rows of the output do not follow those of the input
_ROWWISE = frozenset({"depthwise", "pool", "adaptive_pool", "mean", "unary", "affine", "binary", "resample"})
_FOLDING = frozenset({"conv", "linear", "depthwise", "affine"})
_TOKEN_OPS = frozenset({"scaled_dot_product_attention", "matmul", "bmm", "baddbmm"})


class Draft:
    """One attempt at a plan. Sites that turn out not to fit are noted in `dropped`; the attempt is then repeated without them."""

    def __init__(self, graph: Graph, sites: Sequence[Site], node_macs: dict[str, int]):
        self.graph = graph
        self.sites = tuple(sites)
        self.node_macs = node_macs
        self.values: dict[Node, DraftValue] = {}
        self.steps: list[DraftStep] = []
        self.buffers: list[DraftBuffer] = []
        self.indices: dict[Node, View] = {}  # inputs of int64; sizes and strides count numbers
        self.dropped: dict[int, str] = {}
        self._results: set[str] = set()
        self._hosts = _concat_hosts(graph)
        self._wholes: dict[Node, View] = {}
        self._placed: set[tuple[Node, tuple[int, int]]] = set()
        self.uses = Counter(used for node in graph.nodes for used in node.inputs)
        self.uses.update(output for output in graph.outputs if isinstance(output, Node))
        self._spaces = {name: i for i, site in enumerate(sites) if site.kind == "channels" for name in site.nodes}
        self._regions: dict[str, frozenset[int]] = {}
        for i, site in enumerate(sites):
            for name in site.nodes if site.kind == "branch" else ():
                self._regions[name] = self._regions.get(name, frozenset()) | {i}

    # sites

    def site_of(self, node: Node) -> int:
        """Returns the channel site in whose space the node's value lies, or -1."""
        return self._spaces.get(node.name, -1)

    def branches_of(self, node: Node) -> frozenset[int]:
        """Returns the branch sites inside which the node stands."""
        return self._regions.get(node.name, frozenset())

    def drop(self, site: int, reason: str) -> None:
        """Notes that this plan cannot gate a site; the first reason stays."""
        if site >= 0:
            self.dropped.setdefault(site, reason)

    # values

    def written(self, node: Node, view: View, step: DraftStep | None) -> EngineValue:
        """Returns the value of a node that `step` has just written as a whole."""
        return EngineValue(view, self.site_of(node), step if self.uses[node] == 1 else None)

    def viewed(self, node: Node, base: EngineValue, view: View, *, whole: bool = True) -> EngineValue:
        """Returns the value of a node that sees the memory of `base` otherwise; `whole` says that it sees all of it, once."""
        if base.site != self.site_of(node):
            self.drop(base.site, f"'{node.name}' rearranges its channels")
            self.drop(self.site_of(node), f"'{node.name}' rearranges its channels")
        return EngineValue(view, self.site_of(node), base.step if whole and self.uses[node] == 1 else None)

    def constant(self, item: Any) -> torch.Tensor | None:
        """Returns the tensor behind a node that no input changes, or None where `item` is none."""
        value = self.values.get(item) if isinstance(item, Node) else None
        return value.value if isinstance(value, ConstantValue) and isinstance(value.value, torch.Tensor) else None

    def engine(self, node: Any, order: Sequence[int] | None = None) -> EngineValue:
        """Returns the node's value in the engine's memory and brings it there where PyTorch made it (then nested in `order`)."""
        if not isinstance(node, Node) or node.dtype != torch.float32 or node.shape is None or 0 in node.shape:
            raise NotOnEngine("a number, or a tensor of another type than float32")
        value = self.values[node]
        if isinstance(value, TorchValue):
            value = self._store(node, value, order)
        elif isinstance(value, ConstantValue):
            value = self._spread(node, value)
        elif isinstance(value, PaddedValue):
            value = self.pad(node, self.engine(value.source), ((0, 0), (value.top, value.bottom), (value.left, value.right)), 0.0)
        if not isinstance(value, EngineValue):
            raise NotOnEngine("several values, or a batch that is mixed with other dimensions")
        self.values[node] = value
        return value

    def apart(self, node: Any) -> EngineValue:
        """Returns `engine(node)`, or, where the batch shares a dimension with a neighbour, the value with the two apart."""
        value = self.values.get(node) if isinstance(node, Node) else None
        return value.base if isinstance(value, MergedValue) else self.engine(node)

    def shared_dimension(self, nodes: Sequence[Node]) -> int | None:
        """Returns the `MergedValue.first` that all the nodes have, or None where none has one."""
        found = {value.first if isinstance(value := self.values.get(node), MergedValue) else None for node in nodes}
        if len(found) != 1:
            raise NotOnEngine("a batch that shares a dimension in one operand only")
        return found.pop()

    def along(self, node: Node, dim: int) -> tuple[EngineValue, int | None, int | None]:
        """Returns `apart(node)`, which per-sample dimension of it `dim` is (None for the batch), and `MergedValue.first` or None.

        Raises NotOnEngine where `dim` is the one that the batch shares.
        """
        value, known = self.apart(node), self.values[node]
        first = known.first if isinstance(known, MergedValue) else None
        dim %= len(value.view.sizes) + 1 - (first is not None)
        if first is not None:
            if dim == first:
                raise NotOnEngine("the dimension that the batch shares")
            dim += dim > first
        batch = value.view.batch_dim
        return value, None if dim == batch else dim - (dim > batch), first

    @contextmanager
    def parted(self, node: Node) -> Iterator[int | None]:
        """Inside it, the inputs of `node` in which the batch shares a dimension have it apart; gives the first of the two dimensions.

        Gives None where there are no such inputs. For an operation that does not care for the dimensions up to the shared one.
        """
        merged = {used: value for used in node.inputs if isinstance(value := self.values[used], MergedValue)}
        first = next((value.first for value in merged.values()), None)
        if merged:
            others = [used for used in node.inputs if used not in merged]
            same = len({(value.first, value.base.view.sizes, value.base.view.batch_dim) for value in merged.values()}) == 1
            if not same or not all(isinstance(self.values[used], ConstantValue) for used in others):
                raise NotOnEngine("the batch is mixed with other dimensions")
        self.values.update({used: value.base for used, value in merged.items()})
        try:
            yield first
        finally:
            self.values.update({used: replace(value, base=self.values[used]) for used, value in merged.items()})

    def _store(self, node: Node, value: TorchValue, order: Sequence[int] | None) -> EngineValue:
        if value.step is None:
            raise NotOnEngine("an input without batch")
        sizes = self.sizes(node)
        if order is None and (len(sizes) == 2 or node.op in _TOKEN_OPS):  # tokens by channels: channels become the rows
            order = (*range(len(sizes) - 2), len(sizes) - 1, len(sizes) - 2)
        value.step.store = self.new_view(node, sizes, order)
        return EngineValue(value.step.store)

    def _spread(self, node: Node, value: ConstantValue) -> EngineValue:
        if not value.repeats:
            raise NotOnEngine("a constant without batch")
        sizes = node.shape[1:]
        view = self.new_view(node, sizes)
        step = self.copy_constant(node, value.value[0], view)
        return self.written(node, view, step)

    def sizes(self, node: Node) -> tuple[int, ...]:
        """Returns the per-sample sizes of a node whose batch stands in front."""
        if node.shape is None or not node.shape or node.shape[0] != BATCH or None in node.shape or 0 in node.shape:
            raise NotOnEngine("sizes that depend on the batch")
        return node.shape[1:]

    # memory

    def new_buffer(self, name: str, size: int, kind: str = "arena") -> int:
        """Returns the index of a new buffer of `size` elements per sample."""
        self.buffers.append(DraftBuffer(name, kind, size))
        return len(self.buffers) - 1

    def new_view(self, node: Node, sizes: Sequence[int], order: Sequence[int] | None = None, batch_dim: int = 0) -> View:
        """Returns a view without gaps on a new buffer, nested in `order` (outermost dimension first; default row-major)."""
        sizes = tuple(sizes)
        strides = views.dense_strides(sizes, order)
        view = View(-1, 0, sizes, strides, batch_dim)
        return replace(view, buffer=self.new_buffer(node.name, views.numel(view)))

    def resolve(self, buffer: int, offset: int = 0) -> tuple[int, int]:
        """Returns the buffer that really holds `offset` of a buffer, and the offset there."""
        while self.buffers[buffer].parent >= 0:
            offset += self.buffers[buffer].parent_offset
            buffer = self.buffers[buffer].parent
        return buffer, offset

    # layouts

    def planar(self, node: Node, row_dim: int) -> tuple[Rows, EngineValue]:
        """Returns the node's value as rows along `row_dim` by positions along the other dimensions in order; copies it if need be."""
        known = self.values[node]
        known = known.base if isinstance(known, MergedValue) else known
        rank = len(known.view.sizes if isinstance(known, EngineValue) else node.shape[1:])
        order = (row_dim, *(d for d in range(rank) if d != row_dim))
        value = known if isinstance(known, EngineValue) else self.engine(node, order)
        rows = views.as_rows(value.view, row_dim)
        if rows is None:
            value = self.relaid(node, order)
            rows = views.as_rows(value.view, row_dim)
        return rows, value

    def dense(self, node: Node) -> EngineValue:
        """Returns the node's value without gaps inside its rows, whatever the order of its dimensions; copies it if need be."""
        value = self.apart(node)
        return value if views.memory_rows(value.view) else self.relaid(node, views.memory_order(value.view))

    def relaid(self, node: Node, order: Sequence[int]) -> EngineValue:
        """Copies the node's value into new memory nested in `order`; later readers take it from there."""
        value, known = self.apart(node), self.values[node]
        view = self.new_view(node, value.view.sizes, order, value.view.batch_dim)
        self.copy(node, value, view)
        copied = EngineValue(view, value.site)
        self.values[node] = replace(known, base=copied) if isinstance(known, MergedValue) else copied
        return copied

    def copy(self, node: Node, source: EngineValue, target: View) -> DraftStep:
        """Emits the step that writes `source` to `target`, of the same sizes; of a gated value with what lies behind its active rows."""
        sizes, (in_strides, out_strides) = views.simplified(target.sizes, source.view.strides, target.strides)
        ints = {"sizes": list(sizes), "in_strides": list(in_strides), "out_strides": list(out_strides)}
        return self._copy_step(node, [extent(source.view)], target, ints, {})

    def copy_constant(self, node: Node, source: torch.Tensor, target: View) -> DraftStep:
        """Emits the step that writes the constant `source`, broadcast, to `target`."""
        array = as_array(source).reshape(source.shape)
        own = View(0, 0, array.shape, views.dense_strides(array.shape))
        strides = views.expanded(own, target.sizes).strides
        sizes, (in_strides, out_strides) = views.simplified(target.sizes, strides, target.strides)
        ints = {"sizes": list(sizes), "in_strides": list(in_strides), "out_strides": list(out_strides)}
        return self._copy_step(node, [], target, ints, {"source": array})

    def _copy_step(self, node: Node, inputs: list[Rows], target: View, ints: dict, constants: dict) -> DraftStep:
        if len(ints["sizes"]) > MAX_COPY_RANK:
            raise NotOnEngine(f"a copy over more than {MAX_COPY_RANK} dimensions")
        step = DraftStep(
            "copy", node.module_path or node.name, inputs, extent(target), ints, {}, constants, branches=self.branches_of(node)
        )
        self.steps.append(step)
        return step

    def pad(self, node: Node, source: EngineValue, borders: Sequence[tuple[int, int]], fill: float) -> EngineValue:
        """Emits the steps that write `source` with (before, after) more elements per dimension, set to `fill`; negative ones cut off."""
        sizes = tuple(n + before + after for n, (before, after) in zip(source.view.sizes, borders, strict=True))
        view = self.new_view(node, sizes, views.memory_order(source.view), source.view.batch_dim)
        inner, part = view, source.view
        for dim, (before, after) in enumerate(borders):
            part = views.sliced(part, dim, max(0, -before), part.sizes[dim] + min(0, before) + min(0, after))
            inner = views.sliced(inner, dim, max(0, before), part.sizes[dim])
        ints = {"sizes": [views.numel(view)], "out_strides": [1]}
        floats = {"value": [fill]}
        self.steps.append(DraftStep("fill", node.module_path or node.name, [], extent(view), ints, floats, branches=self.branches_of(node)))
        self.copy(node, EngineValue(part, source.site), inner)
        return EngineValue(view, self.site_of(node))

    # concatenation

    def concatenation(self, node: Node, dim: int) -> tuple[View, int]:
        """Returns a view nested in `dim` that the result of a concatenation is a part of, and where along `dim` it starts there.

        Concatenations of operands that follow each other in a longer one (a dense block) share its memory.
        """
        host, start = self._hosts.get(node, (node, 0))
        if host not in self._wholes:
            sizes = self.sizes(host)
            self._wholes[host] = self.new_view(host, sizes, (dim, *(d for d in range(len(sizes)) if d != dim)))
        return self._wholes[host], start

    def place(self, node: Node, operand: Node, part: View) -> None:
        """Makes `operand` lie at `part` of a concatenation: its memory becomes that part if it can, else it is copied there."""
        view = self.engine(operand).view
        target = self.resolve(part.buffer, part.offset)
        if self.resolve(view.buffer, view.offset) == target or (operand, target) in self._placed:
            return
        buffer = self.buffers[view.buffer]
        same_strides = all(n == 1 or a == b for n, a, b in zip(view.sizes, view.strides, part.strides, strict=True))
        if buffer.kind == "arena" and buffer.parent < 0 and same_strides and views.is_whole(view, buffer.size) and target[0] != view.buffer:
            buffer.parent, buffer.parent_offset = part.buffer, part.offset
        else:
            self.copy(node, self.engine(operand), part)
            self._placed.add((operand, target))

    # steps

    def emit(
        self,
        op: str,
        node: Node,
        reads: Sequence[tuple[Rows, EngineValue]],
        output: Rows,
        *,
        ints: dict[str, list[int]] | None = None,
        floats: dict[str, list[float]] | None = None,
        constants: dict[str, np.ndarray] | None = None,
    ) -> DraftStep:
        """Adds a step that computes `node` and settles which active rows it follows; a site that it cannot follow is dropped."""
        step = DraftStep(op, node.module_path or node.name, [rows for rows, _ in reads], output, ints or {}, floats or {}, constants or {})
        step.out_site = self.site_of(node)
        step.branches, step.nodes = self.branches_of(node), [node.name]
        if op in _FOLDING:
            step.scale, step.shift = np.ones(output.rows), np.zeros(output.rows)
        if op in _MIXING:
            step.in_site = reads[0][1].site
            unfit = set()
        elif op == "attention":
            unfit = self._follow_heads(step, [value.site for _, value in reads])
        elif self._treats_heads_alike(step):
            unfit = {value.site for _, value in reads} - {-1, step.out_site}
            step.out_site = -1
        elif op in _ROWWISE:
            step.in_site = step.out_site
            repeated = [rows.row_stride == 0 and rows.rows > 1 for rows, _ in reads]
            unfit = {
                s
                for skip, (_, value) in zip(repeated, reads, strict=True)
                if not skip and value.site != step.out_site
                for s in (value.site, step.out_site)
            }
        else:
            unfit = {step.out_site, *(value.site for _, value in reads)}
        attention, repeat = op == "attention", step.ints.get("repeat", [1])[0]
        if step.in_site >= 0 and not attention and step.inputs[0].rows != self.sites[step.in_site].num_channels * repeat:
            unfit.add(step.in_site)
        if step.out_site >= 0 and not attention and output.rows != self.sites[step.out_site].num_channels:
            unfit.add(step.out_site)
        for site in unfit:
            self.drop(site, f"'{node.name}' ({op}) does not keep its channels apart")
        self.steps.append(step)
        return step

    def _treats_heads_alike(self, step: DraftStep) -> bool:
        """Whether a step inside a space of heads does the same to each, whatever head its rows belong to.

        Its operands then hold the heads that run first and something behind them; it computes on both, and nobody reads the latter.
        """
        site = step.out_site
        if site < 0 or not self.sites[site].is_heads:
            return False
        return step.op not in _ROWWISE or step.output.rows != self.sites[site].num_channels

    def _follow_heads(self, step: DraftStep, sites: list[int]) -> set[int]:
        """Makes an attention step follow the site of its heads; returns the sites that it cannot follow."""
        site = step.out_site
        query, keys, values = sites[:3]
        if site >= 0 and query == site and keys == values and keys in (site, -1):
            space = self.sites[site]
            fits = space.is_heads and space.num_channels == step.ints["heads"][0] * space.group_size
            if fits and step.inputs[0].rows == step.inputs[2].rows == step.ints["outer"][0] * space.num_channels:
                step.in_site = site
                step.ints["gated_keys"] = [int(keys == site)]
                return set()
        return {site, *sites}

    def torch_step(self, node: Node) -> TorchValue:
        """Adds a step in which PyTorch runs the node."""
        self.drop(self.site_of(node), f"PyTorch runs '{node.name}' ({node.op}) in the middle of it")
        args, kwargs = pytree.tree_map(lambda item: self.torch_argument(item) if isinstance(item, Node) else item, (node.args, node.kwargs))
        return self._call_torch(node, [node.name], TorchCall(node.target, args, kwargs, node.name))

    def called(self, node: Node, function: Callable, name: str) -> EngineValue:
        """Returns what PyTorch makes of a node's value by a function that keeps its sizes, in the engine's memory."""
        value = self._call_torch(node, [name], TorchCall(function, (self.torch_argument(node),), {}, name))
        value.step.store = self.new_view(node, self.sizes(node))
        return EngineValue(value.step.store)

    def _call_torch(self, node: Node, computed: list[str], call: TorchCall) -> TorchValue:
        step = DraftStep("torch", node.module_path or node.name, branches=self.branches_of(node), nodes=computed, call=call)
        self.steps.append(step)
        self._results.add(call.result)
        return TorchValue(step)

    def torch_argument(self, node: Node) -> Any:
        """Returns what stands for a node among the arguments of a TorchCall."""
        if node.op == "input":
            return Value(node.name)
        value = self.values[node]
        if isinstance(value, EngineValue):
            self.drop(value.site, f"PyTorch reads '{node.name}'")
            return value.view
        if isinstance(value, ConstantValue) and not value.repeats:
            return value.value
        if node.name in self._results:
            return Value(node.name)
        if isinstance(value, MergedValue):
            self.drop(value.base.site, f"PyTorch reads '{node.name}'")
            dims = (value.base.view, value.first, value.first + 1)
            self._call_torch(node, [f"{node.name}_merged"], TorchCall(torch.ops.aten.flatten.using_ints, dims, {}, node.name))
        else:
            self.torch_step(node)
        return Value(node.name)


def _concat_hosts(graph: Graph) -> dict[Node, tuple[Node, int]]:
    """Returns, for each concatenation, the longest one that has its operands in a row, and where along the dimension they start."""
    hosts: dict[Node, tuple[Node, int]] = {}
    nodes = [node for node in graph.nodes if node.op == "cat" and node.shape and None not in node.shape]
    for node in sorted(nodes, key=lambda node: -len(node.args[0])):
        operands, dim = list(node.args[0]), node.arguments["dim"] % len(node.shape)
        hosts[node] = (node, 0)
        for host in [host for host, (own, _) in hosts.items() if own is host and host is not node]:
            others = list(host.args[0])
            starts = [i for i in range(len(others) - len(operands) + 1) if others[i : i + len(operands)] == operands]
            if starts and host.arguments["dim"] % len(host.shape) == dim and len(others) > len(operands):
                hosts[node] = (host, sum(other.shape[dim] for other in others[: starts[0]]))
                break
    return hosts


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """Returns the tensor as an f32 C-contiguous array; it shares the tensor's memory where that already is so."""
    return tensor.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy()


def extent(view: View) -> Rows:
    """Returns the stretch of memory that a view lies in, the operand of a copy."""
    return Rows(view.buffer, view.offset, 1, 0, views.span(view))
