"""Compare every engine, byte for byte, on real examples: hard torch, the NumPy program, the host's C under two
compilers, and emulated Cortex-M cores.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train import model_of, task_named, task_of, trained

from thrifty.capture import capture
from thrifty.compress import Quantize
from thrifty.deploy.c.build import build
from thrifty.deploy.c.emit import emit
from thrifty.deploy.c.emulate import emulate
from thrifty.deploy.c.host import run_host
from thrifty.deploy.lower import lower
from thrifty.deploy.run import dequantize, quantize_input
from thrifty.deploy.run import run as run_program

HERE = Path(__file__).resolve().parent


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Return, for each network and each engine, how many examples ran and how many differ in any byte."""
    rows = []
    for k, entry in enumerate(spec["network"]):
        kept = HERE.parent / "runs" / name / f"{k}.json"  # an interrupted run goes on behind its last network
        known = json.loads(kept.read_text()) if kept.exists() else None
        if known is None or known["entry"] != entry:
            known = {"entry": entry, "row": _one(entry, int(spec.get("examples", 1000)))}
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(known))
        rows.append(known["row"])
        print(f"  {name}: {rows[-1]}", flush=True)
    return {"networks": rows, "differing": sum(sum(r["differing"].values()) for r in rows)}


def _one(entry: dict[str, Any], examples: int) -> dict[str, Any]:
    start = time.monotonic()
    if "weights" in entry:
        model, task = trained(entry["weights"]), task_named(entry["weights"])
    else:  # a network that is not trained here: random weights, batch statistics of real data
        task, model = task_of(entry), _settled(model_of(entry), task_of(entry))
    quantized = Quantize(**entry.get("quantize", {})).edit(model, task)
    program = lower(capture(quantized, task.example), "model")
    real = torch.cat([task.split(s).x for s in ("test", "validation", "train")])[:examples]
    stored = quantize_input(program, real.numpy())
    expected = np.concatenate([run_program(program, stored[i : i + 50]) for i in range(0, len(stored), 50)])
    with torch.no_grad():
        hard = torch.cat([quantized(real[i : i + 50]) for i in range(0, len(real), 50)]).numpy()
    wanted = np.asarray(dequantize(program, program.output, expected))
    samples = {"torch": len(real), "program": len(expected)}
    differing = {"torch": _differing(hard.reshape(wanted.shape), wanted)}
    for compiler in ("gcc", "clang"):
        if shutil.which(compiler):
            got = run_host(program, stored, compiler=compiler)
            samples[f"host {compiler}"], differing[f"host {compiler}"] = len(got), _differing(got, expected)
    for core, compiler, count in _cores(entry, examples):
        engine = f"{core}, {compiler}"
        with tempfile.TemporaryDirectory() as place:
            folder = emit(program, Path(place) / "c", target=core)
            got = emulate(build(folder, core, compiler=compiler), stored[:count], count=False).outputs
        samples[engine], differing[engine] = len(got), _differing(got, expected[:count])
    return {
        "name": entry["name"],
        "trained": "weights" in entry,
        "macs": program.macs,
        "samples": samples,
        "differing": differing,
        "seconds": round(time.monotonic() - start, 1),
    }


def _cores(entry: dict[str, Any], examples: int) -> list[tuple[str, str, int]]:
    few = int(entry.get("few", examples))
    return [
        ("cortex-m4", "gcc", examples),
        ("cortex-m4", "zig", few),
        ("cortex-m7", "gcc", few),
        ("cortex-m0plus", "gcc", int(entry.get("portable", few))),
    ]


def _settled(model: torch.nn.Module, task: Any) -> torch.nn.Module:
    """Return the model with batch statistics of real data."""
    model.train()
    with torch.no_grad():
        for _ in range(10):
            model(task.calibration(64))
    return model.eval()


def _differing(got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> int:
    return int((got != expected).reshape(len(expected), -1).any(axis=1).sum())
