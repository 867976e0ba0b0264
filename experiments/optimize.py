"""Run the main job on a trained network: the smallest deployed program within a tolerated drop of the score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy import deployed_score
from train import task_named, trained

from thrifty.budget import Budget
from thrifty.capture import capture
from thrifty.compress import Quantize
from thrifty.deploy import rehearse
from thrifty.deploy.lower import lower
from thrifty.search import optimize

HERE = Path(__file__).resolve().parent


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Return what was chosen, beside the float32 and the int8 original, on the test split."""
    task, model = task_named(spec["network"]), trained(spec["network"])
    target = spec.get("target", "cortex-m4")
    originals = {}
    for label, knobs in (("float32", None), ("int8", {"bits": 8})):
        edited = model if knobs is None else Quantize(**knobs).edit(model, task)
        program = lower(capture(edited, task.example), "model")
        cost = rehearse(program, target, task.split("validation").x[:4].numpy(), vectors=2).cost
        originals[label] = {**cost.to_dict(), "test": round(deployed_score(program, task, "test"), 5)}
    result = optimize(
        model, task, Budget(max_drop=spec["max_drop"], **spec.get("budget", {})), target,
        state=HERE.parent / "runs" / name, progress=lambda done, total, text: print(f"  {done}/{total} {text}", flush=True),
        **spec.get("search", {}),
    )  # fmt: skip
    page = result.report.write(HERE.parent / "runs" / name / "report")
    assert result.program is not None
    chosen = {**result.chosen.cost.to_dict(), "validation": result.chosen.score}
    chosen["test"] = round(deployed_score(result.program, task, "test"), 5)
    print(f"  {name}: {result} {page}", flush=True)
    return {
        "network": spec["network"],
        "target": target,
        "verdict": str(result),
        "feasible": result.feasible,
        "recipe": result.recipe.to_toml(),
        "originals": originals,
        "chosen": chosen,
        "flash_ratio_to_float": round(originals["float32"]["flash_bytes"] / chosen["flash_bytes"], 2),
        "instructions_ratio_to_int8": round(chosen["instructions"] / originals["int8"]["instructions"], 3),
        "tried": [
            {"score": t.score, "error": t.error, "seconds": round(t.seconds, 1), **t.cost.to_dict()} for t in result.trials
        ],
    }
