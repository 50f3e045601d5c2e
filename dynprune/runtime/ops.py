"""`torch.compile` of a `DynamicModel`: the whole model is one operator, `dynprune::run`, which the compiler does not look into."""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import _pytree as pytree

from dynprune.graph.capture import Graph, Node

if TYPE_CHECKING:
    from dynprune.runtime.model import DynamicModel

_models: weakref.WeakValueDictionary[int, DynamicModel] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(dm: DynamicModel) -> int:
    """Returns the number by which `dynprune::run` knows the model as long as it lives."""
    number = next(_numbers)
    _models[number] = dm
    return number


class CallForm:
    """What calls of the example's form have in common: how arguments and result are nested, and their leaves that are no tensors.

    Args:
        args, kwargs: of the example.
        graph: captured from it.

    Attributes:
        spec, values: of the arguments.
        result_spec: of the result.
        result: for each of its leaves whether it is a tensor, and the value of one that is not.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any], graph: Graph):
        leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.values = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        self.result_spec = graph.out_spec
        self.result = [(True, None) if isinstance(output, Node) else (False, output) for output in graph.outputs]


@torch.library.custom_op("dynprune::run", mutates_args=())
def run(model: int, inputs: list[Tensor]) -> list[Tensor]:
    """Returns the flattened outputs of the model of this number for the tensors of a call that has the form of its example."""
    dm = _models[model]
    args, kwargs = _call(dm, inputs)
    if not dm.is_captured(*args, **kwargs):  # which torch.export cannot do inside an operator
        thread = threading.Thread(target=dm.engine_for, args=args, kwargs=kwargs)
        thread.start()
        thread.join()
    with torch.no_grad():
        results = [leaf for leaf in pytree.tree_leaves(dm(*args, **kwargs)) if isinstance(leaf, Tensor)]
    # An operator may hand on neither its inputs nor one tensor twice.
    seen = {x.data_ptr() for x in inputs}
    owned = []
    for result in results:
        owned.append(result.clone() if result.data_ptr() in seen else result)
        seen.add(result.data_ptr())
    return owned


@run.register_fake
def _(model: int, inputs: list[Tensor]) -> list[Tensor]:
    dm = _models[model]
    example = [leaf for leaf in pytree.tree_leaves(dm.example) if isinstance(leaf, Tensor)]
    batch = inputs[0].shape[0]
    with unset_fake_temporarily(), torch.no_grad():
        sizes = [(known.shape[0], *map(int, x.shape[1:])) for known, x in zip(example, inputs, strict=True)]
        args, kwargs = _call(dm, [known.new_zeros(size) for known, size in zip(example, sizes, strict=True)])
        results = [leaf for leaf in pytree.tree_leaves(dm.model(*args, **kwargs)) if isinstance(leaf, Tensor)]
    free = dm.graph.dynamic_batch
    return [inputs[0].new_empty((batch, *x.shape[1:]) if free else x.shape, dtype=x.dtype) for x in results]


def compiled_call(dm: DynamicModel, args: tuple, kwargs: dict[str, Any], deadline: float | None) -> Any:
    """Returns the model's output while torch.compile traces it: one operator, or a call outside the compiled graph where gradients
    are wanted, a deadline is given, or the call has another form than the example."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    values = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    form = dm.call_form
    if dm.training or torch.is_grad_enabled() or deadline is not None or form is None or spec != form.spec or values != form.values:
        return _call_outside(dm, args, kwargs, deadline)
    results = iter(torch.ops.dynprune.run(dm.number, inputs))
    return pytree.tree_unflatten([next(results) if is_tensor else value for is_tensor, value in form.result], form.result_spec)


@torch.compiler.disable
def _call_outside(dm: DynamicModel, args: tuple, kwargs: dict[str, Any], deadline: float | None) -> Any:
    return dm(*args, deadline=deadline, **kwargs)


def _call(dm: DynamicModel, inputs: list[Tensor]) -> tuple[tuple, dict[str, Any]]:
    """Returns the example's arguments with these tensors in place of its own."""
    tensors = iter(inputs)
    return pytree.tree_map(lambda leaf: next(tensors) if isinstance(leaf, Tensor) else leaf, dm.example)
