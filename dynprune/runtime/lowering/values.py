"""What a node's value is while a plan is drafted, and the draft's mutable steps and buffers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dynprune.graph.capture import Node
from dynprune.runtime.plan import Rows, TorchCall, View


class NotOnEngine(Exception):
    """The engine has no step for a node; PyTorch runs it."""


@dataclass(eq=False)
class DraftBuffer:
    """Memory that may still become a part of another buffer, as the operand of a concatenation does."""

    name: str
    kind: str
    size: int
    parent: int = -1
    parent_offset: int = 0


@dataclass(eq=False)
class DraftStep:
    """A step that later nodes may still extend: fold a scale into its weights, add a residual, an activation.

    `scale` and `shift` (f64, one per output row) are applied to weight and bias when the plan is done.
    """

    op: str
    name: str
    inputs: list[Rows] = field(default_factory=list)
    output: Rows | None = None
    ints: dict[str, list[int]] = field(default_factory=dict)
    floats: dict[str, list[float]] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    in_site: int = -1
    out_site: int = -1
    branches: frozenset[int] = frozenset()
    nodes: list[str] = field(default_factory=list)
    call: TorchCall | None = None
    store: View | None = None
    scale: np.ndarray | None = None
    shift: np.ndarray | None = None

    @property
    def is_open(self) -> bool:
        """Whether a per-row scale and shift of the output may still be folded into the weights."""
        return self.scale is not None and "activation" not in self.ints and len(self.inputs) == 1


@dataclass(frozen=True, eq=False)
class EngineValue:
    """A value in the engine's memory.

    Attributes:
        view: where it lies.
        site: the channel site whose active rows alone are stored, or -1.
        step: the step that wrote it, if nothing but the next user of this value will ever read what that step wrote; else None.
    """

    view: View
    site: int = -1
    step: DraftStep | None = None


@dataclass(frozen=True, eq=False)
class TorchValue:
    """A value that PyTorch made, or an input that no engine step can read (`step` is None)."""

    step: DraftStep | None


@dataclass(frozen=True, eq=False)
class ConstantValue:
    """A value that no input changes: a tensor without batch, or one whose batch dimension has size 1 and stands for any (`repeats`)."""

    value: torch.Tensor | Any
    repeats: bool = False


@dataclass(frozen=True, eq=False)
class ListValue:
    """The results of an operation with several; None for one that the engine does not compute."""

    items: tuple[EngineValue | MergedValue | ConstantValue | None, ...]


@dataclass(frozen=True, eq=False)
class MergedValue:
    """A value in whose tensor the batch shares one dimension with a neighbour, as (batch * heads) does.

    Attributes:
        base: the same value with the two apart.
        first: the first of the two dimensions in the tensor of `base`; the second follows it.
    """

    base: EngineValue
    first: int


def merged(value: EngineValue, first: int | None) -> EngineValue | MergedValue:
    """Returns the value of a tensor in which the batch shares the dimension `first`; None: it does not."""
    return value if first is None else MergedValue(value, first)


@dataclass(frozen=True, eq=False)
class PaddedValue:
    """Zeros around the planes of `source`, not yet written: all users are convolutions and take them as their own padding."""

    source: Node
    top: int
    left: int
    bottom: int
    right: int


DraftValue = EngineValue | TorchValue | ConstantValue | ListValue | MergedValue | PaddedValue
