"""Few-shot segmentation of composed scenes: mIoU by shots, method, encoder and drawing style."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tables
from run import write_json

from thrifty.fewshot import mean_interval

FROZEN = ("linear", "multilayer")
RUNS = Path(__file__).resolve().parent.parent / "runs" / "segmentation"
NAMES = {"pretrained": "EfficientNet-Lite0, ImageNet weights", "random": "EfficientNet-Lite0, random weights"}
SHOWN_SIDE = 40  # cells of a mask in the picture
LETTERS = "abcdefghijklm"  # one for each class


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Return every cell; finished ones are read from runs/segmentation."""
    import torch

    torch.set_num_threads(1)
    world = World(spec)
    path = RUNS / f"{name}.cells.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    if done.get("spec") != spec:
        done = {"spec": spec, "rates": {}, "cells": {}}
    for kind in spec["encoders"]:
        for method in spec["methods"]:
            if method not in done["rates"].setdefault(kind, {}):
                start = time.process_time()
                best, scores = world.choose(kind, method, done["rates"][kind])
                done["rates"][kind][method] = {
                    "best": best, "validation_miou": {str(k): round(v, 2) for k, v in scores.items()},
                    "seconds": round(time.process_time() - start, 1),
                }  # fmt: skip
                write_json(path, done)
                print(f"{kind} {method}: {done['rates'][kind][method]}", flush=True)
    for kind, seed, shots in groups(spec):
        missing = [m for m in spec["methods"] if f"{kind}/{m}/{shots}/{seed}" not in done["cells"]]
        for method, cell in world.cells(kind, seed, shots, missing, done["rates"][kind]):
            done["cells"][f"{kind}/{method}/{shots}/{seed}"] = cell
            write_json(path, done)
            print(f"{kind} {method} {shots} {seed}: {cell['test']} {cell['shift']} {cell['seconds']} s", flush=True)
    return {"rates": done["rates"], "cells": done["cells"], **world.facts()}


