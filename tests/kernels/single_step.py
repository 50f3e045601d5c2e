"""One engine step alone, over poisoned memory: what the tests of the operations share."""

from __future__ import annotations

import numpy as np
from helpers import active_list
from helpers import run_step as run_on_buffers

_GAP = 5  # floats between rows and before the first one, to see that strides are kept


def active_lists(kind: str, channels: int, batch: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Returns one ascending list of active channels per sample, of a kind of `helpers.LIST_KINDS`."""
    return [active_list(kind, channels, rng) for _ in range(batch)]


def compact(rows: np.ndarray, lists: list[np.ndarray] | None) -> np.ndarray:
    """Returns `rows` (batch, channels, positions) with each sample's active rows moved to the front and NaN behind them."""
    if lists is None:
        return rows
    result = np.full_like(rows, np.nan)
    for sample, active in enumerate(lists):
        result[sample, : len(active)] = rows[sample, active]
    return result


def run_step(
    isa: str,
    op: str,
    inputs: list[np.ndarray],
    out_shape: tuple[int, int],
    *,
    lists: list[np.ndarray] | None = None,
    gated: str = "both",
    branch: list[bool] | None = None,
    **attributes,
) -> np.ndarray:
    """Returns the output (batch, rows, positions) of one step; rows that it did not write are NaN.

    Every buffer has NaN between its rows. Runs on one thread and on two, which cut the step differently and (on one) may write without
    scratch; asserts that both give the same bits and that neither writes outside the output's rows.

    Args:
        isa: the instruction set.
        op: the step's operation.
        inputs: arrays (batch, rows, positions); a size-1 row dimension is repeated (row_stride 0).
        out_shape: (rows, positions).
        lists: active channels per sample; default None means that the step is not gated.
        gated: "both" or "in": which side follows `lists`.
        branch: per sample whether the step's branch is on; default None means that it has none.
        attributes: `ints`, `floats`, `constants` of the step.
    """
    batch = inputs[0].shape[0] if inputs else (len(lists) if lists is not None else 1)
    buffers, operands = [], []
    for number, values in enumerate(inputs):
        buffer, operand = _strided(values, number)
        buffers.append(buffer)
        operands.append(operand)
    step = {"op": op, "name": op, "inputs": operands, **attributes}
    sites, active = [], []
    if lists is not None:
        step["in_site"] = 0
        step["out_site"] = 0 if gated == "both" else -1
        sites.append(inputs[0].shape[1])
        active.append(lists)
    if branch is not None:
        step["branches"] = [len(sites)]
        sites.append(1)
        active.append([[0] if on else [] for on in branch])
    results = []
    for num_threads in (1, 2):
        output, step["output"] = _strided(np.full((batch, *out_shape), np.nan, np.float32), len(inputs))
        run_on_buffers(isa, step, [*buffers, output], sites=sites, active=active, num_threads=num_threads)
        results.append(_unstrided(output, step["output"]))
    np.testing.assert_array_equal(*results, err_msg="one thread and two threads differ")
    return results[0]


def _strided(values: np.ndarray, number: int) -> tuple[np.ndarray, tuple[int, int, int, int, int]]:
    batch, rows, positions = values.shape
    stride = positions + _GAP
    buffer = np.full((batch, _GAP + rows * stride), np.nan, np.float32)
    _window(buffer, rows, positions)[...] = values
    return buffer, (number, _GAP, rows, 0 if rows == 1 else stride, positions)


def _unstrided(buffer: np.ndarray, operand: tuple[int, int, int, int, int]) -> np.ndarray:
    window = _window(buffer, operand[2], operand[4])
    result = window.copy()
    window[...] = np.nan
    assert np.isnan(buffer).all(), "the step wrote outside its output rows"
    return result


def _window(buffer: np.ndarray, rows: int, positions: int) -> np.ndarray:
    return buffer[:, _GAP:].reshape(buffer.shape[0], rows, positions + _GAP)[:, :, :positions]
