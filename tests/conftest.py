"""Fixtures of all tests; `helpers.py` beside this file holds what they share otherwise."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

ISAS = ("scalar", "avx2", "avx512")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow; pass --slow to run it"))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set that this machine runs; the others are skipped by name."""
    from dynprune.runtime import _C

    if request.param not in _C.available_isas():
        pytest.skip(f"this machine does not run {request.param}")
    return request.param


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed that every random generator starts a test with, so that a test alone sees what it sees among others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0
