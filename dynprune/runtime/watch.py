"""Notices that weights were written in place or replaced, in a few microseconds per call."""

from __future__ import annotations

import inspect

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynprune.gates.heads import Gate
from dynprune.runtime import _C

_VERSION = inspect.getattr_static(Tensor, "_version")


class Watch:
    """Knows the parameters, buffers and submodules of modules as they were when it was made.

    Writes through `tensor.data`, and to tensors made in inference mode, leave no trace and are not noticed. Those to tensors on which no
    output depends, the counters of batch norm layers and the frequencies that gates keep, are not looked for.
    """

    def __init__(self, *roots: nn.Module):
        modules = {module: None for root in roots for module in root.modules()}
        self._tables = tuple(table for module in modules for table in (module._parameters, module._buffers, module._modules) if table)
        self._tags = _C.table_tags(self._tables)
        self._members = tuple(value for table in self._tables for value in table.values())
        uncounted = {id(module.num_batches_tracked) for module in modules if isinstance(module, _BatchNorm)}
        uncounted |= {id(module.keep_frequency) for module in modules if isinstance(module, Gate)}
        self._tensors = tuple(x for x in self._members if isinstance(x, Tensor) and not x.is_inference() and id(x) not in uncounted)
        self._blocks = np.array([getattr(x, "_cdata", 0) for x in self._tensors], np.uint64).tobytes()
        self._version = _C.version_sum(self._tensors, _VERSION)
        self._all_on_cpu = all(x.device.type == "cpu" for x in self._members if isinstance(x, Tensor))

    def changed(self) -> bool:
        """Whether anything was replaced or written."""
        return not _C.unchanged(self._tables, self._tags, self._members, self._tensors, _VERSION, self._blocks, self._version)

    def replaced(self) -> bool:
        """Whether a parameter, buffer or module is another object than it was."""
        return not _C.same_members(self._tables, self._members)

    def written(self) -> bool:
        """Whether a parameter or buffer was written in place."""
        return _C.version_sum(self._tensors, _VERSION) != self._version

    def on_cpu(self) -> bool:
        """Whether all parameters and buffers are on the CPU; of a later move only the first one tells, as modules move whole."""
        return self._all_on_cpu and (not self._tensors or self._tensors[0].is_cpu)
