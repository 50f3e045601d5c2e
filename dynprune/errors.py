"""Every error that dynprune raises for a user's mistake or an unsupported case.

All share `DynpruneError`, so one `except` catches them. Messages say what was expected, what came and what to do.
"""


class DynpruneError(Exception):
    """The root of all errors of this package."""


class InputError(DynpruneError, ValueError):
    """An argument or a model input is not what was expected."""


class UnsupportedModelError(DynpruneError):
    """The model cannot be captured; the message carries the reason and the module."""


class CalibrationError(DynpruneError, ValueError):
    """Calibration data is missing, empty or not finite, or a call needs a calibrated model."""


class TrainingError(DynpruneError, RuntimeError):
    """Training cannot go on, for example because the loss is not finite; the last good weights are kept."""


class PlanError(DynpruneError, RuntimeError):
    """A plan cannot be built or run, for example because its memory would not fit."""


class IsaError(DynpruneError, ValueError):
    """An instruction set was named that is unknown, or that this CPU or operating system lacks."""


class CheckpointError(DynpruneError, ValueError):
    """A save file is damaged, foreign, from a newer version, or of another model."""
