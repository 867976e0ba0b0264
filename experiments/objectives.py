"""Objectives: recovery with a teacher, a narrow student of a wide teacher, the smoothness loss, and what a step costs.

`part` names one of PARTS. Parts that train keep every finished cell in runs/NAME.jsonl, so that a killed run goes on.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tables import percent, result, table
from torch import Tensor, nn
from train import HERE, task_named, task_of, trained

from thrifty.compress import TECHNIQUES, compress
from thrifty.objectives import (
    CrossEntropy,
    GraphDistillation,
    GraphSmoothness,
    RelationalDistillation,
    Teacher,
    WeightedSum,
    k_nearest,
    nearest_mean,
    with_teacher,
)
from thrifty.objectives.features import OnePass, Pass, look
from thrifty.recipe import Recipe, make_step
from thrifty.task import Split, Task
from thrifty.zoo import create

RUNS = HERE.parent / "runs"


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the result of one part."""
    return PARTS[spec["part"]](spec, name)


class Cells:
    """Finished pieces of an experiment, by name, kept in a file as they come."""

    def __init__(self, name: str) -> None:
        self.path = RUNS / f"{name}.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.known: dict[str, Any] = dict(json.loads(line) for line in lines)

    def get(self, key: str, compute: Callable[..., Any], *arguments: Any) -> Any:
        """Return the piece of this name: compute(*arguments), now if it is not known."""
        if key not in self.known:
            start = time.monotonic()
            value = compute(*arguments)
            value = json.loads(json.dumps({**value, "seconds": round(time.monotonic() - start, 2)}))
            self.path.parent.mkdir(exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps([key, value]) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.known[key] = value
            print(f"  {key}: {value}", flush=True)
        return self.known[key]


# --- recovery: the float model teaches its own compressed copy


def recovery(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Recover from pruning and rounding with and without the float model as the teacher, at several step sizes."""
    cells, rows = Cells(name), []
    for network in spec["networks"]:
        model, task = trained(network), task_named(network)
        rows.append({"network": network, "float": _scores(task, model), "cells": []})
        for recipe, steps in spec["recipes"].items():
            for how in spec["objectives"]:
                for factor in spec["steps"]:
                    found = [
                        cells.get(
                            f"{network} / {recipe} / {how} / step x{factor} / seed {seed}",
                            _recovered,
                            model,
                            replace(task, seed=seed),
                            _scaled(steps, factor),
                            spec,
                            how,
                        )
                        for seed in spec["seeds"]
                    ]
                    rows[-1]["cells"].append({"recipe": recipe, "objective": how, "step": factor, "runs": found})
    return {"networks": rows}


def _scaled(steps: list[dict[str, Any]], factor: float) -> Recipe:
    """Return a recipe whose trainings take steps of `factor` times the default size."""
    made = []
    for knobs in steps:
        step = make_step(dict(knobs), TECHNIQUES)
        rate = "recover_lr" if hasattr(step, "recover_lr") else "lr"
        made.append(replace(step, **{rate: getattr(step, rate) * factor}))  # type: ignore[type-var]
    return Recipe(tuple(made))


def _recovered(model: nn.Module, task: Task, recipe: Recipe, spec: dict[str, Any], how: str) -> dict[str, Any]:
    return _scores(task, compress(model, recipe, _taught(task, model, spec, how), teaching=None))


def _taught(task: Task, teacher: nn.Module, spec: dict[str, Any], how: str) -> Task:
    knobs = dict(spec["objectives"][how])
    return task if how == "none" else with_teacher(task, teacher, knobs.pop("name"), **knobs)


def _scores(task: Task, model: nn.Module) -> dict[str, float]:
    return {split: round(task.score(model, split), 5) for split in ("validation", "test")}


# --- student: a wide teacher, a narrow student


def student(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Train a wide teacher once, then narrow students with each objective and seed; errors and agreement on test."""
    task, cells = _few(task_of(spec), spec), Cells(name)
    teacher = _made(spec["teacher"], spec["teacher_seed"])
    where = RUNS / f"{name}.teacher.safetensors"
    show = _shower(f"{name} teacher")
    task.fit(teacher, seed=spec["teacher_seed"], progress=show, checkpoint=where, **spec["teacher_fit"])
    theirs = task.outputs(teacher, "test").argmax(1)
    frozen = Teacher(Remembered(teacher, task.train.x, spec["remember"]) if "remember" in spec else teacher)
    found: dict[str, Any] = {"teacher": cells.get("teacher", _judged, task, teacher, theirs), "students": []}
    for how in spec["objectives"]:
        runs = [
            cells.get(f"{how} / seed {seed}", _student, task, frozen, theirs, spec, how, seed) for seed in spec["seeds"]
        ]
        found["students"].append({"objective": how, "runs": runs})
    sizes = {"teacher": teacher, "student": _made(spec["student"], 0)}
    found["parameters"] = {who: sum(p.numel() for p in m.parameters()) for who, m in sizes.items()}
    found["examples"] = {split: len(task.split(split)) for split in ("train", "validation", "test")}
    return found


class Remembered(nn.Module):
    """A teacher that saw every training row once, for students that train on them unchanged: same numbers, less time.

    It is its own copy. Rows that it does not know, such as augmented ones, are a KeyError.
    """

    def __init__(self, model: nn.Module, x: Tensor, places: list[str]) -> None:
        """Run the model on x: (n, ...) and keep outputs and what passes the places, which `watching` then shows."""
        super().__init__()
        self.model = model.eval()
        self.rows = {row.numpy().tobytes(): i for i, row in enumerate(x)}
        with torch.no_grad():
            seen = [look(model, part, places) for part in torch.split(x, 128)]
        self.output = torch.cat([s.output for s in seen])
        self.at = {place: torch.cat([s.at[place] for s in seen]) for place in places}
        self.asked: list[int] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Remembered:
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for known rows."""
        self.asked = [self.rows[row.numpy().tobytes()] for row in x]
        return self.output[self.asked]

    @contextmanager
    def watching(self, places: list[str], x: Tensor) -> Iterator[dict[str, Tensor]]:
        """Show what passed the places (see objectives.features.RunsGraph)."""
        shown: dict[str, Tensor] = {}
        yield shown
        shown.update({place: self.at[place][self.asked] for place in places})


def _few(task: Task, spec: dict[str, Any]) -> Task:
    """Return the task with at most `train_rows` training and `test_rows` test examples, standardised if that is asked."""
    fewer = task.limited(spec["train_rows"]) if spec.get("train_rows") else task
    test = task.limited(spec["test_rows"]).test if spec.get("test_rows") else task.test
    assert test is not None
    train, validation, test = (
        Split(_standard(s.x), s.y) if spec.get("standardise") else s for s in (fewer.train, task.validation, test)
    )
    return Task(train, validation, test, name=task.name, seed=task.seed, classes=task.classes, info=task.info)


def _standard(x: Tensor) -> Tensor:
    """Return every picture less its own mean, over its own deviation."""
    return (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)


def _student(
    task: Task, teacher: Teacher, theirs: np.ndarray, spec: dict[str, Any], how: str, seed: int
) -> dict[str, Any]:
    model = _made(spec["student"], seed)
    taught = _taught(task, teacher, spec, how)
    taught.fit(model, seed=seed, progress=_shower(f"{how} seed {seed}"), **spec["student_fit"])
    return _judged(task, model, theirs)


def _judged(task: Task, model: nn.Module, theirs: np.ndarray) -> dict[str, Any]:
    """Return scores, and the share of test rows on which the teacher says the same: all, teacher right, teacher wrong.

    theirs: the classes that the teacher gives, (n,).
    """
    assert task.test is not None
    outputs = task.outputs(model, "test")
    mine = outputs.argmax(1)
    right, same = theirs == task.test.y.numpy(), mine == theirs
    shares = {"all": same, "teacher_right": same[right], "teacher_wrong": same[~right]}
    agreement = {k: round(float(v.mean()), 5) if len(v) else None for k, v in shares.items()}
    scores = {"validation": task.score(model), "test": task.score_outputs(outputs, "test")}
    return {**{k: round(v, 5) for k, v in scores.items()}, "agreement": agreement}


def _made(options: dict[str, Any], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create(**options)


def _shower(title: str) -> Callable[[int, int, float], None]:
    return lambda epoch, epochs, loss: print(f"  {title}: epoch {epoch} of {epochs}, loss {loss:.4f}", flush=True)


# --- smoothness: outputs of different classes move apart, against cross-entropy


def smoothness(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Train one network with cross-entropy and with the smoothness loss; accuracy on clean and corrupted test rows."""
    task, cells, found = _few(task_of(spec), spec), Cells(name), []
    for how in spec["objectives"]:
        runs = [cells.get(f"{how} / seed {seed}", _smooth, task, spec, how, seed) for seed in spec["seeds"]]
        found.append({"objective": how, "runs": runs})
    return {"trained": found, "examples": {s: len(task.split(s)) for s in ("train", "validation", "test")}}


def _smooth(task: Task, spec: dict[str, Any], how: str, seed: int) -> dict[str, Any]:
    knobs = dict(spec["objectives"][how])
    objective = {"cross_entropy": CrossEntropy, "graph_smoothness": GraphSmoothness}[knobs.pop("name")](**knobs)
    model = _made(spec["model"], seed)
    task.fit(model, seed=seed, objective=objective, progress=_shower(f"{how} seed {seed}"), **spec["fit"])
    unit = bool(knobs.get("unit_norm"))
    heads: dict[str, nn.Module] = {"nearest mean": nearest_mean(model, task, unit_norm=unit)}
    if isinstance(objective, GraphSmoothness):
        heads["10 nearest"] = k_nearest(model, task, k=10, unit_norm=unit)
    else:
        heads["argmax"] = model
    return {head: _robust(task, judge, spec) for head, judge in heads.items()}


def _robust(task: Task, model: nn.Module, spec: dict[str, Any]) -> dict[str, Any]:
    """Return the scores on validation and test, and on the test rows under each corruption and level."""
    found: dict[str, Any] = dict(_scores(task, model))
    for kind, levels in spec["corruptions"].items():
        found[kind] = [round(task_with(task, kind, level).score(model, "test"), 5) for level in levels]
    return found


def task_with(task: Task, kind: str, level: float) -> Task:
    """Return the task with every test picture corrupted; the noise is the same for every model."""
    mean, std = (torch.tensor(task.info[k], dtype=torch.float32)[:, None, None] for k in ("mean", "std"))
    assert task.test is not None
    pixels = (task.test.x * std + mean).clamp(0, 1)
    changed = CORRUPTIONS[kind](pixels, level).clamp(0, 1)
    return replace(task, test=Split((changed - mean) / std, task.test.y))


def _noise(pixels: Tensor, sigma: float) -> Tensor:
    return pixels + sigma * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))


