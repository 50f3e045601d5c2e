"""Parts of a model that run on the engine where the whole cannot: the MLPs of a decoder that writes token by token into a cache.

Such a call hands over a cache, which no captured graph can hold, so the model runs in PyTorch. Its gated MLPs are modules from one
tensor to one tensor; for one token each is a few matrix-vector products bound by reading weights, and there the engine reads only
what the token needs: with thresholds that a calibration set for single tokens, the columns of inputs above them (`thinning`);
otherwise the neurons that the gates choose.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynprune.errors import DynpruneError
from dynprune.gates.heads import Gate
from dynprune.graph.capture import Graph
from dynprune.graph.sites import Site
from dynprune.runtime.arithmetic import Arithmetic
from dynprune.runtime.engine import Engine, Execution
from dynprune.runtime.plan import Plan
from dynprune.runtime.session import Session, sites_in_common
from dynprune.runtime.statistics import Totals
from dynprune.runtime.thinning import thinned

_CASTS = frozenset({torch.ops.aten.to.dtype, torch.ops.aten.clone.default})
"""What PyTorch runs around a model in half precision."""


class Islands:
    """Runs a model in PyTorch with its gated parts on the engine where their input is one token per sample.

    Args:
        model: the user's model.
        graph: its captured graph.
        sites: those of its gates.
        gates: by site name.
        arithmetic, num_threads: see `DynamicModel`.

    Attributes:
        paths: of the modules that are islands: the innermost ones that hold all of a channel site, are called once, with one tensor in
            and one out, and run wholly on the engine.
        by_token: whether the islands have thresholds for single tokens. The rest of the model then runs whole: its gates would save
            nothing there.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        sites: Sequence[Site],
        gates: Mapping[str, Gate],
        *,
        arithmetic: Arithmetic,
        num_threads: int,
    ):
        self._model = model
        self._gates = gates
        self._arithmetic = arithmetic
        self._num_threads = num_threads
        self._sessions: dict[str, Session] = {}
        self._engines: dict[str, Engine] = {}
        self._totals: dict[str, Totals] = {}
        self._lock = threading.RLock()
        self._sites: defaultdict[str, dict[str, Site]] = defaultdict(dict)
        for site in sites:
            path = _home(site)
            if path and path in graph.tensor_modules and graph.call_counts.get(path) == 1 and not (site.is_heads or site.is_repeated):
                self._sites[path][site.name.removeprefix(f"{path}.")] = site
        self.by_token = any(self._has_curves(known) for known in self._sites.values())
        for path, known in self._sites.items():
            session = self._capture(path, known) if self._has_curves(known) or not self.by_token else None
            if session is not None:
                self._sessions[path] = session
                self._engines[path] = engine = self._engine(path, session, known)
                self._totals[path] = self._totals_of(path, engine.plan, known)
        self.paths = tuple(self._sessions)

    def run(self, call: Callable[[], Any], level: float, done: list[tuple[Totals, Execution]]) -> Any:
        """Returns `call()`, during which the islands run on the engine at `level`. Calls from several threads wait for each other.

        Appends to `done` what all of an island would be and what it executed, each time that one runs on the engine.
        """
        with self._lock:
            own = {path: self._model.get_submodule(path) for path in self.paths}
            saved = {path: vars(module).get("forward") for path, module in own.items()}
            try:
                for path, module in own.items():
                    module.forward = self._on_engine(path, module.forward, level, done)
                return call()
            finally:
                for path, module in own.items():
                    if saved[path] is None:
                        vars(module).pop("forward", None)
                    else:
                        module.forward = saved[path]

    def _on_engine(self, path: str, forward: Callable[..., Any], level: float, done: list[tuple[Totals, Execution]]) -> Callable[..., Any]:
        session, engine, totals = self._sessions[path], self._engines[path], self._totals[path]
        dtype = session.graph.inputs[0].dtype

        def run(*args: Any, **kwargs: Any) -> Any:
            if len(args) != 1 or kwargs or not _is_one_token(args[0], dtype):
                return forward(*args, **kwargs)
            outputs, execution = engine.run(args, level=level)
            done.append((totals, execution))
            return session.pack(outputs)

        return run

    def _capture(self, path: str, known: Mapping[str, Site]) -> Session | None:
        """Returns the plan of one island for one token, or None where it has no plan that keeps its gates and leaves nothing to PyTorch."""
        site = next(iter(known.values()))
        module = self._model.get_submodule(path)
        token = torch.zeros(1, 1, site.gate_channels, dtype=next(module.parameters()).dtype)
        options = {"include": ("*",), "exclude": (), "group_size": site.group_size, "arithmetic": self._arithmetic}
        try:
            session = Session(module, (token,), {}, **options)
        except DynpruneError:
            return None
        session.sites = sites_in_common(session.sites, {} if self.by_token else known)
        whole = self.by_token or len(session.sites.sites) == len(known)
        alone = all(step.torch_call is None or step.torch_call.target in _CASTS for step in session.plan.steps)
        return session if whole and alone else None

    def _has_curves(self, known: Mapping[str, Site]) -> bool:
        return all(self._gates[site.name].token_curves.numel() for site in known.values())

    def _engine(self, path: str, session: Session, known: Mapping[str, Site]) -> Engine:
        if not self.by_token:
            gates = {name: self._gates[site.name] for name, site in known.items()}
            return session.engine(gates, costs=None, num_threads=self._num_threads)
        curves = {}
        for site in known.values():
            makes, reads = self._gates[site.name].token_curves
            curves |= {name.removeprefix(f"{path}."): makes for name in site.producers}
            curves |= {consumer.module_path.removeprefix(f"{path}."): reads for consumer in site.consumers}
        return Engine(*thinned(session.plan, curves), num_threads=self._num_threads)

    def _totals_of(self, path: str, plan: Plan, known: Mapping[str, Site]) -> Totals:
        """Returns what a run of all of an island would be; with thresholds its sites are the inputs of layers."""
        names = [f"inputs of {path}.{site.name}" if self.by_token else known[site.name].name for site in plan.sites]
        return Totals(float(plan.macs), tuple(names), np.array([site.num_channels for site in plan.sites], np.int64))


def _home(site: Site) -> str:
    """Returns the path of the innermost module that holds the producers and consumers of a channel site; "" where it is the root."""
    if site.kind != "channels":
        return ""
    paths = [path.split(".")[:-1] for path in (*site.producers, *(consumer.module_path for consumer in site.consumers))]
    common = 0
    while all(len(path) > common and path[common] == paths[0][common] for path in paths):
        common += 1
    return ".".join(paths[0][:common])


def _is_one_token(x: Any, dtype: torch.dtype) -> bool:
    return (
        isinstance(x, Tensor)
        and x.dtype is dtype
        and x.device.type == "cpu"
        and x.ndim == 3
        and x.shape[1] == 1
        and not (torch.is_grad_enabled() and x.requires_grad)
    )
