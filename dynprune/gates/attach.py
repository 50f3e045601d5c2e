"""The reference semantics of gates: hooks on the user's own modules that mask channels and branches, in place only during a call.

What a gate's choice means, for the engine too:

- channels: every consumer sees zeros in place of the inactive channels. Where the gate compensates a consumer, the consumer's output
  (before anything that follows it) gets `compensation_matrix(...) @ inactive` added at every position.
- branch: the output of `Site.mask_output` is multiplied by 0.
- A gate reads the mean over positions of its input. Channels of that input that are themselves inactive count as zeros in the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from dynprune.errors import InputError
from dynprune.gates.compensation import column_norms, compensation_matrix, weight_matrix
from dynprune.gates.heads import MAX_RANK, BranchGate, ChannelGate, Gate, gate_key
from dynprune.gates.hooks import Hooks, Visitor, along, pool
from dynprune.graph.capture import Graph
from dynprune.graph.sites import Site, Ungated

GATE_COST = 0.01
"""A new gate's rank keeps its multiply-adds under this share of the site's, unless rank 1 is already above."""

Active = Mapping[str, Sequence[Sequence[int]]]
"""Given choices: site name to one ascending list of active group indices per sample."""

Choice = Callable[[Site, Tensor, int], Tensor | None]
"""See `Masking`."""


class Attachment:
    """Runs the user's model with gates applied; the model has no hooks before and after a call.

    Args:
        model: the user's model, as it was captured.
        sites: where gates stand.
        gates: the gate of each site under `gate_key(site.name)`.
        graph: the captured model; it tells which module sees the input of a branch.

    Attributes:
        sites: those that hooks can gate.
        ungated: those they cannot, and why.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], gates: Mapping[str, Gate] | nn.ModuleDict, graph: Graph):
        self.gates = gates
        self._hooks = Hooks(model, sites, graph)
        self.model = model
        self.sites: tuple[Site, ...] = self._hooks.sites
        self.ungated: tuple[Ungated, ...] = self._hooks.ungated

    def gate(self, site_name: str) -> Gate:
        """Returns the gate of a site."""
        return self.gates[gate_key(site_name)]

    def run(
        self, args: tuple, kwargs: dict[str, Any] | None = None, *, level: float | Tensor, active: Active | None = None
    ) -> tuple[Any, dict[str, Tensor]]:
        """Returns the model's output and the masks: site name to a 0-1 tensor (N, num_groups).

        A mask carries gradients where its gate is in training mode.

        Args:
            args, kwargs: of the model's call.
            level: 0 runs everything; then there are no masks. A tensor (N,) holds one level per sample.
            active: choices that replace the gates'; no gate is evaluated, and sites not named run whole and have no mask.

        Raises:
            InputError: `active` names an unknown site, or its lists do not fit the site or the batch.
        """
        if active is None and not isinstance(level, Tensor) and level <= 0:
            return self.model(*args, **(kwargs or {})), {}
        if active is not None:
            check_site_names(self.sites, active)
        masking = Masking(self, _given(active) if active is not None else self._gated(level))
        return self.visit(masking, args, kwargs), masking.masks

    def visit(self, visitor: Visitor, args: tuple, kwargs: dict[str, Any] | None = None) -> Any:
        """Returns the model's output of a call in which `visitor` acts at every site; see `Hooks.visit`."""
        return self._hooks.visit(visitor, args, kwargs)

    def _gated(self, level: float | Tensor) -> Choice:
        # Detached: the gates learn to read the model, which does not bend for them; it also saves a third of what gates add to a step.
        return lambda site, x, channel_dim: self.gate(site.name).mask(pool(x.detach(), channel_dim), level)


