"""Small architectures that tests use: one per way in which real models hand channels on. All take `example(name)` as inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynprune.graph.capture import Graph, capture


def conv_bn(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    padding = kernel_size // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


class BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(in_channels, channels, 3, stride)
        self.conv2, self.bn2 = conv_bn(channels, channels)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and in_channels == channels
        self.downsample = nn.Identity() if same else nn.Sequential(*conv_bn(in_channels, channels, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.downsample(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    """Three convolutions; `groups` > 1 makes it a ResNeXt or RegNet block, `squeeze` adds a squeeze-excite."""

    def __init__(self, in_channels: int, channels: int, out_channels: int, groups: int = 1, squeeze: int = 0):
        super().__init__()
        self.a = nn.Sequential(*conv_bn(in_channels, channels, 1), nn.ReLU(inplace=True))
        self.b = nn.Sequential(*conv_bn(channels, channels, 3, groups=groups), nn.ReLU(inplace=True))
        self.se = SqueezeExcite(channels, squeeze, nn.Sigmoid()) if squeeze else nn.Identity()
        self.c = nn.Sequential(*conv_bn(channels, out_channels, 1))
        self.proj = nn.Identity() if in_channels == out_channels else nn.Sequential(*conv_bn(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.proj(x) + self.c(self.se(self.b(self.a(x)))))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int, gate: nn.Module):
        super().__init__()
        self.fc1, self.fc2, self.gate = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


class InvertedResidual(nn.Module):
    """MBConv of MobileNetV2, V3 and EfficientNet: expand, depthwise, squeeze-excite, project."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int, stride: int = 1, squeezed: int = 0, act=nn.ReLU6, gate=nn.Sigmoid):
        super().__init__()
        self.expand = nn.Sequential(*conv_bn(in_channels, hidden, 1), act())
        self.depthwise = nn.Sequential(*conv_bn(hidden, hidden, 3, stride, hidden), act())
        self.se = SqueezeExcite(hidden, squeezed, gate()) if squeezed else nn.Identity()
        self.project = nn.Sequential(*conv_bn(hidden, out_channels, 1))
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.se(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class Fire(nn.Module):
    """SqueezeNet: squeeze, then two convolutions side by side, concatenated."""

    def __init__(self, in_channels: int, squeezed: int, expanded: int):
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeezed, 1)
        self.expand1x1, self.expand3x3 = nn.Conv2d(squeezed, expanded, 1), nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x), inplace=True)
        return torch.cat([F.relu(self.expand1x1(x), inplace=True), F.relu(self.expand3x3(x), inplace=True)], 1)


class DenseLayer(nn.Module):
    def __init__(self, in_channels: int, hidden: int, growth: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(in_channels), nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(hidden), nn.Conv2d(hidden, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, y], 1)


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(F.gelu(self.pwconv1(y))).permute(0, 3, 1, 2)
        return x + self.scale * y


class Head(nn.Module):
    def __init__(self, channels: int, classes: int = 10):
        super().__init__()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def stem(channels: int) -> nn.Sequential:
    return nn.Sequential(*conv_bn(3, channels, 3, 2), nn.ReLU(inplace=True))


def vgg() -> nn.Module:
    """Convolutions, then a classifier over the flattened 3x3 map: each channel owns 9 features of the first linear."""
    features = [*conv_bn(3, 16), nn.ReLU(True), nn.MaxPool2d(2), *conv_bn(16, 24), nn.ReLU(True), nn.MaxPool2d(2)]
    classifier = [nn.Flatten(), nn.Linear(24 * 9, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10)]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(3), *classifier)


class SamePadded(nn.Module):
    """Convolutions padded apart, right and below only, as TensorFlow's SAME does for stride 2."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(3, 16, 3, 2), nn.Conv2d(16, 24, 3, 2), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.conv1(F.pad(x, (0, 1, 0, 1))))
        return self.head(F.relu6(self.conv2(F.pad(x, (0, 1, 0, 1)))))


class Functional(nn.Module):
    """Weights used through torch.nn.functional: no module stands for the layers."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(16, 3, 3, 3) / 5), nn.Parameter(torch.randn(10, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(F.conv2d(x, self.w1, padding=1))
        return F.linear(x.mean((2, 3)), self.w2)


