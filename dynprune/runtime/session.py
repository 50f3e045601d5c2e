"""One captured shape of a model: its graph, and the plan and engine made from it when they are first needed."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dynprune.errors import InputError
from dynprune.gates.heads import Gate
from dynprune.graph.capture import Graph, capture
from dynprune.graph.sites import Site, Sites, find_sites
from dynprune.graph.widen import widened
from dynprune.runtime.arithmetic import Arithmetic
from dynprune.runtime.costs import CostTable
from dynprune.runtime.engine import Engine
from dynprune.runtime.lower import lower
from dynprune.runtime.plan import Plan
from dynprune.runtime.statistics import Totals


class Session:
    """A model for one set of input shapes (any batch size): captured at once, lowered when it first runs on the engine.

    Args:
        model: the user's model.
        args, kwargs: an example call.
        include, exclude, group_size: see `find_sites`.
        arithmetic: of the engine.

    Attributes:
        last_used_ns: `time.monotonic_ns` of the last call; 0 before the first.
    """

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], *, include, exclude, group_size: int, arithmetic: Arithmetic):
        with torch.autocast("cpu", enabled=False):
            self.graph: Graph = capture(model, args, kwargs)
        self._single = self.graph.out_spec.is_leaf()
        self.sites: Sites = find_sites(self.graph, include=include, exclude=exclude, group_size=group_size)
        self._arithmetic = arithmetic
        self.last_used_ns = 0
        self._lock = threading.Lock()
        self._lean = False
        self._plan: Plan | None = None
        self._engine: Engine | None = None
        self._totals: Totals | None = None

    @property
    def plan(self) -> Plan:
        """The lowered model; made at the first use."""
        with self._lock:
            return self._lowered()

    @property
    def totals(self) -> Totals:
        """What a run of everything would be."""
        totals = self._totals
        if totals is None:
            plan = self.plan
            rows = np.array([site.num_channels for site in plan.sites], np.int64)
            totals = self._totals = Totals(float(plan.macs), tuple(site.name for site in plan.sites), rows)
        return totals

    def engine(self, gates: Mapping[str, Gate], *, costs: CostTable | None, num_threads: int) -> Engine:
        """Returns the engine, which is made at the first use and after `refresh`."""
        engine = self._engine
        if engine is not None:
            return engine
        with self._lock:
            if self._engine is None:
                self._engine = self._built(gates, costs, num_threads)
            return self._engine

    def refresh(self, *, weights: bool) -> None:
        """Makes the next use build the engine again; with `weights` the plan too, which holds the model's folded weights."""
        with self._lock:
            self._engine = None
            if weights:
                self._plan = self._totals = None

    def set_lean(self, lean: bool, gates: Mapping[str, Gate], *, costs: CostTable | None, num_threads: int) -> None:
        """Makes the engine a lean one, or an ordinary one again (see `Engine`); calls use the present one until the new one is built."""
        with self._lock:
            if lean == self._lean:
                return
            self._lean = lean
            if self._engine is not None:
                self._engine = self._built(gates, costs, num_threads)

    def set_num_threads(self, num_threads: int) -> None:
        """Runs later calls on so many threads."""
        if self._engine is not None:
            self._engine.num_threads = num_threads

    def let_go(self, *, plan: bool) -> None:
        """Drops the workspaces that no run uses; with `plan` also the plan and its folded weights, which the next call makes again."""
        if plan and self._plan is not None:
            self.refresh(weights=True)
        elif self._engine is not None:
            self._engine.trim()

    def pack(self, outputs: list[Any]) -> Any:
        """Returns flattened outputs in the form in which the model returns them."""
        if self._single:
            return outputs[0]
        return pytree.tree_unflatten(outputs, self.graph.out_spec)

    def batch_of(self, inputs: list[Tensor]) -> int:
        """Returns the batch size of a call; of a model that fixes it, the one it was captured with.

        Raises:
            InputError: inputs are not dense, or their batch sizes are 0, differ, or are not that of a fixed-batch model.
        """
        sizes = []
        for x in inputs:
            if x.layout is not torch.strided:
                raise InputError(f"Inputs must be dense tensors, got one of layout {x.layout}; call .to_dense().")
            sizes.append(x.shape[0] if x.ndim else 1)
        batch = sizes[0]
        if 0 in sizes:
            raise InputError("The batch must hold at least 1 sample, got 0.")
        if self.graph.dynamic_batch:
            if sizes.count(batch) != len(sizes):
                raise InputError(f"All inputs must have one batch size, got {sizes}.")
        elif batch != self.graph.batch_size:
            raise InputError(f"This model was captured with a fixed batch of {self.graph.batch_size}, got {batch}.")
        return batch

    def _built(self, gates: Mapping[str, Gate], costs: CostTable | None, num_threads: int) -> Engine:
        sites = {site.name: site for site in self.sites.sites}
        return Engine(self._lowered(), sites, gates, costs=costs, num_threads=num_threads, lean=self._lean)

    def _lowered(self) -> Plan:
        if self._plan is None:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                self._plan = lower(widened(self.graph), self.sites)
            self._arithmetic.apply(self._plan.steps)
        return self._plan


def sites_in_common(sites: Sites, known: Mapping[str, Site]) -> Sites:
    """Returns `sites` without those that the model's gates, made for another shape, do not fit."""
    kept = tuple(s for s in sites.sites if s.name in known and s.num_groups == known[s.name].num_groups)
    return Sites(kept, sites.ungated, sites.macs, sites.node_macs)
