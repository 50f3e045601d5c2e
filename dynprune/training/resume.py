"""The checkpoint of a training run: all that is needed to go on after an interruption as if there had been none."""

from __future__ import annotations

import os
import pickle
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from dynprune.errors import CheckpointError
from dynprune.runtime.checkpoint import fingerprint
from dynprune.runtime.model import DynamicModel
from dynprune.training.trainer import Recipe, Trainer

FORMAT = 2


class RunFile:
    """Reads and writes the checkpoint of one run.

    Args:
        path: of the file; None for a run that is not kept.
        dm: before training: the file tells by its weights whether it belongs to the same run.
        settings: whatever else must be the same for the run to go on.

    Attributes:
        epochs_done: 0 for a new run.
        history: by epoch, the means of the loss terms.

    Raises:
        CheckpointError: the file exists but is damaged, or belongs to another model or other settings.
    """

    def __init__(self, path: str | PathLike | None, dm: DynamicModel, recipe: Recipe, settings: dict[str, Any]):
        self.path = None if path is None else Path(path)
        self.epochs_done = 0
        self.history: list[dict[str, float]] = []
        self._start = fingerprint(dm.model)
        self._settings = {**asdict(recipe), **settings, "train": list(recipe.train)}
        self._state = self._read() if self.path is not None and self.path.exists() else None
        if self._state is not None:
            self.epochs_done, self.history = self._state["epochs_done"], self._state["history"]

    def restore(self, trainer: Trainer) -> None:
        """Puts the model, gates, prices and optimizers into the state of the file; does nothing for a new run."""
        if self._state is None:
            return
        try:
            trainer.dm.model.load_state_dict(self._state["model"])
            trainer.dm.gates.load_state_dict(self._state["gates"])
            for optimizer, state in zip(trainer.optimizers, self._state["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            trainer.gate_loss.load_state_dict(self._state["gate_loss"])
            trainer.step = self._state["step"]
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{str(self.path)!r} does not fit this run: {error}") from error
        self._state = None

    def save(self, trainer: Trainer, means: dict[str, float]) -> None:
        """Notes that one more epoch is done and writes the file, whole or not at all; under DDP the first process does."""
        self.epochs_done += 1
        self.history.append(means)
        if self.path is None or trainer.rank > 0:
            return
        state = {
            "format": FORMAT,
            "start": self._start,
            "settings": self._settings,
            "epochs_done": self.epochs_done,
            "step": trainer.step,
            "history": self.history,
            "model": trainer.dm.model.state_dict(),
            "gates": trainer.dm.gates.state_dict(),
            "gate_loss": trainer.gate_loss.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        }
        beside = self.path.with_name(self.path.name + ".part")
        try:
            torch.save(state, beside)
            os.replace(beside, self.path)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{str(self.path)!r} cannot be written: {error}") from error

    def _read(self) -> dict[str, Any]:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            if state["format"] != FORMAT:
                raise CheckpointError(f"{str(self.path)!r} has format {state['format']!r}, this version reads {FORMAT}; remove the file.")
            start, settings = state["start"], state["settings"]
        except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{str(self.path)!r} is no whole checkpoint of finetune ({error}); remove it to start anew.") from error
        if start != self._start:
            raise CheckpointError(
                f"{str(self.path)!r} belongs to a run that started from another model or other weights; load those, or give another file."
            )
        changed = [name for name, value in self._settings.items() if settings.get(name) != value]
        if changed:
            shown = ", ".join(f"{name}={settings.get(name)!r} there, {self._settings[name]!r} here" for name in changed)
            raise CheckpointError(f"{str(self.path)!r} belongs to a run with other settings: {shown}. Give the same, or another file.")
        return state
