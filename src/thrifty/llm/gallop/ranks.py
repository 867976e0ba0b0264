"""The processes of a data-parallel run, if there are any (torchrun); without them everything is one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's number and how many there are."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Return the processes of the default group, or one."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this process's part of a list: every count-th, from its rank on."""
        return list(items[self.rank :: self.count])

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes."""
        if self.count < 2:
            return
        if dist.get_backend() == "nccl" and tensor.device.type == "cpu":  # nccl takes tensors of GPUs only
            there = tensor.cuda()
            dist.all_reduce(there)
            tensor.copy_(there)
        else:
            dist.all_reduce(tensor)