def groups(spec: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Yield (encoder, seed, shots)."""
    return ((k, s, n) for k in spec["encoders"] for s in spec["seeds"] for n in spec["shots"])


class World:
    """The scenes, held in memory, and what is made from them."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from thrifty.fewshot.segmentation import presence
        from thrifty.fewshot.segmentation.scenes import Layout

        layout = Layout(size=spec["size"])
        self.spec = spec
        self.train = held("train", spec["train_styles"], spec["pool"], layout)
        self.validation = held("validation", spec["train_styles"], spec["validation"], layout)
        self.tests = {
            "test": held("test", spec["train_styles"], spec["test"], layout),
            "shift": held("test", spec["shift_styles"], spec["test"], layout),
        }
        self.found = presence(self.train, spec["least"])

    def encoder(self, kind: str, seed: int) -> Any:
        """Return an encoder; the random one differs by seed, its batch norm set on 64 unlabelled training scenes."""
        from thrifty.fewshot.segmentation import EfficientNetLite0

        made = EfficientNetLite0(pretrained=kind == "pretrained", input_size=self.spec["input_size"], seed=seed)
        return made if kind == "pretrained" else made.calibrate(np.stack(self.train.pictures[:64]))

    def support(self, shots: int, seed: int) -> Any:
        """Return the shots of one draw."""
        from thrifty.fewshot.segmentation import sample

        rng = np.random.default_rng([seed, shots])
        return sample(self.train, shots, rng, least=self.spec["least"], found=self.found)

    def fitting(self, method: str, lr: float, seed: int) -> Any:
        """Return how a method is trained."""
        from thrifty.fewshot.segmentation import Augment, Fitting

        steps = self.spec["head_steps" if method in FROZEN else "tuned_steps"]
        return Fitting(
            steps=steps, batch=self.spec["batch"], lr=lr, seed=seed, cache=method in FROZEN, augment=Augment(views=2)
        )

    def choose(self, kind: str, method: str, rates: dict[str, Any]) -> tuple[float, dict[float, float]]:
        """Return the rate that is best on the validation scenes."""
        from thrifty.fewshot.segmentation import adapt, choose_rate

        seed = self.spec["rate_seed"]
        encoder, few = self.encoder(kind, seed), self.support(self.spec["rate_shots"], seed)
        start = None
        if method not in FROZEN:
            start = adapt(encoder, few, "linear", self.fitting("linear", rates["linear"]["best"], seed))
        offered = self.spec["head_rates" if method in FROZEN else "tuned_rates"]
        return choose_rate(
            encoder, few, offered, self.validation, method, self.fitting(method, offered[0], seed), start
        )

    def cells(
        self, kind: str, seed: int, shots: int, methods: list[str], rates: dict[str, Any]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (method, result) for one encoder and one draw."""
        from thrifty.fewshot.segmentation import adapt, evaluate, trainable

        if not methods:
            return
        encoder, few, start = self.encoder(kind, seed), self.support(shots, seed), None
        if any(m not in ("multilayer", "linear") for m in methods) or "linear" in methods:
            begun = time.process_time()
            start = adapt(encoder, few, "linear", self.fitting("linear", rates["linear"]["best"], seed))
            linear_seconds = time.process_time() - begun
        for method in methods:
            begun = time.process_time()
            if method == "linear":
                model, begun = start, begun - linear_seconds
            else:
                fitting = self.fitting(method, rates[method]["best"], seed)
                model = adapt(encoder, few, method, fitting, None if method in FROZEN else start)
            seconds = time.process_time() - begun
            found = {part: evaluate(model, data) for part, data in self.tests.items()}
            cell = {
                **{part: round(c.miou(), 2) for part, c in found.items()},
                "iou": {part: np.round(c.iou(), 1).tolist() for part, c in found.items()},
                "pictures": len(few), "trained": trainable(model), "seconds": round(seconds, 1),
            }  # fmt: skip
            if kind == "pretrained" and shots == max(self.spec["shots"]) and seed == self.spec["seeds"][0]:
                cell["masks"] = {part: self.masks(data, model) for part, data in self.tests.items()}
            yield method, cell

    def masks(self, data: Any, model: Any) -> list[list[str]]:
        """Return some predictions as rows of letters."""
        return [coarse(model.predict(data.picture(i)[None])[0]) for i in range(self.spec["shown"])]

    def facts(self) -> dict[str, Any]:
        """Return what does not depend on a model: classes, grids, and what the grids alone allow."""
        encoder = self.encoder("random", 0)
        side = self.spec["size"]
        grids = {m: encoder.grid(side, side, m == "multilayer") for m in FROZEN}
        return {
            "classes": list(self.train.classes),
            "grids": grids,
            "ceilings": {
                m: {part: round(ceiling(d, g), 1) for part, d in self.tests.items()} for m, g in grids.items()
            },
            "nothing_but_background": {part: round(nothing(d), 1) for part, d in self.tests.items()},
            "truth": {p: [coarse(d.mask(i)) for i in range(self.spec["shown"])] for p, d in self.tests.items()},
        }


def held(split: str, styles: list[str], count: int, layout: Any) -> Any:
    """Return scenes, all made at once."""
    from thrifty.fewshot.segmentation import InMemory, Scenes

    scenes = Scenes(split, styles, count, layout=layout)
    both = [scenes.scene(i) for i in range(count)]
    return InMemory([p for p, _ in both], [m for _, m in both], scenes.classes)


def ceiling(data: Any, grid: tuple[int, int]) -> float:
    """Return the mIoU of the truth itself, averaged in the cells of a grid and brought back: no head does much better."""
    import torch
    from torch.nn import functional as F

    from thrifty.fewshot.segmentation import Confusion

    confusion = Confusion(data.classes)
    for i in range(len(data)):
        truth = torch.from_numpy(data.mask(i).astype(np.int64))
        shares = F.one_hot(truth, len(data.classes)).permute(2, 0, 1)[None].float()
        cells = F.interpolate(shares, grid, mode="bilinear", antialias=True)
        confusion.add(data.mask(i), F.interpolate(cells, truth.shape, mode="bilinear").argmax(1)[0].numpy())
    return confusion.miou()


def nothing(data: Any) -> float:
    """Return the mIoU of predicting background everywhere."""
    from thrifty.fewshot.segmentation import Confusion

    confusion = Confusion(data.classes)
    for i in range(len(data)):
        confusion.add(data.mask(i), np.zeros_like(data.mask(i)))
    return confusion.miou()


def coarse(mask: np.ndarray) -> list[str]:
    """Return a mask as rows of letters, SHOWN_SIDE each way, nearest pixel."""
    rows = (np.arange(SHOWN_SIDE) + 0.5) * len(mask) / SHOWN_SIDE
    small = mask[rows.astype(int)][:, rows.astype(int)]
    return ["".join(LETTERS[v] for v in row) for row in small]


# ---- what the pages show


def scores(result: dict[str, Any], kind: str, method: str, shots: int, part: str) -> list[float]:
    """Return the mIoU of each seed."""
    return [result["cells"][f"{kind}/{method}/{shots}/{s}"][part] for s in result["spec"]["seeds"]]


def miou_table(part: str) -> str:
    """Return mIoU by shots, with 95 % intervals over the seeds."""
    result = tables.result("segmentation_scenes")
    spec, rows = result["spec"], []
    for kind in spec["encoders"]:
        for method in spec["methods"]:
            found = [mean_interval(scores(result, kind, method, k, part)) for k in spec["shots"]]
            rows.append([f"{kind}, {method}", *(f"{i.mean:.1f} ± {i.half_width:.1f}" for i in found)])
    return tables.table(("encoder, method", *(f"{k} shot{'s' if k > 1 else ''}" for k in spec["shots"])), rows)


def cost_table() -> str:
    """Return what each method trains and takes, and its learning rate."""
    result = tables.result("segmentation_scenes")
    spec, rows = result["spec"], []
    for method in spec["methods"]:
        cells = [c for key, c in result["cells"].items() if key.split("/")[:2] == ["pretrained", method]]
        rates = [f"{result['rates'][kind][method]['best']:g}" for kind in spec["encoders"]]
        grid = result["grids"]["multilayer" if method == "multilayer" else "linear"]
        rows.append([
            method, f"{cells[0]['trained']:,}", f"{grid[0]}x{grid[1]}", f"{np.median([c['seconds'] for c in cells]):.0f}", *rates
        ])  # fmt: skip
    return tables.table(
        ("method", "trained numbers", "grid", "seconds", *(f"rate, {k}" for k in spec["encoders"])), rows
    )


def rate_table() -> str:
    """Return every validation score that the rates were chosen by."""
    result = tables.result("segmentation_scenes")
    rows = [
        [f"{kind}, {method}", ", ".join(f"{lr}: {v:.1f}" for lr, v in found["validation_miou"].items())]
        for kind, methods in result["rates"].items()
        for method, found in methods.items()
    ]
    return tables.table(("encoder, method", "rate: validation mIoU"), rows)


def class_table() -> str:
    """Return the IoU of each class at the most shots, mean over seeds."""
    result = tables.result("segmentation_scenes")
    spec, shots = result["spec"], max(result["spec"]["shots"])

    def mean(method: str, part: str) -> np.ndarray:
        return np.mean(
            [result["cells"][f"pretrained/{method}/{shots}/{s}"]["iou"][part] for s in spec["seeds"]], axis=0
        )

    columns = [mean(m, part) for m in ("linear", "multilayer", "finetune") for part in ("test", "shift")]
    rows = [[c, *(f"{column[i]:.0f}" for column in columns)] for i, c in enumerate(result["classes"])]
    names = [f"{m}, {p}" for m in ("linear", "multilayer", "finetune") for p in ("same styles", "new styles")]
    return tables.table(("class", *names), rows)


def bounds_table() -> str:
    """Return the two references that need no model."""
    result = tables.result("segmentation_scenes")
    rows = [["background everywhere", *(f"{result['nothing_but_background'][p]:.1f}" for p in ("test", "shift"))]]
    for method, grid in result["grids"].items():
        name = f"the truth at {grid[0]}x{grid[1]} cells ({method})"
        rows.append([name, *(f"{result['ceilings'][method][p]:.1f}" for p in ("test", "shift"))])
    return tables.table(("mIoU without a model", "same styles", "new styles"), rows)


def gap_table() -> str:
    """Return paired differences over draws and shots: what pretraining, a method and the styles are worth."""
    result = tables.result("segmentation_scenes")
    spec = result["spec"]

    def row(name: str, first: tuple[str, str, str], second: tuple[str, str, str]) -> list[str]:
        cells = []
        for k in spec["shots"]:
            a, b = (np.array(scores(result, kind, method, k, part)) for kind, method, part in (first, second))
            found = mean_interval(a - b)
            cells.append(f"{found.mean:+.1f} ± {found.half_width:.1f}")
        return [name, *cells]

    p = "pretrained"
    rows = [row(f"{m}: pretrained - random", (p, m, "test"), ("random", m, "test")) for m in spec["methods"]]
    rows += [row(f"{m} - linear", (p, m, "test"), (p, "linear", "test")) for m in spec["methods"][1:]]
    rows += [row(f"{m}: new styles - same styles", (p, m, "shift"), (p, m, "test")) for m in spec["methods"]]
    return tables.table(("difference of mIoU", *(f"{k} shot{'s' if k > 1 else ''}" for k in spec["shots"])), rows)


TABLES = {
    "segmentation_test": lambda: miou_table("test"),
    "segmentation_shift": lambda: miou_table("shift"),
    "segmentation_gaps": gap_table,
    "segmentation_cost": cost_table,
    "segmentation_rates": rate_table,
    "segmentation_classes": class_table,
    "segmentation_bounds": bounds_table,
}


def curves() -> str:
    """Draw mIoU by shots: same styles left, new styles right."""
    import io

    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    result = tables.result("segmentation_scenes")
    spec = result["spec"]
    with plt.rc_context({"svg.hashsalt": "thrifty", "font.size": 9, "svg.fonttype": "path"}):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
        for axis, part, title in zip(axes, ("test", "shift"), ("drawing styles of training", "new drawing styles")):
            for i, method in enumerate(spec["methods"]):
                for kind, line in zip(spec["encoders"], ("-", ":")):
                    values = np.array([scores(result, kind, method, k, part) for k in spec["shots"]])
                    label = method if kind == "pretrained" else None
                    axis.plot(spec["shots"], values.mean(1), line, color=f"C{i}", marker="o", ms=3, label=label)
            axis.set(title=title, xlabel="shots per class", xscale="log", xticks=spec["shots"])
            axis.set_xticklabels([str(k) for k in spec["shots"]])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("test mIoU, %")
        handles, names = axes[0].get_legend_handles_labels()
        title = "solid: pretrained\ndotted: random"
        figure.legend(handles, names, loc="outside right center", frameon=False, title=title, fontsize=8)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    return out.getvalue()


def strip() -> str:
    """Draw masks of some test scenes: truth, then each method with the most shots. Scenes themselves are not ours to show."""
    result = tables.result("segmentation_scenes")
    spec = result["spec"]
    top = f"{max(spec['shots'])}/{spec['seeds'][0]}"
    columns = [("truth", result["truth"]["test"])]
    columns += [(m, result["cells"][f"pretrained/{m}/{top}"]["masks"]["test"]) for m in spec["methods"]]
    colours = ["#eeeeee", "#1f77b4", "#ff7f0e", "#d62728", "#2ca02c", "#8c564b", "#17becf", "#bcbd22", "#e377c2",
               "#7f7f7f", "#9467bd", "#393b79", "#111111"]  # fmt: skip
    cell, gap, head = 3, 10, 22
    pitch = SHOWN_SIDE * cell + gap
    width, height = len(columns) * pitch - gap, head + spec["shown"] * pitch + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
    ]
    for x, (name, masks) in enumerate(columns):
        parts.append(f'<text x="{x * pitch}" y="14">{name}</text>')
        for y, rows in enumerate(masks):
            parts.append(blocks(rows, x * pitch, head + y * pitch, cell, colours))
    for i, name in enumerate(result["classes"]):
        x, y = i % 7 * width // 7, head + spec["shown"] * pitch + 4 + 18 * (i // 7)
        parts.append(
            f'<rect x="{x}" y="{y}" width="10" height="10" fill="{colours[i]}"/><text x="{x + 14}" y="{y + 10}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def blocks(rows: list[str], left: int, top: int, cell: int, colours: list[str]) -> str:
    """Return one mask as runs of equal cells, a path for each class."""
    paths: dict[str, list[str]] = {}
    for y, row in enumerate(rows):
        x = 0
        while x < len(row):
            end = x
            while end < len(row) and row[end] == row[x]:
                end += 1
            paths.setdefault(row[x], []).append(f"M{x} {y}h{end - x}v1h-{end - x}z")
            x = end
    made = (f'<path fill="{colours[LETTERS.index(c)]}" d="{"".join(p)}"/>' for c, p in sorted(paths.items()))
    return f'<g transform="translate({left} {top}) scale({cell})">{"".join(made)}</g>'


# nothing to draw before there is a result
PICTURES = (
    {"segmentation_curves.svg": curves, "segmentation_masks.svg": strip}
    if (tables.RESULTS / "segmentation_scenes.json").exists()
    else {}
)
