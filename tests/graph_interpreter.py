"""Runs a captured graph node by node in PyTorch with chosen groups switched off: what a gate means, in the plainest words.

A channel of a "channels" site that does not run is zero where a consumer reads it; a branch that does not run adds zero.
"""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from dynprune.graph.capture import Graph, Node
from dynprune.graph.sites import Site, Sites


def run_graph(graph: Graph, inputs: list[torch.Tensor], sites: Sites | None = None, active: dict[str, list[list[int]]] | None = None):
    """Returns (outputs, values by node name, as computed before masking); `active` as for `plan_interpreter.run_plan`."""
    chosen = [(site, active[site.name]) for site in (sites.sites if sites else ()) if active and site.name in active]
    masks = {(c.node, site.name): (site, rows, c.repeat) for site, rows in chosen if site.kind == "channels" for c in site.consumers}
    additions = {site.add_node: (site, rows) for site, rows in chosen if site.kind == "branch"}
    values = dict(zip((node.name for node in graph.inputs), inputs, strict=True))

    def argument(item, node: Node, position: int):
        if not isinstance(item, Node):
            return item
        value = values[item.name]
        if position == 0:
            for (name, _), (site, rows, repeat) in masks.items():
                if name == node.name:
                    value = value * channel_mask(site, rows, repeat, value, 1 if node.op.startswith("conv") else -1)
        if node.name in additions:
            site, rows = additions[node.name]
            if item.name in site.nodes:
                runs = torch.tensor([float(bool(r)) for r in rows]).repeat_interleave(value.shape[0] // len(rows))
                value = value * runs.reshape(-1, *[1] * (value.ndim - 1))
        return value

    for node in graph.nodes:
        if node.op == "constant":
            values[node.name] = node.tensor
        elif node.op != "input":
            args = [pytree.tree_map(lambda item, n=node, i=i: argument(item, n, i), arg) for i, arg in enumerate(node.args)]
            kwargs = pytree.tree_map(lambda item, n=node: argument(item, n, -1), node.kwargs)
            values[node.name] = node.target(*args, **kwargs)
    return [values[o.name] if isinstance(o, Node) else o for o in graph.outputs], values


def channel_mask(site: Site, rows: list[list[int]], repeat: int, value: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns ones where the value's channels run and zeros where they do not, of a shape that broadcasts."""
    mask = torch.zeros(len(rows), site.num_groups)
    for sample, groups in enumerate(rows):
        mask[sample, torch.tensor(groups, dtype=torch.long)] = 1.0
    mask = mask.repeat_interleave(site.group_size, 1).repeat_interleave(repeat, 1)
    mask = mask.repeat_interleave(value.shape[0] // len(rows), 0)  # of a value that begins with the batch
    shape = [1] * value.ndim
    shape[0], shape[dim] = mask.shape
    return mask.reshape(shape)
