"""Distillation of groups of layers, joint with structured pruning: SKILL, and DPHuBERT's single layers as the baseline.

Source: Zampierin et al. 2024, SKILL (arXiv:2402.16830), built on DPHuBERT (Peng et al. 2023, arXiv:2305.17651).
Three stages: distil and learn the gates together, remove what the gates closed, distil again without gates.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from thrifty.compress.layer_groups.families import Stack, stack_of
from thrifty.compress.layer_groups.gates import Gates, Lagrangian, Masks, counts, expected_sparsity, refuse_sparsity
from thrifty.compress.layer_groups.grouping import Groups
from thrifty.compress.layer_groups.hidden import Batch, each_batch, hidden_states
from thrifty.compress.layer_groups.pruning import prune, scaled_weights, sizes
from thrifty.cost import Cost
from thrifty.errors import DataError, KnobError, UnsupportedModel
from thrifty.report import Report, Table

Progress = Callable[[int, int, str], None]
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
    gate_lr: float = 0.02  # of the gates and the lambdas
    decay_gates: bool = False  # multiply gate_lr by the schedule too, as DPHuBERT does; the target may be missed
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
        bad += [f"{n} is {getattr(self, n)}; it must be above 0" for n in ("lr", "lr_after", "gate_lr", "clip")
                if not getattr(self, n) > 0]  # fmt: skip
        if self.cosine_form not in COSINES:
            bad.append(f"cosine_form is '{self.cosine_form}'; it must be one of {', '.join(COSINES)}")
        if self.scope not in ("layers", "trunk"):
            bad.append(f"scope is '{self.scope}'; it must be layers or trunk")
        if unknown := set(self.kinds) - {"heads", "units", "channels"}:
            bad.append(f"kinds holds {', '.join(sorted(unknown))}; it takes heads, units, channels")
        if bad:
            raise KnobError("; ".join(bad))


@dataclass
class Compressed:
    """What `distill_and_prune` returns."""

    model: nn.Module  # smaller, in eval mode
    masks: dict[str, Tensor]  # by unit; what was pruned
    projections: nn.ModuleList  # of the student's groups
    history: list[dict[str, Any]] = field(
        default_factory=list
    )  # a row per step: stage, loss, distance, sparsity, target
    report: Report = field(default_factory=Report)


def group_means(states: Sequence[Tensor], groups: Sequence[Sequence[int]], normalise: bool = False) -> Tensor:
    """Return the mean representation of each group, (batch, K, steps, width)."""
    if normalise:
        states = [functional.layer_norm(s, s.shape[-1:]) for s in states]
    return torch.stack([torch.stack([states[i] for i in g]).mean(dim=0) for g in groups], dim=1)


def group_loss(student: Tensor, teacher: Tensor, frames: Tensor, plan: Plan | None = None) -> Tensor:
    """Return l1 mean|P - Q| + cosine (-mean cos(P, Q)) + l2 mean (P - Q)^2 over the real frames.

    student, teacher: (batch, K, steps, width), projected; frames: (batch, steps) bool. For equal ones the value is
    -cosine, not 0: the floor of the loss.
    """
    plan = plan or Plan()
    p, q = (x.transpose(1, 2)[frames] for x in (student, teacher))  # (frames, K, width)
    loss = p.new_zeros(())
    if plan.l1:
        loss = loss + plan.l1 * (p - q).abs().mean()
    if plan.cosine:
        cos = functional.cosine_similarity(p, q, dim=-1)
        loss = loss - plan.cosine * (cos if plan.cosine_form == "linear" else functional.logsigmoid(cos)).mean()
    if plan.l2:
        loss = loss + plan.l2 * (p - q).square().mean()
    return loss


def make_projections(stack: Stack, matching: Matching) -> nn.ModuleList:
    """Return the linear maps of a matching, each the identity with zero bias."""
    width = int(stack.config.hidden_size if hasattr(stack.config, "hidden_size") else stack.config.d_model)
    maps = nn.ModuleList()
    for _ in range(max(matching.maps) + 1):
        maps.append(nn.Linear(width, width))
        nn.init.eye_(maps[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(maps[-1].bias)  # type: ignore[arg-type]
    return maps


def distill_and_prune(
    model: nn.Module,
    batches: Sequence[Batch],
    matching: Matching,
    plan: Plan | None = None,
    masks: Masks | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Return a smaller student of `model`, which is its teacher and stays as it is.

    batches: as for `similarities`, no labels; each epoch runs them in a new order. masks: prune with these instead of
    learning gates (random ones, say); then only the second stage runs. The student is trained without dropout,
    layer drop or masking of its input. The targets of the teacher are computed once: 4 bytes x frames x groups x width.
    Raises UnsupportedModel, KnobError, DataError (a NaN in the loss, with the step).
    """
    plan = plan or Plan()
    teacher = stack_of(model)
    _refuse(teacher, batches, matching, plan)
    start = time.perf_counter()
    targets = _targets(teacher, batches, matching, plan)
    student = stack_of(_student(model))
    projections = make_projections(student, matching)
    run = _Run(batches, targets, matching, plan, projections, progress, plan.steps * (masks is None) + plan.steps_after)
    report = _start_report(teacher, plan)
    if masks is None:
        masks = run.learn_gates(student)
        report.add("distil + prune", _cost(teacher.model, teacher, masks), seconds=time.perf_counter() - start,
                   knobs=asdict(plan))  # fmt: skip
    else:
        report.add("given masks", _cost(teacher.model, teacher, masks))
    smaller = stack_of(prune(student.model, masks))
    begin = time.perf_counter()
    run.train(smaller)
    report.add("distil", _cost(smaller.model), seconds=time.perf_counter() - begin)
    report.tables.append(_widths(teacher, masks))
    return Compressed(smaller.model.eval(), dict(masks), projections, run.history, report)


