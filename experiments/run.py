"""Run experiments: `python experiments/run.py experiments/train/har_resnetv1_6_16.toml ...`.

Each file says its `kind`: the module of this folder whose function `run(spec, name) -> dict` carries it out; what it returns
goes into experiments/results/NAME.json. Experiments of the tier "gpu" are skipped unless --gpu is given; those that
have a result are skipped unless --again is given.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def environment() -> dict[str, Any]:
    """Return what a result depends on, besides the file itself."""
    import numpy
    import torch

    import thrifty

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "thrifty": thrifty.__version__,
        "git": git("rev-parse", "--short", "HEAD"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} torch thread(s)",
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result to a temporary file, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def main() -> int:
    """Run the files named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--gpu", action="store_true", help="also run the tier 'gpu'")
    parser.add_argument("--again", action="store_true", help="also run what has a result")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for file in options.files:
        spec = tomllib.loads(file.read_text(encoding="utf-8"))
        result = RESULTS / f"{file.stem}.json"
        if spec.get("tier", "cpu") == "gpu" and not options.gpu:
            print(f"{file.stem}: tier gpu, not run (give --gpu)")
            continue
        if result.exists() and not options.again:
            print(f"{file.stem}: has a result (give --again)")
            continue
        print(f"{file.stem}: running", flush=True)
        start = time.monotonic()
        found = importlib.import_module(spec["kind"]).run(spec, file.stem)
        seconds = round(time.monotonic() - start, 1)
        write_json(
            result,
            {"name": file.stem, "spec": spec, **found, "seconds": seconds, "environment": environment()},
        )
        print(f"{file.stem}: {json.dumps(found)} in {seconds} s -> {result}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
