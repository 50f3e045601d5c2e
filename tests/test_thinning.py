"""Steps of one token: linear layers that leave out small inputs, against the same in PyTorch; the thresholds that a calibration sets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynprune.gates.heads import gate_key
from dynprune.runtime.engine import Engine
from dynprune.runtime.model import DynamicModel
from dynprune.runtime.thinning import thinned
from dynprune.training.samples import Chunk
from dynprune.training.tokens import set_token_curves

CURVES = torch.tensor([[-1.0, 0.2, 0.9], [-1.0, 0.05, 0.3]])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class GatedMlp(nn.Module):
    def __init__(self, hidden: int = 40, inner: int = 96):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(hidden, inner, False), nn.Linear(hidden, inner), nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def plain_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 96), nn.GELU(), nn.Linear(96, 40))


def built(make) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def masked(model: nn.Module, x: Tensor, thresholds: dict[str, float]) -> Tensor:
    """Returns the model's output where each named layer reads zeros in place of inputs at or below its threshold."""
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, t=threshold: (args[0] * (args[0].abs() > t),))
        for name, threshold in thresholds.items()
    ]
    try:
        return model(x)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("level", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(
    ("make", "makers", "reader"), [(GatedMlp, ("gate", "up"), "down"), (plain_mlp, ("0",), "2")], ids=["gated", "plain"]
)
def test_small_inputs_are_left_out(make, makers: tuple[str, ...], reader: str, level: float) -> None:
    model, x = built(make), torch.randn(3, 1, 40, generator=torch.Generator().manual_seed(1))
    plan = DynamicModel(model, x, include=(), exact=True).plan
    plan, sites, gates = thinned(plan, {name: CURVES[0] for name in makers} | {reader: CURVES[1]})
    assert [site.num_channels for site in plan.sites] == [40, 96], "layers that read one value share a site"
    (got,), execution = Engine(plan, sites, gates, num_threads=2).run([x], level=level)
    limits = {0.0: (-1, -1), 0.5: (0.2, 0.05), 0.75: (0.55, 0.175), 1.0: (0.9, 0.3)}[level]
    want = masked(model, x, {name: limits[0] for name in makers} | {reader: limits[1]})
    assert torch.allclose(got, want, atol=1e-5)
    assert execution.counts[0].tolist() == (x.abs() > limits[0]).sum((1, 2)).tolist()
    assert level == 0 or not torch.allclose(got, model(x), atol=1e-3), "nothing was left out"


class Tokens(nn.Module):
    """Two residual MLPs over tokens."""

    def __init__(self):
        super().__init__()
        self.first, self.second = GatedMlp(), plain_mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


def test_every_layer_keeps_the_share_that_sequences_keep_on_average() -> None:
    model, x = built(Tokens), torch.randn(16, 10, 40, generator=torch.Generator().manual_seed(2))
    dm = DynamicModel(model, x)
    kept = {"first.gate": (1.0, 0.8, 0.4, 0.5), "second.0": (1.0, 0.6, 0.2, 0.3)}
    for site in dm.sites:
        shares = torch.tensor(kept.get(site.name, (1.0,) * 4))
        dm.gate(site.name).record_frequency(shares[:, None].expand(4, site.num_groups))
    set_token_curves(dm.attachment, [Chunk((x,), {}, None, 16)])
    read = {"first.gate": x, "second.0": x + model.first(x)}
    for name, value in read.items():
        curves = dm.gate(name).token_curves
        assert curves.shape == (2, 4) and bool((curves[:, 0] == -1).all())
        for level, share in enumerate((1.0, 0.7, 0.3, 0.3)):
            assert (value.abs() > curves[0, level]).float().mean().item() == pytest.approx(share, abs=0.01)
    others = [dm.gates[gate_key(site.name)] for site in dm.sites if site.name not in read]
    assert all(not hasattr(gate, "token_curves") or gate.token_curves.numel() == 0 for gate in others)