@torch.no_grad()
def distance(
    teacher: nn.Module,
    student: nn.Module,
    batches: Sequence[Batch],
    matching: Matching,
    plan: Plan | None = None,
    projections: nn.ModuleList | None = None,
) -> float:
    """Return the mean distillation loss of a student on batches; without projections: identities."""  # fmt: skip
    plan = plan or Plan()
    first, second = stack_of(teacher), stack_of(student)
    maps = projections if projections is not None else make_projections(second, matching)
    total = 0.0
    targets = _targets(first, batches, matching, plan)
    for (target, frames), (states, _) in zip(targets, each_batch(second, batches), strict=True):
        found = _project(group_means(states, matching.groups, plan.normalise), maps, matching)
        total += float(group_loss(found, target, frames, plan))
    return total / len(targets)


@dataclass
class _Run:
    """The state that both stages share: data, projections, history."""

    batches: Sequence[Batch]
    targets: list[tuple[Tensor, Tensor]]
    matching: Matching
    plan: Plan
    projections: nn.ModuleList
    progress: Progress | None
    total: int
    history: list[dict[str, Any]] = field(default_factory=list)

    def learn_gates(self, student: Stack) -> dict[str, Tensor]:
        """Train weights, projections and gates together; return the masks of evaluation."""
        plan = self.plan
        draws = torch.Generator().manual_seed(plan.seed)
        gates = Gates(student.units(plan.kinds), draws)
        shapes = student.scope(plan.scope, plan.kinds)
        pressure = Lagrangian(plan.sparsity, round(plan.ramp * plan.steps))
        weights = [*_trained(student), *self.projections.parameters()]
        optimizer = torch.optim.AdamW([
            {"params": weights, "lr": plan.lr, "scheduled": True},
            {"params": list(gates.parameters()), "lr": plan.gate_lr, "scheduled": plan.decay_gates},
            {"params": list(pressure.parameters()), "lr": plan.gate_lr, "scheduled": plan.decay_gates,
             "maximize": True},
        ], weight_decay=0.0)  # fmt: skip
        for step, index in enumerate(self._order(plan.steps, plan.seed)):
            _schedule(optimizer, step, plan.steps, plan.warmup)
            masked = scaled_weights(student.trunk, gates.units, gates.sample(draws))
            loss = self._loss(student, index, masked)
            sparsity = expected_sparsity(gates, shapes)
            self._step(optimizer, weights, loss + pressure(sparsity, step))
            self._note("gates", step, loss, float(sparsity.detach()), pressure.target(step))
        if plan.settle:
            gates.settle(student, plan.sparsity, plan.scope, plan.uniform)
        elif plan.uniform:
            gates._make_uniform()
        return gates.evaluate()

    def train(self, student: Stack) -> None:
        """Distil again, without gates."""
        plan = self.plan
        weights = [*_trained(student), *self.projections.parameters()]
        optimizer = torch.optim.AdamW([{"params": weights, "lr": plan.lr_after, "scheduled": True}], weight_decay=0.0)
        for step, index in enumerate(self._order(plan.steps_after, plan.seed + 1)):
            _schedule(optimizer, step, plan.steps_after, plan.warmup_after)
            loss = self._loss(student, index, None)
            self._step(optimizer, weights, loss)
            self._note("after", step, loss)

    def _loss(self, student: Stack, index: int, masked: Mapping[str, Tensor] | None) -> Tensor:
        states = hidden_states(student, self.batches[index], masked)
        found = _project(
            group_means(states, self.matching.groups, self.plan.normalise), self.projections, self.matching
        )
        target, frames = self.targets[index]
        return group_loss(found, target, frames, self.plan)

    def _step(self, optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter], loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise DataError(f"step {len(self.history)}: the loss is {float(loss)}; lower lr or look at the batches")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([w for w in weights if w.grad is not None], self.plan.clip)
        optimizer.step()

    def _order(self, steps: int, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        while len(order) < steps:
            order += torch.randperm(len(self.batches), generator=generator).tolist()
        return order[:steps]

    def _note(
        self, stage: str, step: int, loss: Tensor, sparsity: float | None = None, target: float | None = None
    ) -> None:
        self.history.append({"stage": stage, "step": step, "distance": float(loss.detach()), "sparsity": sparsity,
                             "target": target})  # fmt: skip
        if self.progress:
            words = f"distance {float(loss.detach()):.4f}" + (
                f", sparsity {sparsity:.3f}" if sparsity is not None else ""
            )
            self.progress(len(self.history), self.total, words)


def _targets(teacher: Stack, batches: Sequence[Batch], matching: Matching, plan: Plan) -> list[tuple[Tensor, Tensor]]:
    return [
        (group_means(states, matching.groups, plan.normalise), frames)
        for states, frames in each_batch(teacher, batches)
    ]


def _project(means: Tensor, maps: nn.ModuleList, matching: Matching) -> Tensor:
    return torch.stack([maps[m](means[:, k]) for k, m in enumerate(matching.maps)], dim=1)


def _student(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode: no dropout, no layer drop, no masking of the input."""
    return copy.deepcopy(model).eval()


def _trained(student: Stack) -> list[nn.Parameter]:
    """Return what the distillation trains: every weight of the trunk that floats; what was frozen stays frozen."""
    return [p for p in student.trunk.parameters() if p.requires_grad]


def _schedule(optimizer: torch.optim.Optimizer, step: int, steps: int, warmup: float) -> None:
    """Scale the step sizes: up in a straight line, then down to 0 in a straight line."""
    rise = round(warmup * steps)
    factor = (step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise)
    for part in optimizer.param_groups:
        part.setdefault("largest", part["lr"])
        part["lr"] = part["largest"] * (factor if part["scheduled"] else 1.0)


def _refuse(stack: Stack, batches: Sequence[Batch], matching: Matching, plan: Plan) -> None:
    if not len(batches):
        raise DataError("there is no batch to distil on")
    top = len(stack.layers)
    bad = [f"group {g} is empty" for g in matching.groups if not g]
    bad += [
        f"group {g} names representations outside 0..{top}"
        for g in matching.groups
        if any(not 0 <= i <= top for i in g)
    ]
    if not matching.groups:
        bad.append("there are no groups")
    if len(matching.maps) != len(matching.groups):
        bad.append(f"{len(matching.groups)} groups, but {len(matching.maps)} projections")
    if bad:
        raise KnobError("; ".join(bad))
    refuse_sparsity(stack, stack.units(plan.kinds), plan.sparsity, plan.scope, plan.kinds)
    small = {str(p.dtype) for p in stack.trunk.parameters() if p.dtype not in (torch.float32, torch.float64)}
    if small:
        raise UnsupportedModel([f"weights in {', '.join(sorted(small))} are not trained; call model.float() first"])


def _start_report(stack: Stack, plan: Plan) -> Report:
    report = Report(f"layer groups of {type(stack.model).__name__}", seed=plan.seed, metric="distillation loss")
    report.add("start", _cost(stack.model))
    return report


def _cost(model: nn.Module, stack: Stack | None = None, masks: Masks | None = None) -> Cost:
    """Return the counted parameters of a model, less what the masks will remove."""
    count = sum(p.numel() for p in model.parameters())
    width = sum(p.numel() * p.element_size() for p in model.parameters())
    if stack is not None and masks is not None:
        before, after = sizes(stack, masks, "trunk")
        width -= (before - after) * (width // count)
        count -= before - after
    return Cost(params=count, weight_bytes=width)


def _widths(stack: Stack, masks: Masks) -> Table:
    kept = counts(masks)
    rows = [(n, len(masks[n]), kept[n], f"{kept[n] / len(masks[n]):.2f}") for n in masks]
    before, after = sizes(stack, masks)
    note = f"Parameters of the layers: {before:,} before, {after:,} after ({1 - after / before:.4f} removed)."
    return Table("What is left of each layer", ("unit", "before", "after", "share"), rows, note)
