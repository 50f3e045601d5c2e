"""Puts the gates of a draft's sites before the first step that each site owns, and checks that every branch can be skipped."""

from __future__ import annotations

from math import prod

import numpy as np

from dynprune.graph.capture import Node
from dynprune.graph.channels import MIXING
from dynprune.graph.sites import Site
from dynprune.runtime import views
from dynprune.runtime.lowering.draft import Draft
from dynprune.runtime.lowering.registry import dim_of_sample
from dynprune.runtime.lowering.values import DraftStep, NotOnEngine, PaddedValue
from dynprune.runtime.plan import Rows

_CHANNELS_LAST = frozenset({"linear", "layer_norm", "rms_norm"})
_CHANNELS_FIRST = (MIXING - {"linear"}) | {"batch_norm", "group_norm", "instance_norm"}


class Gates:
    """The gates still to be placed while the nodes are walked."""

    def __init__(self, draft: Draft):
        self._draft = draft
        self._nodes = {node.name: node for node in draft.graph.nodes}
        self._pooled: dict[tuple[Node, int], list[tuple[frozenset[int], Rows]]] = {}
        order = {node.name: i for i, node in enumerate(draft.graph.nodes)}
        self._starts: dict[str, list[int]] = {}
        outer_first = sorted(range(len(draft.sites)), key=lambda i: (draft.sites[i].kind != "branch", -len(draft.sites[i].nodes)))
        for i in outer_first:
            self._starts.setdefault(min(draft.sites[i].nodes, key=order.__getitem__), []).append(i)

    def before(self, node: Node) -> None:
        """Emits the gates of the sites that begin with `node`."""
        for site in self._starts.get(node.name, ()):
            try:
                self._emit(site, node)
            except NotOnEngine as reason:
                self._draft.drop(site, f"its gate reads '{self._draft.sites[site].gate_input}', which PyTorch makes: {reason}")

    def _emit(self, index: int, node: Node) -> None:
        draft, site = self._draft, self._draft.sites[index]
        source = self._nodes[site.gate_input]
        row_dim = self._channel_dim(site, node, source)
        if row_dim is None:
            draft.drop(index, f"'{source.name}', which its gate reads, has no dimension of {site.gate_channels} channels")
            return
        branches = draft.branches_of(node) - {index}
        pooled = self._pool(source, row_dim, branches, index)
        step = DraftStep("gate", site.name, [pooled], ints={"site": [index]}, branches=branches)
        draft.steps.append(step)

    def _channel_dim(self, site: Site, first: Node, source: Node) -> int | None:
        """Returns which per-sample dimension of the gate's input holds the channels, or None."""
        padded = self._draft.values[source]
        view = self._draft.apart(padded.source if isinstance(padded, PaddedValue) else source).view
        readers = [first] if site.kind == "channels" else [user for user in source.users if user.name in site.nodes]
        rank = len(view.sizes) + 1
        direct = site.kind == "branch" or source in first.inputs
        last = direct and any(reader.op in _CHANNELS_LAST for reader in readers)
        if direct and not last and not any(reader.op in _CHANNELS_FIRST for reader in readers):
            last = rank == 3
        for dim in (rank - 1, 1) if last else (1, rank - 1):
            sample = dim_of_sample(dim, rank, view.batch_dim)
            if sample is not None and sample < len(view.sizes) and view.sizes[sample] == site.gate_channels:
                return sample
        return None

    def _pool(self, source: Node, row_dim: int, branches: frozenset[int], site: int) -> Rows:
        """Returns the means of the source's channels, all of them; gates that run under the same branches share them."""
        for known, pooled in self._pooled.get((source, row_dim), ()):
            if known <= branches:
                return pooled
        draft, padded = self._draft, self._draft.values[source]
        if isinstance(padded, PaddedValue):
            means = self._pool(padded.source, 0, branches, site)
            inner, outer = prod(padded.source.shape[2:]), prod(source.shape[2:])
            return self._remember(source, row_dim, branches, self._scaled(source, means, inner / outer, branches))
        rows, value = draft.planar(source, row_dim)
        if rows.positions == 1 and value.site < 0:
            if rows.rows > 1 and rows.row_stride != 1:
                rows = views.as_rows(draft.relaid(source, (row_dim,)).view, row_dim)
            return rows
        if value.site >= 0 and rows.rows != draft.sites[value.site].num_channels:
            draft.drop(site, f"its gate reads several features of each channel of site '{draft.sites[value.site].name}'")
        buffer = draft.new_buffer(f"{source.name}_mean", rows.rows)
        pooled = Rows(buffer, 0, rows.rows, 1, 1)
        ints = {"scatter": [int(value.site >= 0)], "for_gates": [1]}
        step = DraftStep("mean", source.module_path or source.name, [rows], pooled, ints, in_site=value.site)
        step.branches = branches
        draft.steps.append(step)
        return self._remember(source, row_dim, branches, pooled)

    def _remember(self, source: Node, row_dim: int, branches: frozenset[int], pooled: Rows) -> Rows:
        self._pooled.setdefault((source, row_dim), []).append((branches, pooled))
        return pooled

    def _scaled(self, source: Node, means: Rows, factor: float, branches: frozenset[int]) -> Rows:
        """Emits means * factor: zeros around a plane lower its mean."""
        scaled = Rows(self._draft.new_buffer(f"{source.name}_mean", means.rows), 0, means.rows, 1, 1)
        constants = {"scale": np.full(means.rows, factor, np.float32), "shift": np.zeros(means.rows, np.float32)}
        name = source.module_path or source.name
        ints = {"for_gates": [1]}
        self._draft.steps.append(DraftStep("affine", name, [means], scaled, ints, constants=constants, branches=branches))
        return scaled


def check_branches(draft: Draft) -> None:
    """Drops every branch site whose addition is not a step that hands the branch's input on."""
    handing = {
        (branch, name)
        for step in draft.steps
        if "handover" in step.ints or (step.op == "conv" and len(step.inputs) == 2)
        for branch in step.branches
        for name in step.nodes
    }
    for i, site in enumerate(draft.sites):
        if site.kind == "branch" and (i, site.add_node) not in handing:
            draft.drop(i, f"the engine does not run its addition '{site.add_node}'")
