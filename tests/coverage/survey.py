"""What is counted of each architecture: whether it wraps and stays equal, what can be gated, what PyTorch has to run."""

from __future__ import annotations

import copy
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from architectures import Architecture, build
from helpers import LIST_KINDS, active_list
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dynprune.runtime.model import DynamicModel

TOLERANCE = 1e-4
"""Of a difference between two results, relative to the largest magnitude."""
BATCHES = (1, 3)


@dataclass
class Coverage:
    """What came out for one architecture.

    Attributes:
        error: why it did not wrap, or "".
        level_0: largest relative difference to the original model at level 0, over `BATCHES`.
        from_exact, own_from_exact: where `level_0` is above `TOLERANCE`, the largest relative difference of the engine, and of PyTorch in
            float32, from the original model in float64; otherwise 0.
        gated: the same between engine and hooked model at random active lists.
        sites: number of places with a gate.
        gateable: share of the multiply-adds that lies in a gated space or branch.
        steps, torch_steps: of the plan, and how many of them PyTorch runs.
        torch_macs: share of the multiply-adds that PyTorch runs.
        torch_ops: operations that PyTorch runs, with their number.
        seconds: for capture and plan.
    """

    name: str
    source: str
    held_out: bool = False
    error: str = ""
    parameters: int = 0
    macs: int = 0
    level_0: float = float("nan")
    from_exact: float = 0.0
    own_from_exact: float = 0.0
    gated: float = float("nan")
    sites: int = 0
    gateable: float = 0.0
    steps: int = 0
    torch_steps: int = 0
    torch_macs: float = 0.0
    torch_ops: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_equal(self) -> bool:
        rounded = self.from_exact <= 2 * self.own_from_exact  # the model amplifies rounding, the engine's no more than PyTorch's
        return not self.error and (self.level_0 <= TOLERANCE or rounded) and self.gated <= TOLERANCE

    @property
    def is_whole(self) -> bool:
        """Whether the engine runs it alone."""
        return not self.error and self.torch_steps == 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def survey(architecture: Architecture) -> Coverage:
    """Returns what `architecture` shows; an exception while it is wrapped becomes `error`, one in a call is raised."""
    result = Coverage(architecture.name, architecture.source, architecture.held_out)
    model = build(architecture)
    result.parameters = sum(p.numel() for p in model.parameters())
    began = time.monotonic()
    try:
        dm = DynamicModel(model, architecture.inputs(1))
        plan = dm.plan
    except Exception as error:
        result.error = f"{type(error).__name__}: {error}"
        return result
    result.seconds = time.monotonic() - began
    result.macs = sum(dm._captured().sites.node_macs.values())
    result.sites, result.gateable = len(dm.sites), gateable_share(dm)
    torch_steps = [step for step in plan.steps if step.torch_call is not None]
    result.steps, result.torch_steps = len(plan.steps), len(torch_steps)
    result.torch_macs = sum(step.macs for step in torch_steps) / max(1, plan.macs)
    result.torch_ops = dict(Counter(step.torch_call.target.__name__.partition(".")[0] for step in torch_steps).most_common())
    result.level_0 = max(difference_at_level_0(dm, model, architecture.inputs(batch)) for batch in BATCHES)
    if result.level_0 > TOLERANCE:
        differences = [differences_from_exact(dm, model, architecture.inputs(batch)) for batch in BATCHES]
        result.from_exact, result.own_from_exact = (max(values) for values in zip(*differences, strict=True))
    rng = np.random.default_rng(0)
    result.gated = max(difference_when_gated(dm, architecture.inputs(batch), rng) for batch in BATCHES)
    return result


def gateable_share(dm: DynamicModel) -> float:
    """Returns the share of the model's multiply-adds in nodes that some site owns or that read one."""
    macs = dm._captured().sites.node_macs
    touched = {name for site in dm.sites for name in (*site.nodes, *(consumer.node for consumer in site.consumers))}
    return sum(count for name, count in macs.items() if name in touched) / max(1, sum(macs.values()))


@torch.no_grad()
def difference_at_level_0(dm: DynamicModel, model: nn.Module, inputs: tuple) -> float:
    return relative_difference(dm(*inputs), model(*inputs))


@torch.no_grad()
def differences_from_exact(dm: DynamicModel, model: nn.Module, inputs: tuple) -> tuple[float, float]:
    """Returns the differences of the engine and of PyTorch in float32 from the model in float64."""
    exact = copy.deepcopy(model).double()(*_double(inputs))
    return relative_difference(_double(dm(*inputs)), exact), relative_difference(_double(model(*inputs)), exact)


def _double(values: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, values)


@torch.no_grad()
def difference_when_gated(dm: DynamicModel, inputs: tuple, rng: np.random.Generator) -> float:
    """Returns the difference between engine and hooked model at lists that every kind of `LIST_KINDS` is drawn for."""
    batch = inputs[0].shape[0]
    lists = {site.name: [active_list(kind, site.num_groups, rng).tolist() for kind in rng.choice(LIST_KINDS, batch)] for site in dm.sites}
    return relative_difference(dm.run_with_active(*inputs, active=lists), dm.run_with_active(*inputs, active=lists, backend="hooked"))


def relative_difference(got: Any, want: Any) -> float:
    """Returns the largest difference of two results, relative to each tensor's largest magnitude; infinity where they differ in kind."""
    (got, got_spec), (want, want_spec) = pytree.tree_flatten(got), pytree.tree_flatten(want)
    if got_spec != want_spec:
        return float("inf")
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if not isinstance(b, Tensor):
            worst = worst if a == b else float("inf")
        elif a.shape != b.shape or a.dtype != b.dtype or not torch.equal(torch.isfinite(a), torch.isfinite(b)):
            worst = float("inf")
        elif a.numel():
            a, b = a.double().nan_to_num(0, 0, 0), b.double().nan_to_num(0, 0, 0)
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)))
    return worst
