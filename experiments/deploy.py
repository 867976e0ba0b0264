"""Deploy a trained network at several precisions: the score of the deployed integer program on the whole test split,
flash, RAM and instructions on the target, and what each engine agreed on.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from train import task_named, trained

from thrifty.capture import capture
from thrifty.compress import Quantize
from thrifty.deploy import rehearse
from thrifty.deploy.c.host import run_host
from thrifty.deploy.lower import lower
from thrifty.deploy.program import Program
from thrifty.deploy.run import dequantize, quantize_input
from thrifty.task import Task


def deployed_score(program: Program, task: Task, split: str) -> float:
    """Return the score of what the C of a program computes on a whole split, on this computer."""
    x = quantize_input(program, task.split(split).x.numpy())
    outputs = dequantize(program, program.output, run_host(program, x))
    return task.score_outputs(np.asarray(outputs, dtype=np.float32), split)


def variant_row(network: str, task: Task, variant: dict[str, Any], target: str, samples: int) -> dict[str, Any]:
    """Return everything measured about one precision of one network."""
    model = trained(network)
    knobs, start = dict(variant.get("quantize", {})), time.monotonic()
    if knobs:
        model = Quantize(**knobs).edit(model, task)
    edited = time.monotonic() - start
    program = lower(capture(model, task.example), "model")
    made = rehearse(program, target, task.split("test").x[:samples].numpy(), vectors=int(variant.get("vectors", 4)))
    cost = made.cost
    return {
        "name": variant["name"],
        "quantize": knobs,
        "validation": round(deployed_score(program, task, "validation"), 5),
        "test": round(deployed_score(program, task, "test"), 5),
        "weight_bytes": cost.weight_bytes,
        "flash_bytes": cost.flash_bytes,
        "ram_bytes": cost.ram_bytes,
        "arena_bytes": made.memory.arena_bytes,
        "instructions": cost.instructions,
        "macs": cost.macs,
        "instructions_per_mac": round((cost.instructions or 0) / (cost.macs or 1), 3),
        "parity_samples": dict(made.parity.samples),
        "parity_mismatches": dict(made.parity.mismatches),
        "compiler": made.image.version if made.image else _compiler(target),
        "edit_seconds": round(edited, 1),
    }


def _compiler(name: str) -> str:
    from thrifty.deploy.c.build import CrossCompiler
    from thrifty.deploy.targets import target

    return str(CrossCompiler.find("auto", target(name)).version)


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Measure every variant of an experiment file."""
    task, target = task_named(spec["network"]), spec.get("target", "cortex-m4")
    rows = []
    for variant in spec["variant"]:
        rows.append(variant_row(spec["network"], task, variant, target, int(spec.get("samples", 1000))))
        print(f"  {name}: {rows[-1]}", flush=True)
    return {
        "network": spec["network"],
        "target": target,
        "torch_test": round(task.score(trained(spec["network"]), "test"), 5),
        "test_examples": len(task.split("test")),
        "variants": rows,
    }
