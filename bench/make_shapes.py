"""Writes shapes/<model>.csv: the convolutions that a torchvision model runs on one 224x224 image, equal ones counted.

python bench/make_shapes.py resnet50 mobilenet_v2
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from dynprune.cli.models import LoadedModel, load_model

SHAPES = Path(__file__).parent / "shapes"
COLUMNS = ("in_channels", "out_channels", "height", "width", "kernel", "stride", "padding", "groups", "count")


def convolutions(loaded: LoadedModel) -> Counter[tuple[int, ...]]:
    """Returns each distinct convolution, by the columns before the last, and how often the model runs it, in order of first use.

    Raises:
        ValueError: a kernel, stride or padding is not square, or a convolution is dilated.
    """
    found: Counter[tuple[int, ...]] = Counter()

    def record(module: nn.Conv2d, inputs: tuple[torch.Tensor, ...]) -> None:
        squares = (module.kernel_size, module.stride, module.padding)
        if any(size[0] != size[1] for size in squares) or module.dilation != (1, 1):
            raise ValueError(f"{module} is not square or is dilated; the shape files cannot hold it.")
        height, width = inputs[0].shape[2:]
        found[(module.in_channels, module.out_channels, height, width, *(size[0] for size in squares), module.groups)] += 1

    hooks = [module.register_forward_pre_hook(record) for module in loaded.model.modules() if isinstance(module, nn.Conv2d)]
    with torch.inference_mode():
        loaded.model(*loaded.inputs)
    for hook in hooks:
        hook.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME")
    for name in parser.parse_args().names:
        loaded = load_model(argparse.Namespace(model=f"torchvision:{name}", weights=None, shape=None, batch=1))
        path = SHAPES / f"{name}.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows((*shape, count) for shape, count in convolutions(loaded).items())
        print(path)


if __name__ == "__main__":
    main()
