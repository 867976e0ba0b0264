"""What each verb does: read the inputs, call the library, write and show the report."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from thrifty import deploy as deployment
from thrifty.budget import Budget, format_bytes
from thrifty.capture import capture
from thrifty.cli import classify, forecast, groups, llm
from thrifty.cli.inputs import read_example, read_model, read_task, refuse_shapes
from thrifty.cli.listing import LISTS
from thrifty.cli.parser import pair
from thrifty.cli.show import finish, progress_bar, say, table_text
from thrifty.cli.teacher import read_teaching, refuse_teacher
from thrifty.compress import TECHNIQUES
from thrifty.compress import compress as apply_recipe
from thrifty.compress.refuse import refusals as integer_refusals
from thrifty.cost import Cost, count, count_nodes
from thrifty.deploy.c.host import run_host
from thrifty.deploy.fidelity import layer_fidelity
from thrifty.deploy.lower import check as refusals
from thrifty.deploy.lower import lower
from thrifty.deploy.plan import plan
from thrifty.deploy.program import Program
from thrifty.deploy.run import dequantize, predict, quantize_input, run
from thrifty.deploy.targets import target as find_target
from thrifty.errors import DataError, KnobError, MissingExtra, StoreError
from thrifty.graph import Graph
from thrifty.recipe import Recipe, make_step
from thrifty.report import Layer, Parity, Report, write_bytes, write_text
from thrifty.report.text import layers_table, steps_table
from thrifty.search import optimize as search
from thrifty.store import save
from thrifty.task import Task

FIDELITY_SAMPLES = 64


# --- the main job ----------------------------------------------------------------------------------------------


def run_optimize(args: argparse.Namespace) -> int:
    """Search, deploy, write everything into the folder; exit code 130 after Ctrl-C."""
    out, budget = Path(args.out), _budget(args)
    state = out / "search"
    if not budget.limits:
        raise KnobError("the budget is empty; give --max-drop, --flash or another limit")
    refuse_out(out)
    if state.exists() and not args.resume:
        raise StoreError(f"{state} holds an earlier search; add --resume to go on with it, or choose another --out")
    refuse_teacher(args)
    task = read_task(args)
    model, source = read_model(args, task)
    teaching = read_teaching(args, task)
    with progress_bar("optimize") as progress:
        result = search(
            model, task, budget, args.target, seed=args.seed, trials=args.trials, time_limit=args.time_limit,
            state=state, progress=progress, sampler=args.sampler, level=args.level, epochs=args.epochs,
            train=args.train, keep=args.keep, folder=out / "c", teaching=teaching,
        )  # fmt: skip
    report = result.report
    write_text(out / "recipe.toml", result.recipe.to_toml())
    report.files["recipe"] = "recipe.toml"
    _save(result.model, out, source, report)
    code = _finish(report, args)
    if result.interrupted:
        say("interrupted: the same command with --resume goes on where it stopped")
        return 130
    return code


def run_compress(args: argparse.Namespace) -> int:
    """Apply a recipe, save the model, and measure it when a limit or a target asks for it."""
    recipe, budget = _recipe(args), _budget(args)
    refuse_out(args.out)
    refuse_teacher(args)
    task = read_task(args)
    model, source = read_model(args, task)
    refuse_shapes(model, task.example)
    teaching = read_teaching(args, task)
    report = Report(f"compress {_short(source)}", budget, args.target or "", args.seed, _metric(task))
    torch.manual_seed(args.seed)
    result = apply_recipe(model, recipe, task, report, teaching)
    if args.target or budget.flash_bytes or budget.ram_bytes or budget.instructions:
        report.target = args.target or "cortex-m4"
        _name_compiler(report)
        program = lower(capture(result, task.example), "model")
        made = deployment.rehearse(program, report.target, _samples(task, FIDELITY_SAMPLES))
        report.add("deploy", made.cost, report.rows[-1].score, note="measured; score of the model before deployment")
        x = _samples(task, FIDELITY_SAMPLES)
        report.memory, report.parity = made.memory, _with_torch(made.parity, result, program, x)
        report.layers = list(made.layers(_fidelity(result, program, task, x)))
    out = Path(args.out)
    write_text(out / "recipe.toml", recipe.to_toml())
    report.files["recipe"] = "recipe.toml"
    _save(result, out, source, report)
    return _finish(report, args)


def run_deploy(args: argparse.Namespace) -> int:
    """Write the C project, prove it on real samples, and report what it takes."""
    out = Path(args.out)
    for name, value in (("--samples", args.samples), ("--vectors", args.vectors)):
        if value < 1:
            raise KnobError(f"{name} is {value}; it must be at least 1")
    refuse_out(out)
    deployment.refuse_missing_tools(find_target(args.target))
    task = read_task(args)
    model, source = read_model(args, task)
    refuse_shapes(model, task.example)
    graph = capture(model, task.example)
    program = lower(graph, args.name)
    x = _samples(task, args.samples)
    made = deployment.deploy(program, out / "c", args.target, x, min(args.vectors, len(x)))
    report = Report(f"deploy {_short(source)} on {args.target}", _budget(args), args.target, args.seed, _metric(task))
    _name_compiler(report)
    before = task.score(model, args.split)
    report.add("start", count(graph), before, note="the model in torch", host_us=_host_us(model, task.example))
    after = task.score_outputs(_outputs(program, task.split(args.split).x.numpy()), args.split)
    report.add("deploy", made.cost, after)
    if args.split == "test":
        report.test_scores = (before, after)
    report.parity = _with_torch(made.parity, model, program, x)
    report.memory = made.memory
    report.layers = list(made.layers(_fidelity(model, program, task, x)))
    report.files["C project"] = "c"
    if not _is_integer(program):
        report.notes.append("this is a float32 program; for integers: thrifty compress ... --step quantize bits=8")
    return _finish(report, args)


def run_check(args: argparse.Namespace) -> int:
    """List everything that cannot be deployed, and say whether the target is large enough."""
    if args.target and args.target_flag and args.target != args.target_flag:
        raise KnobError(f"two targets: {args.target} and --target {args.target_flag}; give one")
    target = find_target(args.target or args.target_flag or "cortex-m4")
    task = read_task(args) if args.data else None
    model, source = read_model(args, task)
    example = read_example(args, model, task)
    refuse_shapes(model, example)
    graph = capture(model, example)
    found = list(refusals(graph))
    if not found and not any(node.format for node in graph):  # what quantising it would refuse
        found += integer_refusals(graph, 8)
    if not found:
        found += _too_small(lower(graph), target.flash_bytes, target.ram_bytes)
    if args.json:
        answer = {"model": source, "target": target.name, "deployable": not found, "refusals": found}
        say(json.dumps(answer, indent=1, ensure_ascii=False))
        return 1 if found else 0
    for refusal in found:
        say(f"- {refusal}")
    if found:
        say(f"{_short(source)} cannot be deployed on {target.title}: {len(found)} reason(s)")
        return 1
    say(f"{_short(source)} can be deployed on {target.title}")
    return 0


def run_profile(args: argparse.Namespace) -> int:
    """Count what each layer takes; measure it when a target is given."""
    if args.out:
        refuse_out(args.out)
    if args.target:
        find_target(args.target)
    task = read_task(args) if args.data else None
    model, source = read_model(args, task)
    example = read_example(args, model, task)
    refuse_shapes(model, example)
    graph, metric = capture(model, example), "score" if task is None else _metric(task)
    report = Report(f"profile {_short(source)}", target=args.target or "", seed=args.seed, metric=metric)
    cost, micro = count(graph), _host_us(model, example)
    report.add("start", cost, None if task is None else task.score(model), host_us=micro)
    if args.target is None:
        report.layers = _counted_layers(graph)
    else:
        made = deployment.rehearse(graph, args.target, None if task is None else task.validation.x[:8].numpy())
        report.add("deploy", made.cost)
        _name_compiler(report)
        report.layers, report.memory, report.parity = list(made.layers()), made.memory, made.parity
    if not args.json:
        say(table_text(layers_table(report)))
        say()
    return _finish(report, args)


def run_train(args: argparse.Namespace) -> int:
    """Train and write the weights of a model."""
    from safetensors.torch import save as to_bytes

    out = Path(args.out)
    if out.suffix != ".safetensors":
        raise KnobError(f"--out {out} must end in .safetensors")
    if out.is_dir():
        raise StoreError(f"--out {out} is a folder; name a file")
    refuse_out(out.parent)
    refuse_teacher(args)
    task = read_task(args)
    model, source = read_model(args, task)
    refuse_shapes(model, task.example)
    teaching = read_teaching(args, task) if args.teacher else None
    task = task if teaching is None else teaching.task(task, model) or task
    checkpoint = out.with_name(f"{out.name}.checkpoint") if args.resume else None
    report = Report(f"train {_short(source)}", seed=args.seed, metric=_metric(task))
    report.add("start", Cost(), task.score(model))
    start = time.perf_counter()
    with progress_bar("train") as progress:
        shown = None if progress is None else (lambda n, of, loss: progress(n, of, f"loss {loss:.4f}"))
        task.fit(model, args.epochs, args.lr, progress=shown or False, checkpoint=checkpoint, **dict(args.knobs))
    knobs = {"epochs": args.epochs, "lr": args.lr, **dict(args.knobs)}
    report.add("train", Cost(), task.score(model), time.perf_counter() - start, knobs)
    write_bytes(out, to_bytes({name: v.contiguous().clone() for name, v in model.state_dict().items()}))
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    report.files["weights"] = out.name
    if teaching is not None:
        report.notes.append(f"teacher: {teaching.name}")
    if args.json:
        return finish(report, as_json=True)
    say(table_text(steps_table(report)))
    say(f"trained: {report.metric} {report.rows[-1].score:.4f} on the validation split     weights: {out}")
    return 0


def run_report(args: argparse.Namespace) -> int:
    """Show a report again, or write it as HTML or Markdown."""
    path = Path(args.report)
    path = path / "report.json" if path.is_dir() else path
    try:
        read = Report.from_json(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise DataError(f"the report {path} cannot be read: {err.strerror or err}") from err
    except UnicodeDecodeError as err:
        raise DataError(f"{path} is no report of thrifty: it is not text") from err
    if args.html:
        write_text(args.html, read.to_html())
    if args.markdown:
        write_text(args.markdown, read.to_markdown())
    where = args.html or args.markdown
    return finish(read, args.json, f"report: {where}" if where else "")


def run_list(args: argparse.Namespace) -> int:
    """List what there is, with the knobs of each technique."""
    for kind in [args.kind] if args.kind else LISTS:
        say(table_text(LISTS[kind]()))
        say()
    return 0


# --- parts -----------------------------------------------------------------------------------------------------


def refuse_out(out: str | Path) -> None:
    """Raise StoreError, before any work is done, when nothing can be written into this folder."""
    place = Path(out).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise StoreError(f"--out {out}: {place} is a file; choose another folder")
    if not os.access(place, os.W_OK | os.X_OK) or os.statvfs(place).f_flag & os.ST_RDONLY:
        raise StoreError(f"--out {out}: the folder {place} cannot be written")


def _budget(args: argparse.Namespace) -> Budget:
    return Budget(**{field.name: getattr(args, field.name) for field in fields(Budget)})


def _name_compiler(report: Report) -> None:
    """Note which compiler flash and instructions belong to: counts of two compilers differ."""
    if version := deployment.compiler_version(report.target):
        report.environment["compiler"] = version


def _recipe(args: argparse.Namespace) -> Recipe:
    """Return the recipe of --recipe or of the --step flags."""
    if bool(args.recipe) == bool(args.step):
        raise KnobError("give either --recipe FILE, or --step TECHNIQUE KNOB=VALUE ... once for each step")
    if args.recipe:
        return Recipe.read(args.recipe, TECHNIQUES)
    steps = []
    for name, *knobs in args.step:
        try:
            steps.append(make_step({"technique": name, **dict(pair(k) for k in knobs)}, TECHNIQUES))
        except argparse.ArgumentTypeError as err:
            raise KnobError(f"--step {name}: {err}") from err
    return Recipe(tuple(steps))


def _metric(task: Task) -> str:
    return getattr(task.metric, "__name__", "accuracy" if task.classes else "score")


def _short(source: str) -> str:
    """Return a source without its arguments."""
    return shlex.split(source)[0]


def _save(model: nn.Module, out: Path, source: str, report: Report) -> None:
    save(model, out / "model", source)
    report.files["model (thrifty.store.load)"] = "model"


def _finish(report: Report, args: argparse.Namespace) -> int:
    where = f"report: {report.write(args.out)}" if args.out else ""
    return finish(report, args.json, where)


def _samples(task: Task, count: int) -> Any:
    """Return up to `count` real inputs: the test split first, then validation, then training."""
    splits = [s for s in (task.test, task.validation, task.train) if s is not None]
    parts: Any = []
    for split in splits:
        rest = count - sum(len(p) for p in parts)
        if rest > 0:
            parts.append(split.x[:rest])
    return torch.cat(parts).numpy()


def _is_integer(program: Program) -> bool:
    return program.buffers[program.output].dtype != "float32"


def _outputs(program: Program, x: Any) -> Any:
    """Return the real outputs of the program on every input: from its C where there is a compiler."""
    stored = quantize_input(program, x)
    try:
        got = run_host(program, stored)
    except MissingExtra:
        got = np.asarray(run(program, stored))
    return np.asarray(dequantize(program, program.output, got), dtype=np.float32)


def _with_torch(parity: Parity, model: nn.Module, program: Program, x: Any) -> Parity:
    """Add torch's hard model to the parity; float sums in torch run in another order, so only integers count."""
    if not _is_integer(program):
        return parity
    with torch.no_grad():
        mine = torch.cat([model(part) for part in torch.split(torch.from_numpy(x), 256)]).numpy()
    differ = int((mine != predict(program, x)).reshape(len(mine), -1).any(axis=1).sum())
    return Parity({"torch": len(x), **parity.samples}, {"torch": differ, **parity.mismatches})


