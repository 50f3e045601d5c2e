"""The real data and pretrained networks: in the folder $DYNPRUNE_DATA, or in shared/data beside the checkout."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(os.environ.get("DYNPRUNE_DATA") or Path(__file__).parents[3] / "shared" / "data")


@pytest.fixture(scope="session")
def data() -> ModuleType:
    """The module that loads everything in that folder; without the folder, the test is skipped."""
    loader = FOLDER / "load.py"
    if not loader.is_file():
        pytest.skip(f"the real data are not here: no file {loader}; set DYNPRUNE_DATA to their folder")
    pytest.importorskip("PIL", reason="the real images need pillow")
    spec = importlib.util.spec_from_file_location("dynprune_real_data", loader)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
