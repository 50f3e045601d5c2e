"""The engine: one plan on the C++ extension with its gates, its workspaces and the steps that PyTorch runs in between."""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dynprune.errors import InputError, IsaError, PlanError
from dynprune.gates.compensation import compensation_matrix
from dynprune.gates.heads import Gate
from dynprune.graph.sites import Site
from dynprune.runtime import _C
from dynprune.runtime.costs import CostTable
from dynprune.runtime.plan import Plan, TorchCall, Value, View

MAX_GROUP = 16
"""Larger batches run in groups of at most this many samples, so that the arena stays small; a plan with PyTorch steps runs whole."""


class Execution(NamedTuple):
    """What one inference executed.

    Attributes:
        macs: multiply-adds, summed over the batch.
        predicted_ms: the cost table's time for it; 0 where there is no table.
        level: at the end; higher than asked where the deadline raised it.
        guard_actions: how often the deadline raised it.
        engine_ms: wall time in the engine's own steps.
        batch: samples.
        rows: that ran, int64 (sites of the plan, batch) as bytes; `counts` is the array of them.
    """

    macs: float
    predicted_ms: float
    level: float
    guard_actions: int
    engine_ms: float
    batch: int
    rows: bytes

    @property
    def counts(self) -> np.ndarray:
        return np.frombuffer(self.rows, np.int64).reshape(-1, self.batch)