def _fidelity(model: nn.Module, program: Program, task: Task, x: Any) -> Any:
    """Return the error of each layer against the same network in float; None when it has no integers."""
    graph = capture(model, task.example)
    if not _is_integer(program):
        return None
    floats = graph.with_nodes({n.name: replace(n, format=None, weight_format=None) for n in graph})
    return layer_fidelity(program, lower(floats, "float"), x[:FIDELITY_SAMPLES])


def _host_us(model: nn.Module, example: Tensor) -> float:
    """Return the measured microseconds of one inference of the model in torch: the median of eleven."""
    times = []
    with torch.no_grad():
        for _ in range(11):
            start = time.perf_counter()
            model(example[:1])
            times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def _too_small(program: Program, flash_bytes: int | None, ram_bytes: int | None) -> Any:
    """Return why a program cannot fit: its constants and its arena alone are already too large."""
    needs = (
        ("flash", "constants", program.constant_bytes, flash_bytes),
        ("RAM", "activations", plan(program).arena_bytes, ram_bytes),
    )
    return [
        f"{memory}: {format_bytes(size)} of {what}, the target has {format_bytes(limit)}; quantise or prune first"
        for memory, what, size, limit in needs
        if limit is not None and size > limit
    ]


def _counted_layers(graph: Graph) -> Any:
    layers = []
    for name, module, cost in count_nodes(graph):
        node = graph[name]
        layers.append(Layer(name, module, node.op, tuple(node.shape), cost.macs, cost.weight_bytes))
    return layers


VERBS = {
    "optimize": run_optimize,
    "compress": run_compress,
    "deploy": run_deploy,
    "check": run_check,
    "profile": run_profile,
    "train": run_train,
    "groups": groups.run,
    "classify": classify.run,
    "forecast": forecast.run,
    "llm": llm.run,
    "report": run_report,
    "list": run_list,
}
