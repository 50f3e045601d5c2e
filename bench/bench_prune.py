"""Accuracy of real networks after pruning in one shot, without training: by criterion and share of the multiply-adds that stay.

    DYNPRUNE_DATA=folder python bench/bench_prune.py cifar_resnet56 --macs 0.8,0.6 --criteria l2,activation --images 1000

The folder holds `load.py` (see tests/real/conftest.py). What is measured on data - activations, gradients, batch-norm statistics, the
means of what was removed - is measured on images that are not those of the accuracy.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.nn import functional as F

from dynprune.cli.models import positive_int
from dynprune.cli.table import format_table
from dynprune.pruning.batch_norm import reestimate_batch_norm
from dynprune.pruning.criteria import CRITERIA
from dynprune.pruning.structured import prune


def load_data() -> ModuleType:
    """Returns the data folder's loader."""
    folder = Path(os.environ.get("DYNPRUNE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    spec = importlib.util.spec_from_file_location("real_data", folder / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images_for(data: ModuleType, name: str, images: int, samples: int) -> tuple:
    """Returns inputs and labels of the accuracy, and inputs and labels to measure on."""
    if name.startswith("cifar"):
        (x, y), (u, v) = data.cifar10("test"), data.cifar10("train")
        return data.cifar_input(x[:images]), y[:images], data.cifar_input(u[:samples]), torch.from_numpy(v[:samples])

    def prepare(images):
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        if name == "mobilenet_v2":
            return x / 127.5 - 1
        return (F.interpolate(x, size=160, mode="bilinear", antialias=True, align_corners=False) - 128) / 128

    (x, y), (u, v) = data.imagenet("val650"), data.imagenet("calibration500")
    return prepare(x[:images]), y[:images], prepare(u[:samples]), torch.from_numpy(v[:samples])


def pruned_accuracy(data: ModuleType, model: nn.Module, sets: tuple, macs: float, options: dict) -> tuple[float, float, float]:
    """Returns the accuracy in per cent after pruning, and the shares of multiply-adds and parameters that stayed."""
    inputs, labels, seen, answers = sets
    batches = list(zip(seen.split(32), answers.split(32), strict=True))
    loss = F.cross_entropy if options["criterion"] == "taylor" else None
    small, report = prune(model, inputs[:1], target_macs=macs, data=batches, loss=loss, measure=False, **options)
    if any(isinstance(module, nn.BatchNorm2d) for module in small.modules()):
        reestimate_batch_norm(small, seen.split(64))
    share = report.macs_after / report.macs_before
    return data.accuracy(small, inputs, labels, 50), share, report.params_after / report.params_before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", help="a name of load.py: cifar_resnet20, cifar_resnet56, mobilenet_v2, mobilenet_v1_050_160")
    parser.add_argument("--macs", default="0.8,0.6", help="shares of the multiply-adds that may stay; default 0.8,0.6")
    parser.add_argument("--criteria", default=",".join(CRITERIA), help="default: all")
    parser.add_argument("--scope", default="global,local", help="default both")
    parser.add_argument("--coupled", action="store_true", help="also prune residual streams")
    parser.add_argument("--images", type=positive_int, default=1000, help="of the accuracy; default 1000")
    parser.add_argument("--samples", type=positive_int, default=512, help="to measure on; default 512")
    arguments = parser.parse_args()
    data = load_data()
    sets = images_for(data, arguments.network, arguments.images, arguments.samples)
    model = data.network(arguments.network)
    shares = [float(text) for text in arguments.macs.split(",")]
    print(f"{arguments.network}: whole {data.accuracy(model, *sets[:2], 50):.2f} %")
    rows = []
    for criterion in arguments.criteria.split(","):
        for scope in arguments.scope.split(","):
            options = {"criterion": criterion, "scope": scope, "coupled": arguments.coupled}
            row = [criterion, scope]
            for macs in shares:
                try:
                    accuracy, share, parameters = pruned_accuracy(data, model, sets, macs, options)
                    row.append(f"{accuracy:.2f} ({share:.0%}, {parameters:.0%})")
                except ValueError as error:
                    row.append(str(error).split(";")[0][:60])
            rows.append(row)
            print("  ".join(row), flush=True)
    print(format_table(["criterion", "scope", *(f"{share:.0%} of the MACs: accuracy (MACs, parameters)" for share in shares)], rows))


if __name__ == "__main__":
    main()
