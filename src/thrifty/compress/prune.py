"""Remove whole channels, least important first, then let the network recover."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from thrifty.capture import capture
from thrifty.compress.cut import cut, refuse_quantised, rounded, step_of, why_not
from thrifty.errors import Incompatible, KnobError, NoMatch, NothingToDo, close_to
from thrifty.graph import Graph
from thrifty.recipe import refuse_mistyped
from thrifty.task import Task
from thrifty.ties import Group, channel_groups
from thrifty.training import PlainLoss

__all__ = ["IMPORTANCES", "Prune", "cut", "recalibrate"]

Array = npt.NDArray[np.float64]
Scores = dict[str, Array]  # group name -> (units,), higher = more important
SCOPES = ("uniform", "global")


@dataclass(frozen=True)
class Prune:
    """Remove whole channels: real shapes shrink, so bytes, MACs and time do too.

    Channels that must go together (residual sums, depthwise filters, concatenations, flattened maps) do.
    After the cut the batch-norm statistics are estimated again from training data; then it trains.
    """

    ratio: float = 0.5  # share of the channels removed, in [0, 1)
    importance: str = "l1"  # what ranks channels: "l1" (weights), "bn" (batch norm), "taylor" (loss), "random"
    scope: str = "uniform"  # "uniform": the same share everywhere; "global": the least important of all
    ratios: Mapping[str, float] = field(default_factory=dict)  # module pattern -> its own ratio
    keep: tuple[str, ...] = ()  # patterns of modules whose channels all stay
    round_to: int = 4  # channel counts become multiples of this
    min_channels: int = 4  # no layer gets fewer
    recalibrate: bool = True  # estimate batch-norm statistics again
    recover_epochs: int = 2  # epochs of training after the cut; 0: none
    recover_lr: float = 0.01  # learning rate of that training, at its start

    def __post_init__(self) -> None:
        """Refuse values outside their range, all at once."""
        refuse_mistyped(self)
        object.__setattr__(self, "ratios", dict(self.ratios))
        object.__setattr__(self, "keep", tuple([self.keep] if isinstance(self.keep, str) else self.keep))
        names = {"ratio": self.ratio, **{f"ratios['{k}']": v for k, v in self.ratios.items()}}
        bad = [f"{k} is {v}; it must be in [0, 1)" for k, v in names.items() if not 0 <= v < 1]
        if self.importance not in IMPORTANCES:
            bad.append(f"importance is '{self.importance}'; {close_to(self.importance, IMPORTANCES)}")
        if self.scope not in SCOPES:
            bad.append(f"scope is '{self.scope}'; {close_to(self.scope, SCOPES)}")
        for name in ("round_to", "min_channels"):
            if getattr(self, name) < 1:
                bad.append(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.recover_epochs < 0:
            bad.append(f"recover_epochs is {self.recover_epochs}; it must be at least 0")
        if self.recover_lr <= 0:
            bad.append(f"recover_lr is {self.recover_lr}; it must be positive")
        if bad:
            raise KnobError("Prune: " + "; ".join(bad))

    @classmethod
    def example(cls) -> Prune:
        """Return a fast instance, for the contract tests."""
        return cls(ratio=0.5, recover_epochs=1)

    def edit(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a smaller copy of the model.

        Raises NothingToDo when rounding leaves every channel, NoMatch for a pattern that matches no module,
        Incompatible for a quantised model, UnsupportedModel for operators without a rule for channels.
        """
        return list(self.stages(model, task))[-1][1]

    def stages(self, model: nn.Module, task: Task) -> Iterator[tuple[str, nn.Module]]:
        """Yield ("cut", model), ("recalibrated", model), ("recovered", model): one object."""
        refuse_quantised(model, "prune")
        graph = capture(model, task.example)
        edited = cut(model, graph, self.choose(model, graph, task))
        yield "cut", edited
        if self.recalibrate and recalibrate(edited, task):
            yield "recalibrated", edited
        if self.recover_epochs:
            yield "recovered", task.fit(edited, epochs=self.recover_epochs, lr=self.recover_lr)

    def choose(self, model: nn.Module, graph: Graph, task: Task) -> dict[str, tuple[int, ...]]:
        """Return the units that stay, for every group that loses some: the argument of `cut`."""
        everything = channel_groups(graph)
        ratios = self._ratios(model, everything)
        groups = [g for g in everything if g.name in ratios]
        scores = IMPORTANCES[self.importance](model, groups, task)
        shares = self._shares(groups, scores, ratios)
        kept = {g.name: self._stay(g, scores[g.name], shares[g.name]) for g in groups}
        kept = {g.name: kept[g.name] for g in groups if len(kept[g.name]) < g.size}
        if not kept:
            sizes = ", ".join(f"{g.name} {g.size}" for g in groups[:8]) or "none that may be cut"
            raise NothingToDo(
                f"Prune with ratio {self.ratio}, round_to {self.round_to}, min_channels {self.min_channels} "
                f"removes nothing (channels: {sizes}); raise the ratio, or lower round_to and min_channels"
            )
        return kept

    def _shares(self, groups: Sequence[Group], scores: Scores, ratios: Mapping[str, float | None]) -> Scores:
        """Return the share of each unit that should stay before rounding; 0 or 1 in a global ranking."""
        shares = {
            g.name: np.full(g.size, 1.0 - (self.ratio if (r := ratios[g.name]) is None else r))
            for g in groups
        }
        ranked = [g.name for g in groups if ratios[g.name] is None]
        if self.scope == "global" and ranked:
            relative = np.concatenate([scores[n] / (scores[n].mean() or 1.0) for n in ranked])
            removed = np.argsort(relative, kind="stable")[: round(self.ratio * len(relative))]
            stays = np.ones(len(relative))
            stays[removed] = 0.0
            ends = np.cumsum([len(scores[n]) for n in ranked])[:-1]
            shares.update(zip(ranked, np.split(stays, ends)))
        return shares

    def _stay(self, group: Group, scores: Array, shares: Array) -> tuple[int, ...]:
        stay: list[int] = []
        for cell in group.cells:
            least = -(-self.min_channels // group.width(cell[0]))
            count = rounded(
                float(shares[list(cell)].sum()), len(cell), step_of(group, cell, self.round_to), least
            )
            stay += sorted(cell, key=lambda u: (-scores[u], u))[:count]
        return tuple(sorted(stay))

    def _ratios(self, model: nn.Module, groups: Sequence[Group]) -> dict[str, float | None]:
        """Return the ratio of each group that may be cut; None where `ratio` and `scope` decide."""
        names = [n for n, _ in model.named_modules() if n]
        for pattern in (*self.keep, *self.ratios):
            if not any(fnmatchcase(n, pattern) for n in names):
                raise NoMatch(f"'{pattern}' matches no module; {close_to(pattern, names)}")
        found: dict[str, float | None] = {}
        for group in groups:
            own = [self.ratios[p] for p in self.ratios if _covers(p, group)]
            refusal = group.frozen or why_not(model, group)
            if not refusal and not any(_covers(p, group) for p in self.keep):
                found[group.name] = own[-1] if own else None
        lost = [p for p in self.ratios if not any(_covers(p, g) and g.name in found for g in groups)]
        if lost:
            reasons = {
                g.name: g.frozen or why_not(model, g) or "it is kept"
                for g in groups
                if any(_covers(p, g) for p in lost)
            }
            said = "; ".join(f"{k}: {v}" for k, v in reasons.items()) or "they make no channels"
            raise Incompatible(f"ratios for {', '.join(lost)} cannot be used ({said})")
        return found


def _covers(pattern: str, group: Group) -> bool:
    """Whether a pattern names a module that makes channels of the group, or one that contains it."""
    for module in group.modules:
        parts = module.split(".")
        if any(fnmatchcase(".".join(parts[:k]), pattern) for k in range(1, len(parts) + 1)):
            return True
    return False


# --- importances: (model, groups, task) -> one score per unit of each group ---


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    path, _, attribute = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(path), attribute)
    return found


