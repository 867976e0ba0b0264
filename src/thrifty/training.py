"""Training a model in place: the options, the loop, and checkpoints that resume bit for bit."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from thrifty.errors import DataError, KnobError, close_to

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "multistep", "onecycle", "constant")
ONECYCLE_RISE = 0.3  # share of the steps in which onecycle's rate rises
ONECYCLE_START = 1 / 25  # onecycle's first rate, as a share of the peak

Progress = Callable[[int, int, float], None]


class Objective(Protocol):
    """What training minimises."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of a batch.

        x: (n, ...) inputs; y: (n,) int64 labels, or (n, classes) float32 probabilities under mixup, or any
        float target for regression. Returns a scalar that carries gradients.
        """


class PlainLoss:
    """Cross-entropy for labels or class probabilities, mean squared error for other float targets."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of a batch (see Objective)."""
        out = matched(model(x), y, labels=not y.is_floating_point())
        if self.classes and out.shape[1] < self.classes:
            raise DataError(f"the model gives {out.shape[1]} scores for {self.classes} classes; give it one per class")
        return F.cross_entropy(out, y) if self.classes else F.mse_loss(out, y)


def matched(outputs: Any, targets: Any, labels: bool) -> Any:
    """Return the outputs of a model in the shape that goes with the targets: never broadcast one to the other.

    outputs, targets: arrays, or tensors. labels: (n, ...) class numbers, with outputs (n, classes, ...), behind
    which axes of one are dropped; other targets take outputs of as many values per row.
    Raises DataError for outputs that do not fit.

    >>> matched(torch.zeros((5, 10, 1, 1)), torch.zeros(5), labels=True).shape
    torch.Size([5, 10])
    >>> matched(torch.zeros((5, 1)), torch.zeros(5), labels=False).shape
    torch.Size([5])
    """
    if not hasattr(outputs, "shape"):
        raise DataError(f"the model returns {type(outputs).__name__}; its forward must return one tensor of scores")
    shape, wanted = tuple(outputs.shape), tuple(targets.shape)
    if labels and len(shape) > 1 and shape[:1] == wanted[:1]:
        if shape[2:] == wanted[1:]:
            return outputs
        if len(wanted) == 1 and math.prod(shape[2:]) == 1:
            return outputs.reshape(shape[:2])
    if not labels and shape[:1] == wanted[:1] and math.prod(shape) == math.prod(wanted):
        return outputs.reshape(wanted)
    expected = f"(n, classes{''.join(f', {n}' for n in wanted[1:])})" if labels else str(wanted)
    raise DataError(f"the model gives outputs of shape {shape} for targets of shape {wanted}; it must give {expected}")


@dataclass(frozen=True)
class Training:
    """How to train: `epochs` passes over the training split; `schedule` sets the step size at every step."""

    epochs: int = 10
    lr: float = 0.05  # the largest step size
    batch: int = 64
    optimizer: str = "sgd"  # one of OPTIMIZERS
    momentum: float = 0.9  # of sgd
    nesterov: bool = False  # of sgd
    weight_decay: float = 5e-4
    schedule: str = "cosine"  # one of SCHEDULES
    milestones: tuple[int, ...] = ()  # multistep: epochs after which the step size is multiplied by gamma
    gamma: float = 0.1
    warmup: float = 0.0  # share of the steps in which the step size rises linearly, in [0, 1)
    mixup: float = 0.0  # alpha of Beta(alpha, alpha); 0 = off. Zhang et al. 2017, arXiv 1710.09412, eq. 1
    crop: int = 0  # zero-pad every spatial axis by this much and cut a random window of the old size
    shift: int = 0  # the same along the last axis only
    flip: bool = False  # mirror the last axis of half of the inputs
    clip_norm: float = 0.0  # largest gradient norm; 0 = off
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values outside their range, all at once."""
        object.__setattr__(self, "milestones", tuple(self.milestones))
        least = min(self.crop, self.shift)
        schedule, optimizer = self.schedule, self.optimizer
        rules = {
            f"epochs is {self.epochs}; it must be at least 0": self.epochs >= 0,
            f"lr is {self.lr}; it must be positive and finite": 0 < self.lr < math.inf,
            f"batch is {self.batch}; it must be at least 1": self.batch >= 1,
            f"optimizer is '{optimizer}'; {close_to(optimizer, OPTIMIZERS)}": optimizer in OPTIMIZERS,
            f"schedule is '{schedule}'; {close_to(schedule, SCHEDULES)}": schedule in SCHEDULES,
            f"momentum is {self.momentum}; it must be in [0, 1)": 0 <= self.momentum < 1,
            f"weight_decay is {self.weight_decay}; it must not be negative": self.weight_decay >= 0,
            f"warmup is {self.warmup}; it must be in [0, 1)": 0 <= self.warmup < 1,
            f"mixup is {self.mixup}; it must not be negative": self.mixup >= 0,
            f"crop is {self.crop} and shift {self.shift}; neither may be negative": least >= 0,
            f"clip_norm is {self.clip_norm}; it must not be negative": self.clip_norm >= 0,
            "milestones belong to schedule='multistep', which needs them": bool(self.milestones)
            == (self.schedule == "multistep"),
        }
        bad = [sentence for sentence, fine in rules.items() if not fine]
        if bad:
            raise KnobError("Training: " + "; ".join(bad))

    @classmethod
    def of(cls, knobs: Mapping[str, Any]) -> Training:
        """Return the options of these names; raises KnobError for a name that is none."""
        names = [f.name for f in fields(cls)]
        strange = [f"'{k}' ({close_to(k, names)})" for k in knobs if k not in names]
        if strange:
            raise KnobError(f"training has no option {', '.join(strange)}")
        return cls(**knobs)

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """Return the step size of the `step`-th step, counted from 0.

        >>> t = Training(epochs=2, lr=1.0, schedule="cosine")
        >>> [round(t.rate(s, 2), 3) for s in range(4)]
        [1.0, 0.854, 0.5, 0.146]
        """
        total = max(1, self.epochs * steps_per_epoch)
        rise = round(self.warmup * total)
        if step < rise:
            return self.lr * (step + 1) / (rise + 1)
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "multistep":
            return self.lr * self.gamma ** sum(step >= m * steps_per_epoch for m in self.milestones)
        done = (step - rise) / (total - rise)
        if self.schedule == "onecycle" and done < ONECYCLE_RISE:
            part = (1 - math.cos(math.pi * done / ONECYCLE_RISE)) / 2
            return self.lr * (ONECYCLE_START + (1 - ONECYCLE_START) * part)
        if self.schedule == "onecycle":
            done = (done - ONECYCLE_RISE) / (1 - ONECYCLE_RISE)
        return self.lr * (1 + math.cos(math.pi * done)) / 2

    def make_optimizer(self, groups: Iterable[Any]) -> torch.optim.Optimizer:
        """Return the optimiser over these parameters or parameter groups."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            groups,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov and self.momentum > 0,
        )


