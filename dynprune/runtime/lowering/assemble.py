"""From a finished draft to a plan: drops what nobody reads, folds scales into weights, places the memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from dynprune.graph.capture import Node
from dynprune.runtime import views
from dynprune.runtime.lowering.draft import Draft
from dynprune.runtime.lowering.fusing import mark_fused
from dynprune.runtime.lowering.values import ConstantValue, DraftStep, EngineValue, NotOnEngine
from dynprune.runtime.memory import place_buffers
from dynprune.runtime.plan import Buffer, Plan, PlanSite, Rows, Step, TorchCall, Value, View


def settle_outputs(draft: Draft) -> list[Any]:
    """Returns where each output of the model lies; copies those that are no memory of their own, so that no run overwrites them."""
    places: dict[Any, Any] = {}
    for output in draft.graph.outputs:
        if isinstance(output, Node) and output not in places:
            places[output] = _settle(draft, output)
    return [places[output] if isinstance(output, Node) else output for output in draft.graph.outputs]


def _settle(draft: Draft, node: Node) -> View | Value:
    value = draft.values[node]
    if isinstance(value, ConstantValue) and not value.repeats:
        return _cloned(draft, node, value.value)
    if not isinstance(value, EngineValue):
        argument = draft.torch_argument(node)
        makers = {step.call.result: step for step in draft.steps if step.call}
        shares = node.op != "input" and any(True for _ in _shared_views(makers[node.name], makers))
        return _cloned(draft, node, argument) if shares else argument
    draft.drop(value.site, f"'{node.name}' is returned by the model")
    view = value.view
    buffer = draft.buffers[view.buffer]
    contiguous = views.is_whole(view, buffer.size) and views.collapse(view.sizes, view.strides) in ((buffer.size, 1), (1, 1))
    if buffer.kind == "arena" and buffer.parent < 0 and contiguous and view.batch_dim == 0:
        buffer.kind = "output"
        return view
    if view.batch_dim != 0:
        return _cloned(draft, node, view)
    result = draft.new_view(node, view.sizes)
    try:
        draft.copy(node, value, result)
    except NotOnEngine:
        return _cloned(draft, node, view)
    draft.buffers[result.buffer].kind = "output"
    return result


def _cloned(draft: Draft, node: Node, value: Any) -> Value:
    """Adds a step in which PyTorch copies `value`, and returns the copy."""
    name = f"{node.name}_output"
    step = DraftStep("torch", node.module_path or node.name, nodes=[name])
    step.call = TorchCall(torch.ops.aten.clone.default, (value,), {}, name)
    draft.steps.append(step)
    return Value(name)


def _leaves(call: TorchCall, kind: type) -> list[Any]:
    return [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, kind)]


def _may_share(call: TorchCall) -> bool:
    """Whether the result of a call may share memory with its arguments."""
    schema = getattr(call.target, "_schema", None)
    return schema is None or any(result.alias_info is not None for result in schema.returns)


def _shared_views(step: DraftStep, makers: dict[str, DraftStep]) -> Iterator[View]:
    """Yields the engine's memory that the result of a torch step may share."""
    if _may_share(step.call):
        yield from _leaves(step.call, View)
        for value in _leaves(step.call, Value):
            if value.name in makers:
                yield from _shared_views(makers[value.name], makers)


def _reads(draft: Draft, step: DraftStep) -> set[int]:
    """Returns the buffers a step reads."""
    operands = step.inputs if step.call is None else _leaves(step.call, View)
    return {draft.resolve(operand.buffer)[0] for operand in operands}


def _writes(draft: Draft, step: DraftStep) -> set[int]:
    """Returns the buffers a step writes."""
    return {draft.resolve(operand.buffer)[0] for operand in (step.output, step.store) if operand is not None}


def _live_steps(draft: Draft, outputs: list[Any]) -> list[DraftStep]:
    """Returns the steps whose result somebody reads, in order."""
    buffers = {output.buffer for output in outputs if isinstance(output, View)}
    names = {output.name for output in outputs if isinstance(output, Value)}
    live = []
    for step in reversed(draft.steps):
        if step.op != "gate" and not _writes(draft, step) & buffers and not (step.call and step.call.result in names):
            continue
        if step.store is not None and not _writes(draft, step) & buffers:
            step.store = None
        live.append(step)
        buffers |= _reads(draft, step)
        names |= {value.name for value in _leaves(step.call, Value)} if step.call else set()
    return live[::-1]


def _ends(steps: list[DraftStep], outputs: list[Any]) -> dict[str, tuple[int, int]]:
    """Returns, for each result of PyTorch, the last step that reads it and the last that reads anything that may share its memory."""
    returned = {output.name for output in outputs if isinstance(output, Value)}
    ends: dict[str, tuple[int, int]] = {}
    for i, step in reversed(list(enumerate(steps))):
        if step.call is None:
            continue
        shared_end = ends.setdefault(step.call.result, (i, i))[1]
        for value in _leaves(step.call, Value):
            last, shared = ends.get(value.name, (i, i))
            ends[value.name] = (last, max(shared, shared_end if _may_share(step.call) else i))
    return ends | {name: (len(steps), len(steps)) for name in returned}


