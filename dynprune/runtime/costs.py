"""The cost table: what each step of a plan is predicted to take, from how many of its rows run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dynprune.errors import InputError
from dynprune.runtime.plan import Plan


@dataclass(frozen=True, eq=False)
class CostTable:
    """Predicted milliseconds per step for one sample: `fixed_ms + scaled_ms * (share of rows x share of columns that run)`.

    Attributes:
        fixed_ms, scaled_ms: one entry per step of the plan it was measured on.
        level_ms: f64 (levels, steps), mean prediction over the calibration inputs at level i / (levels - 1); the rests of these sums
            tell a gate whether the deadline can still be met.
        signature: of the plan; see `plan_signature`.
        run_share, work_share: f64 (levels, steps), mean over the calibration inputs of the share of samples that ran the step, and of
            the rows x columns that ran: `level_ms = fixed_ms * run_share + scaled_ms * work_share`. None in files of before.
        site_share: f64 (levels, sites of the plan), mean share of each site's groups that ran. None in files of before.

    Raises:
        InputError: the sizes do not fit each other.
    """

    fixed_ms: tuple[float, ...]
    scaled_ms: tuple[float, ...]
    level_ms: np.ndarray
    signature: str
    run_share: np.ndarray | None = None
    work_share: np.ndarray | None = None
    site_share: np.ndarray | None = None

    def __post_init__(self) -> None:
        sizes = (len(self.fixed_ms), len(self.scaled_ms), *self.level_ms.shape[1:])
        if self.level_ms.ndim != 2 or len(set(sizes)) > 1:
            raise InputError(f"A cost table needs one entry per step in all its parts, got {self.level_ms.shape} and {sizes[:2]}.")
        for share in (self.run_share, self.work_share):
            if share is not None and share.shape != self.level_ms.shape:
                raise InputError(
                    f"The shares of a cost table must have the shape of its level_ms {self.level_ms.shape}, got {share.shape}."
                )

    def fits(self, plan: Plan) -> bool:
        """Whether the table was measured on a plan of these steps."""
        return self.signature == plan_signature(plan)


def plan_signature(plan: Plan) -> str:
    """Returns words that are the same for plans with the same steps, shapes and types."""
    return ";".join(f"{step.op}{':bf16' if step.ints.get('bf16') else ''}:{step.name}:{step.macs}" for step in plan.steps)
