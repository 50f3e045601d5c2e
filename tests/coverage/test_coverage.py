"""Every architecture of the coverage list wraps, equals the model at level 0, and equals the hooked model at random active lists."""

from __future__ import annotations

import pytest
from survey import survey

from zoo import ARCHITECTURES

QUICK = frozenset({"bert, masked", "gpt2", "llama, shared keys", "whisper", "u-net", "u-net, upsampling", "recommender", "dcgan generator"})
"""Those that the default run has; docs/models.md is made from all."""
NEEDS = {"timm": ("torchvision", "timm"), "torchvision": ("torchvision",), "transformers": ("torchvision", "transformers"), "torch.nn": ()}


@pytest.mark.filterwarnings("ignore")  # of the libraries about their own parts
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, id=a.name.replace(" ", "_"), marks=() if a.name in QUICK else pytest.mark.slow) for a in ARCHITECTURES],
)
def test_architecture_wraps_and_stays_equal(architecture) -> None:
    from torchvision_models import declare_operations

    declare_operations()
    for library in NEEDS[architecture.source]:
        pytest.importorskip(library)
    found = survey(architecture)
    assert not found.error
    assert found.is_equal, f"level 0: {found.level_0:.2e}, gated: {found.gated:.2e}"


def test_the_list_is_long_and_its_names_are_its_own() -> None:
    names = [architecture.name for architecture in ARCHITECTURES]
    assert len(names) >= 60 and len(set(names)) == len(names) and set(names) >= QUICK