def _per_unit(group: Group, units: Sequence[int], per_position: Array) -> Array:
    """Add up values along an axis by unit."""
    total = np.zeros(group.size)
    mine = np.asarray(units)
    np.add.at(total, mine[mine >= 0], per_position[mine >= 0])
    return total


def _l1(model: nn.Module, groups: Sequence[Group], task: Task) -> Scores:
    """Sum of absolute weights of a filter, relative to its layer, averaged over tied layers.

    Source: Li et al. 2017, Pruning Filters for Efficient ConvNets, arXiv 1608.08710, section 3.1.
    """
    scores = {}
    for group in groups:
        total, layers = np.zeros(group.size), np.zeros(group.size)
        for member in group.members:
            if member.role == "out":
                norms = _tensor(model, member.tensor).detach().abs().double().flatten(1).sum(1).cpu().numpy()
                mine = _per_unit(group, member.units, norms)
                total += mine / (mine[mine > 0].mean() if mine.any() else 1.0)
                layers += _per_unit(group, member.units, np.ones(len(norms))) > 0
        scores[group.name] = total / layers
    return scores


def _bn(model: nn.Module, groups: Sequence[Group], task: Task) -> Scores:
    """Absolute scale of the batch norms, averaged over tied ones.

    Source: Liu et al. 2017, Network Slimming, arXiv 1708.06519, section 3.
    """
    scores, without = {}, []
    for group in groups:
        scales = [m for m in group.members if m.role == "norm" and m.tensor.endswith(".weight")]
        values = [
            _per_unit(group, m.units, _tensor(model, m.tensor).detach().abs().double().cpu().numpy())
            for m in scales
        ]
        if values:
            scores[group.name] = np.mean(values, axis=0)
        else:
            without.append(group.name)
    if without:
        raise Incompatible(
            f"importance='bn' needs a batch norm behind each layer; none behind {', '.join(without)}: "
            "use importance='l1', or list these in keep"
        )
    return scores


