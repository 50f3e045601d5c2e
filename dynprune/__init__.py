"""Dynamic inference for PyTorch on CPUs: each input runs only the channels and blocks it needs, within a latency budget.

The names below are the public interface; each is imported when it is first used, so `import dynprune` itself costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dynprune.version import __version__

if TYPE_CHECKING:
    from dynprune.control.frontier import Frontier, OperatingPoint
    from dynprune.control.monitor import ResourceMonitor
    from dynprune.control.pressure import PressurePolicy
    from dynprune.errors import CalibrationError, CheckpointError, DynpruneError, InputError, UnsupportedModelError
    from dynprune.pruning.batch_norm import reestimate_batch_norm
    from dynprune.pruning.recipe import load_pruned, save_pruned
    from dynprune.pruning.structured import prune
    from dynprune.pruning.unstructured import sparsify
    from dynprune.runtime.model import DynamicModel
    from dynprune.training.calibrate import calibrate
    from dynprune.training.finetune import finetune

_MODULE_OF = {
    "CalibrationError": "dynprune.errors",
    "CheckpointError": "dynprune.errors",
    "DynamicModel": "dynprune.runtime.model",
    "DynpruneError": "dynprune.errors",
    "Frontier": "dynprune.control.frontier",
    "InputError": "dynprune.errors",
    "OperatingPoint": "dynprune.control.frontier",
    "PressurePolicy": "dynprune.control.pressure",
    "ResourceMonitor": "dynprune.control.monitor",
    "UnsupportedModelError": "dynprune.errors",
    "calibrate": "dynprune.training.calibrate",
    "finetune": "dynprune.training.finetune",
    "load_pruned": "dynprune.pruning.recipe",
    "prune": "dynprune.pruning.structured",
    "reestimate_batch_norm": "dynprune.pruning.batch_norm",
    "save_pruned": "dynprune.pruning.recipe",
    "sparsify": "dynprune.pruning.unstructured",
}

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "DynamicModel",
    "DynpruneError",
    "Frontier",
    "InputError",
    "OperatingPoint",
    "PressurePolicy",
    "ResourceMonitor",
    "UnsupportedModelError",
    "__version__",
    "calibrate",
    "finetune",
    "load_pruned",
    "prune",
    "reestimate_batch_norm",
    "save_pruned",
    "sparsify",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dynprune' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
