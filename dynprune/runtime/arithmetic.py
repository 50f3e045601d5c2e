"""How the engine computes the products of a plan: which algorithms it may use, and the type of weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dynprune.errors import InputError
from dynprune.runtime.plan import Step

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Arithmetic:
    """How convolutions and linear layers are computed; see `DynamicModel`.

    Attributes:
        exact: no Winograd convolutions.
        dtype: torch.float32, or torch.bfloat16: weights are rounded to it, and so are inputs where there is more than one position;
            sums are float32. Winograd convolutions and sparse weights stay in float32.

    Raises:
        InputError: `dtype` is another one.
    """

    exact: bool = False
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise InputError(f"`dtype` must be torch.float32 or torch.bfloat16, got {self.dtype!r}.")

    def apply(self, steps: Iterable[Step]) -> None:
        """Writes the choice into the steps of a plan."""
        for step in steps:
            if self.exact and step.op == "conv":
                step.ints["winograd"] = [0]
            if self.dtype == torch.bfloat16 and step.op in ("conv", "linear") and step.ints.get("sparse") != [1]:
                step.ints["bf16"] = [1]
