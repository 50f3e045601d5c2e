"""`finetune` and an own loop in two processes under torchrun's environment, with the gloo backend."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(script: str, folder: Path) -> list[subprocess.Popen]:
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    path = folder / "script.py"
    path.write_text(f"import sys\nsys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]\n{script}")
    command = [sys.executable, str(path), str(folder)]
    return [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]


PREPARE = """
import gc
import torch, torch.distributed as dist
from torch.nn import functional as F
from patterns import Net, samples
from dynprune.runtime.model import DynamicModel
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
dm = DynamicModel(Net().eval(), torch.zeros(1, 1, 8, 8))
loader = [samples(16, 10 * i + rank) for i in range(4)]
"""

FINETUNE = """
from dynprune.training import calibrate as calibration
from dynprune.training.finetune import finetune
calibration.LATENCY_SECONDS = 0.002
finetune(dm, loader, epochs=2, levels=2, target_macs=0.5, checkpoint=sys.argv[1] + "/run.pt", validation=[samples(16, i) for i in range(4)])
"""

OWN_LOOP = """
from torch.nn.parallel import DistributedDataParallel
from dynprune.training.levels import sandwich_levels
from dynprune.training.loss import GateLoss
gate_loss = GateLoss(dm, target_macs=0.5)
ddp = DistributedDataParallel(dm.train())
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
for x, labels in loader:
    dm.training_levels = sandwich_levels(len(x))
    optimizer.zero_grad()
    (F.cross_entropy(ddp(x), labels) + gate_loss()).backward()
    optimizer.step()
del ddp  # it holds the process group, whose threads have to be gone before the interpreter ends
gc.collect()
"""

COMPARE = """
for name, value in dm.state_dict().items():
    mine = value.double().contiguous()
    first = mine.clone()
    dist.broadcast(first, 0)
    if "running" not in name and "num_batches" not in name or "finetune" in globals():
        assert torch.equal(mine, first), name
print("same on both")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("training", (FINETUNE, OWN_LOOP), ids=("finetune", "own-loop"))
def test_two_processes_end_with_the_same_model(training, tmp_path):
    processes = run(PREPARE + training + COMPARE, tmp_path)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0 and "same on both" in output, output


DIFFERENT = """
if rank == 1:
    loader[2] = (loader[2][0], loader[2][1])
def loss(output, labels):
    value = F.cross_entropy(output, labels)
    return value * float("nan") if rank == 1 and dm.training and loss.calls() == 2 else value
count = iter(range(1000))
loss.calls = lambda: next(count)
from dynprune.errors import TrainingError
from dynprune.training.finetune import finetune
try:
    finetune(dm, loader, epochs=1, levels=2, target_macs=0.5, teacher=None, loss=loss, validation=[samples(16, i) for i in range(4)])
except TrainingError as error:
    assert "step 2" in str(error), error
    print("stopped")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_both_stop_where_one_loss_is_not_finite(tmp_path):
    processes = run(PREPARE + DIFFERENT, tmp_path)
    for process in processes:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0 and "stopped" in output, output
