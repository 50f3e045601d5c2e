"""What the gates do with a set of inputs: which layers are cut, and whether the inputs matter for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from dynprune.control.checks import check_level
from dynprune.errors import InputError
from dynprune.runtime.model import DynamicModel
from dynprune.training.samples import read_samples


@dataclass(frozen=True)
class SiteUse:
    """What one gate did.

    Attributes:
        name, kind: of the site.
        macs: multiply-adds of one sample that depend on it when it runs whole.
        keep_ratio: share of its groups that ran, mean over samples.
        always, never: shares of its groups that ran for all samples, and for none.
    """

    name: str
    kind: str
    macs: int
    keep_ratio: float
    always: float
    never: float

    @property
    def varies(self) -> float:
        """Share of the groups that some samples ran and others did not."""
        return 1.0 - self.always - self.never


@dataclass(frozen=True)
class GateReport:
    """What all gates did at one level; `print` it for a table.

    Attributes:
        level: of the gates.
        samples: how many inputs were looked at.
        sites: in the model's order.
    """

    level: float
    samples: int
    sites: tuple[SiteUse, ...]

    @property
    def input_dependent(self) -> bool:
        """Whether any group ran for some samples and not for others."""
        return any(site.varies > 0 for site in self.sites)

    def __str__(self) -> str:
        head = f"{'site':<32} {'kind':<8} {'macs':>12} {'keep':>6} {'always':>7} {'varies':>7} {'never':>6}"
        rows = [
            f"{s.name:<32} {s.kind:<8} {s.macs:>12,} {s.keep_ratio:6.2f} {s.always:7.2f} {s.varies:7.2f} {s.never:6.2f}" for s in self.sites
        ]
        end = f"level {self.level:g}, {self.samples} samples"
        if not self.input_dependent:
            end += "; no gate depends on the input: dm.freeze(level) gives the same answers without gates"
        return "\n".join((head, *rows, end))


def gate_report(dm: DynamicModel, inputs: Iterable[Any], *, level: float = 1.0) -> GateReport:
    """Returns what the gates of `dm` do with `inputs` at a level.

    Args:
        dm: a model with gates; its mode is left as it was.
        inputs: batches as `calibrate` takes them; at most 1024 samples are read.
        level: in (0, 1], default 1.

    Raises:
        CalibrationError: `inputs` is empty or holds NaN or Inf.
        InputError: `level` is not in (0, 1].

    Example:
        >>> print(gate_report(dm, loader, level=0.5))
    """
    if check_level(level) == 0:
        raise InputError("At level 0 everything runs, so there is nothing to report; give a `level` above 0.")
    num_inputs = len(dm.graph.inputs) if dm.attachment is not None else None
    chunks = read_samples(inputs, labelled=False, num_inputs=num_inputs, splittable=dm.graph.dynamic_batch)
    training = [module for module in dm.modules() if module.training]
    dm.eval()
    try:
        with torch.no_grad():
            runs = [dm.attachment.run(chunk.args, chunk.kwargs, level=level)[1] for chunk in chunks]
    finally:
        for module in training:
            module.training = True
    uses = []
    for site in dm.sites:
        mask = torch.cat([masks[site.name] for masks in runs])
        always, never = (mask == 1).all(0), (mask == 0).all(0)
        shares = [float(x.float().mean()) for x in (mask, always, never)]
        uses.append(SiteUse(site.name, site.kind, int(site.macs), *shares))
    return GateReport(float(level), sum(chunk.size for chunk in chunks), tuple(uses))
