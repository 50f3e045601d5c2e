"""`freeze`: the static network nearest to a level, in which what hardly any input needs is gone for good."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynprune.control.checks import check_level
from dynprune.errors import CalibrationError, InputError
from dynprune.gates.compensation import compensation_matrix, weight_matrix
from dynprune.graph.sites import Site
from dynprune.pruning.evidence import evaluated
from dynprune.pruning.recipe import Recipe, add_bias_
from dynprune.pruning.residuals import Residual, find_residuals
from dynprune.pruning.spaces import Anatomy
from dynprune.pruning.surgery import check, cut, make_recipe
from dynprune.runtime.model import DynamicModel
from dynprune.training.samples import read_samples

Place = tuple[set[int], list[Residual]]
"""The classes and the branches that go at one site."""


def freeze(dm: DynamicModel, level: float, *, inputs: Iterable[Any] | None = None, min_frequency: float = 0.05) -> nn.Module:
    """Returns a smaller plain copy of the model of `dm` without the channels and branches that hardly any input needs at `level`.

    It has no gates. Where the gates put the means of skipped channels in their place, the biases of their readers now hold them. So it
    computes what `dm.run_with_active` does when every input skips what is gone. `dm` and its model stay as they are.

    Args:
        dm: in eval or training mode; the copy is in the same.
        level: in (0, 1].
        inputs: batches to count over; None takes what `calibrate` counted on its inputs.
        min_frequency: a group goes that is active for a smaller share of the inputs than this, in (0, 1].

    Raises:
        InputError: `level` or `min_frequency` is out of range.
        CalibrationError: nothing was counted and there are no `inputs`, or these are empty or hold NaN.
    """
    level = check_level(level)
    if level == 0:
        raise InputError("At level 0 everything runs; give a level in (0, 1].")
    if isinstance(min_frequency, bool) or not isinstance(min_frequency, int | float) or not 0 < min_frequency <= 1:
        raise InputError(f"`min_frequency` must be a share in (0, 1], got {min_frequency!r}.")
    frequencies = keep_frequencies(dm, level, inputs)
    graph, sites = dm.graph, {site.name: site for site in dm.sites}
    anatomy = Anatomy(graph, coupled=False)
    residuals = {residual.nodes: residual for residual in find_residuals(graph, anatomy.macs)[0]}
    places: dict[str, Place] = {}
    for name, frequency in frequencies.items():
        if sites[name].is_repeated:
            warnings.warn(f"freeze leaves {name!r} whole: its layers run several times in a call.", RuntimeWarning, stacklevel=3)
        elif sites[name].kind == "channels":
            places[name] = _classes_of(sites[name], frequency, min_frequency, anatomy), []
        elif not (frequency >= min_frequency).any():
            residual = residuals.get(sites[name].nodes)
            if residual is None:
                warnings.warn(f"freeze leaves branch {name!r} whole: no modules of its own can be taken out.", RuntimeWarning, stacklevel=3)
            else:
                places[name] = set(), [residual]
    if _problem(dm, anatomy, places.values()) is not None:
        places = _passing(dm, anatomy, places)
    removed, gone = _joined(places.values())
    recipe = make_recipe(anatomy, removed, gone, dm.model)
    frozen = cut(dm.model, recipe)
    for name in frequencies:
        if sites[name].kind == "channels" and not sites[name].is_repeated:
            _fold_means(dm, sites[name], anatomy, removed, frozen, recipe)
    return frozen


def keep_frequencies(dm: DynamicModel, level: float, inputs: Iterable[Any] | None) -> dict[str, Tensor]:
    """Returns how often each group is active at `level`, (num_groups,) by site name: counted over `inputs`, or by the calibration."""
    if inputs is None:
        recorded = {site.name: dm.gate(site.name).frequency(level) for site in dm.sites}
        if not recorded or any(frequency is None for frequency in recorded.values()):
            raise CalibrationError("freeze needs to know which channels the inputs need; call calibrate(dm, data) first or pass `inputs`.")
        return recorded
    chunks = read_samples(inputs, labelled=False, num_inputs=len(dm.graph.inputs), splittable=dm.graph.dynamic_batch)
    masks: dict[str, list[Tensor]] = {}
    with evaluated(dm), torch.no_grad():
        for chunk in chunks:
            for name, mask in dm.attachment.run(chunk.args, chunk.kwargs, level=level)[1].items():
                masks.setdefault(name, []).append(mask)
    return {name: torch.cat(parts).mean(0) for name, parts in masks.items()}


def _classes_of(site: Site, frequency: Tensor, min_frequency: float, anatomy: Anatomy) -> set[int]:
    """Returns the classes of a site's channels of which none is needed; the group needed most always is."""
    stays = frequency >= min_frequency
    stays[frequency.argmax()] = True
    channels = stays.repeat_interleave(site.group_size).cpu().numpy()
    classes = _classes(site, anatomy)
    return set(classes[~channels].tolist()) - set(classes[channels].tolist()) - {-1}


