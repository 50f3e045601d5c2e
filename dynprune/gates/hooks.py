"""Where gates meet the user's modules: hooks that exist only during a call and show a `Visitor` what passes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from dynprune.graph.capture import Graph, Node
from dynprune.graph.sites import Site, Ungated


class Visitor:
    """What happens at the places where gates act, during one call of the model; this one changes nothing."""

    def gate_input(self, site: Site, x: Tensor, channel_dim: int) -> None:
        """Sees the input of a site's gate, before pooling; comes before the other three for that site."""

    def consumer_input(self, site: Site, index: int, x: Tensor, channel_dim: int) -> Tensor:
        """Returns what consumer `index` of a channels site is to read instead of x."""
        return x

    def consumer_output(self, site: Site, index: int, module: nn.Module, y: Tensor, channel_dim: int) -> Tensor:
        """Returns what is to go on instead of y, the output of consumer `index`."""
        return y

    def branch_output(self, site: Site, y: Tensor) -> Tensor:
        """Returns what is to go on instead of y, the output of the `mask_output` of a branch site."""
        return y


class Hooks:
    """Calls a model with a visitor at every site; between calls the model has no hooks.

    Args:
        model: the user's model, as it was captured.
        sites: where gates stand.
        graph: the captured model; it tells which module sees the input of a branch.

    Attributes:
        sites: those that hooks can reach.
        ungated: those they cannot, and why.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], graph: Graph):
        self.model = model
        self._roles: dict[tuple[str, int | None], _Role] = {}
        self._lock = threading.Lock()
        places = _BranchInputs(graph)
        kept, ungated = [], []
        for site in sites:
            if self._assign(site, places):
                kept.append(site)
            else:
                ungated.append(Ungated(site.name, "the input of the branch is neither the only input nor the only output of a module"))
        self.sites: tuple[Site, ...] = tuple(kept)
        self.ungated: tuple[Ungated, ...] = tuple(ungated)

    def visit(self, visitor: Visitor, args: tuple, kwargs: dict[str, Any] | None = None) -> Any:
        """Returns the model's output of a call in which `visitor` acts at every site.

        Calls from several threads wait for each other, because the hooks are on the shared model. Activation checkpointing runs
        modules again after the call, without hooks: do not combine the two.
        """
        handles = []
        batch = next((leaf.shape[0] for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()), 1)
        with self._lock:
            try:
                for (path, _), role in self._roles.items():
                    handles += role.install(self.model.get_submodule(path), visitor, batch)
                return self.model(*args, **(kwargs or {}))
            finally:
                for handle in handles:
                    handle.remove()

    def _assign(self, site: Site, places: _BranchInputs) -> bool:
        if site.kind == "channels":
            first = site.producers[0]
            self._role(first, site.calls[0]).gates_by_input.append((site, _channel_dim(self.model.get_submodule(first))))
            for index, consumer in enumerate(site.consumers):
                reader = self.model.get_submodule(consumer.module_path)
                self._role(consumer.module_path, consumer.call).consumes.append((site, index, _channel_dim(reader)))
            return True
        path, is_input = places.find(site)
        if path is None:
            return False
        observer = self._role(path)
        dim = _channel_dim(self.model.get_submodule(path), places.shape(site), site.gate_channels)
        (observer.gates_by_input if is_input else observer.gates_by_output).append((site, dim))
        self._role(site.mask_output).masks_output.append(site)
        return True

    def _role(self, path: str, call: int | None = None) -> _Role:
        return self._roles.setdefault((path, call), _Role(call))


@dataclass
class _Role:
    """What one module, or one call of it, is to the sites; the lists in the order in which they act."""

    call: int | None  # from 0; None for every call
    consumes: list[tuple[Site, int, int]] = field(default_factory=list)  # site, index of the consumer, channel dimension
    gates_by_input: list[tuple[Site, int]] = field(default_factory=list)  # site, channel dimension
    masks_output: list[Site] = field(default_factory=list)
    gates_by_output: list[tuple[Site, int]] = field(default_factory=list)

    def install(self, module: nn.Module, visitor: Visitor, batch: int) -> list:
        """Returns the handles of the hooks that this role needs on `module`.

        What a visitor sees has one sample per index of dimension 0: a value that begins with the batch, as (batch * windows) does, is
        shown with the two apart.
        """

        seen_calls = 0

        def before(_, args, kwargs):
            nonlocal seen_calls
            seen_calls += 1
            if not self._is_now(seen_calls):
                return None
            value, put_back = _first_tensor(args, kwargs)
            seen = x = _apart(value, batch)
            for site, index, dim in self.consumes:
                x = visitor.consumer_input(site, index, x, _dim_of(dim, value, x))
            for site, dim in self.gates_by_input:
                visitor.gate_input(site, *_in_channels(site, x, _dim_of(dim, value, x)))
            return None if x is seen else put_back(x.reshape(value.shape))

        def after(module, _, result):
            if not self._is_now(seen_calls):
                return None
            value = result if isinstance(result, Tensor) else result[0]
            seen = y = _apart(value, batch)
            for site, index, dim in self.consumes:
                y = visitor.consumer_output(site, index, module, y, _dim_of(dim, value, y))
            for site in self.masks_output:
                y = visitor.branch_output(site, y)
            for site, dim in self.gates_by_output:
                visitor.gate_input(site, y, _dim_of(dim, value, y))
            if y is seen:
                return result
            y = y.reshape(value.shape)
            return y if isinstance(result, Tensor) else (y, *result[1:])

        handles = []
        if self.consumes or self.gates_by_input or self.call is not None:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if self.consumes or self.masks_output or self.gates_by_output:
            handles.append(module.register_forward_hook(after))
        return handles

    def _is_now(self, seen_calls: int) -> bool:
        return self.call is None or seen_calls == self.call + 1


class _BranchInputs:
    """Finds the module through which the input x of a branch can be seen."""

    def __init__(self, graph: Graph):
        self._counts = graph.call_counts
        self._nodes = {node.name: node for node in graph.nodes}
        self._outputs = {node.name for node in graph.outputs if isinstance(node, Node)}
        self._inside: dict[str, set[str]] = {}  # module path -> names of the nodes that run in it
        for node in graph.nodes:
            if node.op not in ("input", "constant", "output"):
                for path in _ancestors(node.module_path):
                    self._inside.setdefault(path, set()).add(node.name)

    def shape(self, site: Site) -> tuple[int | None, ...]:
        return self._nodes[site.gate_input].shape

    def find(self, site: Site) -> tuple[str | None, bool]:
        """Returns (module path, whether x is its input rather than its output); the path is None where no module shows x alone."""
        x = self._nodes[site.gate_input]
        for user in x.users:
            if user.name in site.nodes:
                for path in _ancestors(user.module_path):
                    if self._counts.get(path) == 1 and self._read_from_outside(path) == {x.name}:
                        return path, True
        if x.op not in ("input", "constant"):
            for path in _ancestors(x.module_path):
                if self._counts.get(path) == 1 and self._used_outside(path) == {x.name}:
                    return path, False
        return None, False

    def _read_from_outside(self, path: str) -> set[str]:
        inside = self._inside.get(path, set())
        sources = [source for name in inside for source in self._nodes[name].inputs if source.op != "constant"]
        return {source.name for source in sources if source.name not in inside}

    def _used_outside(self, path: str) -> set[str]:
        inside = self._inside.get(path, set())
        return {name for name in inside if name in self._outputs or any(user.name not in inside for user in self._nodes[name].users)}


def pool(x: Tensor, channel_dim: int) -> Tensor:
    """Returns the mean of each channel over positions, (N, channels), f32."""
    positions = [dim for dim in range(1, x.dim()) if dim != channel_dim % x.dim()]
    return x.mean(positions, dtype=torch.float32) if positions else x.float()


def along(values: Tensor, channel_dim: int, dims: int) -> Tensor:
    """Returns `values` (N, channels) as a view of `dims` dimensions that broadcasts over positions."""
    shape = [1] * dims
    shape[0], shape[channel_dim] = values.shape
    return values.view(shape)


def _channel_dim(module: nn.Module, shape: tuple[int | None, ...] = (), channels: int = 0) -> int:
    """Returns 1 or -1; `shape` and `channels` of the value decide where the module's type does not."""
    if type(module).__name__ == "Conv1D":  # of transformers: a linear layer
        return -1
    channels_first = len(shape) > 2 and shape[1] == channels != shape[-1]  # a layer norm that moves its channels, of timm
    if isinstance(module, nn.Linear | nn.LayerNorm) and not channels_first:
        return -1
    if isinstance(module, _ConvNd | _NormBase) or len(shape) < 3:
        return 1
    first, last = shape[1] == channels, shape[-1] == channels
    return -1 if last and (not first or len(shape) == 3) else 1


