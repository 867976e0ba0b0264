"""What objectives see of a model: its output and the features at some places, from one pass; and frozen teachers."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from thrifty.errors import DataError, Incompatible, KnobError, NoMatch, close_to
from thrifty.objectives.products import gram, gram_for_distances

INPUT = ":input"  # ending of a place: what enters the module instead of what leaves it


class Teacher(nn.Module):
    """A frozen copy of a model: always in eval mode, without gradients; the caller's model is never touched.

    >>> Teacher(nn.Dropout()).train().training
    False
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if isinstance(model, type) or not isinstance(model, nn.Module):
            raise KnobError(f"a teacher is a model (an nn.Module), but this is {model!r}")
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.train(False)

    @classmethod
    def of(cls, model: nn.Module) -> Teacher:
        """Return the teacher itself, or a frozen copy of a model."""
        return model if isinstance(model, Teacher) else cls(model)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, x: Tensor) -> Any:
        """Return the model's output, without a gradient; the model follows x to its device."""
        tensor = next(self.parameters(), None)
        if tensor is not None and tensor.device != x.device:
            self.to(x.device)
        self.train(False)
        with torch.no_grad():
            return self.model(x)


@runtime_checkable
class RunsGraph(Protocol):
    """A model that runs a graph of operators read from other modules, on which hooks see nothing: a QuantizedModel."""

    model: nn.Module  # the modules that were read; their paths name places

    def watching(self, places: Sequence[str], x: Tensor) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Give a mapping that a pass within fills with what it shows at places of `model`; x: (n, ...) inputs."""


def modules_of(model: nn.Module) -> nn.Module:
    """Return the model whose modules name the places: without the teacher, or the graph, around it."""
    inner = model.model if isinstance(model, Teacher) else model
    found: nn.Module = inner.model if isinstance(inner, RunsGraph) else inner
    return found


@dataclass(frozen=True)
class Seen:
    """What one pass of a model showed."""

    output: Tensor  # (n, ...)
    at: Mapping[str, Tensor]  # place -> features, (n, ...)


@dataclass(frozen=True)
class Pass:
    """One batch, seen by the model that trains and by the teachers of an objective."""

    model: nn.Module
    x: Tensor  # (n, ...)
    by: Mapping[nn.Module, Seen]

    @property
    def output(self) -> Tensor:
        """The output of the model that trains."""
        return self.by[self.model].output

    def features(self, model: nn.Module, places: Sequence[str]) -> list[Tensor]:
        """Return what a model showed at these places, each (n, d)."""
        return [self.by[model].at[place].flatten(1) for place in places]


class OnePass(ABC):
    """An objective that needs one pass of the model, so that `WeightedSum` can share it with others."""

    @abstractmethod
    def places(self, model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
        """Return the models to run, the one that trains among them, and the places to look at in each."""

    @abstractmethod
    def value(self, seen: Pass, y: Tensor) -> Tensor:
        """Return the loss of a batch that was seen, a scalar. y: as in `loss`."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar that carries gradients.

        x: (n, ...); y: (n,) int64 labels, or (n, classes) probabilities under mixup.
        """
        return self.value(watch(model, x, self.places(model)), y)


def watch(model: nn.Module, x: Tensor, places: Mapping[nn.Module, Sequence[str]]) -> Pass:
    """Run every model once on x: (n, ...)."""
    return Pass(model, x, {each: look(each, x, names) for each, names in places.items()})


# --- places


def patterns_of(layers: str | Iterable[str]) -> tuple[str, ...]:
    """Return patterns as a tuple, for fields that also take a single one."""
    return (layers,) if isinstance(layers, str) else tuple(layers)


def find(model: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the places that module patterns name, in the order of the patterns, then of the modules.

    A place is the dotted path of a module: what leaves it; with ":input" behind: what enters it; "" is the model's
    output. No patterns: what enters the last linear layer. Raises NoMatch for a pattern without a module.

    >>> find(nn.Sequential(nn.ReLU(), nn.Linear(2, 3)), ())
    ('1:input',)
    """
    inner = modules_of(model)
    if not patterns:
        return (_before_last_linear(inner),)
    names = [n for n, _ in inner.named_modules() if n and "parametrizations" not in n.split(".")]
    found: dict[str, None] = {}
    lost = []
    for pattern in patterns:
        path, ending = (pattern.removesuffix(INPUT), INPUT) if pattern.endswith(INPUT) else (pattern, "")
        hits = [n for n in names if fnmatchcase(n, path)] if path else [""]
        found.update(dict.fromkeys(n + ending for n in hits))
        if not hits:
            lost.append(f"'{pattern}' matches no module of {type(inner).__name__}, {close_to(path, names)}")
    if lost:
        raise NoMatch("; ".join(lost))
    return tuple(found)


