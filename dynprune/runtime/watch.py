"""Notices that weights were written in place or replaced, at the cost of a few C loops per call."""

from __future__ import annotations

import operator
from itertools import chain

from torch import Tensor, nn

_VERSION = operator.attrgetter("_version")
"""How often a tensor was written in place."""


class Watch:
    """Knows the parameters, buffers and submodules of modules as they were when it was made.

    Writes through `tensor.data`, and to tensors made in inference mode, leave no trace and are not noticed.
    """

    def __init__(self, *roots: nn.Module):
        modules = {module: None for root in roots for module in root.modules()}
        self._tables = [table for module in modules for table in (module._parameters, module._buffers, module._modules) if table]
        self._members = list(self._now())
        self._tensors = [x for x in self._members if isinstance(x, Tensor) and not x.is_inference()]
        self._version = sum(map(_VERSION, self._tensors))
        self._all_on_cpu = all(x.device.type == "cpu" for x in self._members if isinstance(x, Tensor))

    def replaced(self) -> bool:
        """Whether a parameter, buffer or module is another object than it was."""
        now = list(self._now())
        return len(now) != len(self._members) or not all(map(operator.is_, now, self._members))

    def written(self) -> bool:
        """Whether a parameter or buffer was written in place."""
        return sum(map(_VERSION, self._tensors)) != self._version

    def on_cpu(self) -> bool:
        """Whether all parameters and buffers are on the CPU; of a later move only the first one tells, as modules move whole."""
        return self._all_on_cpu and (not self._tensors or self._tensors[0].device.type == "cpu")

    def _now(self) -> chain:
        return chain.from_iterable(map(dict.values, self._tables))
