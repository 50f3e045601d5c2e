"""`finetune`: trains gates, and the model with them, so that one set of weights serves every level."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from dynprune.control.frontier import Frontier
from dynprune.errors import InputError
from dynprune.runtime.model import DynamicModel
from dynprune.training.allocation import allocate
from dynprune.training.batches import Batch, as_batch
from dynprune.training.batchnorm import reestimate_batch_norm
from dynprune.training.calibrate import STATIC, Calibration, check_levels, eval_mode, measure_frontier
from dynprune.training.distributed import share_from_first
from dynprune.training.loss import GateLoss
from dynprune.training.progress import Report, epoch_report, part_of, reporter
from dynprune.training.resume import RunFile
from dynprune.training.samples import Chunk, read_samples, take
from dynprune.training.scores import record_pooled
from dynprune.training.sensitivity import Metric
from dynprune.training.settle import settle_levels
from dynprune.training.trainer import Recipe, Trainer

NORM_BATCHES = 32
"""Batches that batch-norm statistics are taken from after training."""
SETTLE_SAMPLES = 256
"""Samples that the cost of each level is measured on."""
MISSED = 0.03
"""Share of the whole cost by which level 1 may miss its target before a warning says so."""
PARTS = ("gates", "model")


def finetune(
    dm: DynamicModel,
    loader: Iterable[Any],
    *,
    train: tuple[str, ...] = PARTS,
    epochs: int = 10,
    target_macs: float | None = None,
    target_ms: float | None = None,
    lr: float = 0.02,
    gate_lr: float = 1e-3,
    weight_decay: float = 1e-4,
    teacher: nn.Module | str | None = "original",
    distill: float = 0.7,
    temperature: float = 4.0,
    gate_weight: float = 10.0,
    floor: float = 0.1,
    loss: Callable[[Any, Any], Tensor] | None = None,
    validation: Iterable[Any] | None = None,
    metric: Metric | None = None,
    levels: int = 32,
    fit: bool = True,
    seed: int = 0,
    autocast: bool = False,
    checkpoint: str | PathLike | None = None,
    progress: bool | Callable[[float, str], None] = False,
) -> Frontier:
    """Returns the `Frontier` of `dm` after training its gates, and with them the weights of the user's model, in place.

    Every sample of a batch runs at its own level (`sandwich_levels`: an eighth whole, a quarter at the tightest, the rest in between),
    with straight-through masks. The loss is cross entropy with the labels, the divergence from a teacher, and a `GateLoss` that brings
    the cost of each level to its target, with thresholds that follow. After training, batch-norm statistics are taken anew over the
    same mix of levels, thresholds are moved so that each level costs its target, and the frontier is measured as by `calibrate`.

    With `train=("gates",)` the model stays as it is, and so does its output at level 0. With the model trained too, level 0 is the
    tuned model; train longer for more: 10 epochs are a beginning.

    Under `torchrun`, call it in every process after `torch.distributed.init_process_group`, with a loader that gives each process its
    share of the samples and all the same number of batches (`DistributedSampler`).

    Args:
        dm: the DynamicModel to train, on any device; its gates are fitted and its frontier measured on CPU.
        loader: yields (inputs, labels), or (inputs, labels, teacher's output), and has a length. Inputs are a tensor, a tuple of the
            model's arguments or a dict of its keyword arguments; labels of None train by the teacher alone.
        train: what to train, ("gates",) or ("gates", "model").
        epochs: >= 1, default 10. The learning rate rises for a twentieth of the steps and then falls to 0 as a cosine.
        target_macs: share in (0, 1) of the multiply-adds to run at level 1; default 0.4 where no time is given.
        target_ms: the same in milliseconds of one sample, by the cost table of `calibrate`, which must have come before.
        lr, weight_decay: of SGD with momentum 0.9 for the model; weight decay spares biases and norms.
        gate_lr: of Adam for the gates, without weight decay.
        teacher: a module in eval mode on the model's device, called as the model is; default "original" is a copy of the model as it was
            before training. None: no teacher. A teacher's output in the batch comes before it.
        distill: in [0, 1], weight of the teacher's term; the labels' has the rest. Default 0.7.
        temperature: > 0, softens the teacher's and the model's classes; default 4.
        gate_weight, floor: see `GateLoss`.
        loss: callable (output, labels) -> scalar; default None is cross entropy with class labels.
        validation: batches for the frontier as `calibrate` takes them; default None uses the loader's.
        metric: as for `calibrate`.
        levels: number of operating points, >= 2; default 32.
        fit: fit the gates in closed form before training; False goes on from the gates as they are.
        seed: of all random numbers but those of the loader's own generators; the caller's random state is left as it was.
        autocast: run forward passes in bfloat16.
        checkpoint: file to write after each epoch and to go on from where it exists; default None.
        progress: True writes a line to stderr, a callable gets (share done in [0, 1], what is done now); default False.

    Raises:
        InputError: an argument or a batch is not what was expected, labels are out of range, the loader yields nothing, or the target
            cannot be met; the message says what can.
        TrainingError: the loss or a gradient is not finite; the weights are those before that step, which the message names.
        CheckpointError: the checkpoint is damaged, or of another model or other settings.

    Example:
        >>> frontier = finetune(dm, loader, epochs=30, target_macs=0.4, autocast=True, checkpoint="run.pt", progress=True)
    """
    recipe = _checked_recipe(train, epochs, lr, gate_lr, weight_decay, distill, temperature, seed, autocast)
    check_levels(levels)
    if not (teacher is None or teacher == "original" or isinstance(teacher, nn.Module)):
        raise InputError(f"`teacher` must be a module, 'original' or None, got {teacher!r}.")
    steps = _length(loader)
    report = reporter(progress, "finetune")
    settings = {"target_macs": target_macs, "target_ms": target_ms, "gate_weight": gate_weight, "floor": floor, "steps": steps}
    device = next((p.device for p in dm.model.parameters()), torch.device("cpu"))
    with torch.random.fork_rng(devices=[]), _on_cpu(dm, device), _only_trainable(dm.model, "model" in recipe.train):
        torch.manual_seed(seed)
        chunks = _chunks(dm, loader if validation is None else validation, labelled=metric is not None)
        run = RunFile(checkpoint, dm, recipe, settings)
        if teacher == "original":
            teacher = copy.deepcopy(dm.model).to(device).eval().requires_grad_(False) if distill > 0 else None
        dm.engine_for(*chunks[0].args, **chunks[0].kwargs)
        gate_loss = GateLoss(dm, target_macs=target_macs, target_ms=target_ms, weight=gate_weight, floor=floor)
        if fit and run.epochs_done == 0:
            fit_gates(dm, chunks, gate_loss, levels, part_of(report, 0.0, 0.05))
        dm.to(device)
        trainer = Trainer(dm, gate_loss, recipe, teacher=teacher, loss=loss, steps_per_epoch=steps)
        run.restore(trainer)
        training = part_of(report, 0.05, 0.95)
        try:
            while run.epochs_done < epochs:
                means = trainer.train_epoch(run.epochs_done, loader, epoch_report(training, run.epochs_done, epochs, steps))
                run.save(trainer, means)
        finally:
            dm.to("cpu").eval()
            dm.refresh()
        found = None
        if trainer.rank == 0:
            if "model" in recipe.train:
                torch.manual_seed(seed)
                reestimate_batch_norm(dm, _first_batches(loader), seed=seed)
            with eval_mode(dm):
                reached = settle_levels(
                    dm, take(chunks, SETTLE_SAMPLES, splittable=dm.graph.dynamic_batch), gate_loss.cost, gate_loss.target
                )
            dynamic = measure_frontier(dm, chunks, levels=levels, metric=metric, report=part_of(report, 0.95, 1.0))
            found = dm.frontier, dm.costs, reached, dynamic
        frontier, costs, reached, dynamic = share_from_first(dm, found)
    if trainer.rank > 0:
        dm.set_frontier(frontier, costs)
    if reached > gate_loss.target + MISSED:
        warnings.warn(
            f"The target was not reached: level 1 costs {reached:.0%} of the whole model, to be {gate_loss.target:.0%}. Train longer, or "
            "raise `gate_weight` or `gate_lr`.",
            RuntimeWarning,
            stacklevel=2,
        )
    report(1.0, "trained" if dynamic else f"trained; {STATIC}")
    return frontier


def fit_gates(dm: DynamicModel, chunks: list[Chunk], gate_loss: GateLoss, levels: int, report: Report) -> None:
    """Fits all gates in closed form, with thresholds that meet the targets of `gate_loss`, and scores of unit spread.

    Args:
        dm: in place.
        chunks: samples to fit to.
        gate_loss: its costs and its target at level 1 decide how much each site keeps at each level.
        levels: entries of the threshold curves.
        report: called with the progress.
    """
    with eval_mode(dm), torch.no_grad():
        plan = dm.engine_for(*chunks[0].args, **chunks[0].kwargs).plan
        fitting = Calibration(dm, plan, chunks, levels, None, report)
        sensitivities = fitting.fit_gates()
        fitting.set_curves(allocate(gate_loss.cost.steps, sensitivities, levels, tightest=gate_loss.target))
        for name, pooled in record_pooled(dm.attachment, chunks).items():
            gate = dm.gate(name)
            spread = gate.score(pooled).std(correction=0).item()
            if spread > 0:
                gate.rescale_(1 / spread)  # the straight-through slope is that of a sigmoid of width `temperature`, at most 1
    dm.refresh()


def _checked_recipe(train: Any, epochs: Any, *others: Any) -> Recipe:
    parts = (train,) if isinstance(train, str) else tuple(train)
    if not parts or "gates" not in parts or not set(parts) <= set(PARTS):
        raise InputError(f"`train` must be ('gates',) or ('gates', 'model'), got {train!r}.")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise InputError(f"`epochs` must be an int >= 1, got {epochs!r}.")
    recipe = Recipe(parts, epochs, *others)
    for name in ("lr", "gate_lr", "temperature"):
        if not getattr(recipe, name) > 0:
            raise InputError(f"`{name}` must be > 0, got {getattr(recipe, name)!r}.")
    if not recipe.weight_decay >= 0:
        raise InputError(f"`weight_decay` must be >= 0, got {recipe.weight_decay!r}.")
    if not 0 <= recipe.distill <= 1:
        raise InputError(f"`distill` must lie in [0, 1], got {recipe.distill!r}.")
    return recipe


def _first_batches(loader: Iterable[Any]) -> list[Batch]:
    return [as_batch(item, f"Batch {number}") for number, item in enumerate(itertools.islice(loader, NORM_BATCHES))]


def _length(loader: Any) -> int:
    if not isinstance(loader, Iterable) or not hasattr(loader, "__len__") or isinstance(loader, Tensor):
        raise InputError(f"`loader` must yield batches and have a length, such as a DataLoader or a list, got {type(loader).__name__}.")
    if len(loader) == 0:
        raise InputError("`loader` yields nothing; it must yield at least one batch (inputs, labels).")
    return len(loader)


def _chunks(dm: DynamicModel, batches: Iterable[Any], *, labelled: bool) -> list[Chunk]:
    """Returns up to 1024 samples of `batches`, without the teacher's outputs."""
    captured = dm.attachment is not None
    return read_samples(
        (item[:2] if isinstance(item, tuple | list) and len(item) == 3 else item for item in batches),
        labelled=labelled,
        num_inputs=len(dm.graph.inputs) if captured else None,
        splittable=not captured or dm.graph.dynamic_batch,
    )


@contextmanager
def _on_cpu(dm: DynamicModel, device: torch.device) -> Iterator[None]:
    """The model is on CPU within, and on `device` after."""
    dm.to("cpu")
    try:
        yield
    finally:
        dm.to(device)


@contextmanager
def _only_trainable(model: nn.Module, trained: bool) -> Iterator[None]:
    """The model's parameters want no gradients while it is not trained."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        for p in wanted:
            p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
