"""Train a network of the zoo on a named data set; `trained("har_resnetv1_6_16")` gives it back with its
weights.
"""

from __future__ import annotations

import json
import math
import os
import time
import tomllib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from thrifty.data import load_task
from thrifty.task import Split, Task
from thrifty.zoo import create

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "weights"
ANIMALS = (2, 3, 4, 5, 6, 7)  # CIFAR-10's labels of living things


def task_of(spec: dict[str, Any]) -> Task:
    """Return the task of an experiment's [task] table."""
    options = dict(spec["task"])
    side = options.pop("animals_or_vehicles_at", 0)
    task = load_task(options.pop("name"), seed=spec.get("seed", 0), **options)
    if not side:
        return task

    def two_classes(split: Split) -> Split:
        x = nn.functional.interpolate(split.x, size=(side, side), mode="bilinear", align_corners=False)
        return Split(x, torch.isin(split.y, torch.tensor(ANIMALS)).long())

    assert task.test is not None
    return Task(
        two_classes(task.train),
        two_classes(task.validation),
        two_classes(task.test),
        name="animals-or-vehicles",
        seed=task.seed,
        classes=("vehicle", "animal"),
        info=task.info,
    )


def model_of(spec: dict[str, Any]) -> nn.Module:
    """Return the untrained network of an experiment's [model] table; equal seeds give equal weights."""
    options = dict(spec["model"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.get("seed", 0))
        return create(options.pop("name"), **options)


def read_spec(name: str) -> dict[str, Any]:
    """Return the experiment train/NAME.toml."""
    return tomllib.loads((HERE / "train" / f"{name}.toml").read_text(encoding="utf-8"))


def trained(name: str) -> nn.Module:
    """Return the network of experiment train/NAME.toml with the weights in weights/NAME.safetensors, in
    eval mode.
    """
    model = model_of(read_spec(name))
    model.load_state_dict(load_file(WEIGHTS / f"{name}.safetensors"))
    return model.eval()


def task_named(name: str) -> Task:
    """Return the task of experiment train/NAME.toml."""
    return task_of(read_spec(name))


def interval(share: float, n: int, z: float = 1.96) -> list[float]:
    """Return the 95 % interval of a share of n independent rows (Wilson 1927)."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [round(middle - half, 5), round(middle + half, 5)]


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Train, write the weights, return the scores. An interrupted run goes on from its last epoch."""
    task, model = task_of(spec), model_of(spec)
    checkpoint = HERE.parent / "runs" / f"{name}.safetensors"
    clock = checkpoint.with_suffix(".json")  # seconds and losses so far, for interrupted runs
    kept = (
        json.loads(clock.read_text())
        if checkpoint.exists() and clock.exists()
        else {"seconds": 0.0, "losses": []}
    )
    last = time.monotonic()

    def note(epoch: int, epochs: int, loss: float) -> None:
        nonlocal last
        now = time.monotonic()
        kept["seconds"], last = round(kept["seconds"] + now - last, 1), now
        kept["losses"].append(round(loss, 5))
        clock.write_text(json.dumps(kept))
        print(f"  {name}: epoch {epoch} of {epochs}, loss {loss:.4f}", flush=True)

    task.fit(model, seed=spec.get("seed", 0), progress=note, checkpoint=checkpoint, **spec["fit"])
    scores = {split: round(task.score(model, split), 5) for split in ("validation", "test")}
    WEIGHTS.mkdir(exist_ok=True)
    partial = WEIGHTS / f"{name}.partial"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, partial)
    os.replace(partial, WEIGHTS / f"{name}.safetensors")
    examples = {split: len(task.split(split)) for split in ("train", "validation", "test")}
    return {
        "scores": scores,
        "intervals_95": {k: interval(v, examples[k]) for k, v in scores.items()} if task.classes else {},
        "metric": "accuracy" if task.classes else "minus the mean squared error",
        "examples": examples,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_seconds": kept["seconds"],
        "last_losses": kept["losses"][-3:],
        "data": task.info,
        "weights": f"weights/{name}.safetensors",
    }
