"""Single channels and what ties them: a union-find over channels, and the entries of parameters that belong to each.

An *atom* is one output channel of one layer. Atoms that can only go together (the two operands of an addition, the features of an
attention head) are united into one class. A class that must stay is pinned, with the reason.
"""

from __future__ import annotations

import numpy as np

NONE = -1
"""The id of an entry that is no atom: a channel that always stays, such as one of the model's inputs."""


class Atoms:
    """The channels of a model, tied and pinned while its graph is traced.

    Attributes:
        slices: (tensor name, dimension) -> one atom per entry along that dimension. An entry goes when its atom goes.
        pinned: atom -> why it has to stay; look classes up with `pin_reason`.
        streams, heads: atoms that were tied by a residual addition, or by attention.
    """

    def __init__(self) -> None:
        self.slices: dict[tuple[str, int], np.ndarray] = {}
        self.pinned: dict[int, str] = {}
        self.streams: set[int] = set()
        self.heads: set[int] = set()
        self._parent: list[int] = []
        self._origins: list[str] = []

    def create(self, count: int, origin: str) -> np.ndarray:
        """Returns `count` new atoms, made by the layer `origin`."""
        first = len(self._parent)
        self._parent += range(first, first + count)
        self._origins += [origin] * count
        return np.arange(first, first + count)

    def __len__(self) -> int:
        return len(self._parent)

    def origin(self, atom: int) -> str:
        """Returns the layer that makes an atom."""
        return self._origins[atom]

    def find(self, atom: int) -> int:
        """Returns the representative of an atom's class."""
        root = atom
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[atom] != root:
            self._parent[atom], atom = root, self._parent[atom]
        return root

    def classes(self) -> np.ndarray:
        """Returns the representative of every atom."""
        return np.array([self.find(atom) for atom in range(len(self))], np.int64)

    def tie(self, first: np.ndarray, second: np.ndarray, reason: str) -> None:
        """Makes the atoms of two arrays of ids go together, pair by pair; one whose partner is no atom has to stay."""
        first, second = np.broadcast_arrays(first, second)
        pairs = np.unique(np.stack((first.reshape(-1), second.reshape(-1))), axis=1).T.tolist()
        for a, b in pairs:
            if a == b:
                continue
            if NONE in (a, b):
                self.pinned.setdefault(max(a, b), reason)
                continue
            a, b = self.find(a), self.find(b)
            self._parent[max(a, b)] = min(a, b)

    def pin(self, ids: np.ndarray, reason: str) -> None:
        """Makes atoms stay."""
        for atom in np.unique(ids).tolist():
            if atom != NONE:
                self.pinned.setdefault(atom, reason)

    def own(self, tensor: str, dim: int, ids: np.ndarray) -> None:
        """Notes that entry i of dimension `dim` of a tensor goes with ids[i]; a tensor used twice ties what its uses say."""
        known = self.slices.setdefault((tensor, dim), ids)
        if known is not ids:
            self.tie(known, ids, f"'{tensor}' is shared with a layer whose channels have to stay")

    def pin_reasons(self) -> dict[int, str]:
        """Returns why a class has to stay, by representative."""
        reasons: dict[int, str] = {}
        for atom, reason in self.pinned.items():
            reasons.setdefault(self.find(atom), reason)
        return reasons