def _taylor(model: nn.Module, groups: Sequence[Group], task: Task) -> Scores:
    """First-order estimate of the change of the loss when a channel's tensors become zero, on training data.

    Source: Molchanov et al. 2019, Importance Estimation for Neural Network Pruning, arXiv 1906.10771, eq. 8:
    |sum of gradient * weight|, here per tensor, summed over the tensors of the channel.
    """
    twin = copy.deepcopy(model).eval()
    for p in twin.parameters():
        p.requires_grad_(True)
        p.grad = None
    objective = task.objective or PlainLoss(len(task.classes))
    rows = torch.randperm(len(task.train.x), generator=torch.Generator().manual_seed(task.seed))[
        :TAYLOR_EXAMPLES
    ]
    with torch.enable_grad():
        objective.loss(twin, task.train.x[rows], task.train.y[rows]).backward()  # type: ignore[no-untyped-call]
    scores = {}
    for group in groups:
        total = np.zeros(group.size)
        for member in group.members:
            tensor = _tensor(twin, member.tensor)
            if member.role != "in" and tensor.grad is not None:
                change = (
                    (tensor.detach() * tensor.grad).double().reshape(tensor.shape[0], -1).sum(1).cpu().numpy()
                )
                total += np.abs(_per_unit(group, member.units, change))
        scores[group.name] = total
    return scores


def _random(model: nn.Module, groups: Sequence[Group], task: Task) -> Scores:
    """A seeded lottery: the control that every importance must beat."""
    rng = np.random.default_rng(task.seed)
    return {g.name: rng.random(g.size) for g in groups}


IMPORTANCES: dict[str, Callable[[nn.Module, Sequence[Group], Task], Scores]] = {
    "l1": _l1,
    "bn": _bn,
    "taylor": _taylor,
    "random": _random,
}
TAYLOR_EXAMPLES = 256


def recalibrate(model: nn.Module, task: Task, examples: int = 1024, batch: int = 64) -> bool:
    """Estimate the batch-norm statistics of `model` again, in place, from training data; weights stay.

    The mean over batches replaces the running statistics. Returns whether there was anything to estimate.
    """
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    if not norms:
        return False
    modes = {m: m.training for m in model.modules()}
    momenta = {m: m.momentum for m in norms}
    order = torch.randperm(len(task.train.x), generator=torch.Generator().manual_seed(task.seed))[:examples]
    device = next(model.parameters()).device
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.training = True
    with torch.no_grad():
        for rows in torch.split(order, batch):
            if len(rows) == min(batch, len(order)):  # a ragged last batch would weigh too much
                model(task.train.x[rows].to(device))
    for norm in norms:
        norm.momentum = momenta[norm]
    for module, mode in modes.items():
        module.training = mode
    return True
