"""Count what generated code costs on a target, per network and per layer. Weights are random: counts do not depend on
them, but for the borders of saturation, which no branch of the kernels looks at.
"""

from __future__ import annotations

from typing import Any

import torch
from train import model_of

from thrifty.capture import capture
from thrifty.compress import Quantize
from thrifty.deploy import rehearse
from thrifty.deploy.lower import lower
from thrifty.task import Task


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Return flash, RAM and instructions of each network, with the per-layer counts."""
    rows = []
    for entry in spec["network"]:
        rows.append(_one(entry, spec.get("target", "cortex-m4")))
        print(f"  {name}: { {k: v for k, v in rows[-1].items() if k != 'layers'} }", flush=True)
    return {"target": spec.get("target", "cortex-m4"), "networks": rows}


def _one(entry: dict[str, Any], target: str) -> dict[str, Any]:
    model = model_of(entry).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((64, *model.input_shape), generator=generator)
    task = Task.from_arrays(x, torch.arange(64) % 2, name="random")
    program = lower(capture(Quantize(**entry.get("quantize", {"bits": 8})).edit(model, task), task.example))
    made = rehearse(program, target, x[:2].numpy(), vectors=2)
    cost = made.cost
    return {
        "name": entry["name"],
        "macs": cost.macs,
        "instructions": cost.instructions,
        "instructions_per_mac": round((cost.instructions or 0) / (cost.macs or 1), 3),
        "flash_bytes": cost.flash_bytes,
        "code_bytes": (cost.flash_bytes or 0) - program.constant_bytes,
        "ram_bytes": cost.ram_bytes,
        "arena_bytes": made.memory.arena_bytes,
        "bound_bytes": made.memory.bound_bytes,
        "differing_bytes": sum(made.parity.mismatches.values()),
        "layers": [
            {"name": r.name, "op": r.op, "macs": r.macs, "instructions": r.instructions, "bytes": r.weight_bytes}
            for r in made.layers()
        ],
    }
