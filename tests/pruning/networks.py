"""Networks for the tests of pruning, beside those of tests/models.py."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynprune.pruning.structured import prune


class HeadsBlock(nn.Module):
    """A transformer block whose forward takes any number of heads."""

    def __init__(self, channels: int = 16, heads: int = 4):
        super().__init__()
        self.num_heads, self.head_dim = heads, channels // heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim)
        x = x + self.proj(y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class PlainAttention(nn.Module):
    """Attention by two products and a softmax, with three layers of its own."""

    def __init__(self, channels: int = 16, heads: int = 4):
        super().__init__()
        self.head_dim = channels // heads
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, -1, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-2, -1) / self.head_dim**0.5, -1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, -1))


class Transposed(nn.Module):
    """A layer with a weight (in, out), as transformers' GPT-2 has, that keeps its width and adds a tensor without dimensions."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / 4), nn.Parameter(torch.randn(nf))
        self.shift = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf) + self.shift


class ShuffleUnit(nn.Module):
    """Splits its channels, works on a half, concatenates and shuffles (ShuffleNetV2)."""

    def __init__(self, channels: int = 16):
        super().__init__()
        self.first, self.second = nn.Conv2d(channels // 2, channels // 2, 1), nn.Conv2d(channels // 2, channels // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        b = self.second(F.relu(self.first(b)))
        n, _, h, w = a.shape
        return torch.cat([a, b], 1).view(n, 2, -1, h, w).transpose(1, 2).reshape(n, -1, h, w)


def two_layers(hidden: int = 6) -> nn.Sequential:
    """Two linear layers without biases; hidden neuron i has weights of size i + 1 in both."""
    model = nn.Sequential(nn.Linear(4, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, 2, bias=False)).eval()
    sizes = torch.arange(1.0, hidden + 1)
    with torch.no_grad():
        model[0].weight.copy_(sizes[:, None].expand(hidden, 4))
        model[2].weight.copy_(sizes.expand(2, hidden))
    return model


def quick(model: nn.Module, example, **options):
    """Returns `prune(...)` without timing."""
    return prune(model, example, measure=False, **options)


def run_onnx(model: nn.Module, x: Tensor, folder: Path) -> np.ndarray:
    """Returns what ONNX Runtime makes of `x` with the exported model."""
    onnxruntime = pytest.importorskip("onnxruntime")
    path = folder / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own successor
        torch.onnx.export(model, (x,), path, dynamo=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
