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
from torch.utils import _pytree as pytree

from dynprune.errors import InputError, UnsupportedModelError
from dynprune.gates.attach import Attachment, check_site_names, make_gate
from dynprune.gates.heads import Gate, gate_key
from dynprune.graph.capture import Graph
from dynprune.graph.sites import Site, Ungated
from dynprune.runtime.arithmetic import Arithmetic
from dynprune.runtime.call import FAR_NS, due_at_ns, is_plain_call, tensors_in
from dynprune.runtime.engine import Engine, Execution
from dynprune.runtime.explain import explain
from dynprune.runtime.governed import Governed
from dynprune.runtime.islands import Islands
from dynprune.runtime.ops import CallForm, compiled_call, register
from dynprune.runtime.plan import Plan
from dynprune.runtime.session import Session, sites_in_common
from dynprune.runtime.statistics import LastCall, Stats, StatsRecorder
from dynprune.runtime.watch import Watch

MAX_SESSIONS = 8
"""Plans kept for different input shapes; the one used longest ago goes first."""

Active = Mapping[str, Sequence[Sequence[int]]]


class DynamicModel(Governed):
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
        super().__init__()
        if not isinstance(model, nn.Module):
            raise InputError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        if isinstance(model, DynamicModel):
            raise InputError("`model` is a DynamicModel already; wrap its `.model`.")
        self.model = model
        self.gates = nn.ModuleDict()
        self.training = self.gates.training = model.training
        self.include, self.exclude, self.group_size = tuple(include), tuple(exclude), group_size
        self.arithmetic = Arithmetic(exact, dtype)
        self.attachment: Attachment | None = None
        self.training_levels: Tensor | None = None
        self.masks: dict[str, Tensor] = {}
        self._example: tuple[tuple, dict[str, Any]] | None = None
        self._sites: dict[str, Site] = {}
        self._unhooked: tuple[Ungated, ...] = ()
        self._model_watch: Watch | None = None
        self._gate_watch: Watch | None = None
        self._recorder = StatsRecorder()
        self._recorder.last_call = LastCall(0.0, 0.0, self._num_threads, 0.0)
        self.register_load_state_dict_post_hook(lambda dm, _: dm.refresh())
        self._uncapturable: set[Any] = set()
        self.number = register(self)
        self.call_form: CallForm | None = None
        if isinstance(example_inputs, Mapping):
            self.capture(**example_inputs)
        elif example_inputs is not None:
            self.capture(*(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)))

    # ------------------------------------------------------------------ calls

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
        if torch.compiler.is_dynamo_compiling():
            return compiled_call(self, args, kwargs, deadline)
        began_ns = time.monotonic_ns()
        due_ns = FAR_NS if deadline is None else due_at_ns(deadline)
        if self._example is not None and not is_plain_call(args, kwargs):
            return self._run_in_pytorch(args, kwargs)
        gates = deadline is not None or self._level > 0 or self._controller is not None or self._monitor is not None
        try:
            session, inputs, batch = self._session_for(args, kwargs, gates=gates)
        except UnsupportedModelError as error:
            if self._example is None:
                raise
            self._warn_once("capture", f"Calls of this form run in PyTorch: {error}")
            return self._run_in_pytorch(args, kwargs)
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
        self._recorder.last_call = LastCall(level, execution.level, threads or self._num_threads, execution.engine_ms)
        missed = False
        if controller is not None:
            missed, guarded = latency_ms > limit_ms, execution.guard_actions > 0
            if guarded:
                reached = self.frontier.accuracy_at(execution.level)
                self._recorder.add_guarded(execution.level - level, self.frontier.accuracy_at(level) - reached)
            options = {"level": level, "threads": threads, "work": float(batch), "limit_ms": limit_ms, "guarded": guarded}
            controller.observe(latency_ms, execution.predicted_ms, **options)
        self._record(session, batch, execution, latency_ms, missed)
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
        self._record(session, batch, execution, (time.monotonic_ns() - began_ns) * 1e-6, missed=False)
        return result

    # ------------------------------------------------------------------ what it is and did

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where gates stand."""
        self._check_captured()
        return tuple(self._sites.values())

    @property
    def plan(self) -> Plan:
        """The engine's plan for the shape of the example inputs."""
        return self._captured().plan

    @property
    def example(self) -> tuple[tuple, dict[str, Any]]:
        """Positional and keyword arguments of the call that the model was first captured from."""
        self._check_captured()
        return self._example

    @property
    def graph(self) -> Graph:
        """The captured graph for the shape of the example inputs."""
        return self._captured().graph

    def gate(self, site_name: str) -> Gate:
        """Returns the gate of a site.

        Raises:
            InputError: no site has this name.
        """
        check_site_names(self.sites, [site_name])
        return self._gate_of[site_name]

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

    def engine_for(self, *inputs: Any, **kwargs: Any) -> Engine:
        """Returns the engine that runs inputs of these shapes."""
        session, _, _ = self._session_for(inputs, kwargs)
        return session.engine(self._gate_of, costs=self.costs, num_threads=self._num_threads)

    def flat_inputs(self, *inputs: Any, **kwargs: Any) -> list[Tensor]:
        """Returns the tensors of a call in the order in which the engine takes them."""
        return [leaf for leaf in pytree.tree_leaves((inputs, kwargs)) if isinstance(leaf, Tensor)]

    def refresh(self) -> None:
        """Makes the engine take the weights as they are now; needed only after writes through `tensor.data`, which leave no trace."""
        self._refresh_sessions(weights=True)

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

    def _apply(self, fn, recurse: bool = True):
        result = super()._apply(fn, recurse)
        self.refresh()
        return result

    # ------------------------------------------------------------------ inside

    def capture(self, *inputs: Any, **kwargs: Any) -> None:
        """Captures the model for inputs of these shapes ahead of their first call; the first capture decides where gates stand.

        Raises:
            InputError, UnsupportedModelError: as for `DynamicModel` itself.
        """
        self._session_for(inputs, kwargs)

    def is_captured(self, *inputs: Any, **kwargs: Any) -> bool:
        """Returns whether the plan for inputs of these shapes is there already."""
        return self._key(inputs, kwargs)[0] in self._sessions

    def _key(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
        """Returns what calls that share a session have in common, and the call's tensors."""
        if not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
            return (((args[0].shape[1:], args[0].dtype),), None, ()), [args[0]]
        leaves = pytree.tree_leaves((args, kwargs))
        inputs = tensors_in(leaves)
        key = (
            tuple((x.shape[1:], x.dtype) for x in inputs),
            None if len(leaves) == len(inputs) else tuple(repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor)),
            tuple(kwargs),
        )
        return key, inputs

    def _session_for(self, args: tuple, kwargs: dict[str, Any], *, gates: bool = True) -> tuple[Session, list[Tensor], int]:
        """Returns the session for the shapes of a call, captured now if they are new, the call's tensors and its batch size.

        `gates` says whether the call's result may depend on the gates; where not, changes of theirs are left to a later call.
        """
        key, inputs = self._key(args, kwargs)
        if not self.training:
            self._follow_changes(gates=gates)
        session = self._sessions.get(key)
        if session is None:
            if key in self._uncapturable:
                raise UnsupportedModelError("torch.export could not capture a call of this form.")
            with self._lock:
                session = self._sessions.get(key) or self._capture(key, args, kwargs)
        batch = session.batch_of(inputs)
        session.last_used_ns = time.monotonic_ns()
        return session, inputs, batch

    def _capture(self, key: Any, args: tuple, kwargs: dict[str, Any]) -> Session:
        if any(isinstance(x, Tensor) and x.ndim and x.shape[0] == 0 for x in pytree.tree_leaves((args, kwargs))):
            raise InputError("The batch must hold at least 1 sample, got 0.")
        options = {"include": self.include, "exclude": self.exclude, "group_size": self.group_size, "arithmetic": self.arithmetic}
        try:
            session = Session(self.model, args, kwargs, **options)
        except UnsupportedModelError:
            if self._example is not None:
                self._uncapturable.add(key)
            raise
        if self._example is None:
            self._take_sites(session)
            self._example = (args, kwargs)
            self.call_form = CallForm(args, kwargs, session.graph)
            self._watch()
        else:
            session.sites = sites_in_common(session.sites, self._sites)
        if len(self._sessions) == MAX_SESSIONS:
            del self._sessions[min(self._sessions, key=lambda known: self._sessions[known].last_used_ns)]
        session.set_lean(self._lean, self._gate_of, costs=self.costs, num_threads=self._num_threads)
        self._sessions[key] = session
        return session

    def _take_sites(self, session: Session) -> None:
        """Makes the gates of the sites that the first capture found."""
        hooked = Attachment(self.model, session.sites.sites, self.gates, session.graph)
        session.sites = sites_in_common(session.sites, {site.name: site for site in hooked.sites})
        honoured = {site.name for site in session.plan.sites}
        self.attachment = Attachment(self.model, [site for site in hooked.sites if site.name in honoured], self.gates, session.graph)
        self._unhooked = hooked.ungated
        self._sites = {site.name: site for site in self.attachment.sites}
        gates = {site.name: make_gate(self.model, site) for site in self.attachment.sites}
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        for name in self._sites:
            self.gates[gate_key(name)] = gates[name].to(device).train(self.training)
            self._gate_of[name] = gates[name]

    def _run_in_pytorch(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Returns the model's output of a call that has no plan."""
        self._follow_changes(gates=True)
        tensors = tensors_in(pytree.tree_leaves((args, kwargs)))
        self._check_devices(tensors)
        level = max(self.level, self._next_level(None, 1, math.inf))
        call = partial(self.attachment.run, args, kwargs, level=level)
        if self.training or level <= 0 or not self._runs_on_engine(tensors):
            return call()[0]
        if self._islands is None:
            session = self._captured()
            options = {"arithmetic": self.arithmetic, "num_threads": self._num_threads}
            self._islands = Islands(self.model, session.graph, self.sites, self._gate_of, **options)
        if self._islands.by_token:
            return self._islands.run(partial(self.model, *args, **kwargs), level)
        return self._islands.run(call, level)[0]

    def _check_captured(self) -> None:
        if self._example is None:
            raise InputError("The model is captured at its first call; pass `example_inputs` or call it once.")

    def _captured(self) -> Session:
        """Returns the session for the shapes of the example."""
        args, kwargs = self.example
        return self._session_for(args, kwargs)[0]

    def _follow_changes(self, *, gates: bool = True) -> None:
        """Makes later calls capture a model again in which a module or weight was replaced, and fold weights again that were written.

        Args:
            gates: whether to look at the gates too, whose weights matter only where they decide.
        """
        model = self._model_watch
        if model is None or not (model.changed() or (gates and self._gate_watch.changed())):
            return
        with self._lock:
            if self._model_watch is not model:
                return
            self._watch()
            if model.replaced():
                self._sessions.clear()
                self._islands = None
            else:
                self._refresh_sessions(weights=model.written())

    def _watch(self) -> None:
        self._model_watch, self._gate_watch = Watch(self.model), Watch(self.gates)

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

    def _record(self, session: Session, batch: int, execution: Execution, latency_ms: float, missed: bool) -> None:
        self._recorder.add(
            session.totals,
            samples=batch,
            latency_ms=latency_ms,
            macs=execution.macs,
            ran=execution.counts,
            level=execution.level,
            missed=missed,
            guard_actions=execution.guard_actions,
        )
