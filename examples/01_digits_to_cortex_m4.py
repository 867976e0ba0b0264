"""How to state a budget and get proven C: a small network on scikit-learn's digits, onto a Cortex-M4."""

import argparse
import time
from pathlib import Path

import torch

from thrifty.budget import Budget
from thrifty.data import load_task
from thrifty.search import optimize
from thrifty.zoo import create


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--trials", type=int, default=16)
    args = parser.parse_args()

    torch.manual_seed(0)
    task = load_task("digits")
    model = create("lenet", input_shape=(1, 8, 8), classes=10)
    start = time.perf_counter()
    task.fit(model, epochs=args.epochs, lr=0.05, batch=32)
    print(f"trained in {time.perf_counter() - start:.0f} s, validation accuracy {task.score(model):.3f}")

    budget = Budget(flash_bytes=9 * 1024, ram_bytes=1536, max_drop=0.01)
    result = optimize(model, task, budget, target="cortex-m4", trials=args.trials, folder=args.out / "c")
    page = result.report.write(args.out)
    print(f"float32 model: {sum(p.numel() for p in model.parameters()) * 4} bytes of weights")
    print(f"chosen:\n{result.recipe.to_toml()}")
    print(f"{result}   report: {page}")
    return 0 if result.feasible else 1


if __name__ == "__main__":
    raise SystemExit(main())
