"""How to write a recipe, apply it, save the smaller model and load it back with the same outputs."""

import tempfile
from pathlib import Path

import torch

from thrifty import Budget, Prune, Quantize, Recipe, Report, load, load_task, save
from thrifty.compress import compress
from thrifty.zoo import create


def net() -> torch.nn.Module:
    return create("resnetv1-6", input_shape=(1, 8, 8), classes=10, filters=16)


def main() -> int:
    torch.manual_seed(0)
    task = load_task("digits")
    model = net()
    task.fit(model, epochs=15, lr=0.05, batch=32)

    recipe = Recipe((Prune(ratio=0.5, recover_epochs=8, recover_lr=0.02), Quantize(bits=8)))
    report = Report(title="prune, then quantise", budget=Budget(max_drop=0.03), metric="accuracy")
    small = compress(model, recipe, task, report)
    for row in report.rows:
        cost = row.cost
        print(f"{row.step:12s} {cost.params} parameters, {cost.weight_bytes} B, {cost.macs} MACs")
        print(f"{'':12s} score {row.score:.3f}")

    folder = Path(tempfile.mkdtemp()) / "small"
    save(small, folder)
    again = load(folder, net)
    same = torch.equal(again(task.validation.x), small(task.validation.x))
    print(recipe.to_toml())
    print(f"saved to {folder}; loaded back with equal outputs: {same}")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
