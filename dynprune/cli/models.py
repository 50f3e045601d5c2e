"""Loads the model that a command names: torchvision:NAME, timm:NAME, transformers:CLASS or FILE.py:FUNCTION."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import inspect
import math
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynprune.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

DEFAULT_SHAPE = (3, 224, 224)
TOKENS = 128
"""Tokens of a sequence where --shape says nothing."""
SIGNAL = 16_000
"""Samples of a waveform where --shape says nothing."""

# Operators of torchvision's C++ part that its Python part looks up when imported; a build without that part lacks them. Only
# detection models call them.
_TORCHVISION_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, int sampling_ratio, bool aligned)"
    " -> Tensor",
)
_declared: list[torch.library.Library] = []


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode and one batch of inputs for it, standard normal where the model's author gave none."""

    name: str
    model: nn.Module
    inputs: tuple[torch.Tensor, ...]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL, --weights, --shape and --batch."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="torchvision:NAME, timm:NAME, transformers:CLASS (with its default configuration) or FILE.py:FUNCTION, which returns a model "
        "or (model, inputs)",
    )
    parser.add_argument("--weights", metavar="FILE", type=Path, help="state_dict or .safetensors to load; default: random weights")
    parser.add_argument(
        "--shape",
        metavar="C,H,W",
        type=parse_shape,
        help="sizes of one input without the batch, tokens for a language model; default: the model's own, else 3,224,224",
    )
    parser.add_argument("--batch", metavar="N", type=positive_int, default=1, help="samples per call; default 1")


def positive_int(text: str) -> int:
    """Returns the integer that `text` spells; argparse reports anything below 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """Returns the finite number above 0 that `text` spells."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def parse_shape(text: str) -> tuple[int, ...]:
    """Returns the sizes that "3,224,224" spells."""
    return tuple(positive_int(size.strip()) for size in text.split(","))


def load_model(arguments: argparse.Namespace) -> LoadedModel:
    """Returns the model that the arguments of `add_model_arguments` name.

    Weights are random unless --weights names a file; nothing is fetched from a network.

    Raises:
        InputError: the name, the file or the weights are not what was expected; the message says what to do.
    """
    import torch

    source, _, name = arguments.model.partition(":")
    shape = arguments.shape
    torch.manual_seed(0)
    if source == "torchvision" and name:
        model = _torchvision_model(name)
    elif source == "timm" and name:
        model = _timm_model(name)
        shape = shape or tuple(model.default_cfg["input_size"])
    elif source == "transformers" and name:
        model = _transformers_model(name)
        _load_weights(model, arguments.weights)
        return LoadedModel(arguments.model, model.eval(), (_transformers_input(model, arguments.batch, shape),))
    elif source.endswith(".py") and name:
        model, inputs = _model_from_file(Path(source), name)
        if inputs is not None and shape is None:
            _load_weights(model, arguments.weights)
            return LoadedModel(arguments.model, model.eval(), _repeat_batch(inputs, arguments.batch))
    else:
        raise InputError(
            f"model {arguments.model!r} is not understood; give torchvision:NAME, timm:NAME, transformers:CLASS or FILE.py:FUNCTION."
        )
    if arguments.weights is None:
        _replace_zeros_(model)
    _load_weights(model, arguments.weights)
    inputs = (torch.randn(arguments.batch, *(shape or DEFAULT_SHAPE)),)
    return LoadedModel(arguments.model, model.eval(), inputs)


def _replace_zeros_(model: nn.Module) -> None:
    """Gives weights that start as zeros, such as the last layer's of a ViT, random values: with zeros every output would be right."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            parameter.data.normal_(std=0.02)


def declare_torchvision_operators() -> None:
    """Makes `import torchvision` work beside a torch that its C++ part was not built for, such as the CPU build of torch.

    Declares the operators' names without code; does nothing where torchvision's own load or torchvision is not installed.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _loads(Path(spec.origin).parent):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _TORCHVISION_OPERATORS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)
    _declared.append(library)  # the declarations live as long as this object


