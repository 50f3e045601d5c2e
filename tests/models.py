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


class Tied(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), Head(16)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.stem(x).relu()).relu()))


class Causal(nn.Module):
    """1-D convolutions that look back only: padded on both sides, and cut off behind."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 16, 3, padding=2), nn.Conv1d(16, 24, 3, padding=4, dilation=2)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x.flatten(2))[:, :, :-2])
        return self.fc(torch.relu(self.second(y)[..., :-4]).mean(2))


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


class LayersAgain(AttentionBlock):
    """ALBERT's way: one block, called twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class RootMeanSquare(nn.Module):
    """Llama's norm, written out."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale


class RotaryBlock(nn.Module):
    """Llama's block: rotary embeddings, RMS norm, queries that share keys where `key_heads` is smaller, a gated MLP (fused or not)."""

    def __init__(self, channels: int = 16, heads: int = 4, key_heads: int = 4, fused: bool = False):
        super().__init__()
        self.heads, self.key_heads, self.size, self.fused = heads, key_heads, channels // heads, fused
        self.norm1, self.norm2 = RootMeanSquare(channels), RootMeanSquare(channels)
        self.query, self.key = nn.Linear(channels, channels, bias=False), nn.Linear(channels, key_heads * self.size, bias=False)
        self.value, self.proj = nn.Linear(channels, key_heads * self.size, bias=False), nn.Linear(channels, channels, bias=False)
        self.up, self.down = nn.Linear(channels, 64 if fused else 32), nn.Linear(32, channels)
        self.gate = nn.Identity() if fused else nn.Linear(channels, 32)

    def rotate(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2])[:, None] / 10.0 ** torch.arange(self.size // 2).repeat(2)
        first, second = x[..., : self.size // 2], x[..., self.size // 2 :]
        return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        y = self.norm1(x)
        q = self.rotate(self.query(y).view(b, t, self.heads, -1).transpose(1, 2))
        k, v = (layer(y).view(b, t, self.key_heads, -1).transpose(1, 2) for layer in (self.key, self.value))
        k = self.rotate(k)
        if self.heads != self.key_heads:
            k, v = (z[:, :, None].expand(-1, -1, self.heads // self.key_heads, -1, -1).reshape(b, self.heads, t, -1) for z in (k, v))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c))
        y = self.norm2(x)
        up, gate = self.up(y).chunk(2, -1) if self.fused else (self.up(y), self.gate(y))
        return x + self.down(F.silu(gate) * up)


class WindowBlock(nn.Module):
    """Swin's block: rolled windows that share a dimension with the batch, a bias for each head, products written out."""

    def __init__(self, channels: int = 16, heads: int = 2, side: int = 2, whole: bool = False):
        super().__init__()
        self.heads, self.side, self.whole = heads, side, whole
        self.norm, self.attention = nn.LayerNorm(channels), nn.Sequential(nn.Linear(channels, 3 * channels), nn.Linear(channels, channels))
        self.bias = nn.Parameter(torch.randn(1, heads, side * side, side * side))

    def attend(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.attention[0](x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.whole:
            y = F.scaled_dot_product_attention(q, k, v, self.bias)
        else:
            y = ((q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1) + self.bias).softmax(-1) @ v
        return self.attention[1](y.transpose(1, 2).reshape(n, t, c))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        y = torch.roll(self.norm(x), (-1, -1), (1, 2))
        s = self.side
        y = y.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        y = self.attend(y).view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return x + torch.roll(y, (1, 1), (1, 2))


class TransposedLinear(nn.Module):
    """GPT-2's linear layer: the weight is (in, out)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.nf, self.nx = outputs, inputs
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


TransposedLinear.__name__ = "Conv1D"


class GPTBlock(nn.Module):
    """GPT-2's block, with a fused layer that is split, and the tanh form of GELU written out."""

    def __init__(self, channels: int = 16, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.attn, self.proj = TransposedLinear(channels, 3 * channels), TransposedLinear(channels, channels)
        self.fc, self.out = TransposedLinear(channels, 64), TransposedLinear(64, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.attn(x).split(c, 2))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c))
        y = self.fc(x)
        y = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * torch.pow(y, 3.0))))
        return x + self.out(y)


class FlatTokens(nn.Module):
    """OPT's MLP: tokens share a dimension with the batch."""

    def __init__(self, channels: int = 16):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 64), nn.Linear(64, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(-1, x.shape[-1])
        return (y + self.fc2(F.relu(self.fc1(y)))).view(x.shape)


class PairAttention(nn.Module):
    """A module that returns a tuple, as nn.MultiheadAttention does, on the way of a branch."""

    def __init__(self, channels: int = 16):
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


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
    "tied": Tied,
    "generator": lambda: nn.Sequential(
        nn.ConvTranspose2d(3, 16, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 16, 2, 2, groups=16),
        nn.SiLU(),
        nn.Conv2d(16, 12, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 6, (3, 5), (2, 3), (1, 0)),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, 2, groups=2),
    ),
    "causal": Causal,
    "layers_again": LayersAgain,
    "two_inputs": TwoInputs,
    "in_place": InPlace,
    "in_place_view": lambda: InPlace(through_view=True),
    "attention": lambda: nn.Sequential(AttentionBlock(), AttentionBlock(), nn.Linear(16, 10)),
    "rotary": lambda: nn.Sequential(RotaryBlock(), RotaryBlock(fused=True), nn.Linear(16, 10)),
    "grouped_queries": lambda: nn.Sequential(RotaryBlock(key_heads=2), nn.Linear(16, 10)),
    "gpt": lambda: nn.Sequential(GPTBlock(), GPTBlock(), nn.Linear(16, 10)),
    "windows": lambda: nn.Sequential(WindowBlock(), WindowBlock(whole=True), nn.Linear(16, 10)),
    "flat_tokens": lambda: nn.Sequential(FlatTokens(), nn.Linear(16, 10)),
    "pair": lambda: nn.Sequential(PairAttention(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)),
    "channel_shuffle": lambda: nn.Sequential(nn.Conv2d(3, 16, 3), Shuffle(), nn.Conv2d(16, 8, 1), Head(8)),
}
TOKENS = ("attention", "layers_again", "rotary", "grouped_queries", "gpt", "flat_tokens", "pair")
NAMES = tuple(_BUILDERS)
"""Every architecture of this file."""
GATED = ("basic", "bottleneck", "vgg", "mbconv", "mbconv_se", "dense", "fire", "grouped", "convnext", "same_padded", "mlp", "attention",
         "rotary", "grouped_queries", "gpt", "windows", "flat_tokens", "pair", "shared", "generator", "causal", "layers_again")  # fmt: skip
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
    if name in TOKENS:
        return (torch.randn(batch, 7, 16, generator=generator),)
    if name == "windows":
        return (torch.randn(batch, 4, 4, 16, generator=generator),)
    image = torch.randn(batch, 3, 16, 16, generator=generator)
    return (image, torch.randn(batch, 8, generator=generator), True) if name == "two_inputs" else (image,)


@cache
def captured(name: str) -> tuple[nn.Module, Graph]:
    """Returns `build(name)` and its graph, shared by all tests: they must not change either."""
    model = build(name)
    return model, capture(model, example(name))
