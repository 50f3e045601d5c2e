"""Importing the package is light: optional friends stay out, and the command starts without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

OPTIONAL = ("transformers", "timm", "lightning", "ray", "onnxruntime", "openvino", "sklearn", "matplotlib", "rich", "torchvision", "pandas")
USE_ALL = "import dynprune; [getattr(dynprune, name) for name in dynprune.__all__]"


def loaded_after(code: str) -> set[str]:
    """Returns the top-level modules that a fresh interpreter has loaded after running `code`."""
    script = f"{code}\nimport sys\nprint('\\n'.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def loaded_by_all_names() -> set[str]:
    return loaded_after(USE_ALL)


@pytest.mark.parametrize("friend", OPTIONAL)
def test_public_names_load_no_optional_friend(friend, loaded_by_all_names):
    assert "torch" in loaded_by_all_names
    assert friend not in loaded_by_all_names


@pytest.mark.parametrize(
    "code",
    ["import dynprune", "import dynprune.errors, dynprune.control.controller", "from dynprune.cli import build_parser; build_parser()"],
)
def test_starts_without_torch(code):
    assert not {"torch", "numpy", "psutil"} & loaded_after(code)


def test_every_public_name_is_there():
    import dynprune

    assert sorted(dynprune.__all__) == sorted([*dynprune._MODULE_OF, "__version__"])
    assert all(getattr(dynprune, name) is not None for name in dynprune.__all__)


def test_unknown_name_is_an_attribute_error():
    import dynprune

    with pytest.raises(AttributeError, match="no attribute 'DynamicModle'"):
        dynprune.DynamicModle  # noqa: B018