def _loads(torchvision_folder: Path) -> bool:
    import torch

    for extension in torchvision_folder.glob("_C*.so"):
        with contextlib.suppress(OSError):
            torch.ops.load_library(extension)
            return True
    return False


def _torchvision_model(name: str) -> nn.Module:
    declare_torchvision_operators()
    try:
        from torchvision import models
    except ImportError as error:
        raise InputError(f"'torchvision:{name}' needs torchvision, not installed here ({error}); run: pip install torchvision") from error
    _check_name("torchvision", name, models.list_models())
    builder = models.get_model_builder(name)
    without_weights = {option: None for option in ("weights", "weights_backbone") if option in inspect.signature(builder).parameters}
    return builder(**without_weights)


def _timm_model(name: str) -> nn.Module:
    declare_torchvision_operators()
    try:
        import timm
    except ImportError as error:
        raise InputError(f"'timm:{name}' needs timm, not installed here ({error}); run: pip install timm") from error
    _check_name("timm", name.split(".")[0], timm.list_models())
    return timm.create_model(name, pretrained=False)


def _transformers_model(name: str) -> nn.Module:
    declare_torchvision_operators()
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            f"'transformers:{name}' needs transformers, not installed here ({error}); run: pip install transformers"
        ) from error
    known = [item for item in dir(transformers) if item.endswith(("Model", "LM", "Classification")) and not item.startswith("Auto")]
    _check_name("transformers", name, known)
    model_class = getattr(transformers, name)
    config = model_class.config_class()
    config.use_cache = False  # a cache is an argument that the call writes to
    return model_class(config)


def _transformers_input(model: nn.Module, batch: int, shape: tuple[int, ...] | None) -> torch.Tensor:
    """Returns one batch of the model's main input: token numbers, an image or a waveform."""
    import torch

    config = model.config
    if model.main_input_name == "input_ids":
        return torch.randint(0, config.vocab_size, (batch, *(shape or (TOKENS,))))
    if model.main_input_name == "pixel_values" and shape is None:
        shape = (config.num_channels, config.image_size, config.image_size)
    return torch.randn(batch, *(shape or (SIGNAL,)))


def _check_name(source: str, name: str, known: Iterable[str]) -> None:
    known = set(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "no name is close to it."
        raise InputError(f"{source} has no model {name!r}; {hint}")


def _model_from_file(path: Path, function: str) -> tuple[nn.Module, tuple[torch.Tensor, ...] | None]:
    import torch

    if not path.is_file():
        raise InputError(f"file {str(path)!r} does not exist; give FILE.py:FUNCTION with a path from here.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        made = getattr(module, function)()
    except Exception as error:
        raise InputError(f"'{path}:{function}' failed with {type(error).__name__}: {error}") from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"'{path}:{function}' must return a torch.nn.Module or (module, inputs), got {type(model).__name__}.")
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if inputs is not None and not (isinstance(inputs, tuple) and all(isinstance(item, torch.Tensor) for item in inputs)):
        raise InputError(f"the inputs of '{path}:{function}' must be a tensor or a tuple of tensors, got {type(inputs).__name__}.")
    return model, inputs


def _repeat_batch(inputs: tuple[torch.Tensor, ...], batch: int) -> tuple[torch.Tensor, ...]:
    return tuple(item[:1].repeat(batch, *[1] * (item.dim() - 1)) if item.shape[0] != batch else item for item in inputs)


def _load_weights(model: nn.Module, path: Path | None) -> None:
    if path is None:
        return
    if not path.is_file():
        raise InputError(f"weights file {str(path)!r} does not exist.")
    state = _read_state(path)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"weights {str(path)!r} do not fit the model: {' '.join(str(error).split())[:400]}") from error


def _read_state(path: Path) -> dict[str, Any]:
    """Returns the state_dict in a file; training checkpoints keep it under "state_dict" or "model"."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"weights {str(path)!r} cannot be read as a state_dict or safetensors file: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise InputError(f"weights {str(path)!r} must hold a state_dict, got {type(state).__name__}.")
    return state
