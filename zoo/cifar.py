"""CIFAR-10 batches in fixed augmented views, with a teacher's logits for each, so that the teacher runs once and not in every epoch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
PADDING = 4
CHUNK = 250


def load_module(folder: Path) -> ModuleType:
    """Returns the module of the data folder that loads images and pretrained networks."""
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["load"] = module
    spec.loader.exec_module(module)
    return module


class Views:
    """Every image in `count` fixed views: a crop of the image padded by 4 pixels of the mean colour, half of them flipped.

    Args:
        images: uint8 (N, 32, 32, 3).
        count: of views.
        seed: of crops and flips.
    """

    def __init__(self, images: np.ndarray, count: int, seed: int = 0):
        around = ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0))
        self._padded = np.pad(images, around)
        self._padded[:] = np.round(MEAN.numpy() * 255).astype(np.uint8)
        self._padded[:, PADDING:-PADDING, PADDING:-PADDING] = images
        rng = np.random.default_rng(seed)
        self._row, self._column = (rng.integers(0, 2 * PADDING + 1, (count, len(images))) for _ in range(2))
        self._flip = rng.random((count, len(images))) < 0.5
        self.count = count

    def batch(self, view: int, index: np.ndarray) -> Tensor:
        """Returns one view of some images, normalised, f32 (N, 3, 32, 32) in channels_last."""
        span = np.arange(32)
        rows = span + self._row[view, index][:, None]
        columns = np.where(self._flip[view, index][:, None], span[::-1], span) + self._column[view, index][:, None]
        images = torch.from_numpy(self._padded[index[:, None, None], rows[:, :, None], columns[:, None, :]])
        return ((images.float() / 255 - MEAN) / STD).permute(0, 3, 1, 2)


def teacher_logits(teacher: nn.Module, views: Views, count: int, folder: Path) -> list[np.ndarray]:
    """Returns the teacher's logits (count, classes), f16, for each view; kept in `folder`, so that a second call reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    result = []
    for view in range(views.count):
        path = folder / f"teach{view}.npy"
        if not path.exists():
            with torch.no_grad():
                parts = [teacher(views.batch(view, np.arange(i, min(i + CHUNK, count)))).half().numpy() for i in range(0, count, CHUNK)]
            np.save(path, np.concatenate(parts))
        result.append(np.load(path))
    return result


class ViewLoader:
    """Yields (inputs, labels, teacher's logits) of `index` in random order, a random view of each batch.

    Args:
        views: of all images.
        labels: int64 (N,) of all images.
        logits: by view, (N, classes).
        index: images to train on.
        batch_size: the last, smaller batch of an epoch is left out.
        steps: batches of an epoch; default None: all of `index`.
    """

    def __init__(
        self, views: Views, labels: np.ndarray, logits: list[np.ndarray], index: np.ndarray, batch_size: int, steps: int | None = None
    ):
        self._views, self._labels, self._logits = views, torch.from_numpy(labels), logits
        self._index, self._batch_size = index, batch_size
        self._steps = min(steps or len(index), len(index) // batch_size)

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = self._index[torch.randperm(len(self._index)).numpy()]
        for chosen in np.split(order[: len(self) * self._batch_size], len(self)):
            view = int(torch.randint(self._views.count, ()))
            yield self._views.batch(view, chosen), self._labels[chosen], torch.from_numpy(self._logits[view][chosen]).float()
