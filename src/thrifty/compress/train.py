"""Train a model further; a quantised one trains in its float shadow and ends on its exact integers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import nn

from thrifty.compress.quantized_model import QuantizedModel
from thrifty.compress.refuse import copied
from thrifty.errors import KnobError
from thrifty.recipe import refuse_mistyped
from thrifty.training import Training

if TYPE_CHECKING:
    from thrifty.task import Task

HARD_SHARE = 5  # one epoch of so many trains on the exact integers, and at least the last one


@dataclass(frozen=True)
class Train:
    """Train on the task's training split: recovery after another technique, or the first training of all.

    The knobs are those of `thrifty.training.Training`. A QuantizedModel is trained with fake quantisation:
    the ranges of weights follow the weights, those of activations stay as calibrated; in the last fifth of
    the epochs, and at least in the last one, the loss is that of the exact integers, with the gradients of
    the float shadow.
    """

    epochs: int = 10
    lr: float = 0.01
    batch: int = 64
    optimizer: str = "sgd"
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()  # of schedule = "multistep"
    gamma: float = 0.1
    warmup: float = 0.0
    mixup: float = 0.0
    crop: int = 0
    shift: int = 0
    flip: bool = False
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values of the wrong type, or outside their range, all at once."""
        refuse_mistyped(self)
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if self.epochs < 1:
            raise KnobError(f"Train.epochs is {self.epochs}; it must be at least 1 (or leave the step out)")
        Training.of({f.name: getattr(self, f.name) for f in fields(self)})

    def edit(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a trained copy. Raises Incompatible for a model that cannot be copied."""
        return fine_tune(copied(model), task, asdict(self))

    @classmethod
    def example(cls) -> Train:
        """Return a short training, for the contract tests."""
        return cls(epochs=1, lr=0.01, batch=32)


def fine_tune(model: nn.Module, task: Task, knobs: dict[str, Any]) -> nn.Module:
    """Train `model` in place and return it in eval mode; knobs: fields of Training.

    A QuantizedModel switches to its exact integers for the last part.
    """
    if not isinstance(model, QuantizedModel):
        return task.fit(model, **knobs)
    exact_from = knobs["epochs"] - max(1, knobs["epochs"] // HARD_SHARE)

    def switch(epoch: int, trained: nn.Module) -> None:
        assert isinstance(trained, QuantizedModel)
        trained.training_hard = epoch >= exact_from

    try:
        task.fit(model, before_epoch=switch, **knobs)
    finally:
        model.training_hard = False
    model.prepare()
    return model