class Shared(nn.Module):
    """One convolution called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1), Head(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.again(torch.relu(self.again(torch.relu(self.first(x)))))))


@dataclass
class Result:
    logits: Tensor
    aux: dict


class TwoInputs(nn.Module):
    """Two tensors and a flag in, a dataclass with a nested dict out."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Conv2d(3, 16, 3, 2), nn.Linear(8, 16)
        self.hidden, self.fc = nn.Linear(16, 32), nn.Linear(32, 10)

    def forward(self, image: Tensor, text: Tensor, double: bool = False) -> Result:
        joined = self.image(image).relu().mean((2, 3)) + self.text(text)
        logits = self.fc(F.gelu(self.hidden(joined)))
        return Result(logits * 2 if double else logits, {"joined": joined, "none": None, "pair": [text, 3]})


class InPlace(nn.Module):
    """In-place operations whose order matters: readers before and after a write, and a write through a view."""

    def __init__(self, through_view: bool = False):
        super().__init__()
        self.conv, self.through_view = nn.Conv2d(3, 8, 3), through_view

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        before = y * 2
        y += 1
        z = y
        z.relu_()
        if self.through_view:
            z[:, :2] = 0.5
            z[:, 2].mul_(3)
        return before + y * 3 + F.hardswish(z, inplace=True)


class AttentionBlock(nn.Module):
    """A pre-norm transformer block over tokens with its own q, k, v layers."""

    def __init__(self, channels: int = 16, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c)
        x = x + self.proj(y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


_BUILDERS = {
    "basic": lambda: nn.Sequential(stem(16), BasicBlock(16, 16), BasicBlock(16, 24, 2), Head(24)),
    "bottleneck": lambda: nn.Sequential(stem(16), Bottleneck(16, 8, 32), Bottleneck(32, 8, 32), Head(32)),
    "vgg": vgg,
    "mbconv": lambda: nn.Sequential(stem(8), InvertedResidual(8, 32, 8), InvertedResidual(8, 32, 16, 2), Head(16)),
    "mbconv_se": lambda: nn.Sequential(
        stem(8),
        InvertedResidual(8, 32, 8, 1, 8, nn.SiLU),
        InvertedResidual(8, 32, 16, 2, 8, nn.Hardswish, nn.Hardsigmoid),
        Head(16),
    ),
    "dense": lambda: nn.Sequential(stem(16), DenseLayer(16, 32, 8), DenseLayer(24, 32, 8), nn.BatchNorm2d(32), nn.ReLU(), Head(32)),
    "fire": lambda: nn.Sequential(stem(16), Fire(16, 8, 16), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(32, 8, 16), Head(32)),
    "grouped": lambda: nn.Sequential(stem(16), Bottleneck(16, 32, 32, 4), Bottleneck(32, 32, 32, 4, 8), Head(32)),
    "convnext": lambda: nn.Sequential(nn.Conv2d(3, 16, 4, 4), ConvNeXtBlock(16), ConvNeXtBlock(16), Head(16)),
    "same_padded": SamePadded,
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 64), nn.Sigmoid(), nn.Linear(64, 32), nn.ELU(), nn.Linear(32, 10)),
    "functional": Functional,
    "shared": Shared,
    "two_inputs": TwoInputs,
    "in_place": InPlace,
    "in_place_view": lambda: InPlace(through_view=True),
    "attention": lambda: nn.Sequential(AttentionBlock(), AttentionBlock(), nn.Linear(16, 10)),
}
NAMES = tuple(_BUILDERS)
"""Every architecture of this file."""
GATED = ("basic", "bottleneck", "vgg", "mbconv", "mbconv_se", "dense", "fire", "grouped", "convnext", "same_padded", "mlp", "attention")
"""Those that have sites."""


def build(name: str, seed: int = 0) -> nn.Module:
    """Returns a model by name in eval mode, with random weights and batch norms that are no identity."""
    torch.manual_seed(seed)
    model = _BUILDERS[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model


def example(name: str, batch: int = 1, seed: int = 1) -> tuple:
    """Returns the positional arguments of a call: images (batch, 3, 16, 16), tokens (batch, 7, 16), or what the model takes."""
    generator = torch.Generator().manual_seed(seed)
    if name == "attention":
        return (torch.randn(batch, 7, 16, generator=generator),)
    image = torch.randn(batch, 3, 16, 16, generator=generator)
    return (image, torch.randn(batch, 8, generator=generator), True) if name == "two_inputs" else (image,)


@cache
def captured(name: str) -> tuple[nn.Module, Graph]:
    """Returns `build(name)` and its graph, shared by all tests: they must not change either."""
    model = build(name)
    return model, capture(model, example(name))