# --- augmentation


def random_window(x: Tensor, axis: int, reach: int, generator: torch.Generator) -> Tensor:
    """Move every sample by its own -reach..reach places along `axis`, with zeros coming in. x: (n, ...)."""
    length = x.shape[axis]
    pad = [0, 0] * (x.dim() - 1 - axis % x.dim()) + [reach, reach]
    padded = F.pad(x, pad)
    start = torch.randint(0, 2 * reach + 1, (len(x),), generator=generator)
    places = start[:, None] + torch.arange(length)[None, :]
    view = [1] * x.dim()
    view[0], view[axis] = len(x), length
    index = places.view(view).expand(x.shape)
    return padded.gather(axis % x.dim(), index)


def augment(x: Tensor, training: Training, generator: torch.Generator) -> Tensor:
    """Return a randomly changed copy of the inputs x: (n, C, ...)."""
    if training.crop:
        for axis in range(2, x.dim()):
            x = random_window(x, axis, training.crop, generator)
    if training.shift:
        x = random_window(x, x.dim() - 1, training.shift, generator)
    if training.flip:
        mirror = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(mirror.view(-1, *[1] * (x.dim() - 1)), x.flip(-1), x)
    return x


def mix(x: Tensor, y: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blend every sample with another one of the batch. x: (n, ...); y: (n, ...) floats."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    share = float(np.random.default_rng(seed).beta(alpha, alpha))
    other = torch.randperm(len(x), generator=generator)
    return share * x + (1 - share) * x[other], share * y + (1 - share) * y[other]


# --- the loop


@dataclass
class Fit:
    """One training run: what it needs, in one place."""

    model: nn.Module
    x: Tensor  # (n, ...) float32
    y: Tensor  # (n,) int64 or (n, ...) float32
    classes: int  # 0 for regression
    objective: Objective
    training: Training
    parameters: list[Any] | None = None  # parameter groups; None = all that require gradients
    before_epoch: Callable[[int, nn.Module], None] | None = None
    checkpoint: Path | None = None

    def run(self, progress: Progress | None) -> None:
        """Train; leaves the model in eval mode and the global random state as it was."""
        groups = self.parameters
        if groups is None:
            groups = [p for p in self.model.parameters() if p.requires_grad]
        if not groups:
            raise DataError("the model has no trainable parameter: nothing to fit (check requires_grad)")
        optimizer = self.training.make_optimizer(groups)
        shares = [g["lr"] / self.training.lr for g in optimizer.param_groups]
        with torch.random.fork_rng(devices=[]):
            for epoch in range(self._resume(optimizer), self.training.epochs):
                loss = self._epoch(epoch, optimizer, shares)
                if self.checkpoint is not None:
                    objective = digest_of(parts_of(self.objective))
                    save_checkpoint(self.checkpoint, self.model, optimizer, epoch + 1, self.training, objective)
                if progress is not None:
                    progress(epoch + 1, self.training.epochs, loss)
        self.model.eval()

    def _resume(self, optimizer: torch.optim.Optimizer) -> int:
        if self.checkpoint is None or not self.checkpoint.exists():
            return 0
        objective = digest_of(parts_of(self.objective))
        return load_checkpoint(self.checkpoint, self.model, optimizer, self.training, objective)

    def _epoch(self, epoch: int, optimizer: torch.optim.Optimizer, shares: list[float]) -> float:
        """Train for one epoch; its randomness depends on seed and epoch alone. Return the mean loss."""
        seed = (self.training.seed * 1_000_003 + epoch) % 2**63
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed + 1)
        if self.before_epoch is not None:
            self.before_epoch(epoch, self.model)
        self.model.train()
        rows_in_order = torch.randperm(len(self.x), generator=generator)
        order = torch.split(rows_in_order, self.training.batch)
        if len(order) > 1 and len(order[-1]) == 1:
            order = order[:-1]  # batch normalisation cannot train on a single sample
        device = next(self.model.parameters()).device
        total = 0.0
        for i, rows in enumerate(order):
            x, y = self._batch(rows, generator)
            for group, share in zip(optimizer.param_groups, shares):
                group["lr"] = self.training.rate(epoch * len(order) + i, len(order)) * share
            loss = self.objective.loss(self.model, x.to(device), y.to(device))
            value = float(loss.detach())
            if not math.isfinite(value):
                raise DataError(
                    f"the loss became {value} in epoch {epoch + 1}, step {i + 1} (lr {self.training.lr}); "
                    "try a smaller lr, warmup=0.1 or clip_norm=1"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if self.training.clip_norm:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip_norm)
            optimizer.step()
            total += value * len(rows)
        return total / sum(len(rows) for rows in order)

    def _batch(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = augment(self.x[rows], self.training, generator), self.y[rows]
        if self.training.mixup:
            soft = F.one_hot(y, self.classes).float() if self.classes else y
            x, y = mix(x, soft, self.training.mixup, generator)
        return x, y


# --- checkpoints


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, training: Training, objective: str = ""
) -> None:
    """Write weights, optimiser state and the number of finished epochs (temporary file, then rename).

    objective: a digest of it, so that training does not go on with another one.
    """
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if value is not None:
                tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + f".{os.getpid()}.partial")
    meta = {"epoch": str(epoch), "training": json.dumps(asdict(training)), "objective": objective}
    save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, partial, metadata=meta)
    os.replace(partial, path)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, training: Training, objective: str = ""
) -> int:
    """Fill model and optimiser, return the number of finished epochs; DataError if it is another run's."""
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        epoch, saved = int(meta["epoch"]), json.loads(meta["training"])
    except Exception as err:
        raise DataError(f"the checkpoint {path} cannot be read ({err}); delete it to start over") from err
    wanted = json.loads(json.dumps(asdict(training)))
    differ = [f"{k} was {saved.get(k)!r}, is {v!r}" for k, v in wanted.items() if saved.get(k) != v]
    if meta.get("objective") and objective and meta["objective"] != objective:
        differ.append("the objective, or its teacher, was another one")
    if differ:
        raise DataError(
            f"the checkpoint {path} belongs to another training run ({'; '.join(differ)}); "
            "use the old options, another path, or delete it"
        )
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as err:
        raise DataError(f"the checkpoint {path} belongs to another model: {err}") from err
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return epoch


