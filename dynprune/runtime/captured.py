"""What is captured of a model: its sites and gates, and a session for each set of input shapes, made again where the model changes."""

from __future__ import annotations

import time
from collections.abc import Sequence
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
from dynprune.runtime.call import tensors_in
from dynprune.runtime.engine import Engine
from dynprune.runtime.governed import Governed
from dynprune.runtime.ops import CallForm
from dynprune.runtime.plan import Plan
from dynprune.runtime.session import Session, sites_in_common
from dynprune.runtime.watch import Watch

MAX_SESSIONS = 8
"""Plans kept for different input shapes; the one used longest ago goes first."""
_MAX_FAMILIAR = 64
"""Shapes of one tensor, with their batch sizes, whose plans are found at once."""


class Captured(Governed):
    """The part of `DynamicModel` that captures the model and keeps up with it; see there.

    Attributes:
        attachment: the hooks on the model's own modules; None before the first capture.
        call_form: of the call that was captured first; None before.
    """

    def __init__(self, model: nn.Module, *, include: Sequence[str], exclude: Sequence[str], group_size: int, arithmetic: Arithmetic):
        super().__init__()
        self.model = model
        self.gates = nn.ModuleDict()
        self.training = self.gates.training = model.training
        self.include, self.exclude, self.group_size = tuple(include), tuple(exclude), group_size
        self.arithmetic = arithmetic
        self.attachment: Attachment | None = None
        self.call_form: CallForm | None = None
        self._example: tuple[tuple, dict[str, Any]] | None = None
        self._sites: dict[str, Site] = {}
        self._macs = 0.0
        self._unhooked: tuple[Ungated, ...] = ()
        self._uncapturable: set[Any] = set()
        self._familiar: dict[Any, tuple[Session, int]] = {}
        self._model_watch: Watch | None = None
        self._gate_watch: Watch | None = None
        self.register_load_state_dict_post_hook(lambda dm, _: dm.refresh())

    def capture(self, *inputs: Any, **kwargs: Any) -> None:
        """Captures the model for inputs of these shapes ahead of their first call; the first capture decides where gates stand.

        Raises:
            InputError, UnsupportedModelError: as for `DynamicModel` itself.
        """
        self._session_for(inputs, kwargs)

    def is_captured(self, *inputs: Any, **kwargs: Any) -> bool:
        """Returns whether the plan for inputs of these shapes is there already."""
        return self._key(inputs, kwargs)[0] in self._sessions

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
    def graph(self) -> Graph:
        """The captured graph for the shape of the example inputs."""
        return self._captured().graph

    @property
    def example(self) -> tuple[tuple, dict[str, Any]]:
        """Positional and keyword arguments of the call that the model was first captured from."""
        self._check_captured()
        return self._example

    def gate(self, site_name: str) -> Gate:
        """Returns the gate of a site.

        Raises:
            InputError: no site has this name.
        """
        check_site_names(self.sites, [site_name])
        return self._gate_of[site_name]

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

    def _apply(self, fn, recurse: bool = True):
        result = super()._apply(fn, recurse)
        self.refresh()
        return result

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
        if not self.training:
            self._follow_changes(gates=gates)
        one_tensor = not kwargs and len(args) == 1 and isinstance(args[0], Tensor)
        if one_tensor:
            x = args[0]
            familiar = self._familiar.get((x.shape, x.dtype, x.layout))
            if familiar is not None:
                session, batch = familiar
                session.last_used_ns = time.monotonic_ns()
                return session, [x], batch
        key, inputs = self._key(args, kwargs)
        session = self._sessions.get(key)
        if session is None:
            if key in self._uncapturable:
                raise UnsupportedModelError("torch.export could not capture a call of this form.")
            with self._lock:
                session = self._sessions.get(key) or self._capture(key, args, kwargs)
        batch = session.batch_of(inputs)
        session.last_used_ns = time.monotonic_ns()
        if one_tensor and len(self._familiar) < _MAX_FAMILIAR:
            with self._lock:
                if self._sessions.get(key) is session:
                    self._familiar[x.shape, x.dtype, x.layout] = session, batch
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
            self._familiar.clear()
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
        self._macs = float(session.sites.macs)
        self._sites = {site.name: site for site in self.attachment.sites}
        gates = {site.name: make_gate(self.model, site) for site in self.attachment.sites}
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        for name in self._sites:
            self.gates[gate_key(name)] = gates[name].to(device).train(self.training)
            self._gate_of[name] = gates[name]

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
                self._familiar.clear()
                self._islands = None
            else:
                self._refresh_sessions(weights=model.written())

    def _watch(self) -> None:
        self._model_watch, self._gate_watch = Watch(self.model), Watch(self.gates)