def pairs(
    student: nn.Module, layers: Sequence[str], teacher: Teacher, teacher_layers: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the places to compare, of the student and of the teacher, equally many.

    teacher_layers: empty means those of the student. Raises NoMatch; KnobError when the numbers differ.
    """
    ours, theirs = find(student, layers), find(teacher, teacher_layers or layers)
    if len(ours) != len(theirs):
        raise KnobError(
            f"layers match {len(ours)} place(s) of the student ({', '.join(ours)}) and {len(theirs)} of the teacher "
            f"({', '.join(theirs)}); they are compared one by one, so name equally many (see teacher_layers)"
        )
    return ours, theirs


def _before_last_linear(model: nn.Module) -> str:
    linear: list[str] = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise NoMatch(
            f"{type(model).__name__} has no nn.Linear whose input could be compared; name the layers "
            "(patterns of modules, or '' for the output)"
        )
    return linear[-1] + INPUT


# --- looking


def look(model: nn.Module, x: Tensor, places: Sequence[str]) -> Seen:
    """Run the model on x: (n, ...) and return its output and what it showed at the places.

    The hooks are gone afterwards, also after an error. Raises Incompatible for a place that cannot be used.
    """
    inner = model.model if isinstance(model, Teacher) else model
    named = [place for place in places if place]
    if isinstance(inner, RunsGraph):
        with inner.watching(named, x) as given:
            output = model(x)
        at = {place: _one(place, [(value, value._version)], len(x)) for place, value in given.items()}
    else:
        shown: dict[str, list[tuple[Any, int]]] = {place: [] for place in named}
        with _hooks(inner, shown):
            output = model(x)
        at = {place: _one(place, found, len(x)) for place, found in shown.items()}
    if not isinstance(output, Tensor):
        raise Incompatible(
            f"{type(inner).__name__} returns {type(output).__name__}; an objective needs one tensor: wrap the model "
            "so that its forward returns the scores only"
        )
    return Seen(output, {**at, "": output} if "" in places else at)


@contextmanager
def _hooks(model: nn.Module, shown: Mapping[str, list[tuple[Any, int]]]) -> Iterator[None]:
    """Append what passes each place, and its version, while the model runs."""

    def keep(place: str, value: Any) -> None:
        shown[place].append((value, value._version if isinstance(value, Tensor) else 0))

    handles = []
    try:
        for place in shown:
            module = model.get_submodule(place.removesuffix(INPUT))
            if place.endswith(INPUT):
                handles.append(module.register_forward_pre_hook(lambda _m, args, p=place: keep(p, *args[:1])))
            else:
                handles.append(module.register_forward_hook(lambda _m, _args, out, p=place: keep(p, out)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _one(place: str, found: list[tuple[Any, int]], rows: int) -> Tensor:
    """Return the only tensor that passed a place; refuse everything else."""
    if not found:
        raise Incompatible(
            f"the module of '{place}' did not run; compare other layers, or the output with layers=('',)"
        )
    if len(found) > 1:
        raise Incompatible(f"the module of '{place}' ran {len(found)} times; name a layer that runs once")
    value, version = found[0]
    if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != rows:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise Incompatible(f"'{place}' gives {shape}; features need one row for each of the {rows} inputs")
    if value._version != version:
        raise Incompatible(f"what passes '{place}' is changed in place afterwards; name the layer that changes it")
    return value


# --- pairs of rows


def same_class(y: Tensor, rows: int) -> Tensor:
    """Return how much two rows share their class: 1 or 0 for labels, in between for probabilities. (n, n) floats.

    y: (n,) int64 labels, or (n, classes) probabilities p (mixup): 1 - |p_i - p_j|^2 / 2, which is 1 for equal rows
    and for labels the same as 1 or 0. Raises DataError for anything else.
    """
    if not y.is_floating_point() and y.dim() == 1 and len(y) == rows:
        return (y[:, None] == y[None, :]).float()
    fits = y.is_floating_point() and y.dim() == 2 and len(y) == rows
    if not fits or not bool(((y >= 0).all()) & ((y.sum(1) - 1).abs() < 1e-3).all()):
        raise DataError(
            f"y is {y.dtype} of shape {tuple(y.shape)}; this objective needs classes: ({rows},) int64 labels, or "
            f"({rows}, classes) probabilities whose rows sum to 1"
        )
    return (1 - (y[:, None] - y[None]).square().sum(-1) / 2).clamp(0, 1)


def off_diagonal(h: Tensor) -> Tensor:
    """Return ones with a zero diagonal, (n, n), of the type of h: (n, ...)."""
    return 1 - torch.eye(len(h), dtype=h.dtype, device=h.device)


def cosines(h: Tensor) -> Tensor:
    """Return the cosines of the rows of h: (n, d), as (n, n); 0, with gradient 0, for rows of zeros.

    >>> cosines(torch.tensor([[2.0, 0.0], [0.0, 0.0]])).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    products = gram(h)
    scale = _inverse_lengths(products.diagonal())
    return scale[:, None] * products * scale[None, :]


def distances(h: Tensor) -> Tensor:
    """Return the Euclidean distances of the rows of h: (n, d), as (n, n).

    Distances below the rounding error of the computation are 0 and have gradient 0.

    >>> distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist()
    [[0.0, 5.0], [5.0, 0.0]]
    """
    products = gram_for_distances(h)
    sums = products.diagonal()[:, None] + products.diagonal()[None, :]
    squares = sums - 2 * products
    real = ~(squares <= 8 * torch.finfo(h.dtype).eps * sums)  # NaN stays
    return torch.where(real, squares, 1).sqrt() * real * off_diagonal(h)


def unit_rows(h: Tensor) -> Tensor:
    """Return the rows of h: (n, d) at length 1; a row of zeros stays so, with gradient 0."""
    return h * _inverse_lengths(h.square().sum(1))[:, None]


def _inverse_lengths(squares: Tensor) -> Tensor:
    """Return 1 / sqrt of squared lengths, (n,); 0, with gradient 0, where there is no length."""
    real = ~(squares <= torch.finfo(squares.dtype).tiny)  # NaN stays
    return torch.where(real, squares, 1).rsqrt() * real


# --- knobs


def refuse(name: str, rules: Mapping[str, bool]) -> None:
    """Raise KnobError with every sentence whose rule is broken."""
    bad = [sentence for sentence, fine in rules.items() if not fine]
    if bad:
        raise KnobError(f"{name}: " + "; ".join(bad))


def positive(value: float) -> bool:
    """Whether a number is above 0 and finite."""
    return 0 < value < math.inf


def counts(value: int | None) -> bool:
    """Whether a number is whole and at least 1, or None."""
    return value is None or (isinstance(value, int) and value >= 1)
