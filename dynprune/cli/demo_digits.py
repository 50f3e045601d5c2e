"""The demo's task: scikit-learn's handwritten digits, and a small residual network trained on them in under a minute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

IMAGE_SIZE = 32
TEST_IMAGES = 500
# Most epochs run at a quarter of the pixels; the network averages over positions at its end, so it takes any size.
EPOCH_SIZES = (16,) * 8 + (IMAGE_SIZE,) * 3
BATCH = 32
PEAK_LEARNING_RATE = 0.003


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 32, 32), f32 with mean 0 and deviation 1, and labels (N,) int64, split at random."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; their inner channels and the whole branch can be gated."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        nn.init.zeros_(self.norm2.weight)  # the block starts as its shortcut, which trains faster
        whole = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if whole else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (N, out_channels, H / stride, W / stride)."""
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class ResidualNet(nn.Module):
    """A residual network of three stages, for images with one channel.

    Args:
        width: channels of the first stage; the next ones have twice and four times as many.
        blocks: residual blocks per stage.
    """

    def __init__(self, width: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        stages = []
        channels = width
        for stage in range(3):
            for block in range(blocks):
                stages.append(ResidualBlock(channels, width << stage, stride=2 if stage and not block else 1))
                channels = width << stage
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the logits (N, 10) of images (N, 1, H, W)."""
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def load_digits(seed: int = 0) -> Digits:
    """Returns the 1,797 digits that scikit-learn carries, 8x8 pixels scaled up to 32x32, 500 of them for testing."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None]
    images = F.interpolate((images - images.mean()) / images.std(), size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return Digits(images[train], labels[train], images[test], labels[test])


def train(model: nn.Module, digits: Digits, epoch_sizes: Sequence[int], progress: Callable[[float], None], seed: int = 0) -> None:
    """Trains the model in place, on the training images only, and leaves it in eval mode.

    Args:
        model: takes (N, 1, H, W), returns logits (N, 10).
        digits: the data.
        epoch_sizes: height and width of the images in each epoch, in pixels.
        progress: called with the share done, in (0, 1], after each step.
        seed: of the order of the images and their shifts.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.05)
    batches = len(digits.train_labels) // BATCH
    steps = [size for size in epoch_sizes for _ in range(batches)]
    work = [size * size for size in steps]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=len(steps))
    model.train()
    for step, size in enumerate(steps):
        if step % batches == 0:
            order = torch.randperm(len(digits.train_labels), generator=generator)
        chosen = order[step % batches * BATCH :][:BATCH]
        images = F.interpolate(digits.train_images[chosen], size=size, mode="area")
        shift = tuple(torch.randint(-size // 16, size // 16 + 1, (2,), generator=generator).tolist())
        loss = F.cross_entropy(model(images.roll(shift, (2, 3))), digits.train_labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(sum(work[: step + 1]) / sum(work))
    model.eval()
