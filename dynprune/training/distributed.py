"""Training in several processes: who this one is, and how all get what the first one found."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn


def rank_and_world() -> tuple[int, int]:
    """Returns this process's rank and the number of processes; (0, 1) where no process group is initialised."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@torch.no_grad()
def share_from_first(module: nn.Module, value: Any = None) -> Any:
    """Gives the parameters and buffers of the first process to the others, in place, and returns its `value`.

    Args:
        module: of the same names and shapes in every process.
        value: anything that can be pickled; only the first process's counts.
    """
    if rank_and_world()[1] == 1:
        return value
    for x in module.state_dict().values():
        whole = x.contiguous()
        distributed.broadcast(whole, 0)
        if whole is not x:
            x.copy_(whole)
    box = [value]
    distributed.broadcast_object_list(box, 0)
    return box[0]
