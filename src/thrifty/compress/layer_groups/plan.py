"""What a student imitates, and how it is trained and pruned."""

from __future__ import annotations

from dataclasses import dataclass

from thrifty.compress.layer_groups.grouping import Groups
from thrifty.errors import KnobError

COSINES = ("linear", "log_sigmoid")


@dataclass(frozen=True)
class Matching:
    """What the student imitates: the mean of each group of representations, through one linear map per `projection`.

    >>> Matching.single_layers(12)
    Matching(groups=((0,), (4,), (8,), (12,)), projection=(0, 1, 1, 1))
    """

    groups: tuple[tuple[int, ...], ...]  # representations 0..L; 0 is the input of layer 1
    projection: tuple[int, ...] = ()  # index of the linear map of each group; one map for each where empty

    @classmethod
    def of(cls, groups: Groups) -> Matching:
        """Return the matching of SKILL: a map for each group."""
        return cls(groups.groups, tuple(range(len(groups.groups))))

    @classmethod
    def single_layers(cls, layers: int) -> Matching:
        """Return DPHuBERT's choice: the input with its own map, three single layers that share one."""
        chosen = sorted({round(layers * k / 3) for k in (1, 2, 3)} - {0})
        return cls(((0,), *((c,) for c in chosen)), (0, *(1 for _ in chosen)))

    @property
    def maps(self) -> tuple[int, ...]:
        """The index of the map of each group."""
        return self.projection or tuple(range(len(self.groups)))


@dataclass(frozen=True)
class Plan:
    """The knobs of `distill_and_prune`; the values of DPHuBERT where they were known, its steps shortened."""

    sparsity: float = 0.5  # share of the parameters in scope that goes
    kinds: tuple[str, ...] = ("heads", "units")  # of "heads", "units", "channels"
    scope: str = "layers"  # what the sparsity counts: "layers", or "trunk" with embeddings and front end
    steps: int = 5000  # with gates
    steps_after: int = 2500  # after pruning
    lr: float = 2e-4  # largest step size of the weights, with gates
    lr_after: float = 1e-4  # the same after pruning
    warmup: float = 0.3  # share of the steps, with gates
    warmup_after: float = 0.2  # the same after pruning
    ramp: float = 0.1  # share of the steps over which the target sparsity rises from 0
    gate_lr: float = 0.02  # of the gates; heads start 6 above where they close: gate_lr * steps must be well above that
    lambda_lr: float = 0.02  # of the lambdas; in a short run below gate_lr, else the sparsity overshoots
    decay_gates: bool = False  # multiply both by the schedule too, as DPHuBERT does; the target may be missed
    settle: bool = True  # shift all gates at the end so that the sparsity is met
    uniform: bool = False  # keep the same number of heads, of units, in every layer
    clip: float = 10.0  # largest norm of the gradient of the weights
    l1: float = 1.0  # weight of the mean absolute difference
    cosine: float = 1.0  # weight of the cosine term
    l2: float = 0.0  # weight of the mean squared difference
    cosine_form: str = "linear"  # "linear": -cos; "log_sigmoid": -log sigmoid(cos)
    normalise: bool = False  # standardise every frame of every layer before the mean, so that no layer outweighs
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("steps", "steps_after", "l1", "cosine", "l2")
        bad = [f"{n} is {getattr(self, n)}; it must be at least 0" for n in positive if getattr(self, n) < 0]
        bad += [f"{n} is {getattr(self, n)}; it must be 0..1" for n in ("warmup", "warmup_after", "ramp")
                if not 0 <= getattr(self, n) <= 1]  # fmt: skip
        above = ("lr", "lr_after", "gate_lr", "lambda_lr", "clip")
        bad += [f"{n} is {getattr(self, n)}; it must be above 0" for n in above if not getattr(self, n) > 0]
        if self.cosine_form not in COSINES:
            bad.append(f"cosine_form is '{self.cosine_form}'; it must be one of {', '.join(COSINES)}")
        if self.scope not in ("layers", "trunk"):
            bad.append(f"scope is '{self.scope}'; it must be layers or trunk")
        if unknown := set(self.kinds) - {"heads", "units", "channels"}:
            bad.append(f"kinds holds {', '.join(sorted(unknown))}; it takes heads, units, channels")
        if bad:
            raise KnobError("; ".join(bad))
