"""Architectures of the coverage list in plain torch.nn: what the model libraries hold little of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UNet(nn.Module):
    """Down and up again with transposed convolutions and skip connections (Ronneberger et al. 2015)."""

    def __init__(self, channels: int = 16):
        super().__init__()
        self.enter = self._block(3, channels)
        self.down = nn.ModuleList(self._block(channels * 2**i, channels * 2 ** (i + 1)) for i in range(3))
        self.up = nn.ModuleList(nn.ConvTranspose2d(channels * 2 ** (i + 1), channels * 2**i, 2, 2) for i in reversed(range(3)))
        self.merge = nn.ModuleList(self._block(channels * 2 ** (i + 1), channels * 2**i) for i in reversed(range(3)))
        self.leave = nn.Conv2d(channels, 2, 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Sequential:
        layers = [(nn.Conv2d(n, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(True)) for n in (inputs, outputs)]
        return nn.Sequential(*(layer for group in layers for layer in group))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        skipped = []
        for down in self.down:
            skipped.append(x)
            x = down(F.max_pool2d(x, 2))
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skipped.pop(), up(x)], 1))
        return self.leave(x)


class UpsamplingUNet(nn.Module):
    """Bilinear and nearest upsampling in place of transposed convolutions, group norm."""

    def __init__(self, channels: int = 16):
        super().__init__()
        self.enter, self.down = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 2 * channels, 3, 2, 1)
        self.deep = nn.Sequential(nn.GroupNorm(4, 2 * channels), nn.SiLU(), nn.Conv2d(2 * channels, 2 * channels, 3, padding=1))
        self.merge, self.leave = nn.Conv2d(3 * channels, channels, 3, padding=1), nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.enter(x))
        y = self.down(x)
        y = y + self.deep(y)
        y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
        y = F.silu(self.merge(torch.cat([x, y], 1)))
        return torch.sigmoid(F.interpolate(self.leave(y), scale_factor=2, mode="nearest"))


class Generator(nn.Module):
    """DCGAN's generator (Radford et al. 2016): transposed convolutions from one position."""

    def __init__(self, noise: int = 32, channels: int = 16):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(noise, 4 * channels, 4, 1, 0, bias=False), nn.BatchNorm2d(4 * channels), nn.ReLU(True),
            nn.ConvTranspose2d(4 * channels, 2 * channels, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * channels), nn.ReLU(True),
            nn.ConvTranspose2d(2 * channels, channels, 4, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(True),
            nn.ConvTranspose2d(channels, 3, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip

    def forward(self, noise: Tensor) -> Tensor:
        return self.layers(noise[:, :, None, None])


class TemporalBlock(nn.Module):
    """Dilated causal convolutions with a residual (Bai et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, dilation: int):
        super().__init__()
        self.padding = 2 * dilation
        self.conv1 = nn.Conv1d(inputs, outputs, 3, padding=self.padding, dilation=dilation)
        self.conv2 = nn.Conv1d(outputs, outputs, 3, padding=self.padding, dilation=dilation)
        self.match = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x)[:, :, : -self.padding])
        y = F.relu(self.conv2(y)[:, :, : -self.padding])
        return F.relu(y + self.match(x))


class SpeechTagger(nn.Module):
    """1-D convolutions, a bidirectional LSTM, a classifier per step."""

    def __init__(self, channels: int = 32):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv1d(20, channels, 5, 2, 2), nn.BatchNorm1d(channels), nn.ReLU(), nn.Conv1d(channels, channels, 3, 1, 1)
        )
        self.lstm = nn.LSTM(channels, channels, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Linear(2 * channels, 4 * channels), nn.ReLU(), nn.Linear(4 * channels, 11))

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(F.relu(self.conv(x)).transpose(1, 2))
        return self.head(y)


class Recommender(nn.Module):
    """Embeddings of two numbers, an MLP over both and a product of factors (He et al. 2017): two inputs, two outputs."""

    def __init__(self, items: int = 99, size: int = 32):
        super().__init__()
        self.user, self.item = nn.Embedding(items, size), nn.Embedding(items, size)
        self.mlp = nn.Sequential(nn.Linear(2 * size, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1))
        self.factors = nn.Linear(size, 1)

    def forward(self, user: Tensor, item: Tensor) -> dict[str, Tensor]:
        u, i = self.user(user[:, 0]), self.item(item[:, 0])
        return {"score": self.mlp(torch.cat([u, i], 1)), "factors": self.factors(u * i)}


def encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 128, activation="gelu", batch_first=True, norm_first=norm_first)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 10))


def temporal() -> nn.Module:
    blocks = [TemporalBlock(20, 32, 1), TemporalBlock(32, 32, 2), TemporalBlock(32, 32, 4)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 12))