class Engine:
    """Runs a plan. Any number of threads may call `run` at once; gates and weights are fixed when it is made.

    Args:
        plan: the lowered model.
        sites: of the model, by name; at least those of the plan.
        gates: by site name.
        costs: predicted times of this plan's steps, or None.
        num_threads: threads of one run, >= 1.
        isa: instruction set; None for the fastest here, or what DYNPRUNE_MAX_ISA allows.
        lean: spend as little memory as possible: no repacked weights (so no Winograd convolutions), batches sample by sample, and
            callers take turns in one workspace.

    Raises:
        IsaError: the instruction set is unknown or cannot run here.
        PlanError: the plan is inconsistent.
    """

    def __init__(
        self,
        plan: Plan,
        sites: Mapping[str, Site],
        gates: Mapping[str, Gate],
        *,
        costs: CostTable | None = None,
        num_threads: int = 1,
        isa: str | None = None,
        lean: bool = False,
    ):
        self.plan = plan
        self._max_group = 1 if lean else MAX_GROUP
        self._turn = threading.Lock() if lean else None
        self.num_threads = num_threads
        self.isa = choose_isa() if isa is None else isa
        try:
            self._compiled = _C.Plan(_lean_spec(plan) if lean else plan.to_spec(), self.isa, num_threads)
        except ValueError as error:
            raise PlanError(str(error)) from error
        self._segments = _segments(plan)
        self._torch_steps = any(step.torch_call is not None for step in plan.steps)
        self._buffer_of_input = [view.buffer for view in plan.inputs]
        self._in_one_call = not (lean or self._torch_steps)
        self._batch_dim = plan.inputs[0].batch_dim if plan.inputs else 0
        self._results = [(view.buffer, plan.buffers[view.buffer].size, view.sizes) for view in plan.outputs if isinstance(view, View)]
        self._in_groups = not self._torch_steps and plan.fixed_batch is None
        # Of the smallest table that numbers of an input select from: by buffer, and there by the first number and how many.
        self._entries: defaultdict[int, dict[tuple[int, int], int]] = defaultdict(dict)
        for step in plan.steps:
            if step.op == "embedding":
                numbers, entries = step.inputs[0], step.ints["entries"][0]
                known, place = self._entries[numbers.buffer], (numbers.offset // 2, numbers.positions // 2)
                known[place] = min(entries, known.get(place, entries))
        self._site_number = {site.name: i for i, site in enumerate(plan.sites)}
        if costs is not None and costs.fits(plan):
            self._compiled.set_costs(list(costs.fixed_ms), list(costs.scaled_ms))
        else:
            costs = None
        self._set_gates(sites, gates, costs)

    def run(
        self,
        inputs: Sequence[Tensor],
        *,
        level: float = 0.0,
        deadline_ns: int = 0,
        slowdown: float = 1.0,
        active: Mapping[str, Sequence[Sequence[int]]] | None = None,
        num_threads: int | None = None,
    ) -> tuple[list[Any], Execution]:
        """Returns the flattened outputs and what was executed.

        Args:
            inputs: flattened, CPU tensors of the plan's shapes and dtypes; one batch size.
            level: in [0, 1].
            deadline_ns: time of `time.monotonic_ns` at which the result is due; gates tighten on the way to meet it. 0 for none.
            slowdown: how many times slower than its cost table the machine is now.
            active: choices in place of the gates': site name to one ascending list of groups per sample; other sites run whole.
            num_threads: of this run; None for the engine's.

        Raises:
            InputError: `active` does not fit the sites, or a number lies outside the table that it selects from.
            PlanError: the memory for this batch cannot be had.
        """
        batch = inputs[0].shape[self._batch_dim] if inputs else 1
        threads = num_threads or self.num_threads
        if batch <= self._max_group and active is None and self._in_one_call:
            return self._infer(inputs, batch, level, deadline_ns, slowdown, threads)
        if batch <= self._max_group or not self._in_groups:
            return self._run_in_turn(inputs, batch, level, deadline_ns, slowdown, active, threads)
        groups = -(-batch // self._max_group)
        results = []
        for i in range(groups):
            first, last = batch * i // groups, batch * (i + 1) // groups
            part = [x[first:last] for x in inputs]
            lists = None if active is None else {name: chosen[first:last] for name, chosen in active.items()}
            results.append(self._run_in_turn(part, last - first, level, deadline_ns, slowdown, lists, threads))
        return _join(results)

    def step_times_ms(self, inputs: Sequence[Tensor], *, active: Mapping[str, Sequence[Sequence[int]]] | None = None) -> list[float]:
        """Returns the wall time of each step in one run at level 0 or with given lists; PyTorch's steps count 0.

        The gates and what only they read run too, which other runs of that kind leave out.
        """
        batch = inputs[0].shape[0]
        workspace = self._acquire(batch)
        workspace.set_profiling(True)
        try:
            self._execute(workspace, inputs, batch, 0.0, 0, 1.0, active, self.num_threads)
            return workspace.step_ms()
        finally:
            workspace.set_profiling(False)
            self._compiled.release(workspace)

    def executed_for(self, active: Mapping[str, Sequence[Sequence[int]]], batch: int) -> Execution:
        """Returns what a run with these lists would execute, without running it."""
        workspace = self._acquire(batch)
        try:
            self._begin_given(workspace, active)
            return Execution._make(workspace.executed())
        finally:
            self._compiled.release(workspace)

    def trim(self) -> None:
        """Lets go of the memory of workspaces that no run uses."""
        self._compiled.trim()

    def _acquire(self, batch: int) -> _C.Workspace:
        try:
            return self._compiled.acquire(batch)
        except MemoryError as error:
            raise self._lack_of_memory(batch) from error

    def _lack_of_memory(self, batch: int) -> PlanError:
        needed = self._compiled.arena_bytes(batch) / 2**20
        return PlanError(f"A batch of {batch} needs {needed:.0f} MiB for its activations, which cannot be had; use a smaller batch.")

    def _run_in_turn(self, *arguments) -> tuple[list[Any], Execution]:
        if self._turn is None:
            return self._run_group(*arguments)
        with self._turn:
            return self._run_group(*arguments)

    def _run_group(self, inputs, batch, level, deadline_ns, slowdown, active, threads) -> tuple[list[Any], Execution]:
        if active is None and not self._torch_steps:
            return self._infer(inputs, batch, level, deadline_ns, slowdown, threads)
        workspace = self._acquire(batch)
        try:
            outputs = self._execute(workspace, inputs, batch, level, deadline_ns, slowdown, active, threads)
            return outputs, Execution._make(workspace.executed())
        finally:
            self._compiled.release(workspace)

    def _infer(self, inputs, batch, level, deadline_ns, slowdown, threads) -> tuple[list[Any], Execution]:
        """Runs a group of a plan that leaves no step to PyTorch, with little Python: that finds no cache warm."""
        tensors, buffers = self._buffers(inputs, batch)
        outputs = self._outputs(tensors)
        try:
            return outputs, Execution._make(self._compiled.infer(batch, buffers, level, deadline_ns, slowdown, threads))
        except MemoryError as error:
            raise self._lack_of_memory(batch) from error

    def _execute(self, workspace, inputs, batch, level, deadline_ns, slowdown, active, threads) -> list[Any]:
        if active is None:
            workspace.begin(level, deadline_ns, slowdown)
        else:
            self._begin_given(workspace, active)
        tensors, buffers = self._buffers(inputs, batch)
        for buffer in buffers:
            workspace.bind(*buffer)
        if not self._torch_steps:
            workspace.run(0, len(self.plan.steps), threads)
            return self._outputs(tensors)
        return self._run_segments(workspace, batch, tensors, threads)

    def _buffers(self, inputs: Sequence[Tensor], batch: int) -> tuple[dict[int, Tensor], list[tuple[int, int, int, Tensor]]]:
        """Returns the tensors of a run's inputs and outputs by buffer, and where they lie: buffer, address, sample stride, tensor."""
        tensors, buffers = {}, []
        for buffer, x in zip(self._buffer_of_input, inputs, strict=True):
            tensors[buffer] = x = x.contiguous()
            if buffer in self._entries:
                for (first, count), entries in self._entries[buffer].items():
                    _check_numbers(x.view(batch, -1)[:, first : first + count], entries)
            buffers.append((buffer, x.data_ptr(), self.plan.buffers[buffer].size, x))
        for buffer, size, sizes in self._results:
            tensors[buffer] = out = torch.empty(batch, *sizes)
            buffers.append((buffer, out.data_ptr(), size, out))
        return tensors, buffers

    def _outputs(self, tensors: dict[int, Tensor]) -> list[Any]:
        """Returns the flattened outputs of a plan that leaves no step to PyTorch."""
        return [tensors[view.buffer] if isinstance(view, View) else view for view in self.plan.outputs]

    def _run_segments(self, workspace, batch: int, tensors: dict[int, Tensor], threads: int) -> list[Any]:
        arena = self._arena_tensor(workspace, batch)
        values: dict[str, Any] = {self.plan.buffers[b].name: tensors[b] for b in self._buffer_of_input}

        def window(view: View) -> Tensor:
            base = tensors.get(view.buffer, arena)
            buffer = self.plan.buffers[view.buffer]
            stride = self.plan.arena_size if base is arena else buffer.size
            sizes, strides = list(view.sizes), list(view.strides)
            sizes.insert(view.batch_dim, batch)
            strides.insert(view.batch_dim, stride)
            offset = buffer.offset + view.offset if base is arena else view.offset
            return base.as_strided(sizes, strides, offset)

        def resolve(argument: Any) -> Any:
            if isinstance(argument, View):
                return window(argument)
            return values[argument.name] if isinstance(argument, Value) else argument

        for first, last in self._segments:
            call = self.plan.steps[first].torch_call
            if call is None:
                workspace.run(first, last, threads)
            elif self._some_sample_runs(workspace, first, batch):
                self._call_torch(call, resolve, window, values, arena)
        return [self._result(output, tensors, values) for output in self.plan.outputs]

    def _call_torch(self, call: TorchCall, resolve, window, values: dict[str, Any], arena: Tensor) -> None:
        args, kwargs = tree_map(resolve, (list(call.args), dict(call.kwargs)), is_leaf=lambda x: isinstance(x, (View, Value)))
        result = call.target(*args, **kwargs)
        if call.store is not None:
            window(call.store).copy_(result)
        # The arena is written again later; a result that is a window on it must not change under its readers.
        values[call.result] = tree_map(lambda x: x.clone() if isinstance(x, Tensor) and _shares_memory(x, arena) else x, result)
        for name in call.last_use:
            values.pop(name, None)

    def _some_sample_runs(self, workspace, step: int, batch: int) -> bool:
        branches = self.plan.steps[step].branches
        if not branches:
            return True
        return bool((Execution._make(workspace.executed()).counts[list(branches)] > 0).all(0).any())

    def _result(self, output: Any, tensors: dict[int, Tensor], values: dict[str, Any]) -> Any:
        if isinstance(output, View):
            return tensors[output.buffer]
        return values[output.name] if isinstance(output, Value) else output

    def _arena_tensor(self, workspace, batch: int) -> Tensor:
        floats = max(1, self.plan.arena_size * batch)
        memory = (ctypes.c_float * floats).from_address(workspace.arena_address())
        return torch.from_numpy(np.frombuffer(memory, np.float32))

    def _begin_given(self, workspace, active: Mapping[str, Sequence[Sequence[int]]]) -> None:
        lists: list[Any] = [None] * len(self.plan.sites)
        for name, chosen in active.items():
            if chosen is None:
                raise InputError(f"`active` of site {name!r} must be one list per sample, got None; leave the site out to run it whole.")
            if name in self._site_number:
                lists[self._site_number[name]] = chosen
        try:
            workspace.begin_given(lists)
        except ValueError as error:
            raise InputError(f"`active` does not fit: {error}") from error
        except TypeError as error:
            raise InputError("`active` must hold, by site name, one list of ints per sample; got something else.") from error

    def _set_gates(self, sites: Mapping[str, Site], gates: Mapping[str, Gate], costs: CostTable | None) -> None:
        gate_step = {step.ints["site"][0]: i for i, step in enumerate(self.plan.steps) if step.op == "gate"}
        steps_of_node: defaultdict[str, list[int]] = defaultdict(list)
        for i, step in enumerate(self.plan.steps):
            for node in step.nodes:
                steps_of_node[node].append(i)
        for number, plan_site in enumerate(self.plan.sites):
            site, gate = sites[plan_site.name], gates[plan_site.name]
            curve = _array(gate.curve)
            rest_ms = np.zeros(0, np.float32)
            if costs is not None and costs.level_ms.shape[0] == len(curve):
                rest_ms = costs.level_ms[:, gate_step[number] :].sum(1).astype(np.float32)
            down, up = (_array(gate.down), _array(gate.up)) if gate.calibrated or gate.down.any() else _no_input(gate)
            self._compiled.set_gate(number, down, up, _array(gate.bias), curve, rest_ms)
            for index, consumer in enumerate(site.consumers):
                if gate.compensated[index]:
                    self._compensate(
                        [step for step in steps_of_node[consumer.node] if self.plan.steps[step].in_site == number], gate, index
                    )

    def _compensate(self, steps: Sequence[int], gate: Gate, index: int) -> None:
        """Makes the steps of a consumer add what skipped channels would at their means; a transposed one is several steps."""
        means, added = gate.channel_means[index].detach().cpu(), []
        for step in steps:
            if len(self._compiled.compensation_sizes(step)) == 1:
                added.append(means)
                continue
            weight = torch.from_numpy(self.plan.steps[step].constants["weight"])
            groups = self.plan.steps[step].ints.get("groups", [1])[0]
            added.append(compensation_matrix(weight.view(weight.shape[0], -1), means, groups))
        for step in steps:
            self._compiled.set_compensation(step, _array(sum(added) / len(steps)))


def _check_numbers(x: Tensor, entries: int) -> None:
    low, high = (int(bound) for bound in x.aminmax())
    if low < 0 or high >= entries:
        raise InputError(f"Numbers of an embedding must lie in [0, {entries}), got {low if low < 0 else high}.")


def expect_run() -> None:
    """Wakes the helper threads for a run that follows at once."""
    _C.expect_run()


def choose_isa() -> str:
    """Returns the instruction set to use: the fastest here, or what DYNPRUNE_MAX_ISA allows.

    Raises:
        IsaError: DYNPRUNE_MAX_ISA names one that is unknown or that this machine lacks.
    """
    try:
        return _C.chosen_isa()
    except ValueError as error:
        raise IsaError(str(error)) from error


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy())


def _no_input(gate: Gate) -> tuple[np.ndarray, np.ndarray]:
    """A gate that ignores its input has rank 0 in the engine."""
    return np.zeros((0, gate.in_channels), np.float32), np.zeros((gate.num_groups, 0), np.float32)


def _lean_spec(plan: Plan) -> dict[str, Any]:
    """Returns the plan's specification with convolutions that read their weights as they are."""
    spec = plan.to_spec()
    for step in spec["steps"]:
        if step["op"] == "conv":
            step["ints"] = {**step["ints"], "winograd": [0], "packed": [0]}
    return spec


def _segments(plan: Plan) -> list[tuple[int, int]]:
    """Returns runs of engine steps as (first, last), and PyTorch's steps one by one."""
    segments: list[tuple[int, int]] = []
    for i, step in enumerate(plan.steps):
        grows = segments and step.torch_call is None and plan.steps[segments[-1][0]].torch_call is None
        if grows:
            segments[-1] = (segments[-1][0], i + 1)
        else:
            segments.append((i, i + 1))
    return segments


def _shares_memory(x: Tensor, arena: Tensor) -> bool:
    begin = arena.data_ptr()
    return x.device.type == "cpu" and begin <= x.data_ptr() < begin + arena.numel() * arena.element_size()


def _join(results: list[tuple[list[Any], Execution]]) -> tuple[list[Any], Execution]:
    """Returns the outputs of groups of samples as one batch, and the sum of what was executed."""
    columns = zip(*(outputs for outputs, _ in results), strict=True)
    outputs = [torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0] for parts in columns]
    done = [execution for _, execution in results]
    return outputs, Execution(
        sum(e.macs for e in done),
        sum(e.predicted_ms for e in done),
        max(e.level for e in done),
        sum(e.guard_actions for e in done),
        sum(e.engine_ms for e in done),
        sum(e.batch for e in done),
        np.concatenate([e.counts for e in done], 1).tobytes(),
    )
