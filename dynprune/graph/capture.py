"""Captures a model as a graph whose nodes know their shape, dtype and the user's module that ran them (torch.export)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

BATCH = -1
"""Stands for the batch size in `Node.shape`."""


@dataclass(frozen=True, eq=False)
class Node:
    """One operation of a captured model.

    Attributes:
        name: unique in the graph, as torch.export named it.
        op: "input", "constant" (a parameter, buffer or lifted tensor), "output", or the ATen packet's name without overload and
            without the in-place underscore: "conv2d", "add", "relu", "getitem" for operator.getitem, "sym_size" ...
        target: what PyTorch calls to run it (an OpOverload or a Python function); None for "input", "constant" and "output".
        args, kwargs: as torch.export has them, with Nodes in place of fx nodes.
        shape: sizes; the batch dimension is BATCH, sizes that depend on it otherwise are None. None for what is not one tensor.
        dtype: None for what is not one tensor.
        module_path: dotted path of the innermost module of the user that ran the node ("" is the root).
        tensor: the live parameter or buffer behind a "constant".
        parameter_name: the name of that tensor in `model.state_dict()` or "".
    """

    name: str
    op: str
    target: Callable | None
    args: tuple
    kwargs: dict[str, Any]
    shape: tuple[int | None, ...] | None
    dtype: torch.dtype | None
    module_path: str
    tensor: torch.Tensor | None = None
    parameter_name: str = ""
    users: list[Node] = field(default_factory=list, repr=False)

    @property
    def inputs(self) -> list[Node]:
        """The nodes among args and kwargs, in order, nested lists included."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Graph:
    """A captured model: nodes in execution order, and how inputs and outputs are nested.

    Attributes:
        nodes: every node, each after those it uses.
        inputs: the "input" nodes, one per tensor input, in the order of the flattened call.
        outputs: the nodes returned, in the order of the flattened result.
        in_spec, out_spec: torch pytree specs of the call's (args, kwargs) and of the result.
        dynamic_batch: whether dimension 0 of every input and output is a free batch size.
        call_counts: how often each module of the user ran, by module path.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    in_spec: Any
    out_spec: Any
    dynamic_batch: bool
    call_counts: dict[str, int]


def capture(model: nn.Module, example_inputs: tuple) -> Graph:
    raise NotImplementedError
