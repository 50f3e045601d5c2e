"""Saves and loads what calibration and training added to a model: one safetensors file with JSON inside, never code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dynprune.control.frontier import Frontier
from dynprune.errors import CheckpointError, DynpruneError, InputError
from dynprune.runtime import example
from dynprune.runtime.costs import CostTable
from dynprune.version import __version__

if TYPE_CHECKING:
    from dynprune.runtime.model import DynamicModel

FORMAT = 3
"""Goes up when files can no longer be read by older versions: 2 came with tuned weights, 3 with other types than float32 and thresholds
for single tokens. A file says the lowest that reads it whole."""

_TUNED = "tuned."
_TOKEN_CURVES = ".token_curves"
_KEY = "dynprune"
_COSTS = "costs."
_ARRAYS = ("level_ms", "run_share", "work_share", "site_share")


def save(dm: DynamicModel, path: str | PathLike, base: nn.Module | None = None) -> None:
    """Writes gates, frontier and costs of `dm` to `path`; see `DynamicModel.save`.

    Raises:
        InputError: the model has not been captured, or its example cannot be written down (see `example.to_json`), or `base` is another
            architecture.
        CheckpointError: the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in dm.gates.state_dict().items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel() or not name.endswith(_TOKEN_CURVES)}
    about: dict[str, Any] = {
        "format": _lowest_format(dm, tensors, tuned=base is not None),
        "version": __version__,
        "fingerprint": fingerprint(dm.model if base is None else base),
        "include": list(dm.include),
        "exclude": list(dm.exclude),
        "group_size": dm.group_size,
        "exact": dm.arithmetic.exact,
        "dtype": str(dm.arithmetic.dtype).removeprefix("torch."),
        "example": example.to_json(dm.example),
        "sites": [[site.name, site.kind, site.num_groups] for site in dm.sites],
        "frontier": None if dm.frontier is None else dm.frontier.to_json(),
        "costs": None,
    }
    if dm.costs is not None:
        tensors |= {_COSTS + name: torch.from_numpy(values).contiguous() for name, values in _arrays(dm.costs).items()}
        about["costs"] = {
            "fixed_ms": list(dm.costs.fixed_ms),
            "scaled_ms": list(dm.costs.scaled_ms),
            "signature": dm.costs.signature,
        }
    if base is not None:
        tensors.update(_differences(base, dm.model))
        about["tuned"] = fingerprint(dm.model)
    try:
        save_file(tensors, path, {_KEY: json.dumps(about)})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be written: {error}") from error


def load(path: str | PathLike, model: nn.Module, *, remeasure: bool) -> DynamicModel:
    """Returns a `DynamicModel` of `model` with what is in the file; see `DynamicModel.load`."""
    from dynprune.runtime.model import DynamicModel

    if not isinstance(model, nn.Module):
        raise InputError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    about, tensors = _read(path)
    tuned = {name.removeprefix(_TUNED): tensors.pop(name) for name in list(tensors) if name.startswith(_TUNED)}
    given = fingerprint(model)
    if given not in (about.get("fingerprint"), about.get("tuned")):
        raise CheckpointError(
            f"{str(path)!r} was saved for a model with other parameters (names, shapes or values); load that model's weights first."
        )
    try:
        if tuned and given != about["tuned"]:
            state = {name: _bits(x) ^ tuned[name] if x.numel() else _bits(x) for name, x in model.state_dict().items()}
            state = {name: state[name].view(x.dtype).reshape(x.shape) for name, x in model.state_dict().items()}
            if _fingerprint(state) != about["tuned"]:
                raise CheckpointError(f"{str(path)!r} is damaged: its weights are not those that were saved.")
            model.load_state_dict(state)
        args, kwargs = example.from_json(about["example"])
        options = {name: about[name] for name in ("include", "exclude", "group_size", "exact")}
        dm = DynamicModel(model, dtype=getattr(torch, about.get("dtype", "float32")), **options)
        dm.capture(*args, **kwargs)
        if [[site.name, site.kind, site.num_groups] for site in dm.sites] != about["sites"]:
            raise CheckpointError(f"{str(path)!r} was saved with gates at other sites than this version finds; calibrate the model again.")
        arrays = {name: tensors.pop(_COSTS + name).double().numpy() for name in _ARRAYS if _COSTS + name in tensors}
        dm.gates.load_state_dict(tensors)
        if about["frontier"] is not None:
            costs = about["costs"]
            table = None
            if costs is not None:
                table = CostTable(tuple(costs["fixed_ms"]), tuple(costs["scaled_ms"]), signature=costs["signature"], **arrays)
            dm.set_frontier(Frontier.from_json(about["frontier"]), table)
            if remeasure and table is not None and table.run_share is not None and not dm.measured_here:
                dm.remeasure()
        return dm
    except CheckpointError:
        raise
    except (DynpruneError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {error}") from error


def _lowest_format(dm: DynamicModel, tensors: Mapping[str, Tensor], *, tuned: bool) -> int:
    if dm.arithmetic.dtype != torch.float32 or any(name.endswith(_TOKEN_CURVES) for name in tensors):
        return 3
    return 2 if tuned else 1


def fingerprint(model: nn.Module) -> str:
    """Returns a SHA-256 of the names, shapes, dtypes and values of the model's parameters and buffers."""
    return _fingerprint(model.state_dict())


def _fingerprint(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _arrays(costs: CostTable) -> dict[str, np.ndarray]:
    return {name: values for name in _ARRAYS if (values := getattr(costs, name)) is not None}


def _differences(base: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """Returns how the bits of each parameter and buffer differ, which gives back the tuned ones exactly."""
    old, new = base.state_dict(), model.state_dict()
    if {name: (x.shape, x.dtype) for name, x in old.items()} != {name: (x.shape, x.dtype) for name, x in new.items()}:
        raise InputError("`base` must be the model as it was before training: its parameters have other names, shapes or types.")
    return {_TUNED + name: _bits(old[name]) ^ _bits(x) for name, x in new.items() if x.numel()}


def _bits(x: Tensor) -> Tensor:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _read(path: str | PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {str(path)!r}.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is not a whole safetensors file: {error}") from error
    if text is None:
        raise CheckpointError(f"{str(path)!r} is a safetensors file, but not one that dynprune saved.")
    try:
        about = json.loads(text)
        written = about["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged: its description cannot be read ({error}).") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{str(path)!r} is damaged: {name!r} holds NaN or infinity.")
    if not isinstance(written, int) or written > FORMAT:
        raise CheckpointError(
            f"{str(path)!r} has format {written!r}; this version (dynprune {__version__}) reads up to {FORMAT}. Update dynprune."
        )
    return about, tensors
