"""Whole residual branches: which can be taken out of the user's modules, what they cost, and what stands in for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dynprune.errors import InputError
from dynprune.graph.branches import Branch, find_branches, is_within
from dynprune.graph.capture import Graph
from dynprune.graph.channels import MIXING
from dynprune.pruning.evidence import Evidence, evaluated


@dataclass(frozen=True, eq=False)
class Residual:
    """A residual branch that modules of its own make up.

    Attributes:
        name: module path of the block whose branch it is, or the addition's name.
        replaced: module path -> what stands in for it when the branch is gone; see `Recipe.replaced`.
        nodes: names of the nodes that then cost nothing.
        last: module path of its last convolution or linear layer.
        norm: module path of the batch norm behind that, or "".
        output: path of the module that returns the branch's value.
    """

    name: str
    replaced: dict[str, str]
    nodes: frozenset[str]
    last: str
    norm: str
    output: str


def find_residuals(graph: Graph, macs: dict[str, int]) -> tuple[list[Residual], list[tuple[str, str]]]:
    """Returns the branches that can be taken out, and (place, reason) of those that cannot."""
    found, refused = [], []
    for branch in find_branches(graph, macs)[0]:
        name = branch.add.module_path or branch.add.name
        if any(name == known.name for known in found):
            name = f"{name}.{branch.mask_output.rpartition('.')[2]}".lstrip(".")
        if not branch.mask_output:
            refused.append((name, "no module of its own returns the branch as one tensor"))
        elif (zero := _zero(branch.x.shape, branch.add.shape)) is None:
            refused.append((name, "the branch changes the shape of its input"))
        else:
            found.append(_residual(name, branch, graph, zero))
    return found, refused


def _zero(before: tuple[int | None, ...], after: tuple[int | None, ...]) -> str | None:
    """Returns the stand-in that makes zeros of shape `after` from a value of shape `before`, or None."""
    if before == after:
        return "zero"
    if len(before) != 4 or len(after) != 4 or None in (*before, *after):
        return None
    stride = -(-before[2] // after[2])
    fits = all(-(-before[d] // stride) == after[d] for d in (2, 3))
    return f"zero {after[1]} {stride}" if fits else None


def resized(stand_in: str, rows: Sequence[int] | None) -> str:
    """Returns the stand-in for a branch of whose output rows only some stay, as the stream that it is added to was cut; None is all."""
    kind, *sizes = stand_in.split()
    return stand_in if not sizes or rows is None else f"{kind} {len(rows)} {sizes[1]}"


def _residual(name: str, branch: Branch, graph: Graph, zero: str) -> Residual:
    inside = {node.name for node in branch.nodes}
    modules = dict.fromkeys(_outermost(node.module_path, inside, graph) for node in branch.nodes)
    paths = [path for path in modules if path]
    replaced = {path: zero if is_within(branch.mask_output, path) else "pass" for path in paths}
    mixing = [node.module_path for node in branch.nodes if node.op in MIXING]
    norms = [node.module_path for node in branch.nodes if node.op == "batch_norm"]
    return Residual(name, replaced, frozenset(inside), mixing[-1], norms[-1] if norms else "", branch.mask_output)


def _outermost(path: str, inside: set[str], graph: Graph) -> str:
    """Returns the path of the largest module around `path` that runs for the branch alone; "" where none does."""
    best = ""
    while path:
        here = [node for node in graph.nodes if node.op != "constant" and is_within(node.module_path, path)]
        if not all(node.name in inside for node in here) or path not in graph.tensor_modules or graph.call_counts.get(path) != 1:
            break
        best, path = path, path.rpartition(".")[0]
    return best


def score_residuals(criterion: str, residuals: Sequence[Residual], evidence: Evidence) -> np.ndarray:
    """Returns one score per branch, f64; higher stays longer.

    Norms (l1, l2, fpgm: per weight of its last layer, times the mean scale of the batch norm behind it), bn_scale: that scale alone;
    activation: norm of the branch's value relative to its input; taylor: what the loss loses with it, to first order, squared.

    Raises:
        InputError: the criterion is a callable of one's own, which knows channels only, or needs a batch norm that is not there.
    """
    if criterion == "random":
        return np.random.default_rng(evidence.seed).random(len(residuals))
    if criterion == "activation":
        return _relative_norms(residuals, evidence)
    if criterion == "taylor":
        totals = [[products[f"{r.last}.weight"].sum().item() for r in residuals] for products in evidence.products()]
        return np.mean(np.square(totals), axis=0)
    if criterion not in ("l1", "l2", "fpgm", "bn_scale"):
        raise InputError("Whole branches are ranked by a criterion of this package; a callable of one's own knows channels only.")
    return np.array([_weight_score(criterion, residual, evidence) for residual in residuals])


def _weight_score(criterion: str, residual: Residual, evidence: Evidence) -> float:
    norm = evidence.model.get_submodule(residual.norm) if residual.norm else None
    scale = norm.weight.detach().abs().mean().item() if isinstance(norm, _NormBase) and norm.weight is not None else None
    if criterion == "bn_scale":
        if scale is None:
            raise InputError(f"criterion='bn_scale' needs a batch norm with weights in branch {residual.name!r}; take another criterion.")
        return scale
    weight = evidence.tensor(f"{residual.last}.weight")
    size = weight.abs().mean() if criterion == "l1" else weight.square().mean().sqrt()
    return size.item() * (1.0 if scale is None else scale)


def _relative_norms(residuals: Sequence[Residual], evidence: Evidence) -> np.ndarray:
    """Returns norm of branch over norm of what enters the first of its modules."""
    evidence.moments("")  # raises where there is no data
    squares = {r.name: [0.0, 0.0] for r in residuals}
    handles = []
    for residual in residuals:
        total = squares[residual.name]

        def seen(_: nn.Module, args: tuple, total: list[float] = total) -> None:
            total[0] += args[0].double().square().sum().item() if args and isinstance(args[0], Tensor) else 0.0

        def made(_: nn.Module, args: tuple, y: Tensor, total: list[float] = total) -> None:
            total[1] += y.double().square().sum().item()

        handles.append(evidence.model.get_submodule(next(iter(residual.replaced))).register_forward_pre_hook(seen))
        handles.append(evidence.model.get_submodule(residual.output).register_forward_hook(made))
    try:
        with evaluated(evidence.model), torch.no_grad():
            for chunk in evidence.chunks:
                evidence.model(*chunk.args, **chunk.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return np.sqrt([made / max(seen, 1e-30) for seen, made in squares.values()])