class Masking(Visitor):
    """Masks channels and branches as `choose` says.

    Args:
        attachment: gives the gates' compensation.
        choose: called with a site, the input of its gate and that tensor's channel dimension; returns the mask (N, num_groups), or
            None to run the site whole.

    Attributes:
        masks: site name to its mask in this call.
    """

    def __init__(self, attachment: Attachment, choose: Choice):
        self.attachment = attachment
        self.choose = choose
        self.masks: dict[str, Tensor] = {}

    def gate_input(self, site: Site, x: Tensor, channel_dim: int) -> None:
        mask = self.choose(site, x, channel_dim)
        if mask is not None:
            self.masks[site.name] = mask

    def consumer_input(self, site: Site, index: int, x: Tensor, channel_dim: int) -> Tensor:
        if site.name not in self.masks:
            return x
        mask = self.masks[site.name].repeat_interleave(site.group_size * site.consumers[index].repeat, 1)
        return x * along(mask.to(x.dtype), channel_dim, x.dim())

    def consumer_output(self, site: Site, index: int, module: nn.Module, y: Tensor, channel_dim: int) -> Tensor:
        gate = self.attachment.gate(site.name)
        if site.name not in self.masks or not gate.compensated[index]:
            return y
        weight = weight_matrix(module, site.consumers[index].transposed)
        matrix = compensation_matrix(weight, gate.channel_means[index], getattr(module, "groups", 1))
        inactive = 1 - self.masks[site.name].repeat_interleave(site.group_size, 1)
        return y + along((inactive @ matrix.T).to(y.dtype), channel_dim, y.dim())

    def branch_output(self, site: Site, y: Tensor) -> Tensor:
        if site.name not in self.masks:
            return y
        return y * self.masks[site.name].to(y.dtype).reshape(-1, *[1] * (y.dim() - 1))


def make_gate(model: nn.Module, site: Site) -> Gate:
    """Returns a new gate for `site` that costs little beside it; a channel gate ranks channels by the norms of their weights.

    The static score of a group is the L2 norm of its rows in the producers times that of its columns in the consumers, relative to
    the mean over groups (weight-magnitude pruning, Han et al. 2015, arXiv 1506.02626).
    """
    if site.kind == "branch":
        return BranchGate(site.gate_channels)
    rows = sum(
        weight_matrix(model.get_submodule(path), transposed)[first : first + site.num_channels].flatten(1).square().sum(1)
        for path, firsts, transposed in zip(site.producers, site.first_rows, site.transposed, strict=True)
        for first in firsts
    )
    readers = [(model.get_submodule(consumer.module_path), consumer.transposed) for consumer in site.consumers]
    columns = sum(column_norms(weight_matrix(m, flip), site.num_channels, getattr(m, "groups", 1)).square() for m, flip in readers)
    score = (rows * columns).reshape(site.num_groups, -1).sum(1).sqrt()
    affordable = int(GATE_COST * site.macs / (site.gate_channels + site.num_groups))
    return ChannelGate(
        site.gate_channels,
        site.num_groups,
        max(1, min(site.gate_channels, site.num_groups, MAX_RANK, affordable)),
        score / score.mean().clamp_min(1e-12),
        num_channels=site.num_channels,
        num_consumers=len(site.consumers),
    )


def _given(active: Active) -> Choice:
    def choose(site: Site, x: Tensor, channel_dim: int) -> Tensor | None:
        return active_mask(site, active[site.name], x.shape[0]).to(x.device) if site.name in active else None

    return choose


def active_mask(site: Site, lists: Sequence[Sequence[int]], batch: int) -> Tensor:
    """Returns the 0-1 mask (batch, num_groups) of given lists of active groups.

    Raises:
        InputError: there is not one list per sample, or one is not strictly ascending within [0, num_groups).
    """
    if len(lists) != batch:
        raise InputError(f"`active` of site {site.name!r} must hold one list per sample, {batch} here, got {len(lists)}.")
    mask = torch.zeros(batch, site.num_groups)
    for sample, indices in enumerate(lists):
        index = torch.as_tensor(indices, dtype=torch.int64)
        if len(index) and (index[0] < 0 or index[-1] >= site.num_groups or (index.diff() <= 0).any()):
            raise InputError(
                f"`active` of site {site.name!r}, sample {sample}, must be strictly ascending indices in [0, {site.num_groups}), "
                f"got {index.tolist()}."
            )
        mask[sample, index] = 1
    return mask


def check_site_names(sites: Sequence[Site], names: Iterable[str]) -> None:
    """Raises InputError if one of `names` is not the name of a site; the message says which is near."""
    known = {site.name: site for site in sites}
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, 3, 0.4) or list(known)[:3]
            raise InputError(f"No site is named {name!r}; did you mean one of {near}? All {len(known)} are in `dm.sites`.")