def _apart(value: Tensor, batch: int) -> Tensor:
    """Returns a view of the value with the batch as dimension 0, where it shares that with others."""
    return value if value.shape[0] == batch or value.shape[0] % batch else value.unflatten(0, (batch, -1))


def _dim_of(dim: int, value: Tensor, x: Tensor) -> int:
    """Returns where the dimension of `value` is in `x`, which `_apart` made of it."""
    return dim if dim < 0 else dim + x.dim() - value.dim()


def _in_channels(site: Site, x: Tensor, dim: int) -> tuple[Tensor, int]:
    """Returns x and its channel dimension; where several features of a flattened x belong to each channel, with these apart."""
    if x.shape[dim] == site.gate_channels:
        return x, dim
    dim %= x.dim()
    return x.unflatten(dim, (site.gate_channels, -1)), dim


def _first_tensor(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Callable[[Tensor], tuple[tuple, dict]]]:
    """Returns the first tensor of a call's arguments, and a function that gives the arguments with another in its place."""
    place = next((i for i, value in enumerate(args) if isinstance(value, Tensor)), None)
    if place is not None:
        return args[place], lambda new: ((*args[:place], new, *args[place + 1 :]), kwargs)
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return kwargs[name], lambda new: (args, {**kwargs, name: new})


def _ancestors(path: str) -> list[str]:
    """Returns "a.b", "a", "" for "a.b"."""
    parts = path.split(".") if path else []
    return [".".join(parts[:end]) for end in range(len(parts), -1, -1)]
