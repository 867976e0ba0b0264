"""Tune the chosen scalars on data: batches, schedule, progress; on one process or, under torchrun, on several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from thrifty.errors import DataError, KnobError, close_to
from thrifty.llm.gallop.adapter import Adapter
from thrifty.llm.gallop.checkpoint import Checkpoint, random_state
from thrifty.llm.gallop.optimizer import DECAY_TO, SparseAdamW
from thrifty.llm.gallop.partial_gradient import WAYS
from thrifty.llm.gallop.ranks import Ranks
from thrifty.llm.gallop.selection import Selection
from thrifty.llm.loading import Encoded, collate, completion_losses

__all__ = ["SCHEDULES", "Step", "Tune", "tune"]

SCHEDULES = ("constant", "linear", "cosine")
_SHARED = ("lr", "betas", "weight_decay", "decay_to", "clip", "gradient")  # settings of SparseAdamW


@dataclass(frozen=True)
class Tune:
    """How the chosen scalars are trained. GaLLoP's own optimiser and rates are not published; these are ours."""

    lr: float = 3e-4
    epochs: int = 3
    steps: int = 0  # > 0: this many instead of epochs
    batch: int = 16  # examples an update, over all processes
    micro_batch: int = 0  # examples a backward pass and process; 0 = all of them at once
    schedule: str = "linear"  # how lr falls to 0: "constant" (not), "linear", "cosine"
    warmup: float = 0.05  # share of the steps in which lr rises from 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    decay_to: str = "zero"
    clip: float = 1.0  # of the norm of the chosen scalars' gradient; 0 = none
    checkpointing: bool = False  # compute activations again in the backward pass instead of keeping them
    gradient: str = "auto"  # see SparseAdamW
    seed: int = 0  # of the order of the data and of dropout

    def __post_init__(self) -> None:
        """Refuse values outside their range, all at once."""
        object.__setattr__(self, "betas", tuple(self.betas))
        rules = {
            f"lr is {self.lr}; it must be positive": self.lr > 0,
            f"epochs is {self.epochs}; it must be at least 1": self.epochs >= 1,
            f"steps is {self.steps}; it must be 0 or more": self.steps >= 0,
            f"batch is {self.batch}; it must be at least 1": self.batch >= 1,
            f"micro_batch is {self.micro_batch}; it must be 0 or more": self.micro_batch >= 0,
            f"schedule is '{self.schedule}'; {close_to(str(self.schedule), SCHEDULES)}": self.schedule in SCHEDULES,
            f"warmup is {self.warmup}; it must be in [0, 1)": 0 <= self.warmup < 1,
            f"weight_decay is {self.weight_decay}; it must be at least 0": self.weight_decay >= 0,
            f"decay_to is '{self.decay_to}'; {close_to(str(self.decay_to), DECAY_TO)}": self.decay_to in DECAY_TO,
            f"clip is {self.clip}; it must be at least 0": self.clip >= 0,
            f"gradient is '{self.gradient}'; {close_to(str(self.gradient), WAYS)}": self.gradient in WAYS,
        }
        bad = [text for text, good in rules.items() if not good]
        if bad:
            raise KnobError("Tune: " + "; ".join(bad))


@dataclass(frozen=True)
class Step:
    """What happened in one update: mean loss of its examples (of this process), gradient norm before clipping."""

    number: int  # from 1
    of: int
    loss: float
    norm: float
    lr: float


def tune(
    model: nn.Module,
    encoded: Sequence[Encoded],
    selection: Selection,
    settings: Tune | None = None,
    progress: Callable[[Step], None] | None = None,
    base: str = "",
    checkpoint: Checkpoint | None = None,
) -> Adapter:
    """Train the chosen scalars of the model in place and return them as an adapter; `adapter.unmerge` undoes it.

    encoded: the training data. base: what the user calls the original model. checkpoint: a file that keeps the run
    every minute and when it is interrupted; the same call goes on from it, with the same result (one process only; the
    caller deletes it). Under torchrun (torch.distributed with
    any backend), every process calls this with the same arguments, takes its share of each batch, and only the k
    gradients travel. The model is left in the mode it had. An interrupt, or a loss or gradient that is no finite number
    (DataError), leaves the model as it was before the call.
    """
    settings = settings or Tune()
    if not encoded:
        raise DataError("there are no examples to train on")
    ranks = Ranks.current()
    per_epoch = math.ceil(len(encoded) / settings.batch)
    total = settings.steps or settings.epochs * per_epoch
    shared: dict[str, Any] = {key: getattr(settings, key) for key in _SHARED}
    optimizer = SparseAdamW(model, selection, **shared)
    try:
        with _training(model, settings, ranks), _kept(checkpoint, selection, optimizer) as kept:
            for number, rows in enumerate(_orders(len(encoded), settings, total), 1):
                if number <= kept.done:
                    continue
                optimizer.lr = settings.lr * factor(number, total, settings)
                loss = _backward(model, [encoded[i] for i in rows], settings, ranks, optimizer)
                norm = kept.step(number)
                if progress is not None:
                    progress(Step(number, total, loss, norm, optimizer.lr))
        optimizer.lr = settings.lr
        adapter = Adapter.of(optimizer, base=base, tune=asdict(settings), steps=total)
    except BaseException:
        optimizer.restore()
        raise
    optimizer.close()
    return adapter


