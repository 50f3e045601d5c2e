"""The prunable places of a model: spaces of channels, neurons, heads or coupled channels, each a list of classes that go one by one."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynprune.errors import InputError
from dynprune.graph.capture import Graph
from dynprune.graph.channels import MIXING
from dynprune.graph.macs import count_macs
from dynprune.pruning.trace import Trace, parameter_of

KINDS = ("channels", "neurons", "heads", "coupled", "branches")
"""What can be pruned: inner channels of convolutions, hidden neurons of linear layers, attention heads, channels tied through residual
additions, and whole residual branches."""


@dataclass(frozen=True, eq=False)
class Part:
    """What a space takes from one dimension of one tensor.

    Attributes:
        tensor: name of the parameter or buffer.
        dim: its dimension.
        classes: (size of the dimension,) the class that each entry goes with; -1 for entries of other spaces.
        produces: whether the entries are outputs of a convolution or linear layer (rows of its weight).
        consumes: whether they are inputs of one (columns).
    """

    tensor: str
    dim: int
    classes: np.ndarray
    produces: bool
    consumes: bool

    @property
    def module_path(self) -> str:
        """Path of the module that holds the tensor."""
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Space:
    """A set of channels that the same layers make and read; its classes can go one by one.

    Attributes:
        name: module path of the first layer that makes it; of the attention for heads.
        kind: one of `KINDS` but "branches".
        size: number of classes: channels, or heads.
        atoms: the representative atom of each class.
        parts: the entries of parameters that go with the classes.
    """

    name: str
    kind: str
    size: int
    atoms: np.ndarray
    parts: tuple[Part, ...]

    @property
    def producers(self) -> tuple[Part, ...]:
        """Rows of weights."""
        return tuple(part for part in self.parts if part.produces)

    @property
    def consumers(self) -> tuple[Part, ...]:
        """Columns of weights."""
        return tuple(part for part in self.parts if part.consumes)


class Anatomy:
    """What can be pruned in a captured model, and what each class costs.

    Attributes:
        trace: the atoms of the model.
        spaces: what can go, in the order of the model.
        refused: (layer, reason) of what cannot.
        macs: multiply-adds of one sample, by node.
    """

    def __init__(self, graph: Graph, *, coupled: bool):
        self.graph = graph
        self.macs = count_macs(graph)
        self.trace = Trace(graph)
        self.classes = self.trace.atoms.classes()
        self.spaces, self.refused = self._find(coupled)
        self._factors = self._cost_factors()

    def macs_after(self, removed: set[int], gone: frozenset[str] = frozenset()) -> int:
        """Returns the multiply-adds of one sample without the classes of these representatives and without the nodes `gone`."""
        total = 0.0
        for name, count in self.macs.items():
            if name in gone:
                continue
            for ids in self._factors[name]:
                count *= sum(atom not in removed for atom in ids) / len(ids) if len(ids) else 1.0
            total += count
        return round(total)

    def _cost_factors(self) -> dict[str, list[list[int]]]:
        """Returns, by node, the classes of its outputs and those of its inputs: the shares kept of each scale its cost."""
        factors: dict[str, list[list[int]]] = {}
        for node in self.graph.nodes:
            if node.name not in self.macs:
                continue
            vectors = [self.trace.shares[node.name]] if node.name in self.trace.shares else []
            weight = node.arguments.get("weight") if node.op not in ("matmul", "bmm", "mm", "baddbmm", "addmm") else None
            transposed = node.op.startswith("conv_transpose")
            depthwise = transposed and node.arguments["groups"] > 1  # then its inputs are its outputs
            if weight is not None and node.name in self.trace.shares and not depthwise:
                dim = 0 if transposed else 1
                columns = self.trace.atoms.slices.get(parameter_of(weight, dim))
                vectors += [] if columns is None else [columns]
            factors[node.name] = [[-1 if atom < 0 else int(self.classes[atom]) for atom in ids] for ids in vectors]
        return factors

    def _find(self, coupled: bool) -> tuple[list[Space], list[tuple[str, str]]]:
        atoms = self.trace.atoms
        members: dict[int, list[int]] = {}
        for atom, root in enumerate(self.classes.tolist()):
            members.setdefault(root, []).append(atom)
        pins = atoms.pin_reasons()
        reasons: dict[str, str] = {}
        groups: dict[tuple, list[int]] = {}
        streams = {int(self.classes[atom]) for atom in atoms.streams if atom >= 0}
        heads = {int(self.classes[atom]) for atom in atoms.heads}
        for root, tied in members.items():
            origins = tuple(dict.fromkeys(atoms.origin(atom) for atom in tied))
            if root in pins or (root in streams and not coupled):
                reason = pins.get(root, "a residual stream; pass coupled=True to prune all its layers together")
                for origin in origins:
                    reasons.setdefault(origin, reason)
                continue
            groups.setdefault((origins, root in heads, root in streams), []).append(root)
        linear = {node.module_path for node in self.graph.nodes if node.op == "linear"}
        spaces: list[Space] = []
        for (origins, is_head, is_stream), roots in groups.items():
            parts = self._parts(roots)
            if len(roots) == 1 and max(np.count_nonzero(part.classes >= 0) for part in parts) > 1:
                reasons.setdefault(origins[0], "all its channels can only go together")
                continue
            if not any(part.consumes for part in parts):
                reasons.setdefault(origins[0], "no convolution or linear layer reads it")
                continue
            kind = "heads" if is_head else "coupled" if is_stream else "neurons" if set(origins) <= linear else "channels"
            name = self._attention_name(roots) if is_head else origins[0]
            spaces.append(Space(name, kind, len(roots), np.array(roots), parts))
        return spaces, [(origin, reason) for origin, reason in reasons.items() if origin not in {space.name for space in spaces}]

    def _attention_name(self, roots: list[int]) -> str:
        wanted = set(roots)
        return next(path for atom, path in self.trace.attention.items() if int(self.classes[atom]) in wanted)

    def _parts(self, roots: list[int]) -> tuple[Part, ...]:
        number = {root: i for i, root in enumerate(roots)}
        roles = self._roles()
        parts = []
        for (tensor, dim), ids in self.trace.atoms.slices.items():
            classes = np.array([-1 if atom < 0 else number.get(int(self.classes[atom]), -1) for atom in ids.tolist()])
            if (classes >= 0).any():
                produces, consumes = roles.get((tensor, dim), (False, False))
                parts.append(Part(tensor, dim, classes, produces, consumes))
        return tuple(parts)

    def _roles(self) -> dict[tuple[str, int], tuple[bool, bool]]:
        """Returns whether a dimension of a weight is its outputs, and whether it is its inputs."""
        roles: dict[tuple[str, int], tuple[bool, bool]] = {}
        for node in self.graph.nodes:
            weight = node.arguments.get("weight") if node.op in MIXING | {"conv3d"} or node.op.startswith("conv_transpose") else None
            if weight is None:
                continue
            rows = 1 if node.op.startswith("conv_transpose") else 0
            depthwise = node.arguments.get("groups", 1) > 1 and weight.shape[1] == 1
            roles[parameter_of(weight, rows)] = (True, False)
            roles[parameter_of(weight, 1 - rows)] = (False, not depthwise)
        return roles


def choose_names(names: Sequence[str], include: Sequence[str], exclude: Sequence[str], what: str = "prunable space") -> set[str]:
    """Returns the names that match a pattern of `include` and none of `exclude`.

    Raises:
        InputError: a pattern matches nothing.
    """
    include, exclude = ((patterns,) if isinstance(patterns, str) else tuple(patterns) for patterns in (include, exclude))
    for pattern in (*include, *exclude):
        if pattern != "*" and not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or list(names)[:3]
            raise InputError(f"{pattern!r} matches no {what}; expected a name or a pattern of names, for example {near}.")
    chosen = {name for pattern in include for name in fnmatch.filter(names, pattern)}
    return chosen - {name for pattern in exclude for name in fnmatch.filter(names, pattern)}
