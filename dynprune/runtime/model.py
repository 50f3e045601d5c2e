"""`DynamicModel`: what the user holds. It wraps a model, picks a level for each call and runs it on the engine or on PyTorch."""

from __future__ import annotations

import copy
import importlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules import module as nn_module
from torch.utils import _pytree as pytree

from dynprune.errors import InputError, UnsupportedModelError
from dynprune.gates.attach import check_site_names
from dynprune.runtime.arithmetic import Arithmetic
from dynprune.runtime.call import FAR_NS, due_at_ns, is_plain_call, length_of, tensors_in
from dynprune.runtime.captured import Captured
from dynprune.runtime.engine import Execution, expect_run
from dynprune.runtime.explain import explain
from dynprune.runtime.islands import Islands
from dynprune.runtime.ops import compiled_call, register
from dynprune.runtime.statistics import LastCall, Stats, StatsRecorder, Totals

Active = Mapping[str, Sequence[Sequence[int]]]


class DynamicModel(Captured):
    """Runs a model so that each input uses only the channels and blocks that it needs, within a latency budget.

    In eval mode, on CPU and without gradients the calls run on the C++ engine; in training mode, on another device or where gradients
    are wanted, on the user's own modules with hooks. At level 0 the output is that of the original model. `model` itself stays as it
    is: its parameters can be trained, loaded and moved as before, and the engine follows.

    Args:
        model: any module that torch.export can capture.
        example_inputs: a tensor, a tuple, or a mapping of keyword arguments, as a call of the model takes it; None captures at the
            first call. For a decoder of transformers pass `use_cache=False` with it.
        include, exclude: fnmatch patterns over site names ("layer2.*"): which sites get gates.
        group_size: consecutive channels that a gate decides on together; it must divide every site's channels.
        exact: leave out Winograd's algorithm, which makes 3x3 convolutions two to three times faster, rounds them a few times more
            coarsely (within 1e-5 of the largest output) and spreads a NaN in the input over its tile of 6x6.
        dtype: torch.float32, or torch.bfloat16 for the engine's weights and products: about twice as fast on CPUs with bfloat16
            instructions, and outputs differ from the model's by some thousandths. Inputs, outputs and the model itself stay as they are.

    Attributes:
        training_levels: in training mode the level of each sample (N,) of the next calls; default None: `level` for all.
        masks: of the last call in training mode, site name to a 0-1 tensor (N, num_groups) that carries the gates' gradients.

    Raises:
        InputError: the model does not take `example_inputs`, or a pattern or group size does not fit.
        UnsupportedModelError: torch.export cannot capture the model.

    Example:
        >>> dm = DynamicModel(model.eval(), torch.rand(1, 3, 224, 224))
        >>> calibrate(dm, loader)
        >>> dm.set_latency_budget(ms=12)
        >>> with torch.no_grad():
        ...     y = dm(x)
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Tensor | tuple | Mapping[str, Any] | None = None,
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        group_size: int = 1,
        exact: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        if not isinstance(model, nn.Module):
            raise InputError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        if isinstance(model, DynamicModel):
            raise InputError("`model` is a DynamicModel already; wrap its `.model`.")
        super().__init__(model, include=include, exclude=exclude, group_size=group_size, arithmetic=Arithmetic(exact, dtype))
        self.training_levels: Tensor | None = None
        self.masks: dict[str, Tensor] = {}
        self._recorder = StatsRecorder(self._num_threads)
        self._hook_tables = _hook_tables_of(self)
        self.number = register(self)
        if isinstance(example_inputs, Mapping):
            self.capture(**example_inputs)
        elif example_inputs is not None:
            self.capture(*(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)))

    # ------------------------------------------------------------------ calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling() or self._compiled_call_impl is not None or any(self._hook_tables):
            return super().__call__(*args, **kwargs)
        return self.forward(*args, **kwargs)  # PyTorch's own way here takes 30 microseconds, where an inference has emptied the caches

    def forward(self, *args: Any, deadline: float | None = None, **kwargs: Any) -> Any:
        """Returns what the model returns.

        Args:
            args, kwargs: of the model. Dimension 0 of every tensor is the batch.
            deadline: `time.monotonic()` seconds at which the result is due, with or without a latency budget. A calibrated model starts
                at a level that fits the time left, and gates tighten on the way to meet it. Default None: the latency budget alone counts.

        Raises:
            InputError: the model does not take these inputs.

        A call that holds more than tensors and plain values (a cache that the model writes to), or that torch.export cannot capture,
        runs in PyTorch with the same gates, except for parts that have one token per sample: they run on the engine.
        """
        if is_dynamo_compiling():
            return compiled_call(self, args, kwargs, deadline)
        began_ns = time.monotonic_ns()
        due_ns = FAR_NS if deadline is None else due_at_ns(deadline)
        if self._example is not None and not is_plain_call(args, kwargs):
            return self._run_in_pytorch(args, kwargs, began_ns, due_ns)
        if not self.training and (self._num_threads if self._controller is None else self._controller.threads) > 1:
            expect_run()
        gates = deadline is not None or self._level > 0 or self._controller is not None or self._monitor is not None
        try:
            session, inputs, batch = self._session_for(args, kwargs, gates=gates)
        except UnsupportedModelError as error:
            if self._example is None:
                raise
            self._warn_once("capture", f"Calls of this form run in PyTorch: {error}")
            return self._run_in_pytorch(args, kwargs, began_ns, due_ns)
        controller = None if self.training else self._controller
        if controller is None and deadline is not None and not self.training:
            controller = self._deadline_controller()
        level = self._next_level(controller, batch, (due_ns - began_ns) * 1e-6)
        if not self._runs_on_engine(inputs):
            self._check_devices(inputs)
            if self.training and self.training_levels is not None:
                level = self.training_levels
            result, masks = self.attachment.run(args, kwargs, level=level)
            self.masks = masks if self.training else {}
            return result
        slowdown, threads = 1.0, None
        if controller is not None:
            threads = controller.threads
            limit_ms = min(controller.budget_ms, (due_ns - began_ns) * 1e-6)
            due_ns, slowdown = max(1, began_ns + int(limit_ms * 1e6)), controller.pace
        engine = session.engine(self._gate_of, costs=self.costs, num_threads=self._num_threads)
        deadline_ns = due_ns if due_ns < FAR_NS // 2 else 0
        outputs, execution = engine.run(inputs, level=level, deadline_ns=deadline_ns, slowdown=slowdown, num_threads=threads)
        result = session.pack(outputs)
        latency_ms = (time.monotonic_ns() - began_ns) * 1e-6
        self._recorder.last = level, execution, threads or self._num_threads
        missed = False
        if controller is not None:
            missed, guarded = latency_ms > limit_ms, execution.guard_actions > 0
            if guarded:
                reached = self.frontier.accuracy_at(execution.level)
                self._recorder.add_guarded(execution.level - level, self.frontier.accuracy_at(level) - reached)
            options = {"level": level, "threads": threads, "work": float(batch), "limit_ms": limit_ms, "guarded": guarded}
            controller.observe(latency_ms, execution.predicted_ms, **options)
        self._recorder.add(session.totals, execution, latency_ms, missed)
        return result

    def run_with_active(self, *inputs: Any, active: Active, backend: str = "engine", **kwargs: Any) -> Any:
        """Returns the model's output with given choices in place of the gates'.

        Args:
            inputs, kwargs: of the model.
            active: site name to one strictly ascending list of active group indices per sample; a branch is [0] or []. A site not
                named runs whole.
            backend: "engine", or "hooked" for the user's modules in PyTorch; both mean the same.

        Raises:
            InputError: an unknown site or backend, or lists that do not fit.
        """
        if backend not in ("engine", "hooked"):
            raise InputError(f"`backend` must be 'engine' or 'hooked', got {backend!r}.")
        if not isinstance(active, Mapping):
            raise InputError(f"`active` must be a dict from site names to one list per sample, got {type(active).__name__}.")
        began_ns = time.monotonic_ns()
        session, tensors, batch = self._session_for(inputs, kwargs)
        check_site_names(self.sites, active)
        engine = session.engine(self._gate_of, costs=self.costs, num_threads=self._num_threads)
        if backend == "hooked":
            execution = engine.executed_for(active, batch)
            result, _ = self.attachment.run(inputs, kwargs, level=1.0, active=active)
        else:
            with torch.no_grad():
                outputs, execution = engine.run(tensors, active=active)
            result = session.pack(outputs)
        self._recorder.add(session.totals, execution, (time.monotonic_ns() - began_ns) * 1e-6, missed=False)
        return result

    # ------------------------------------------------------------------ what it is and did

    def stats(self) -> Stats:
        """Returns what was executed and how long it took since the model was wrapped or `reset_stats()` was called."""
        controller = self._controller
        budget_ms = None if controller is None else controller.budget_ms
        return self._recorder.summary(level=self.level, budget_ms=budget_ms)

    @property
    def last_call(self) -> LastCall:
        """How the last call on the engine ran; of calls that overlap, the one that ended last."""
        return self._recorder.last_call

    def reset_stats(self) -> None:
        """Forgets the statistics."""
        self._recorder.reset()

    def explain(self) -> str:
        """Returns a table of every step, where it runs, its site and cost, and of every place without a gate and why."""
        session = self._captured()
        return explain(session.plan, session.sites, self._unhooked, self._gate_of, self.costs, level=self.level or 1.0)

    def freeze(self, level: float, *, inputs: Iterable[Any] | None = None, min_frequency: float = 0.05) -> nn.Module:
        """Returns the static network nearest to a level: a smaller plain copy of the model, without gates; see `pruning.freeze`.

        Channels and branches go that are needed for less than `min_frequency` of the inputs. It exports to ONNX and `torch.export`.

        Args:
            level: in (0, 1].
            inputs: batches to count over; default None takes what `calibrate` counted.
            min_frequency: in (0, 1]; 0.5 comes nearest to the level's own cost, less is nearer to its accuracy.

        Raises:
            InputError: `level` or `min_frequency` is out of range.
            CalibrationError: nothing was counted yet and there are no `inputs`.
        """
        later = importlib.import_module("dynprune.pruning.freeze")  # by name, as it stands after this module on a model's way
        return later.freeze(self, level, inputs=inputs, min_frequency=min_frequency)

    # ------------------------------------------------------------------ files and copies

    def save(self, path: str | PathLike, *, base: nn.Module | None = None) -> None:
        """Saves gates, frontier and cost table as safetensors with JSON inside; the model's own weights only with `base`.

        Args:
            path: of the file.
            base: the model as it was before `finetune`. The file then holds how the weights differ from it, and `load` takes the model
                as it was before training and tunes it. Default None: `load` takes the model as it is now.
        """
        from dynprune.runtime.checkpoint import save

        save(self, path, base)

    @staticmethod
    def load(path: str | PathLike, model: nn.Module, *, remeasure: bool = True) -> DynamicModel:
        """Returns a `DynamicModel` of `model` with what `save` wrote; tuned weights are written to `model`, in place.

        Args:
            path: of the file.
            model: with the weights that it was saved for.
            remeasure: whether to measure the times again, in some seconds, where the file comes from a machine of another name or was
                not measured for as many threads; see `remeasure`.

        Raises:
            CheckpointError: the file is damaged or foreign, was written by a newer version, or belongs to another model.
        """
        from dynprune.runtime.checkpoint import load

        return load(path, model, remeasure=remeasure)

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicModel:
        twin = DynamicModel(
            copy.deepcopy(self.model, memo),
            include=self.include,
            exclude=self.exclude,
            group_size=self.group_size,
            exact=self.arithmetic.exact,
            dtype=self.arithmetic.dtype,
        )
        if self._example is not None:
            args, kwargs = copy.deepcopy(self._example, memo)
            twin.capture(*args, **kwargs)
            twin.gates.load_state_dict(self.gates.state_dict())
        twin._level, twin._num_threads, twin._policy = self._level, self._num_threads, self._policy
        twin._threads_given = self._threads_given
        if self.frontier is not None:
            twin.set_frontier(self.frontier, self.costs)
        return twin

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("model")
            if name.startswith("_") or not hasattr(model, name):
                raise
        return self._generate if name == "generate" else getattr(model, name)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, whose forward passes are calls of this."""
        twin = copy.copy(self.model)
        vars(twin)["forward"] = self.__call__  # assigned, it would become a submodule of both
        return twin.generate(*args, **kwargs)

    def __reduce__(self):
        raise InputError("A DynamicModel is not pickled; use dm.save(path) and DynamicModel.load(path, model).")

    def extra_repr(self) -> str:
        if self._example is None:
            return "not captured yet"
        return f"{len(self._sites)} sites, level={self.level:.2f}, num_threads={self._num_threads}"

    # ------------------------------------------------------------------ inside

    def _run_in_pytorch(self, args: tuple, kwargs: dict[str, Any], began_ns: int, due_ns: int) -> Any:
        """Returns the model's output of a call that has no plan, and counts the call."""
        self._follow_changes(gates=True)
        tensors = tensors_in(pytree.tree_leaves((args, kwargs)))
        self._check_devices(tensors)
        level = max(self.level, self._next_level(None, 1, math.inf))
        done: list[tuple[Totals, Execution]] = []
        if self.training or (level > 0 and not self._runs_on_engine(tensors)):
            return self.attachment.run(args, kwargs, level=level)[0]
        if level <= 0:
            result, _ = self.attachment.run(args, kwargs, level=0.0)
        elif self._token_islands().by_token:
            result = self._token_islands().run(partial(self.model, *args, **kwargs), level, done)
        else:
            result, _ = self._token_islands().run(partial(self.attachment.run, args, kwargs, level=level), level, done)
        self._record_parts(args, kwargs, done, level, (time.monotonic_ns() - began_ns) * 1e-6, (due_ns - began_ns) * 1e-6)
        return result

    def _token_islands(self) -> Islands:
        if self._islands is None:
            options = {"arithmetic": self.arithmetic, "num_threads": self._num_threads}
            self._islands = Islands(self.model, self.graph, self.sites, self._gate_of, **options)
        return self._islands

    def _runs_on_engine(self, inputs: list[Tensor]) -> bool:
        if self.training:
            return False
        for x in inputs:
            if not x.is_cpu:
                return False
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *self.model.parameters())):
            self._warn_once("grad", "Gradients are enabled, so this call runs on PyTorch; use torch.no_grad() to run on the engine.")
            return False
        if torch.is_autocast_enabled("cpu"):
            self._warn_once("autocast", "Autocast is enabled, so this call runs on PyTorch; the engine computes in float32, without it.")
            return False
        return self._model_watch.on_cpu()

    def _check_devices(self, inputs: list[Tensor]) -> None:
        """Raises InputError where inputs are on several devices, or on another one than a model that is on one."""
        given, own = {x.device for x in inputs}, {p.device for p in self.model.parameters()}
        if len(given) > 1 or (len(own) == 1 and given != own):
            names = " and ".join(sorted(map(str, given | own)))
            raise InputError(f"The model and all inputs must be on one device, got {names}; move them with `.to(...)`.")

    def _record_parts(
        self, args: tuple, kwargs: dict[str, Any], done: list[tuple[Totals, Execution]], level: float, latency_ms: float, limit_ms: float
    ) -> None:
        """Counts a call that PyTorch ran but for the parts in `done`."""
        example, controller = self.example, self._controller
        batch = tensors_in(pytree.tree_leaves((args, kwargs)))[0].shape[0]
        length = length_of(self.model.forward, args, kwargs) / length_of(self.model.forward, *example)
        all_macs = self._macs * length * batch
        self._recorder.add_parts(
            [(totals, execution.counts) for totals, execution in done],
            samples=batch,
            latency_ms=latency_ms,
            macs=all_macs - sum(totals.macs * batch - execution.macs for totals, execution in done),
            all_macs=all_macs,
            level=level,
            missed=latency_ms > min(limit_ms, math.inf if controller is None else controller.budget_ms),
        )


def _hook_tables_of(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """Returns the tables of the hooks that PyTorch runs at a call of a module."""
    own = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    names = ("forward_pre", "forward", "backward_pre", "backward")
    return (*own, *(getattr(nn_module, f"_global_{name}_hooks") for name in names))
