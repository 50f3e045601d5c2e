"""Training in several processes: who this one is, and how all get the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor, distributed, nn


def rank_and_world() -> tuple[int, int]:
    """Returns this process's rank and the number of processes; (0, 1) where no process group is initialised."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def mean_of_all(values: Tensor) -> Tensor:
    """Returns the mean of all processes' `values`."""
    _, world = rank_and_world()
    if world == 1:
        return values
    total = values.to("cuda" if distributed.get_backend() == "nccl" else "cpu", copy=True)
    distributed.all_reduce(total)
    return (total / world).to(values.device)


def share_from_first(module: nn.Module, value: Any = None) -> Any:
    """Gives the parameters and buffers of the first process to the others, in place, and returns its `value`.

    Args:
        module: of the same names in every process, on CPU; buffers whose size is found by training may differ in shape.
        value: anything that can be pickled; only the first process's counts.
    """
    rank, world = rank_and_world()
    if world == 1:
        return value
    box = [(module.state_dict(), value)] if rank == 0 else [None]
    distributed.broadcast_object_list(box, 0)
    state, value = box[0]
    if rank > 0:
        module.load_state_dict(state)
    return value
