"""The other ways to run the same model on this CPU: PyTorch eager and compiled, ONNX Runtime, OpenVINO; all at the same threads."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dynprune.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

NAMES = ("eager", "compile", "onnxruntime", "openvino")
ONNX_OPSET = 17


@dataclass(frozen=True)
class Rival:
    """One way to run the model.

    Attributes:
        name: of `NAMES`.
        run: runs the model on the inputs it was built for and returns the output (a tensor or an array); None where unavailable.
        reason: why it is unavailable, "" otherwise.
    """

    name: str
    run: Callable[[], object] | None = None
    reason: str = ""


def parse_names(text: str) -> tuple[str, ...]:
    """Returns the rivals in a comma-separated list, each once; "" or "none" gives none.

    Raises:
        InputError: a name is unknown.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip() and name.strip() != "none"))
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise InputError(f"rival {unknown[0]!r} is unknown; choose of {', '.join(NAMES)} (or none).")
    return names


@contextlib.contextmanager
def built_rivals(
    names: tuple[str, ...], model: nn.Module, inputs: tuple[torch.Tensor, ...], threads: int, *, precision: str = "f32"
) -> Iterator[list[Rival]]:
    """Gives the named rivals, ready to run and warmed up, or with the reason why they are not available.

    A failure to build a rival is that rival's `reason`, never an error: the other measurements go on. ONNX files live as long as the
    context. Sets torch's number of threads.

    Args:
        names: of `NAMES`.
        model: in eval mode; is not changed.
        inputs: one batch.
        threads: for each rival, >= 1.
        precision: "f32", or "bf16" for what can run in it (OpenVINO).
    """
    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="dynprune-") as folder:
        onnx_file = Path(folder) / "model.onnx"
        yield [_build(name, model, inputs, threads, precision, onnx_file) for name in names]


def _build(name: str, model: nn.Module, inputs: tuple[torch.Tensor, ...], threads: int, precision: str, onnx_file: Path) -> Rival:
    builders = {
        "eager": lambda: _eager(model, inputs),
        "compile": lambda: _compiled(model, inputs),
        "onnxruntime": lambda: _onnxruntime(model, inputs, threads, onnx_file),
        "openvino": lambda: _openvino(model, inputs, threads, precision, onnx_file),
    }
    try:
        run = builders[name]()
        run()
    except ImportError as error:
        return Rival(name, reason=f"not installed ({error})")
    except Exception as error:  # whatever another project raises: it becomes the row's reason
        first_line = (str(error).strip() or "no message").splitlines()[0]
        return Rival(name, reason=f"failed: {type(error).__name__}: {first_line[:200]}")
    return Rival(name, run)


def _eager(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    import torch

    def run() -> object:
        with torch.inference_mode():
            return model(*inputs)

    return run


def _compiled(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    import torch

    compiled = torch.compile(model)

    def run() -> object:
        with torch.no_grad():
            return compiled(*inputs)

    return run


def _onnxruntime(model: nn.Module, inputs: tuple[torch.Tensor, ...], threads: int, onnx_file: Path) -> Callable[[], object]:
    import onnxruntime

    export_onnx(model, inputs, onnx_file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(onnx_file, options, providers=["CPUExecutionProvider"])
    feed = {slot.name: value.numpy() for slot, value in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: session.run(None, feed)[0]


def _openvino(model: nn.Module, inputs: tuple[torch.Tensor, ...], threads: int, precision: str, onnx_file: Path) -> Callable[[], object]:
    import openvino

    export_onnx(model, inputs, onnx_file)
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(onnx_file), "CPU", settings).create_infer_request()
    arrays = [value.numpy() for value in inputs]
    return lambda: request.infer(arrays)[0]


def export_onnx(model: nn.Module, inputs: tuple[torch.Tensor, ...], path: Path) -> None:
    """Writes the model as ONNX with the sizes of `inputs` fixed and the tensors it returns; does nothing where the file exists.

    Fixed sizes are what serves a rival best: its planner can fold every shape.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    class Plain(torch.nn.Module):
        """The model with tensors alone as arguments and results."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(leaf for leaf in tree_leaves(self.model(*tensors)) if isinstance(leaf, torch.Tensor))

    if path.exists():
        return
    chatter = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(contextlib.redirect_stdout(chatter))
        stack.enter_context(contextlib.redirect_stderr(chatter))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # the fused operation of nn.MultiheadAttention has no ONNX form
        warnings.simplefilter("ignore")
        torch.onnx.export(Plain().eval(), inputs, path, dynamo=False, opset_version=ONNX_OPSET)
