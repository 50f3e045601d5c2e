"""The cost table: what each step of a plan is predicted to take, from how many of its rows run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dynprune.runtime.plan import Plan


@dataclass(frozen=True, eq=False)
class CostTable:
    """Predicted milliseconds per step for one sample: `fixed_ms + scaled_ms * (share of rows x share of columns that run)`.

    Attributes:
        fixed_ms, scaled_ms: one entry per step of the plan it was measured on.
        level_ms: f64 (levels, steps), mean prediction over the calibration inputs at level i / (levels - 1); the rests of these sums
            tell a gate whether the deadline can still be met.
        signature: of the plan; see `plan_signature`.
    """

    fixed_ms: tuple[float, ...]
    scaled_ms: tuple[float, ...]
    level_ms: np.ndarray
    signature: str

    def fits(self, plan: Plan) -> bool:
        """Whether the table was measured on a plan of these steps."""
        return self.signature == plan_signature(plan)


def plan_signature(plan: Plan) -> str:
    """Returns words that are the same for plans with the same steps and shapes."""
    return ";".join(f"{step.op}:{step.name}:{step.macs}" for step in plan.steps)