def _fuse(draft: Draft, steps: list[DraftStep], outputs: list[Any]) -> dict[int, int]:
    """Marks steps that may run as one; see `mark_fused`."""
    readers = Counter(buffer for step in steps for buffer in _reads(draft, step))
    readers.update(draft.resolve(output.buffer)[0] for output in outputs if isinstance(output, View))
    writers = Counter(buffer for step in steps for buffer in _writes(draft, step))

    def place(rows: Rows) -> Rows:
        buffer, offset = draft.resolve(rows.buffer, rows.offset)
        return replace(rows, buffer=buffer, offset=offset)

    return mark_fused(steps, readers, writers, lambda buffer: draft.buffers[buffer].kind == "arena", place)


def _place(draft: Draft, steps: list[DraftStep], inputs: list[View], outputs: list[Any]) -> tuple[list[Buffer], int, dict[int, int]]:
    """Returns the plan's buffers, the arena's size, and which of them each buffer of the draft has become."""
    ends, fused_until = _ends(steps, outputs), _fuse(draft, steps, outputs)
    lifetimes: dict[int, tuple[int, int]] = {view.buffer: (0, 0) for view in inputs}
    for i, step in enumerate(steps):
        until = max(i, ends[step.call.result][1]) if step.call and _may_share(step.call) else fused_until.get(i, i)
        for buffer in _writes(draft, step) | _reads(draft, step):
            first, last = lifetimes.get(buffer, (i, i))
            lifetimes[buffer] = (first, max(last, until))
    arena = [buffer for buffer in lifetimes if draft.buffers[buffer].kind == "arena"]
    offsets, arena_size = place_buffers([draft.buffers[buffer].size for buffer in arena], [lifetimes[buffer] for buffer in arena])
    offset_of = dict(zip(arena, offsets, strict=True))
    placed = [
        Buffer(draft.buffers[buffer].name, draft.buffers[buffer].kind, draft.buffers[buffer].size, offset_of.get(buffer, 0))
        for buffer in lifetimes
    ]
    return placed, arena_size, {buffer: i for i, buffer in enumerate(lifetimes)}


def _last_uses(steps: list[DraftStep], outputs: list[Any]) -> list[tuple[str, ...]]:
    """Returns, for each step, the results of PyTorch that nothing reads after it."""
    dropped: list[list[str]] = [[] for _ in steps]
    results = {step.call.result for step in steps if step.call}
    for name, (last, _) in _ends(steps, outputs).items():
        if name in results and last < len(steps):
            dropped[last].append(name)
    return [tuple(names) for names in dropped]


def _folded(step: DraftStep) -> dict[str, np.ndarray]:
    """Returns the step's constants with its scale and shift folded in, computed in f64."""
    if step.scale is None or (np.all(step.scale == 1.0) and np.all(step.shift == 0.0)):
        return step.constants
    factor, offset = ("scale", "shift") if step.op == "affine" else ("weight", "bias")
    weight, bias = step.constants[factor], step.constants[offset]
    scale = step.scale.reshape(-1, *[1] * (weight.ndim - 1))
    weight = np.multiply(weight, scale, dtype=np.float64).astype(np.float32)
    return step.constants | {factor: weight, offset: (bias * step.scale + step.shift).astype(np.float32)}


def _macs_of_steps(draft: Draft, steps: list[DraftStep]) -> Iterator[int]:
    """Yields the multiply-adds of each step; a node that several steps compute is shared out evenly among them."""
    total = Counter(name for step in steps for name in step.nodes)
    done: Counter[str] = Counter()
    for step in steps:
        macs = 0
        for name in step.nodes:
            whole, i, n = draft.node_macs.get(name, 0), done[name], total[name]
            macs += whole * (i + 1) // n - whole * i // n
            done[name] += 1
        yield macs


def assemble(draft: Draft, inputs: list[View], outputs: list[Any], fixed_batch: int | None, ungated: list[tuple[str, str]]) -> Plan:
    """Returns the plan of a draft in which every node has a value; `inputs` and `outputs` are where those of the model lie."""
    steps = _live_steps(draft, outputs)
    buffers, arena_size, index = _place(draft, steps, inputs, outputs)

    def move(item: Any) -> Any:
        if not isinstance(item, View | Rows):
            return item
        buffer, offset = draft.resolve(item.buffer, item.offset)
        return replace(item, buffer=index[buffer], offset=offset)

    finished = []
    macs = _macs_of_steps(draft, steps)
    for step, last_use in zip(steps, _last_uses(steps, outputs), strict=True):
        call = step.call
        if call is not None:
            args, kwargs = pytree.tree_map(move, (call.args, call.kwargs))
            call = replace(call, args=args, kwargs=kwargs, store=move(step.store), last_use=last_use)
        finished.append(
            Step(
                op=step.op,
                name=step.name,
                inputs=tuple(move(rows) for rows in step.inputs),
                output=move(step.output),
                ints=step.ints,
                floats=step.floats,
                constants=_folded(step),
                in_site=step.in_site,
                out_site=step.out_site,
                branches=tuple(sorted(step.branches)),
                macs=next(macs),
                nodes=tuple(step.nodes),
                torch_call=call,
            )
        )
    return Plan(
        steps=tuple(finished),
        buffers=tuple(buffers),
        arena_size=arena_size,
        sites=tuple(PlanSite(site.name, site.kind, site.num_channels, site.group_size) for site in draft.sites),
        inputs=tuple(move(view) for view in inputs),
        outputs=tuple(move(output) for output in outputs),
        fixed_batch=fixed_batch,
        ungated=tuple(ungated),
    )
