"""Pictures to features: a walk through the command line, crops, "unknown", and the forecast tied to leave-one-out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import real_features
from tables import result, table

from thrifty.data import emoji
from thrifty.fewshot import WithUnknown, accuracies, mean_interval, preprocess, uniform
from thrifty.fewshot.easy import Crops, average_views
from thrifty.fewshot.episodes import Episodes
from thrifty.fewshot.features import CroppedPictures, encoder, extract
from thrifty.fewshot.generalization import GaussianModel, forecast, forecast_episodes, leave_one_out_episodes
from thrifty.fewshot.generalization.anchor import anchored, learn_anchor
from thrifty.fewshot.unknown import STRANGENESS

MINE = {
    "animal-mammal": "mammals", "animal-bird": "birds", "plant-flower": "flowers", "food-fruit": "fruit",
    "time": "clocks", "face-smiling": "smiling faces", "transport-ground": "road vehicles", "clothing": "clothing",
}  # fmt: skip
OTHER = {
    "tool": "tools", "book-paper": "paper", "food-sweet": "sweets", "heart": "hearts", "animal-bug": "bugs",
    "household": "household", "drink": "drinks", "musical-instrument": "instruments", "game": "games", "sport": "sport",
}  # fmt: skip
COMMANDS = (
    "forecast mine",
    "classify mine new --out answers",
    "forecast mine --validation other --shots 1,2,5",
    "classify mine new other --unknown 10%",
)


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the result of one part."""
    return PARTS[spec["part"]](spec)


# ---- a walk


def walk(spec: dict[str, Any]) -> dict[str, Any]:
    """Make folders of pictures and run the commands of the page in them."""
    root = Path(tempfile.mkdtemp())
    try:
        sizes = make_folders(root, spec)
        done = [command(root, words) for words in COMMANDS]
        return {"pictures": sizes, "classes": {"mine": len(MINE), "other": len(OTHER)}, "commands": done}
    finally:
        shutil.rmtree(root)


def make_folders(root: Path, spec: dict[str, Any]) -> dict[str, int]:
    """Write mine/LABEL (the shots), new/LABEL (the rest) and other/LABEL (other classes) as PNG files."""
    from PIL import Image

    pictures = emoji.load(spec["style"])
    rng = np.random.default_rng(spec["seed"])
    groups = np.array(pictures.subcategories)
    sizes = {"mine": 0, "new": 0, "other": 0}
    for names, places in ((MINE, ("mine", "new")), (OTHER, ("other", "other"))):
        for group, label in names.items():
            rows = rng.permutation(np.flatnonzero(groups == group))
            for i, row in enumerate(rows):
                place = places[int(i >= spec["shots"])]
                words = pictures.names[row].replace(" ", "-").replace("/", "-")
                file = root / place / label / f"{words}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                if not file.exists():
                    Image.fromarray(pictures.rgba[row]).save(file)
                    sizes[place] += 1
    return sizes


