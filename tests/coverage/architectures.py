"""The architectures of the coverage list: how each is built, small and with random weights, and what a call of it takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision_models import declare_operations

VOCABULARY = 99
"""Tokens that the language models of the list know."""


@dataclass(frozen=True)
class Architecture:
    """One model of the list.

    Attributes:
        name: in docs/models.md, and the id of its tests.
        source: the library it comes from.
        build: returns the model.
        inputs: batch size -> positional arguments of a call.
        held_out: chosen last, when nothing was changed in dynprune any more, to see how a family fares that nobody looked at.
    """

    name: str
    source: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple]
    held_out: bool = False


def build(architecture: Architecture) -> nn.Module:
    """Returns the model in eval mode with weights under which every part of it shows in the result.

    Parameters that start as one constant (norms, layer scales, zero-initialised branches) get random values. Batch norms scale their
    channels to a magnitude of about 1, as in a trained model. With statistics at random values grow from layer to layer until attention
    ends in one-hot choices between near ties (Visformer: logits of some 1e6), and with the true ones of noise images, which are all
    alike, differences of nearly equal numbers are blown up (EfficientNet); either way the last bit of a sum decides.
    """
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = architecture.build().eval()
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point() and parameter.numel() > 1 and parameter.min() == parameter.max():
                    parameter.uniform_(0.5, 1.5) if parameter.flatten()[0] == 1 else parameter.normal_(std=0.1)
        _set_statistics(model, architecture.inputs(4))
    return model


def _set_statistics(model: nn.Module, inputs: tuple) -> None:
    """Gives batch norms, on the way of these inputs, second moments for variances and a tenth of their roots for means, at random."""

    def measure(norm: nn.Module, args: tuple) -> None:
        x = args[0].movedim(1, 0).flatten(1)
        moment = x.square().mean(1) + 1e-6
        norm.running_mean.copy_(0.1 * moment.sqrt() * torch.randn_like(moment))
        norm.running_var.copy_(moment * torch.empty_like(moment).uniform_(0.5, 1.5))

    norms = [module for module in model.modules() if isinstance(getattr(module, "running_var", None), Tensor)]
    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    if norms:
        model(*inputs)
    for handle in handles:
        handle.remove()


def images(size: int, channels: int = 3) -> Callable[[int], tuple]:
    return lambda batch: (torch.randn(batch, channels, size, size, generator=_generator(batch)),)


def tokens(length: int) -> Callable[[int], tuple]:
    return lambda batch: (torch.randint(1, VOCABULARY, (batch, length), generator=_generator(batch)),)


def masked_tokens(length: int) -> Callable[[int], tuple]:
    """Token numbers and an attention mask that hides the last tokens, another number of them for each sample."""

    def inputs(batch: int) -> tuple:
        lengths = length - torch.arange(batch) % (length // 2)
        return (*tokens(length)(batch), (torch.arange(length) < lengths[:, None]).long())

    return inputs


def signal(*shape: int) -> Callable[[int], tuple]:
    return lambda batch: (torch.randn(batch, *shape, generator=_generator(batch)),)


def together(*parts: Callable[[int], tuple]) -> Callable[[int], tuple]:
    return lambda batch: tuple(value for part in parts for value in part(batch))


def _generator(batch: int) -> torch.Generator:
    return torch.Generator().manual_seed(batch)


def torchvision(name: str, size: int = 64, inputs: Callable[[int], tuple] | None = None, **options: Any) -> Architecture:
    def make() -> nn.Module:
        declare_operations()
        from torchvision import models

        return models.get_model(name, weights=None, **options)

    return Architecture(name, "torchvision", make, inputs or images(size))


def timm(name: str, size: int = 64, *, held_out: bool = False, **options: Any) -> Architecture:
    def make() -> nn.Module:
        declare_operations()
        import timm

        return timm.create_model(name, pretrained=False, **options)

    return Architecture(name, "timm", make, images(size), held_out)


def transformers(
    name: str, model: str, config: str, inputs: Callable[[int], tuple], *, part: str = "", held_out: bool = False, **options: Any
) -> Architecture:
    """`part` is the path of the sub-module that is taken (an encoder), "" for the whole model."""

    def make() -> nn.Module:
        declare_operations()
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options)).get_submodule(part)

    return Architecture(name, "transformers", make, inputs, held_out)
