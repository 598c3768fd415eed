"""The processes that train together: their number, and what they add up. One process needs no process group."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(minutes=30)  # until a process that does not answer is given up


@dataclass(frozen=True)
class World:
    """This process among those that train together. Sums are the same bits in every process."""

    rank: int = 0
    size: int = 1

    def total(self, n: int) -> int:
        """The sum of an integer over all processes."""
        return n if self.size == 1 else int(self.sum(torch.tensor(n, dtype=torch.int64, device=_device())).item())

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes, a new tensor; of one process x itself."""
        if self.size == 1:
            return x
        out = x.detach().clone()
        dist.all_reduce(out)
        return out

    def mean(self, x: Tensor) -> Tensor:
        """The mean over all processes."""
        return x if self.size == 1 else self.sum(x) / self.size

    def logsumexp(self, x: Tensor) -> Tensor:
        """ln sum exp over all processes, element by element."""
        if self.size == 1:
            return x
        out = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(out, x.contiguous())
        return torch.logsumexp(torch.stack(out), dim=0)

    def cat(self, x_ND: Tensor) -> Tensor:
        """The rows of all processes, in order of their ranks; each must have as many."""
        if self.size == 1:
            return x_ND
        out = [torch.empty_like(x_ND) for _ in range(self.size)]
        dist.all_gather(out, x_ND.contiguous())
        return torch.cat(out)

    def gather(self, thing: Any) -> list[Any]:
        """A small picklable thing of every process, in order of their ranks."""
        if self.size == 1:
            return [thing]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, thing)
        return out

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world that ``torchrun`` or ``training.launch`` started this process in; a world of one without them.

    NCCL among GPUs, gloo among CPUs. Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, and sets the
    GPU of this process. A process whose block raises is to end. Raises ValueError for one GPU given to several.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    cuda, index = device.startswith("cuda"), torch.device(device).index
    if size > 1 and index is not None:
        raise ValueError(f"train.resources.device must be 'cuda' or 'cpu' with {size} processes: got {device!r}")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) if index is None else index)
    if size == 1:
        yield World()
        return
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    # After an error the group is left as it is: to take it apart would wait for processes that wait for this one, which
    # is to end, and to say first what went wrong.
    yield World(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()


def _device() -> torch.device:
    """Where small numbers must be for the backend."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def share(n: int, world: World, what: str) -> int:
    """The equal share of n that a process has. Raises ValueError when there is none."""
    if n % world.size:
        raise ValueError(f"{what} must be a multiple of the number of processes ({world.size}): got {n}")
    return n // world.size
