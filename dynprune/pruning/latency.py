"""How long a call of a model takes on this machine, with the engine or with PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dynprune.errors import InputError
from dynprune.pruning.evidence import evaluated
from dynprune.runtime.model import DynamicModel
from dynprune.timing import measure

RUNTIMES = ("engine", "eager")


def measure_ms(model: nn.Module, args: tuple, kwargs: dict[str, Any], *, runtime: str, seconds: float = 0.2) -> float:
    """Returns the median milliseconds of a call without gradients, on `torch.get_num_threads()` threads.

    Args:
        model: on CPU.
        args, kwargs: of the call.
        runtime: "engine" (a `DynamicModel` at level 0) or "eager".
        seconds: to spend on timed runs.

    Raises:
        InputError: an unknown runtime.
    """
    if runtime not in RUNTIMES:
        raise InputError(f"`runtime` must be one of {RUNTIMES}, got {runtime!r}.")
    with evaluated(model), torch.no_grad():
        if runtime == "eager":
            return measure(lambda: model(*args, **kwargs), min_seconds=seconds).median_ms
        dm = DynamicModel(model)
        engine, inputs = dm.engine_for(*args, **kwargs), dm.flat_inputs(*args, **kwargs)
        return measure(lambda: engine.run(inputs), min_seconds=seconds).median_ms
