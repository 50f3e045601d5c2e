"""An example call as JSON, so that a file can say how its model was captured. No tensors of floats are kept, only their shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dynprune.errors import InputError

MAX_VALUES = 1 << 16
"""Tensors of whole numbers (token ids, masks) keep their values up to this size; larger ones and floats come back as zeros."""

_PLAIN = (type(None), bool, int, float, str)


def to_json(value: Any) -> dict[str, Any]:
    """Returns the description of one argument or of a tuple, list or dict of them.

    Raises:
        InputError: it holds something else than tensors, numbers, strings, booleans and None.
    """
    if isinstance(value, Tensor):
        about = {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if not (value.is_floating_point() or value.is_complex()) and value.numel() <= MAX_VALUES:
            about["values"] = value.flatten().tolist()
        return about
    if isinstance(value, _PLAIN) and not (isinstance(value, float) and not math.isfinite(value)):
        return {"value": value}
    if type(value) in (tuple, list):
        return {type(value).__name__: [to_json(item) for item in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: to_json(item) for key, item in value.items()}}
    raise InputError(
        f"The model was captured from an example that holds a {type(value).__name__}, which cannot be saved; wrap it with an example of "
        "tensors, numbers, strings, booleans and None, in tuples, lists or dicts."
    )


def from_json(about: Mapping[str, Any]) -> Any:
    """Returns what `to_json` described.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, RuntimeError: it is no such description.
    """
    if "tensor" in about:
        dtype = getattr(torch, about["dtype"])
        if "values" in about:
            return torch.tensor(about["values"], dtype=dtype).reshape(about["tensor"])
        return torch.zeros(about["tensor"], dtype=dtype)
    if "value" in about:
        return about["value"]
    for kind in (tuple, list):
        if kind.__name__ in about:
            return kind(map(from_json, about[kind.__name__]))
    return {key: from_json(item) for key, item in about["dict"].items()}
