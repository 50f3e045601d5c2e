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
    from dynprune.errors import CalibrationError, CheckpointError, DynpruneError, InputError, TrainingError, UnsupportedModelError
    from dynprune.pruning.batch_norm import reestimate_batch_norm
    from dynprune.pruning.recipe import load_pruned, save_pruned
    from dynprune.pruning.structured import prune
    from dynprune.pruning.unstructured import sparsify
    from dynprune.runtime.model import DynamicModel
    from dynprune.training.calibrate import calibrate
    from dynprune.training.finetune import finetune
    from dynprune.training.levels import sandwich_levels
    from dynprune.training.loss import GateLoss
    from dynprune.training.report import gate_report

_MODULE_OF = {
    "CalibrationError": "dynprune.errors",
    "CheckpointError": "dynprune.errors",
    "DynamicModel": "dynprune.runtime.model",
    "DynpruneError": "dynprune.errors",
    "Frontier": "dynprune.control.frontier",
    "GateLoss": "dynprune.training.loss",
    "InputError": "dynprune.errors",
    "OperatingPoint": "dynprune.control.frontier",
    "PressurePolicy": "dynprune.control.pressure",
    "ResourceMonitor": "dynprune.control.monitor",
    "TrainingError": "dynprune.errors",
    "UnsupportedModelError": "dynprune.errors",
    "calibrate": "dynprune.training.calibrate",
    "finetune": "dynprune.training.finetune",
    "gate_report": "dynprune.training.report",
    "load_pruned": "dynprune.pruning.recipe",
    "prune": "dynprune.pruning.structured",
    "reestimate_batch_norm": "dynprune.pruning.batch_norm",
    "sandwich_levels": "dynprune.training.levels",
    "save_pruned": "dynprune.pruning.recipe",
    "sparsify": "dynprune.pruning.unstructured",
}

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "DynamicModel",
    "DynpruneError",
    "Frontier",
    "GateLoss",
    "InputError",
    "OperatingPoint",
    "PressurePolicy",
    "ResourceMonitor",
    "TrainingError",
    "UnsupportedModelError",
    "__version__",
    "calibrate",
    "finetune",
    "gate_report",
    "load_pruned",
    "prune",
    "reestimate_batch_norm",
    "sandwich_levels",
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