# --- what a training run depends on


def parts_of(value: object) -> list[object]:
    """Return what tells two objectives apart: types, knobs, and the tensors of teachers."""
    parts: list[object] = [type(value).__name__]
    if isinstance(value, nn.Module):
        parts += [str(value), *value.state_dict().items()]
    elif is_dataclass(value):
        parts += [part for f in fields(value) for part in (f.name, *parts_of(getattr(value, f.name)))]
    elif isinstance(value, Mapping):
        parts += [part for pair in value.items() for item in pair for part in parts_of(item)]
    elif isinstance(value, (list, tuple)):
        parts += [part for item in value for part in parts_of(item)]
    elif isinstance(value, (bool, int, float, str)):
        parts.append(repr(value))
    return parts


def digest_of(parts: Iterable[object]) -> str:
    """Return twelve hexadecimal digits that differ when any part does: texts, or pairs of a name and a tensor.

    >>> digest_of(["a"]) == digest_of(["a"]), digest_of(["a"]) == digest_of(["b"])
    (True, False)
    """
    digest = hashlib.sha256()
    for part in parts:
        name, value = part if isinstance(part, tuple) else (part, None)
        digest.update(repr(name).encode())
        if isinstance(value, Tensor):
            digest.update(repr((tuple(value.shape), str(value.dtype))).encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


# --- progress


@contextmanager
def progress_bar(wanted: bool | Progress, title: str) -> Iterator[Progress | None]:
    """Give a callable (epoch, epochs, loss): the caller's own, a rich bar on stderr for True, or None."""
    if callable(wanted):
        yield wanted
        return
    if not wanted:
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as RichProgress

    with RichProgress(console=Console(stderr=True), transient=True) as bar:
        row = bar.add_task(title, total=None)

        def show(epoch: int, epochs: int, loss: float) -> None:
            bar.update(row, completed=epoch, total=epochs, description=f"{title}: loss {loss:.4f}")

        yield show
