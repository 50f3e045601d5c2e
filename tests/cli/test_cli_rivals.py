"""The rivals give the model's output, and say why where they cannot."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from dynprune.cli.rivals import NAMES, built_rivals, parse_names
from dynprune.errors import InputError

MODULE_OF = {"onnxruntime": "onnxruntime", "openvino": "openvino"}


def small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name == "compile" else ()) for name in NAMES])
def test_rival_gives_the_models_output(name):
    if name in MODULE_OF:
        pytest.importorskip(MODULE_OF[name], reason=f"{name} is not installed")
    model, x = small_model(), torch.randn(2, 3, 8, 8)
    with built_rivals((name,), model, (x,), threads=1) as (rival,):
        assert rival.reason == ""
        output = torch.as_tensor(rival.run())
    torch.testing.assert_close(output, model(x).detach(), rtol=1e-5, atol=1e-6)


def test_a_rival_takes_pytorchs_fused_attention():
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, x = Attention().eval(), torch.randn(1, 5, 16)
    with built_rivals(("onnxruntime",), model, (x,), threads=1) as (rival,):
        assert rival.reason == ""
        output = torch.as_tensor(rival.run())
    assert torch.backends.mha.get_fastpath_enabled()
    torch.testing.assert_close(output, model(x).detach(), rtol=1e-4, atol=1e-5)


class Keywords(nn.Module):
    """Returns a dict, and takes options that the exporter must not fill in, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x, mask=None, **options):
        return {"logits": self.fc(x), "cache": options.get("use_cache")}


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_rival_takes_a_model_that_returns_more_than_a_tensor(name):
    pytest.importorskip(name, reason=f"{name} is not installed")
    model, x = Keywords().eval(), torch.randn(2, 8)
    with built_rivals((name,), model, (x,), threads=1) as (rival,):
        assert rival.reason == ""
        output = torch.as_tensor(rival.run())
    torch.testing.assert_close(output, model(x)["logits"].detach(), rtol=1e-5, atol=1e-6)


def test_rival_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with built_rivals(("onnxruntime", "eager"), small_model(), (torch.randn(1, 3, 8, 8),), threads=1) as (onnxruntime, eager):
        assert onnxruntime.run is None
        assert onnxruntime.reason.startswith("not installed")
        assert eager.run is not None


def test_rival_that_cannot_take_the_model_says_why():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("this model does not like you\nand says more")

    with built_rivals(("eager",), Fails(), (torch.randn(1, 3),), threads=1) as (rival,):
        assert rival.run is None
        assert rival.reason == "failed: RuntimeError: this model does not like you"


@pytest.mark.parametrize(("text", "names"), [("eager, openvino,eager", ("eager", "openvino")), ("none", ()), ("", ())])
def test_names(text, names):
    assert parse_names(text) == names


def test_unknown_name():
    with pytest.raises(InputError, match="rival 'onnx' is unknown; choose of eager, compile, onnxruntime, openvino"):
        parse_names("eager,onnx")