class _Kept:
    """What is done, on disk where there is a checkpoint."""

    def __init__(self, file: Checkpoint | None, selection: Selection, optimizer: SparseAdamW) -> None:
        self.file, self.selection, self.optimizer = file, selection, optimizer
        self.done = file.load(optimizer) if file is not None else 0
        self.random = random_state()
        self.whole = True  # not in the middle of an update

    def step(self, number: int) -> float:
        """Make an update and take note of it; write when it is time to. Return the gradient's norm."""
        self.whole = False
        norm = self.optimizer.step()
        self.done, self.random, self.whole = number, random_state(), True
        if self.file is not None and self.file.due():
            self.write()
        return norm

    def write(self) -> None:
        if self.file is not None and self.whole:
            self.file.write(self.selection, self.optimizer, self.done, self.random)


@contextmanager
def _kept(file: Checkpoint | None, selection: Selection, optimizer: SparseAdamW) -> Iterator[_Kept]:
    """Within: updates are counted, and kept when an interrupt ends them."""
    kept = _Kept(file, selection, optimizer)
    try:
        yield kept
    except KeyboardInterrupt:
        kept.write()
        raise


def _backward(model: nn.Module, rows: list[Encoded], settings: Tune, ranks: Ranks, optimizer: SparseAdamW) -> float:
    """Add the gradient of this process's share of a batch; return the mean loss of its examples."""
    mine = ranks.share(rows)
    size = settings.micro_batch or len(mine) or 1
    pad = getattr(model.config, "pad_token_id", None)
    loss = 0.0
    for start in range(0, len(mine), size):
        batch = collate(mine[start : start + size], pad if isinstance(pad, int) else 0)
        losses = completion_losses(model, batch.to(optimizer.grad.device)).sum() / len(rows)
        if not bool(losses.isfinite()):
            raise DataError("the loss is no finite number; lower lr, or check the data and the dtype")
        losses.backward()  # type: ignore[no-untyped-call]
        loss += float(losses.detach()) * len(rows) / len(mine)
    return loss


def _orders(n: int, settings: Tune, total: int) -> Iterator[list[int]]:
    """Yield the examples of each update: a new order every epoch."""
    generator = torch.Generator().manual_seed(settings.seed)
    made = 0
    while made < total:
        order = torch.randperm(n, generator=generator).tolist()
        for start in range(0, n, settings.batch):
            if made == total:
                return
            made += 1
            yield order[start : start + settings.batch]


def factor(number: int, total: int, settings: Tune) -> float:
    """Return what lr is multiplied by in update `number` (from 1) of `total`.

    >>> [round(factor(n, 4, Tune(warmup=0.0)), 2) for n in (1, 2, 3, 4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    rise = round(settings.warmup * total)
    if number <= rise:
        return number / rise
    done = (number - 1 - rise) / max(1, total - rise)
    if settings.schedule == "constant":
        return 1.0
    return 1.0 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


@contextmanager
def _training(model: Any, settings: Tune, ranks: Ranks) -> Iterator[None]:
    """Within: training mode, a random state of its own for dropout, gradient checkpointing where asked."""
    modes = {module: module.training for module in model.modules()}
    had = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    try:
        with torch.random.fork_rng(enabled=True):
            torch.manual_seed(settings.seed * 1_000_003 + ranks.rank)
            model.train()
            if settings.checkpointing and not had:
                checkpoint_blocks(model, True)
            yield
    finally:
        if settings.checkpointing and not had:
            checkpoint_blocks(model, False)
        for module, training in modes.items():
            module.training = training


def checkpoint_blocks(model: Any, on: bool) -> None:
    """Switch transformers' gradient checkpointing, which newer releases call activation checkpointing."""
    newer = hasattr(model, "activation_checkpointing_enable")
    if on:
        enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
        enable(**{f"{'activation' if newer else 'gradient'}_checkpointing_kwargs": {"use_reentrant": False}})
    else:
        (model.activation_checkpointing_disable if newer else model.gradient_checkpointing_disable)()
