"""Selection over several processes: each runs the network on its share of the pool, all make the same choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from thrifty.errors import DataError, KnobError
from thrifty.llm.d5p4.kernels import shared_gram
from thrifty.llm.d5p4.sampling import Alone
from thrifty.llm.d5p4.selectors import Choice

__all__ = ["Ranks"]


class Ranks(Alone):
    """The processes of a torch.distributed group; give it to `sample(..., ranks=Ranks())` on each of them.

    Every process takes n / world candidates through the network. Raw qualities are gathered and normalised over the
    whole pool; hidden states are gathered piece by piece into the Gram matrix, never all at once; rank 0 chooses and
    tells the others. Generators must be seeded alike. A child is drawn where its parent is; token ids are summed.
    Raises KnobError when the pool cannot be shared equally, DataError where no group runs.
    """

    def __init__(self, group: Any = None) -> None:
        """Join a process group that runs (None: the default one)."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise DataError("no process group runs; call torch.distributed.init_process_group first")
        self._dist, self._group = dist, group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def own(self, n: int) -> tuple[int, int]:
        """Return the candidates [first, end) of this rank."""
        if n % self.world:
            raise KnobError(f"a pool of {n} cannot be shared equally by {self.world} processes; change k or w")
        share = n // self.world
        return self.rank * share, (self.rank + 1) * share

    def gather(self, raw: Tensor) -> Tensor:
        """Return the numbers of all ranks, in the order of the pool."""
        parts = [torch.empty_like(raw) for _ in range(self.world)]
        self._dist.all_gather(parts, raw.contiguous(), group=self._group)
        return torch.cat(parts)

    def cosines(self, hidden: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
        """Return the cosines (n, n) of the whole pool: `kernels.gram`, its pieces gathered."""
        return shared_gram(hidden, len(hidden) * self.world, self.gather, precision)

    def choose(self, choose: Callable[[], Choice]) -> Choice:
        """Return rank 0's choice, or raise its error, on every rank."""
        box: list[Any] = [None]
        if self.rank == 0:
            try:
                box[0] = choose()
            except Exception as error:
                box[0] = error
        source = self._dist.get_global_rank(self._group, 0) if self._group is not None else 0
        self._dist.broadcast_object_list(box, src=source, group=self._group)
        if isinstance(box[0], Exception):
            raise box[0]
        found: Choice = box[0]
        return found

    def merge(self, numbers: Tensor) -> Tensor:
        """Return the sum over ranks: each child was drawn by one."""
        self._dist.all_reduce(numbers, group=self._group)
        return numbers