def _contrast(pixels: Tensor, share: float) -> Tensor:
    middle = pixels.mean((2, 3), keepdim=True)
    return middle + share * (pixels - middle)


def _jpeg(pixels: Tensor, quality: float) -> Tensor:
    from PIL import Image

    def squeezed(picture: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=int(quality))
        return np.asarray(Image.open(file))

    pictures = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return torch.from_numpy(np.stack([squeezed(p) for p in pictures])).permute(0, 3, 1, 2).float() / 255


CORRUPTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {"noise": _noise, "contrast": _contrast, "jpeg": _jpeg}


# --- overhead: what an objective adds to a training step


class _Look(OnePass):
    """Looks at the same places as another objective, teacher included, and compares nothing."""

    def __init__(self, other: OnePass) -> None:
        self.other = other

    def places(self, model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
        return self.other.places(model)

    def value(self, seen: Pass, y: Tensor) -> Tensor:
        return seen.output.sum() * 0


def overhead(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Time training steps in CPU time of one thread, and count their operations.

    Each round takes a step with cross-entropy, and for each objective in turn one that also looks at the features of model
    and teacher, one that compares them, and the comparison alone, on features that are there, with its gradient. What
    comparing adds is the difference of the two steps, which is noisy, or its time alone, which leaves out that gradients
    of features are added to those that come from behind.
    """
    torch.manual_seed(spec["seed"])
    model, teacher = create(**spec["model"]).train(), Teacher(create(**spec["model"]))
    x, y = torch.randn(spec["batch"], *model.input_shape), torch.arange(spec["batch"]) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    own = CrossEntropy()

    def step(objective: WeightedSum) -> float:
        start = time.process_time()
        loss = objective.loss(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.process_time() - start

    plain = WeightedSum({own: 1.0})
    made = {key: _measured(given, teacher) for key, given in spec["objectives"].items()}
    both = {key: [WeightedSum({own: 1.0, o: 1.0}) for o in (_Look(term), term)] for key, term in made.items()}
    operations = _operations(lambda: step(plain))
    counted = {key: _operations(lambda p=pair: step(p[1])) - _operations(lambda p=pair: step(p[0])) for key, pair in both.items()}
    alone = {key: _alone(term, model, x, y) for key, term in made.items()}
    whole: list[float] = []
    rounds: dict[str, list[tuple[float, float, float, float]]] = {key: [] for key in made}
    for _ in range(spec["rounds"]):
        whole.append(step(plain))
        for key, (look_at, compare) in both.items():
            looked, full = step(look_at), step(compare)
            rounds[key].append((looked, full, *alone[key]()))
    return {
        "cross_entropy_ms": round(1e3 * statistics.median(whole), 2),
        "gflop": round(operations / 1e9, 3),
        "rounds": spec["rounds"],
        "rates": {**_rates(spec["batch"]), "a training step of ResNet-8": round(operations / 1e9 / _quartile(whole), 1)},
        "load": [round(v, 2) for v in os.getloadavg()],
        "objectives": [
            {"objective": key, "operations": round(counted[key] / operations, 4), **_shares(rounds[key], whole)} for key in made
        ],
    }


def _rates(rows: int) -> dict[str, float]:
    """Return the GFLOP/s (lower quartile of times) of the products of a large layer."""
    from thrifty.objectives.products import gram, product

    h, s = torch.randn(rows, 16384), torch.randn(rows, rows)
    whole = 2 * rows * rows * h.shape[1]
    works = {
        "h @ h.T": (lambda: h @ h.T, whole), "gram(h)": (lambda: gram(h), _operations(lambda: gram(h))),
        "s @ h": (lambda: s @ h, whole), "product(s, h)": (lambda: product(s, h), whole),
    }  # fmt: skip
    rates = {}
    for name, (work, count) in works.items():
        times = []
        for _ in range(40):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        rates[name] = round(count / 1e9 / _quartile(times), 1)
    return rates


def _operations(work: Callable[[], Any]) -> int:
    """Count floating-point operations of products and convolutions, those of oneDNN's product among them."""
    from torch.utils.flop_counter import FlopCounterMode

    known = {torch.ops.mkldnn._linear_pointwise: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[0]}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        work()
    return int(counter.get_total_flops())


def _shares(rounds: list[tuple[float, float, float, float]], whole: list[float]) -> dict[str, Any]:
    """Return, as shares of a plain step, what comparing adds and what the teacher costs.

    `added` is the median, over rounds, of the differences between neighbouring steps; `added_quiet` the difference of the
    lower quartiles of the times of all steps, which other work on the machine disturbs less.
    """
    middle, low = statistics.median(whole), _quartile(whole)
    looked, full, comparing, teachers = (list(column) for column in zip(*rounds, strict=True))
    differences = [(b - a) / middle for a, b in zip(looked, full, strict=True)]
    first, second, third = statistics.quantiles(differences, n=4)
    return {
        "added": round(second, 4),
        "added_quiet": round((_quartile(full) - _quartile(looked)) / low, 4),
        "quartiles": [round(first, 4), round(third, 4)],
        "alone": [round(_quartile(comparing) / low, 4), round(statistics.median(comparing) / middle, 4)],
        "teachers_graph": round(_quartile(teachers) / low, 4),
        "teachers_pass": round((_quartile(looked) - low) / low, 4),
    }


def _quartile(values: list[float]) -> float:
    """Return the lower quartile."""
    return statistics.quantiles(values, n=4)[0]


def _measured(given: dict[str, Any], teacher: Teacher) -> OnePass:
    knobs = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    kind = MEASURED[knobs.pop("name")]
    made: OnePass = kind(**knobs) if kind is GraphSmoothness else kind(teacher, **knobs)
    return made


MEASURED: dict[str, Any] = {
    "graph_distillation": GraphDistillation,
    "relational_distillation": RelationalDistillation,
    "graph_smoothness": GraphSmoothness,
}


def _alone(term: OnePass, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], tuple[float, float]]:
    """Return a function that compares features and computes their gradient; it returns its seconds, all and the teacher's.

    The features are those of one pass, kept.
    """
    from thrifty.objectives.graph_distillation import similarity_graph
    from thrifty.objectives.relational_distillation import relative_distances

    places = term.places(model)
    passes = {each: look(each, x, names) for each, names in places.items()}
    mine = {place: h.detach().requires_grad_(True) for place, h in passes[model].at.items()}
    seen = Pass(model, x, {**passes, model: replace(passes[model], at=mine)})
    graph: Any = {GraphDistillation: similarity_graph, RelationalDistillation: relative_distances}.get(type(term))

    def work() -> tuple[float, float]:
        start = time.process_time()
        torch.autograd.grad(term.value(seen, y), list(mine.values()))
        middle = time.process_time()
        if graph is not None:
            for h in passes[term.teacher].at.values():  # type: ignore[attr-defined]
                graph(h.flatten(1))
        return middle - start, time.process_time() - middle

    return work


PARTS = {"recovery": recovery, "student": student, "smoothness": smoothness, "overhead": overhead}


# --- tables of the docs


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _spread(values: list[float]) -> str:
    """Return mean and range of shares, in percent."""
    return f"{percent(_mean(values))} ({percent(min(values))}–{percent(max(values))})"


def recovery_table() -> str:
    """Return validation and test accuracy per network, recipe and objective, each at its best step size."""
    found, rows = result("objective_recovery"), []
    hows = list(found["spec"]["objectives"])
    for network in found["networks"]:
        for recipe in found["spec"]["recipes"]:
            best = {how: _best(network["cells"], recipe, how) for how in hows}
            row = [f"{network['network']}, {recipe}"]
            for how in hows:
                runs = best[how]["runs"]
                tests = percent(_mean([r["test"] for r in runs]))
                row.append(f"{percent(_mean([r['validation'] for r in runs]))} / {tests} (x{best[how]['step']})")
            rows.append(row)
    return table(("network, recipe", *hows), rows)


def _best(cells: list[dict[str, Any]], recipe: str, how: str) -> dict[str, Any]:
    mine = [c for c in cells if (c["recipe"], c["objective"]) == (recipe, how)]
    return max(mine, key=lambda c: _mean([r["validation"] for r in c["runs"]]))


def gain_table() -> str:
    """Return, per objective, what it gains in validation and test points over labels alone, averaged."""
    found, rows = result("objective_recovery"), []
    for how in found["spec"]["objectives"]:
        if how == "none":
            continue
        row: list[Any] = [how]
        for step in found["spec"]["steps"]:
            row += [_gain(found, how, split, step) for split in ("validation", "test")]
        row += [_gain(found, how, split, None) for split in ("validation", "test")]
        rows.append(row)
    steps = [f"step x{s}, {split}" for s in found["spec"]["steps"] for split in ("validation", "test")]
    return table(("points over labels alone", *steps, "best step, validation", "best step, test"), rows)


def _gain(found: dict[str, Any], how: str, split: str, step: float | None) -> str:
    """Return the mean difference to "none", in points; step None: each at its best by validation."""
    gaps = []
    for network in found["networks"]:
        for recipe in found["spec"]["recipes"]:
            both = []
            for which in (how, "none"):
                cells = [c for c in network["cells"] if step is None or c["step"] == step]
                both.append(_mean([r[split] for r in _best(cells, recipe, which)["runs"]]))
            gaps.append(100 * (both[0] - both[1]))
    return f"{_mean(gaps):+.2f}"


def student_table() -> str:
    """Return errors and agreement of the students."""
    found = result("objective_student_gtsrb")
    rows = []
    for entry in found["students"]:
        runs = entry["runs"]
        agreement = {k: [r["agreement"][k] for r in runs] for k in ("all", "teacher_right", "teacher_wrong")}
        rows.append([
            entry["objective"], _spread([1 - r["test"] for r in runs]), _spread([1 - r["validation"] for r in runs]),
            *(percent(_mean(agreement[k])) for k in agreement), f"{_mean([r['seconds'] for r in runs]):.0f} s",
        ])  # fmt: skip
    teacher = found["teacher"]
    rows.append(["(the teacher)", percent(1 - teacher["test"]), percent(1 - teacher["validation"]), "–", "–", "–", "–"])
    head = ("trained with", "test error %", "validation error %", "agrees with the teacher %", "where it is right",
            "where it is wrong", "training")  # fmt: skip
    return table(head, rows)


def smoothness_table() -> str:
    """Return clean accuracy and accuracy under corruption, averaged over seeds."""
    found = result("objective_smoothness_cifar10")
    kinds, rows = found["spec"]["corruptions"], []
    for entry in found["trained"]:
        for head in (k for k in entry["runs"][0] if k != "seconds"):
            runs = [r[head] for r in entry["runs"]]
            cells = [" ".join(f"{100 * _mean([r[kind][i] for r in runs]):.1f}" for i in range(5)) for kind in kinds]
            rows.append([f"{entry['objective']}, {head}", _spread([r["test"] for r in runs]), *cells])
    heads = [f"{kind} {', '.join(map(str, levels))}" for kind, levels in kinds.items()]
    return table(("trained with, classified by", "clean test accuracy %", *heads), rows)


def overhead_table() -> str:
    """Return what each objective adds to a step."""
    found = result("objective_overhead")
    if "gflop" not in found:  # measured before operations were counted
        return "Not measured."
    rows = [
        [
            r["objective"], f"{100 * r['operations']:.1f}", " / ".join(f"{100 * v:.1f}" for v in r["alone"]),
            f"{100 * r['added_quiet']:.1f}",
            f"{100 * r['added']:.1f} ({100 * r['quartiles'][0]:.1f} to {100 * r['quartiles'][1]:.1f})",
            f"{100 * r['teachers_graph']:.1f}", f"{100 * r['teachers_pass']:.1f}",
        ]
        for r in found["objectives"]
    ]  # fmt: skip
    step = f"% of a step with cross-entropy ({found['cross_entropy_ms']:.0f} ms, {found['gflop']:.2f} GFLOP)"
    head = (step, "comparing: operations", "time alone, lower quartile / median", "in a step, lower quartiles",
            "in a step, median (quartiles)", "of it the teacher's graph", "besides: the teacher's pass")  # fmt: skip
    return table(head, rows)


def rates_table() -> str:
    """Return how quick the products are, beside a whole step."""
    found = result("objective_overhead")
    return table(("work", "GFLOP/s"), [[f"`{k}`" if "(" in k or "@" in k else k, v] for k, v in found["rates"].items()]) if "rates" in found else "Not measured."


TABLES: dict[str, Callable[[], str]] = {
    "objective_overhead_rates": rates_table,
    "objective_recovery": recovery_table,
    "objective_recovery_gain": gain_table,
    "objective_student": student_table,
    "objective_smoothness": smoothness_table,
    "objective_overhead": overhead_table,
}
