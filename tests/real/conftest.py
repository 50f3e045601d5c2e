"""Real data and networks, read where they lie: $DYNPRUNE_DATA, or ../shared/data beside the checkout. The project contains none of them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(os.environ.get("DYNPRUNE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


@pytest.fixture(scope="session")
def data() -> ModuleType:
    """The data folder's own loader, a module with `cifar10`, `network`, `accuracy` and others."""
    loader = FOLDER / "load.py"
    if not loader.exists():
        pytest.skip(f"the real data is absent: there is no {loader}; set DYNPRUNE_DATA to the folder that holds load.py")
    for package in ("PIL", "safetensors"):
        pytest.importorskip(package, reason=f"reading the real data needs {package}")
    spec = importlib.util.spec_from_file_location("dynprune_real_data", loader)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
