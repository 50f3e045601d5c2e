"""Trains the gates and weights of a CIFAR-10 ResNet for all levels at once; see README.md for the commands that were run.

    torchrun --nproc-per-node 2 zoo/train_cifar.py --depth 20 --epochs 16 --batch-size 64 --out run20

Run by python instead of torchrun it trains in one process; the batch size is that of each process, which all draw from all images.

Never reads the test images: 2,500 training images are held out for the frontier that it prints.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from cifar import ViewLoader, Views, load_module, teacher_logits

from dynprune import DynamicModel, finetune

HELD_OUT = 2500
SPLIT_SEED = 1
"""Of the choice of held-out images, the same in all runs: a run that goes on from another holds out what that did."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data", help="folder with load.py")
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--teacher", type=int, default=56, choices=(20, 56), help="depth of the network whose answers are learnt")
    parser.add_argument("--views", type=int, default=6, help="augmented views of each image")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--steps", type=int, help="steps of an epoch; default: all images once")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--target-macs", type=float, default=0.365)
    parser.add_argument("--floor", type=float, default=0.1, help="share of its channels that each site keeps at least, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fit", type=int, default=1024, help="held-out images that gates are fitted to and the frontier is measured on")
    parser.add_argument("--levels", type=int, default=32, help="operating points of the frontier")
    parser.add_argument("--branches", action="store_true", help="gate whole residual branches too")
    parser.add_argument("--start", type=Path, help="a file that this script wrote: train that network further, at its sites")
    parser.add_argument("--refit", action="store_true", help="with --start: fit the gates anew before training")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint, the teacher's answers and the result")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rank = int(os.environ.get("RANK", "0"))
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    load = load_module(args.data)

    images, labels = load.cifar10("train")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    held_out, trained = order[:HELD_OUT], order[HELD_OUT:]
    views = Views(images, args.views)
    logits = teacher_logits(load.network(f"cifar_resnet{args.teacher}"), views, len(images), args.out / f"teacher{args.teacher}")
    loader = ViewLoader(views, labels, logits, trained, args.batch_size, args.steps)
    net = load.network(f"cifar_resnet{args.depth}").to(memory_format=torch.channels_last)
    if args.start is None:
        dm = DynamicModel(net, torch.zeros(1, 3, 32, 32), exclude=() if args.branches else ("layer?.?",))
    else:
        dm = DynamicModel.load(args.start, net, remeasure=False)
    fitted = held_out[: args.fit]
    validation = list(zip(load.cifar_input(images[fitted]).split(64), torch.from_numpy(labels[fitted]).split(64), strict=True))
    began = time.monotonic()
    finetune(
        dm,
        loader,
        epochs=args.epochs,
        target_macs=args.target_macs,
        floor=args.floor,
        lr=args.lr,
        seed=args.seed,
        levels=args.levels,
        fit=args.start is None or args.refit,
        autocast=True,
        teacher=None,
        validation=validation,
        metric=lambda output, classes: (output.argmax(1) == classes).double().mean().item(),
        checkpoint=args.out / "run.pt",
        progress=rank == 0 and (lambda share, what: print(f"{time.monotonic() - began:7.0f} s {share:6.1%} {what}", flush=True)),
    )
    if rank > 0:
        return
    print(dm.frontier.table())
    dm.save(args.out / f"resnet{args.depth}.safetensors", base=load.network(f"cifar_resnet{args.depth}"))


if __name__ == "__main__":
    main()
