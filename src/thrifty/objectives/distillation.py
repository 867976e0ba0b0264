"""Classical distillation: the student's probabilities follow the teacher's."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional as F

from thrifty.errors import Incompatible
from thrifty.objectives.features import OnePass, Pass, Teacher, positive, refuse


@dataclass(frozen=True)
class Distillation(OnePass):
    """(1 - alpha) * cross-entropy + alpha * T^2 * KL(teacher || student), both softened by the temperature T.

    The divergence is summed over the classes and averaged over the rest. Under mixup the teacher sees the mixed
    inputs, and the cross-entropy the mixed labels.
    Source: Hinton, Vinyals, Dean 2015, Distilling the Knowledge in a Neural Network, arXiv 1503.02531, section 2.
    """

    teacher: nn.Module = field(repr=False)  # kept as a frozen copy
    temperature: float = 4.0  # divides the scores of both; above 1, small probabilities count more
    alpha: float = 0.9  # share of the teacher in the sum, in [0, 1]; 1 = the labels are not used
    times_square: bool = True  # multiply by T^2, so that gradients keep their size when T changes

    def __post_init__(self) -> None:
        """Freeze the teacher; refuse values outside their range, all at once."""
        object.__setattr__(self, "teacher", Teacher.of(self.teacher))
        rules = {
            f"temperature is {self.temperature}; it must be positive and finite": positive(self.temperature),
            f"alpha is {self.alpha}; it must be in [0, 1]": 0 <= self.alpha <= 1,
        }
        refuse("Distillation", rules)

    def places(self, model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
        """Return both models; only their outputs are needed."""
        return {model: (), self.teacher: ()}

    def value(self, seen: Pass, y: Tensor) -> Tensor:
        """Return the mean loss of a batch (see OnePass). Raises Incompatible when the outputs differ in shape."""
        ours, theirs = seen.output, seen.by[self.teacher].output
        if ours.shape != theirs.shape or ours.dim() < 2:
            raise Incompatible(
                f"Distillation compares class scores, (n, classes); the student gives {tuple(ours.shape)}, the "
                f"teacher {tuple(theirs.shape)}. For other outputs use GraphDistillation or RelationalDistillation"
            )
        loss = self.alpha * self._divergence(ours, theirs)
        return loss if self.alpha == 1 else loss + (1 - self.alpha) * F.cross_entropy(ours, y)

    def _divergence(self, ours: Tensor, theirs: Tensor) -> Tensor:
        p = F.log_softmax(theirs / self.temperature, dim=1)
        q = F.log_softmax(ours / self.temperature, dim=1)
        mean = F.kl_div(q, p, log_target=True, reduction="none").sum(1).mean()
        return mean * self.temperature**2 if self.times_square else mean

    @classmethod
    def example(cls, teacher: nn.Module) -> Distillation:
        """Return an instance, for the contract tests."""
        return cls(teacher, temperature=2.0, alpha=0.5)
