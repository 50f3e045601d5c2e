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

from dynprune.gates.attach import Attachment
from dynprune.runtime.model import DynamicModel

TOLERANCE = 1e-4
"""Of a difference between two results, relative to the largest magnitude."""
BATCHES = (1, 3)
MOST_ROUNDING = 1e-2
"""A model that amplifies rounding to more than this tells nothing."""
ROUNDINGS = 8
"""Times that a model is computed with its modules' results rounded, each time otherwise."""


@dataclass
class Coverage:
    """What came out for one architecture.

    Attributes:
        error: why it did not wrap, or "".
        level_0: largest relative difference to the original model at level 0, over `BATCHES`; infinity where results differ in kind.
        gated: the same between engine and hooked model at random active lists.
        from_exact: where one of these is above `TOLERANCE`, the largest relative difference of the engine from the model in float64;
            otherwise 0.
        rounding: the same of a float64 model of which the result of every module is rounded once to float32, up or down at random: the
            largest of `ROUNDINGS`.
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
    level_0: float = 0.0
    gated: float = 0.0
    from_exact: float = 0.0
    rounding: float = 0.0
    sites: int = 0
    gateable: float = 0.0
    steps: int = 0
    torch_steps: int = 0
    torch_macs: float = 0.0
    torch_ops: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_equal(self) -> bool:
        if self.error or not max(self.level_0, self.gated) < float("inf"):
            return False
        return max(self.level_0, self.gated) <= TOLERANCE or self.from_exact <= 2 * self.rounding < MOST_ROUNDING

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
    cases = [(architecture.inputs(batch), gated) for batch in BATCHES for gated in (False, True)]
    for inputs, gated in cases:
        lists = random_lists(dm, inputs[0].shape[0]) if gated else {}
        difference = difference_when_gated(dm, inputs, lists) if gated else difference_at_level_0(dm, model, inputs)
        if gated:
            result.gated = max(result.gated, difference)
        else:
            result.level_0 = max(result.level_0, difference)
        if TOLERANCE < difference < float("inf"):
            from_exact, rounding = differences_from_exact(dm, inputs, lists)
            if from_exact * result.rounding >= result.from_exact * rounding:  # the case that rounding explains least
                result.from_exact, result.rounding = from_exact, rounding
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
def differences_from_exact(dm: DynamicModel, inputs: tuple, active: dict[str, list[list[int]]]) -> tuple[float, float]:
    """Returns how far the engine, and a float64 model with rounded modules, are from the hooked model in float64 at given lists."""
    model = copy.deepcopy(dm.model).double()
    hooked = Attachment(model, dm.sites, dm.attachment.gates, dm.graph)

    def run() -> Any:
        return hooked.run(_double(inputs), level=1.0, active=active)[0]

    exact = run()
    got = dm.run_with_active(*inputs, active=active)
    rounded = []
    for seed in range(ROUNDINGS):
        generator = torch.Generator().manual_seed(seed)
        leaves = [module for module in model.modules() if not list(module.children())]
        handles = [module.register_forward_hook(lambda _, __, y, g=generator: _rounded(y, g)) for module in leaves]
        rounded.append(relative_difference(run(), exact))
        for handle in handles:
            handle.remove()
    return relative_difference(_double(got), exact), max(rounded)


def _rounded(values: Any, generator: torch.Generator) -> Any:
    """Returns what rounding to float32 may make of values: each times a random 1 +- 2^-24 at most."""

    def one(x: Tensor) -> Tensor:
        return x * (1 + 2.0**-24 * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1)) if x.is_floating_point() else x

    return pytree.tree_map_only(Tensor, one, values)


def _double(values: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, values)


def random_lists(dm: DynamicModel, batch: int) -> dict[str, list[list[int]]]:
    """Returns lists for every site, of a kind that is drawn from `LIST_KINDS` for each sample."""
    rng = np.random.default_rng(batch)
    return {site.name: [active_list(kind, site.num_groups, rng).tolist() for kind in rng.choice(LIST_KINDS, batch)] for site in dm.sites}


@torch.no_grad()
def difference_when_gated(dm: DynamicModel, inputs: tuple, lists: dict[str, list[list[int]]]) -> float:
    """Returns the difference between engine and hooked model at given lists."""
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
