"""What criteria look at: weights, what consumers read of their channels, and gradients of a loss, each gathered when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dynprune.errors import CalibrationError, InputError
from dynprune.training.samples import Chunk

Loss = Callable[[Any, Any], Tensor]


class Evidence:
    """A model and, where given, data and a loss.

    Args:
        model: to be pruned; in eval mode while it is looked at.
        chunks: samples; empty where there is no data.
        loss: (output of a batch, labels) -> scalar tensor; None for none.
        seed: of the random criterion.
    """

    def __init__(self, model: nn.Module, chunks: Sequence[Chunk] = (), loss: Loss | None = None, seed: int = 0):
        self.model = model
        self.chunks = tuple(chunks)
        self.loss = loss
        self.seed = seed
        self._tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
        self._moments: dict[str, tuple[Tensor, Tensor]] | None = None
        self._products: list[dict[str, Tensor]] | None = None

    def tensor(self, name: str) -> Tensor:
        """Returns a parameter or buffer, f64."""
        return self._tensors[name].detach().double()

    def moments(self, module_path: str) -> tuple[Tensor, Tensor] | None:
        """Returns mean and root mean square of each input channel of a convolution or linear module, over samples and positions.

        None where the module did not run as a module of its own. Raises CalibrationError where there is no data.
        """
        if not self.chunks:
            raise CalibrationError("This criterion needs data: pass `data=`, an iterable of batches as the model takes them.")
        if self._moments is None:
            self._moments = input_moments(self.model, self.chunks)
        return self._moments.get(module_path)

    def products(self) -> list[dict[str, Tensor]]:
        """Returns, per batch, gradient times weight of every parameter of dimension 2 or more; the sum over a channel's columns is the
        first-order estimate of what the loss loses with it.

        Raises:
            CalibrationError: there is no data or no loss, or the loss is not a finite scalar.
        """
        if not self.chunks or self.loss is None:
            raise CalibrationError("The Taylor criterion needs data and gradients: pass `data=` with labels and `loss=`.")
        if self._products is None:
            self._products = [self._batch_products(number, chunk) for number, chunk in enumerate(self.chunks)]
        return self._products

    def mean_loss(self) -> float:
        """Returns the mean loss over the data, by samples."""
        with evaluated(self.model), torch.no_grad():
            values = [float(self._loss_of(number, chunk)) * chunk.size for number, chunk in enumerate(self.chunks)]
        return sum(values) / sum(chunk.size for chunk in self.chunks)

    def _loss_of(self, number: int, chunk: Chunk) -> Tensor:
        output = self.model(*chunk.args, **chunk.kwargs)
        try:
            value = self.loss(output, chunk.labels)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise CalibrationError(f"`loss` failed on the output and labels of batch {number}: {error}") from error
        if not isinstance(value, Tensor) or value.numel() != 1 or not torch.isfinite(value):
            raise CalibrationError(f"`loss` must return a finite scalar tensor, got {value!r} on batch {number}.")
        return value

    def _batch_products(self, number: int, chunk: Chunk) -> dict[str, Tensor]:
        weights = {name: p for name, p in self.model.named_parameters() if p.dim() > 1}
        flags = {p: p.requires_grad for p in self.model.parameters()}
        with evaluated(self.model), torch.enable_grad():
            for p in weights.values():
                p.requires_grad_(True)
            try:
                value = self._loss_of(number, chunk)
                if not value.requires_grad:
                    raise InputError("`loss` returned a tensor without gradients; compute it from the model's output without no_grad.")
                gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
            finally:
                for p, flag in flags.items():
                    p.requires_grad_(flag)
        return {name: (g * p).detach().double() for (name, p), g in zip(weights.items(), gradients, strict=True) if g is not None}


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Keeps a model in eval mode, and gives every module its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def input_moments(model: nn.Module, chunks: Sequence[Chunk]) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns, by module path, the mean and root mean square of each input channel of every convolution and linear module, f64."""
    sums: dict[str, list[Tensor | int]] = {}
    handles = []

    def watch(path: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: tuple) -> None:
            if not args:
                return
            dim = 1 if isinstance(module, _ConvNd) and args[0].dim() == len(module.kernel_size) + 2 else -1
            x = args[0].detach().movedim(dim, 0).flatten(1).double()
            total = sums.setdefault(path, [0, 0, 0])
            total[0], total[1], total[2] = total[0] + x.sum(1), total[1] + x.square().sum(1), total[2] + x.shape[1]

        handles.append(module.register_forward_pre_hook(before))

    for path, module in model.named_modules():
        if isinstance(module, _ConvNd | nn.Linear):
            watch(path, module)
    try:
        with evaluated(model), torch.no_grad():
            for chunk in chunks:
                model(*chunk.args, **chunk.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {path: (first / count, (second / count).sqrt()) for path, (first, second, count) in sums.items()}