def command(root: Path, words: str) -> dict[str, Any]:
    """Run `thrifty WORDS` in a folder, with its own cache, and return what it printed."""
    start = time.perf_counter()
    environment = {**os.environ, "XDG_CACHE_HOME": str(root / "cache"), "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-m", "thrifty", *words.split()], cwd=root, capture_output=True, text=True, check=False,
        env=environment,
    )  # fmt: skip
    return {
        "command": f"thrifty {words}", "code": done.returncode, "printed": done.stdout, "remarks": done.stderr,
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


# ---- crops


def crops(spec: dict[str, Any]) -> dict[str, Any]:
    """Compare features of the whole picture with features averaged over random crops (EASY's augmented samples)."""
    pictures = emoji.load(spec["style"])
    groups = np.array(pictures.subcategories)
    rows = np.flatnonzero(np.isin(groups, list(MINE)))
    x, y = emoji.on_background(pictures.rgba[rows]), groups[rows]
    made = encoder("efficientnet-lite0")
    folder = real_features.cache_folder() / "features"
    tables = {"whole picture": extract(made, x, cache=folder)}
    for scale in spec["scales"]:
        kind = Crops(spec["views"], (scale, 1.0))
        views = extract(made, CroppedPictures(x, kind, 224, spec["seed"]), cache=folder)
        tables[f"{spec['views']} crops of {100 * scale:g} % to 100 %"] = average_views(views.reshape(len(x), -1, 1280))
    found = {}
    for shots in spec["shots"]:
        drawn = uniform(y, len(MINE), shots, spec["queries"], spec["episodes"], np.random.default_rng(spec["seed"]))
        for name, features in tables.items():
            score = mean_interval(accuracies(preprocess(features.astype(np.float64), "E"), drawn))
            found.setdefault(name, {})[str(shots)] = {"accuracy": score.mean, "half_width": score.half_width}
    return {"pictures": len(x), "classes": len(MINE), "accuracy": found}


# ---- unknown


def tables_of(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return unit-length features and labels of a named set; of emoji, one table for each drawing style."""
    if name == "emoji":
        found = {}
        for style in ("apple", "google"):
            features, pictures = real_features.emoji(style)
            groups = np.array(pictures.subcategories)
            names, sizes = np.unique(groups, return_counts=True)
            kept = np.isin(groups, names[sizes >= 40])
            found[f"emoji, {style}, groups of 40 and more"] = (features[kept], groups[kept])
        return {k: (preprocess(x.astype(np.float64), "E"), y) for k, (x, y) in found.items()}
    features, labels = getattr(real_features, name)("test")[:2]
    title = {"gtsrb": "GTSRB, test", "cifar10": "CIFAR-10, test"}[name]
    names, sizes = np.unique(labels, return_counts=True)
    kept = np.isin(labels, names[sizes >= 40])
    return {title: (preprocess(features[kept].astype(np.float64), "E"), labels[kept])}


def unknown(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure how many known queries are lost and how many of other classes are found, over random supports."""
    found: dict[str, Any] = {}
    for title, (x, y) in tables_of(spec["set"]).items():
        for shots in spec["shots"]:
            kinds = {s: [] for s in STRANGENESS}  # type: dict[str, list[tuple[float, float]]]
            for i in range(spec["supports"]):
                rng = np.random.default_rng([spec["seed"], shots, i])
                support, known, strange = drawn_apart(y, spec["ways"], shots, spec["queries"], rng)
                for kind, values in kinds.items():
                    model = WithUnknown(None, spec["rate"], strangeness=kind, unknown="?")
                    try:
                        model.fit(x[support], y[support].astype(str))
                    except ValueError:
                        continue  # too few shots for the rate
                    lost, seen = (model.predict(x[rows]) == "?" for rows in (known, strange))
                    values.append((float(lost.mean()), float(seen.mean())))
            found.setdefault(title, {})[str(shots)] = {
                kind: {key: interval([v[i] for v in values]) for i, key in enumerate(("lost", "found"))}
                for kind, values in kinds.items()
                if values
            }
    return {"features": found}


def drawn_apart(
    y: np.ndarray, ways: int, shots: int, queries: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows of a support, of queries of its classes and of queries of all others."""
    chosen = rng.choice(np.unique(y), ways, replace=False)
    order = [rng.permutation(np.flatnonzero(y == c)) for c in chosen]
    support = np.concatenate([rows[:shots] for rows in order])
    least = min(len(rows) for rows in order) - shots
    known = np.concatenate([rows[shots : shots + min(least, queries // ways)] for rows in order])
    strange = rng.permutation(np.flatnonzero(~np.isin(y, chosen)))[:queries]
    return support, known, strange


def interval(values: list[float]) -> dict[str, float]:
    """Return mean and half width of the 95 % interval."""
    found = mean_interval(np.array(values))
    return {"mean": found.mean, "half_width": found.half_width}


# ---- the forecast tied to leave-one-out


def anchor(spec: dict[str, Any]) -> dict[str, Any]:
    """Compare forecasts with what came true, at the shots of the support and at more."""
    model = GaussianModel(samples=1000, rehearsals=0)
    found: dict[str, Any] = {}
    for title, (x, y) in tables_of(spec["set"]).items():
        for ways in (w for w in spec["ways"] if w <= len(np.unique(y))):
            for shots in spec["shots"]:
                rng = np.random.default_rng([spec["seed"], ways, shots])
                drawn = uniform(y, ways, max(shots, spec["at"]), spec["queries"], spec["episodes"], rng)
                for at in (shots, spec["at"]):
                    key = f"{ways} ways, {shots} to {at} shots"
                    found.setdefault(title, {})[key] = judged(x, drawn, shots, at, model)
    return {"features": found}


def judged(x: np.ndarray, drawn: Episodes, shots: int, at: int, model: GaussianModel) -> dict[str, float]:
    """Return the mean absolute error of each forecast, in points, and its bias."""
    true = 1.0 - accuracies(x, Episodes(drawn.classes, drawn.support[:, :, :at], drawn.query))
    support = drawn.support[:, :, :shots]
    said = {
        "model": forecast_episodes(x, support, None if at == shots else at, model),
        "leave-one-out": leave_one_out_episodes(x, support),
        "tied": np.array([tied(x, rows, at, model) for rows in support]),
    }
    errors = {f"{name} error": float(100 * np.abs(e - true).mean()) for name, e in said.items()}
    biases = {f"{name} bias": float(100 * (e - true).mean()) for name, e in said.items()}
    return {"true": float(100 * true.mean()), **errors, **biases}


def tied(x: np.ndarray, rows: np.ndarray, at: int, model: GaussianModel) -> float:
    """Return the error forecast by the model tied to leave-one-out."""
    features, labels = x[rows.reshape(-1)], np.repeat(np.arange(len(rows)), rows.shape[1])
    return anchored(forecast(features, labels, at, replace(model)), learn_anchor(features, labels, model)).error


PARTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "walk": walk,
    "crops": crops,
    "unknown": unknown,
    "anchor": anchor,
}

# ---- tables of docs/features.md

SHOWN = 5  # lines of predictions


def walk_text(index: int) -> Callable[[], str]:
    """Return what makes the block of one command: the command, and what it printed."""

    def make() -> str:
        done = result("features_walk")["commands"][index]
        lines = done["printed"].rstrip("\n").split("\n")
        more = next((i for i, words in enumerate(lines) if words.startswith("and ") and "more" in words), None)
        if more is not None:
            lines = [*lines[: SHOWN + 1], "...", *lines[more + 1 :]]
        said = [words for words in done["remarks"].split("\n") if words]
        return "\n".join(["```text", f"$ {done['command']}", *said, *lines, "```"])

    return make


def walk_facts() -> str:
    """Return what the folders of the walk hold."""
    found = result("features_walk")
    n, c = found["pictures"], found["classes"]
    seconds = ", ".join(f"{done['seconds']:.0f} s" for done in found["commands"])
    return (
        f"`mine` holds {n['mine']} pictures of {c['mine']} classes, `new` {n['new']} other ones of the same classes, "
        f"`other` {n['other']} pictures of {c['other']} other classes. The four commands took {seconds} on one core of a "
        "busy machine; features that one has computed, the next ones find in the cache."
    )


def crops_table() -> str:
    """Return accuracy with and without crops."""
    found = {**result("features_crops_08")["accuracy"], **result("features_crops_35")["accuracy"]}
    shots = list(next(iter(found.values())))
    rows = []
    for name, values in found.items():
        cells = [f"{100 * values[k]['accuracy']:.1f} ± {100 * values[k]['half_width']:.1f}" for k in shots]
        rows.append([name, *cells])
    return table(["features of", *(f"{k} shot{'s' * (k != '1')}, %" for k in shots)], rows)


def of_sets(part: str) -> dict[str, Any]:
    """Return what was found for every table of every set."""
    found: dict[str, Any] = {}
    for name in ("emoji", "gtsrb", "cifar10"):
        found |= result(f"features_{part}_{name}")["features"]
    return found


def unknown_table() -> str:
    """Return known queries lost and strangers found."""
    rows = []
    for title, by_shots in of_sets("unknown").items():
        for shots, kinds in by_shots.items():
            cells = []
            for kind in STRANGENESS:
                got = kinds.get(kind)
                cells.append(f"{100 * got['lost']['mean']:.1f} / {100 * got['found']['mean']:.1f}" if got else "–")
            rows.append([title, shots, *cells])
    return table(["features", "shots", *(f"{k}: lost / found, %" for k in STRANGENESS)], rows)


def anchor_table() -> str:
    """Return the mean absolute error of three forecasts, in points, and the bias of two."""
    names, cases = ("model", "leave-one-out", "tied"), ("2 to 2", "5 to 5", "5 to 20", "2 to 20")
    rows = []
    for title, found in of_sets("anchor").items():
        for ways in dict.fromkeys(case.split(" ways")[0] for case in found):
            got = [found[f"{ways} ways, {case} shots"] for case in cases]
            cells = [" / ".join(f"{g[f'{n} error']:.1f}" for n in names) for g in got]
            bias = f"{got[1]['model bias']:+.1f} / {got[1]['tied bias']:+.1f}"
            rows.append([title, ways, *cells, bias])
    heads = [f"{case} shots" for case in cases]
    return table(["features", "ways", *heads, "bias at 5 to 5: alone / tied"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "features_walk_facts": walk_facts,
    **{f"features_walk_{i + 1}": walk_text(i) for i in range(len(COMMANDS))},
    "features_crops": crops_table,
    "features_unknown": unknown_table,
    "features_anchor": anchor_table,
}
