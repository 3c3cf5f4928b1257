"""Several GPUs: torchrun starts a process for each of them, and they share the rows of every step.

    torchrun --nproc-per-node 4 train_grpo.py

Every process holds the whole model and draws the same random numbers. It samples answers to its share of the prompts and
sends them to the others; it trains on its share of the rows, and `Optimizers.step` adds the gradients up. The weights of a
step are made for all of its rows at once, so that this sum is the gradient of the step, on any number of processes. Only
rank 0 writes files. Without torchrun there is one process, and everything here does nothing.
"""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def join(device: torch.device) -> None:
    """Meet the other processes that torchrun has started, if there are any."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    if device.type == "cuda":
        mine = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(mine)
        dist.init_process_group("nccl", device_id=mine)
    else:
        dist.init_process_group("gloo")
    if rank():
        sys.stdout = open(os.devnull, "w", errors="replace")         # noqa: SIM115      one voice is enough


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(rows: Any) -> Any:
    """The rows of this process, of a tensor's or a list's first dimension: rows rank, rank + n, ... of n processes."""
    return rows[rank()::count()]


def parts(rows: Any, size: int) -> list[Any]:
    """The rows of this process, `size` at a time; none where it has none."""
    mine = share(rows)
    return [mine[i : i + size] for i in range(0, len(mine), size)]


def summed(x: Tensor) -> Tensor:
    """The sum over all processes, which all of them get."""
    if count() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def gathered(x: Any) -> list[Any]:
    """What each process has, in the order of their ranks: anything that can be pickled, tensors on the CPU."""
    if count() == 1:
        return [x]
    found = [None] * count()
    dist.all_gather_object(found, x)
    return found


def wait() -> None:
    """Wait until every process has reached this line."""
    if count() > 1:
        dist.barrier()