def _classes(site: Site, anatomy: Anatomy) -> np.ndarray:
    """Returns the class of each of a site's channels; -1 for one that has to stay."""
    rows = site.first_rows[0][0] + np.arange(site.num_channels)
    ids = anatomy.trace.atoms.slices[f"{site.producers[0]}.weight", int(site.transposed[0])][rows]
    pinned = anatomy.trace.atoms.pin_reasons()
    classes = np.where(ids < 0, -1, anatomy.classes[ids])
    return np.array([-1 if atom in pinned else atom for atom in classes.tolist()])


def _joined(places: Iterable[Place]) -> Place:
    removed, gone = set(), []
    for classes, branches in places:
        removed |= classes
        gone += branches
    return removed, gone


def _problem(dm: DynamicModel, anatomy: Anatomy, places: Iterable[Place]) -> str | None:
    """Returns what is wrong with the model without these; None if nothing is."""
    removed, gone = _joined(places)
    small = cut(dm.model, make_recipe(anatomy, removed, gone, dm.model))
    return check(dm.model, small, anatomy.spaces, removed, gone, dm.example)


def _passing(dm: DynamicModel, anatomy: Anatomy, places: dict[str, Place]) -> dict[str, Place]:
    """Returns the places that pass alone, and warns of the others."""
    problems = {name: _problem(dm, anatomy, [place]) for name, place in places.items()}
    for name, problem in problems.items():
        if problem is not None:
            warnings.warn(f"freeze leaves {name!r} whole: {problem}.", RuntimeWarning, stacklevel=4)
    return {name: place for name, place in places.items() if problems[name] is None}


def _fold_means(dm: DynamicModel, site: Site, anatomy: Anatomy, removed: set[int], frozen: nn.Module, recipe: Recipe) -> None:
    """Adds to the biases of a site's consumers what its gate puts in place of the channels that are gone."""
    gate = dm.gate(site.name)
    inactive = torch.tensor([atom in removed for atom in _classes(site, anatomy).tolist()])
    for index, consumer in enumerate(site.consumers):
        module = dm.model.get_submodule(consumer.module_path)
        if not inactive.any() or not gate.compensated[index] or recipe.removes(consumer.module_path):
            continue
        target = frozen.get_submodule(consumer.module_path)
        means = gate.channel_means[index].to(module.weight.device).double() * inactive.to(module.weight.device)
        weight = weight_matrix(module, consumer.transposed).double()
        added = compensation_matrix(weight, means, getattr(module, "groups", 1)).sum(1)
        rows = recipe.kept.get(f"{consumer.module_path}.weight", {}).get(int(consumer.transposed))
        add_bias_(target)
        with torch.no_grad():
            target.bias += (added if rows is None else added[rows]).to(target.bias)
