"""Distillation of groups of layers, joint with structured pruning: SKILL, and DPHuBERT's single layers as the baseline.

Source: Zampierin et al. 2024, SKILL (arXiv:2402.16830), built on DPHuBERT (Peng et al. 2023, arXiv:2305.17651).
Three stages: distil and learn the gates together, remove what the gates closed, distil again without gates.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thrifty.compress.layer_groups.checkpoint import Checkpoint, Saved, restore
from thrifty.compress.layer_groups.families import Stack, stack_of
from thrifty.compress.layer_groups.gates import Gates, Lagrangian, Masks, counts, expected_sparsity, refuse_sparsity
from thrifty.compress.layer_groups.hidden import Batch, each_batch, hidden_states
from thrifty.compress.layer_groups.loss import group_loss, group_means, make_projections, project
from thrifty.compress.layer_groups.plan import Matching, Plan
from thrifty.compress.layer_groups.pruning import prune, scaled_weights, sizes
from thrifty.cost import Cost
from thrifty.errors import DataError, KnobError, UnsupportedModel
from thrifty.report import Report, Table

Progress = Callable[[int, int, str], None]


@dataclass
class Compressed:
    """What `distill_and_prune` returns."""

    model: nn.Module  # smaller, in eval mode
    masks: dict[str, Tensor]  # by unit; what was pruned
    projections: nn.ModuleList  # of the student's groups
    history: list[dict[str, Any]] = field(default_factory=list)  # per step: stage, distance, sparsity, target
    report: Report = field(default_factory=Report)


def distill_and_prune(
    model: nn.Module,
    batches: Sequence[Batch],
    matching: Matching,
    plan: Plan | None = None,
    masks: Masks | None = None,
    progress: Progress | None = None,
    checkpoint: str | Path | None = None,
    every: int = 200,
) -> Compressed:
    """Return a smaller student of `model`, which is its teacher and stays as it is.

    batches: as for `similarities`, no labels; each epoch runs them in a new order. masks: prune with these instead of
    learning gates (random ones, say); then only the second stage runs. The student is trained without dropout,
    layer drop or masking of its input. The targets of the teacher are computed once: 4 bytes x frames x groups x width.
    checkpoint: a file that is written every `every` steps; the same call goes on from it, to the same bits.
    Raises UnsupportedModel, KnobError, DataError (a NaN in the loss, with the step).
    """
    plan = plan or Plan()
    teacher = stack_of(model)
    _refuse(teacher, batches, matching, plan)
    start = time.perf_counter()
    targets = _targets(teacher, batches, matching, plan)
    student = stack_of(_student(model))
    projections = make_projections(student, matching)
    total = plan.steps * (masks is None) + plan.steps_after
    file = None if checkpoint is None else Checkpoint(Path(checkpoint), _key(teacher, batches, matching, plan), every)
    run = _Run(batches, targets, matching, plan, projections, progress, total, file, file.read() if file else None)
    report = _start_report(teacher, plan)
    if run.saved and run.saved.stage == "after":
        masks = run.saved.under("mask.")
    if masks is None:
        masks = run.learn_gates(student)
        report.add("distil + prune", _cost(teacher.model, teacher, masks), seconds=time.perf_counter() - start,
                   knobs=asdict(plan))  # fmt: skip
    else:
        report.add("given masks", _cost(teacher.model, teacher, masks))
    smaller = stack_of(prune(student.model, masks))
    begin = time.perf_counter()
    run.train(smaller, masks)
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
    """Return the mean distillation loss of a student on batches; without projections: identities."""
    plan = plan or Plan()
    first, second = stack_of(teacher), stack_of(student)
    maps = projections if projections is not None else make_projections(second, matching)
    total = 0.0
    targets = _targets(first, batches, matching, plan)
    for (target, frames), (states, _) in zip(targets, each_batch(second, batches), strict=True):
        found = project(group_means(states, matching.groups, plan.normalise), maps, matching)
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
    file: Checkpoint | None = None
    saved: Saved | None = None
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
            {"params": list(pressure.parameters()), "lr": plan.lambda_lr, "scheduled": plan.decay_gates,
             "maximize": True},
        ], weight_decay=0.0)  # fmt: skip
        modules = {"student": student.trunk, "projections": self.projections, "gates": gates, "pressure": pressure}
        first = self._resume("gates", modules, optimizer, draws)
        for step, index in self._order(plan.steps, plan.seed, first):
            _schedule(optimizer, step, plan.steps, plan.warmup)
            masked = scaled_weights(student.trunk, gates.units, gates.sample(draws))
            loss = self._loss(student, index, masked)
            sparsity = expected_sparsity(gates, shapes)
            self._step(optimizer, weights, loss + pressure(sparsity, step))
            self._note("gates", step, loss, float(sparsity.detach()), pressure.target(step))
            self._keep("gates", step, modules, optimizer, {"draws": draws.get_state()})
        if plan.settle:
            gates.settle(student, plan.sparsity, plan.scope, plan.uniform)
        elif plan.uniform:
            gates.make_uniform()
        return gates.evaluate()

    def train(self, student: Stack, masks: Masks) -> None:
        """Distil again, without gates; masks: what was pruned, for the checkpoint."""
        plan = self.plan
        weights = [*_trained(student), *self.projections.parameters()]
        optimizer = torch.optim.AdamW([{"params": weights, "lr": plan.lr_after, "scheduled": True}], weight_decay=0.0)
        modules = {"student": student.trunk, "projections": self.projections}
        first = self._resume("after", modules, optimizer)
        for step, index in self._order(plan.steps_after, plan.seed + 1, first):
            _schedule(optimizer, step, plan.steps_after, plan.warmup_after)
            loss = self._loss(student, index, None)
            self._step(optimizer, weights, loss)
            self._note("after", step, loss)
            self._keep("after", step, modules, optimizer, {f"mask.{n}": m for n, m in masks.items()})

    def _resume(
        self, stage: str, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer,
        draws: torch.Generator | None = None,
    ) -> int:  # fmt: skip
        """Put back what the checkpoint holds, where it is of this stage, and return the step to go on with."""
        if self.saved is None or self.saved.stage != stage:
            return 0
        restore(self.saved, modules, optimizer)
        if draws is not None:
            draws.set_state(self.saved.tensors["draws"])
        self.history = list(self.saved.history)
        return self.saved.step

    def _keep(
        self, stage: str, step: int, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer,
        other: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        if self.file is not None and self.file.due(step):
            self.file.write(stage, step + 1, self.history, modules, optimizer, other)

    def _loss(self, student: Stack, index: int, masked: Mapping[str, Tensor] | None) -> Tensor:
        states = hidden_states(student, self.batches[index], masked)
        found = project(
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

    def _order(self, steps: int, seed: int, first: int = 0) -> list[tuple[int, int]]:
        """Return (step, batch) from step `first` on: every batch once, in a new order each time round."""
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        while len(order) < steps:
            order += torch.randperm(len(self.batches), generator=generator).tolist()
        return list(enumerate(order[:steps]))[first:]

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


def _key(stack: Stack, batches: Sequence[Batch], matching: Matching, plan: Plan) -> str:
    """Return a text that differs between runs that differ."""
    first = {k: [*v.shape, float(v.double().sum())] for k, v in batches[0].items()}
    weights = sum(float(p.detach().double().abs().sum()) for p in stack.trunk.parameters())
    name = type(stack.model).__name__
    return json.dumps([name, weights, len(batches), first, matching.groups, matching.maps, asdict(plan)])


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
