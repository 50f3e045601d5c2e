"""Fixtures of all tests; `helpers.py` beside this file holds what they share otherwise."""

from __future__ import annotations

import pytest

ISAS = ("scalar", "avx2", "avx512")


@pytest.fixture(params=ISAS)
def isa(request) -> str:
    """Every instruction set that this machine runs; the others are skipped by name."""
    from dynprune.runtime import _C

    if request.param not in _C.available_isas():
        pytest.skip(f"this machine does not run {request.param}")
    return request.param
