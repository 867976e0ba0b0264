"""Class names that help few-shot learning, on real features: emoji pictures, EfficientNet-Lite0, all-MiniLM-L6-v2.

`part` names one of PARTS. Splits of the classes are repeated; every method of a row sees the same episodes, so that gains are
paired. What a split gives is kept in the cache folder until the result is written, so that an interrupted run goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emoji_worlds
import numpy as np
import real_features
from emoji_worlds import STYLES, VIEWS, style_episodes, world

import thrifty.fewshot.text_statistics
from thrifty.data.source import cache_folder
from thrifty.fewshot import Episodes, NearestClassMean, TextStatistics, mean_interval, uniform
from thrifty.fewshot.text_statistics import (
    Choice,
    NamedFeatures,
    Perceptron,
    Ridge,
    TextToStatistics,
    choose_on_classes,
    closed_alpha,
    learn_statistics,
    split_classes,
)
from thrifty.fewshot.text_statistics.fusion import GRID, class_scales, whitened, whitening

ALL = range(len(STYLES))
LETTERS = "ME"
NARROW = 128  # principal axes


@dataclass(frozen=True)
class Method:
    """A column: which statistics, the weights of text, and what is done to the texts of a task."""

    statistics: str  # a key of LEARN
    alpha: str | float  # "closed", "per_dimension", "chosen", or a number
    beta: str | float  # "chosen" or a number
    texts: str = "true"  # "shuffled": each class has another's; "none": the mean spread of the base classes


LEARN: dict[str, dict[str, Any]] = {
    "wide": {},
    "wide, base texts shuffled": {},
    "narrow": {"components": NARROW},
    "perceptron": {"components": NARROW, "method": Perceptron()},
    "full": {"components": NARROW, "full": True, "method": Ridge(tuple(float(p) for p in 10.0 ** np.arange(1, 4.6, 0.5)))},
}
NCM = {"ncm": Method("wide", 0.0, 0.0)}
WIDE = {
    "mean, closed": Method("wide", "closed", 0.0),
    "mean, per dimension": Method("wide", "per_dimension", 0.0),
    "mean, chosen": Method("wide", "chosen", 0.0),
    "both, chosen": Method("wide", "chosen", "chosen"),
}
CONTROLS = {
    "spread alone": Method("wide", 0.0, 1.0),
    "texts shuffled, closed": Method("wide", "closed", 0.0, "shuffled"),
    "base texts shuffled, closed": Method("wide, base texts shuffled", "closed", 0.0),
}
AXES = {
    "axes: ncm": Method("narrow", 0.0, 0.0),
    "axes: mean, closed": Method("narrow", "closed", 0.0),
    "axes: spread alone": Method("narrow", 0.0, 1.0),
    "axes: spread without text": Method("narrow", 0.0, 1.0, "none"),
    "axes: both": Method("narrow", "closed", 1.0),
    "axes: both, chosen": Method("narrow", "chosen", "chosen"),
    "axes: both, texts shuffled": Method("narrow", "closed", 1.0, "shuffled"),
}
PERCEPTRON = {
    "perceptron: mean, closed": Method("perceptron", "closed", 0.0),
    "perceptron: both": Method("perceptron", "closed", 1.0),
}
FULL = {
    "full: spread alone": Method("full", 0.0, 1.0),
    "full: spread without text": Method("full", 0.0, 1.0, "none"),
    "full: both": Method("full", "closed", 1.0),
    "full: mean, spread without text": Method("full", "closed", 1.0, "none"),
}
METHODS = NCM | WIDE | CONTROLS | AXES | PERCEPTRON | FULL  # in-domain
ACROSS = NCM | WIDE | CONTROLS | AXES  # and to an unseen style


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the result of one part: accuracies of its cells, gathered over the splits."""
    found = [kept(name, spec, split) for split in range(spec["splits"])]
    return {"classes": [f["classes"] for f in found], "notes": [f["notes"] for f in found], "rows": gathered(found)}


def kept(name: str, spec: dict[str, Any], split: int) -> dict[str, Any]:
    """Return what a split gives, from the cache folder when spec and code are the same."""
    sources = [Path(__file__), Path(emoji_worlds.__file__), *Path(thrifty.fewshot.text_statistics.__file__).parent.glob("*.py")]
    key = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(sources)) + json.dumps(spec).encode()).hexdigest()[:16]
    path = cache_folder() / "experiments" / f"{name}_{split}_{key}.json"
    if not path.exists():
        found = PARTS[spec["part"]](spec, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".partial").write_text(json.dumps(found), encoding="utf-8")
        path.with_suffix(".partial").rename(path)
        print(f"{name}: split {split} of {spec['splits']} done", flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def gathered(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per kind of episode, ways and shots, all splits and styles together.

    Each method has its accuracy, its gain over nearest class mean (points; intervals over episodes, and the mean of every
    split), its chosen weights; "gain_by_style" where the style of the queries is unseen.
    """
    rows = []
    for at in dict.fromkeys(tuple(cell["at"]) for cell in found[0]["cells"]):
        parts = [[c for c in f["cells"] if tuple(c["at"]) == at] for f in found]
        cells = [c for part in parts for c in part]
        row: dict[str, Any] = {"episodes": at[0], "ways": at[1], "shots": at[2], "methods": {}}
        for name in cells[0]["accuracy"]:
            entry = rounded(mean_interval(pooled(cells, name)), 4)
            if at[2]:
                entry["gain_points"] = rounded(mean_interval(gains(cells, name)), 2)
                entry["gain_of_each_split"] = [round(float(gains(part, name).mean()), 2) for part in parts]
                styles = {c["style"]: [d for d in cells if d["style"] == c["style"]] for c in cells}
                if len(styles) > 1:
                    entry["gain_by_style"] = {k: rounded(mean_interval(gains(v, name)), 2) for k, v in styles.items()}
            if name in cells[0]["chosen"]:
                entry["chosen_alpha_beta"] = [c["chosen"][name] for c in cells]
            row["methods"][name] = entry
        for extra in ("area", "chosen_with_shuffled_texts"):
            if extra in cells[0]:
                row[extra] = {k: round(float(np.mean([c[extra][k] for c in cells])), 4) for k in cells[0][extra]}
        rows.append(row)
    return rows


def pooled(cells: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Return a method's accuracies over all episodes of cells."""
    return np.concatenate([c["accuracy"][name] for c in cells])


def gains(cells: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Return a method's accuracies minus those of nearest class mean on the same episodes, in points."""
    return 100 * (pooled(cells, name) - pooled(cells, "ncm"))


def rounded(interval: Any, digits: int) -> dict[str, Any]:
    """Return an interval as plain numbers."""
    return {"mean": round(interval.mean, digits), "half_width": round(interval.half_width, digits), "count": interval.count}


# ---- judging


def judge(
    statistics: TextToStatistics, part: NamedFeatures, episodes: Episodes, methods: Mapping[str, Method],
    choices: Mapping[str, Choice], shots: int,
) -> dict[str, list[float]]:  # fmt: skip
    """Return the accuracies (E,) of methods: the labels of TextStatistics (see `check`), computed once per metric."""
    x, (means, spreads) = statistics.prepared(part.features), statistics.predict(part.text_rows)
    mean_spread = statistics._positive(statistics.spreads.mean[None])
    ways, asked = episodes.support.shape[1], episodes.query.shape[2]
    counts, truth = np.full(ways, shots), np.repeat(np.arange(ways), asked)
    found: dict[str, list[float]] = {name: [] for name in methods}
    for classes, support, query in zip(episodes.classes, episodes.support, episodes.query, strict=True):
        of_shots, queries, metrics = x[support].mean(axis=1), x[query.ravel()], {}
        for name, m in methods.items():
            key = choices[name].beta if m.beta == "chosen" else float(m.beta), m.texts == "none"
            if key not in metrics:
                spread = mean_spread if key[1] else spreads[classes]
                weights = whitening(class_scales(spread, key[0], relative=True).mean(axis=0))
                metrics[key] = weights, whitened(queries, weights)
            weights, q = metrics[key]
            if m.alpha in ("closed", "per_dimension"):
                alpha: Any = closed_alpha(statistics, counts, weights, m.alpha == "per_dimension")
            else:
                alpha = 1.0 if shots == 0 else choices[name].alpha if m.alpha == "chosen" else m.alpha
            guess = np.roll(means[classes], 1, axis=0) if m.texts == "shuffled" else means[classes]
            centres = whitened(alpha * guess + (1 - alpha) * of_shots, weights)
            labels = (q @ centres.T - 0.5 * (centres**2).sum(axis=1)).argmax(axis=1)
            found[name].append(round(float((labels == truth).mean()), 6))
    return found


def judged(
    learned: Mapping[str, TextToStatistics], methods: Mapping[str, Method], new: NamedFeatures, episodes: Episodes,
    held: NamedFeatures, tries: Episodes, shots: int,
) -> dict[str, Any]:  # fmt: skip
    """Return a cell: accuracies of all methods on the same episodes; weights are chosen on `tries` of held classes."""
    found: dict[str, Any] = {"accuracy": {}, "chosen": {}}
    for kind, statistics in learned.items():
        own = {name: m for name, m in methods.items() if m.statistics == kind and (shots or m.alpha != 0.0)}
        choices = {name: choose(statistics, held, tries, m, shots) for name, m in own.items() if m.alpha == "chosen"}
        found["chosen"] |= {name: [c.alpha, c.beta] for name, c in choices.items()}
        found["accuracy"] |= judge(statistics, new, episodes, own, choices, shots)
    return found


def choose(statistics: TextToStatistics, held: NamedFeatures, tries: Episodes, method: Method, shots: int) -> Choice:
    """Return the best weights on validation classes; without shots alpha is 1."""
    betas = GRID[::2] if method.beta == "chosen" else [float(method.beta)]
    return choose_on_classes(statistics, held, tries, alphas=GRID if shots else [1.0], betas=betas)


def shuffled(part: NamedFeatures, rng: np.random.Generator) -> NamedFeatures:
    """Return the same features with the texts of its classes permuted."""
    rows = rng.permutation(part.text_rows)
    return NamedFeatures(part.features, part.labels, dict(zip(part.classes.tolist(), rows, strict=True)))


def learn_all(methods: Mapping[str, Method], base: NamedFeatures, held: NamedFeatures, seed: int) -> dict[str, TextToStatistics]:
    """Return every kind of statistics that methods ask for."""
    found = {}
    for kind in dict.fromkeys(m.statistics for m in methods.values()):
        options, rng = dict(LEARN[kind]), np.random.default_rng([seed, 5])
        parts = [shuffled(p, rng) for p in (base, held)] if "shuffled" in kind else [base, held]
        found[kind] = learn_statistics(*parts, options.pop("method", None), preprocess=LETTERS, rng=rng, **options)
    return found


def notes(statistics: TextToStatistics) -> dict[str, Any]:
    """Return the held-out errors and the log."""
    one = np.ones(statistics.dimension)
    return {
        "mean_ratio": round(statistics.mean_ratio, 4), "spread_ratio": round(statistics.spread_ratio, 4),
        "beta_closed": round(statistics.beta, 3),
        "alpha_closed": {str(k): round(float(closed_alpha(statistics, np.array([k]), one)[0, 0]), 3) for k in (1, 2, 4)},
        "log": [str(line) for line in statistics.log],
    }  # fmt: skip


def check(statistics: TextToStatistics, new: NamedFeatures, episodes: Episodes, shots: int) -> dict[str, int]:
    """Return in how many episodes `judge` differs from the estimators themselves."""
    methods = {"fused": Method("", "closed", 0.5), "ncm": Method("", 0.0, 0.0)}
    found = judge(statistics, new, episodes, methods, {}, shots)
    differ = {"text_statistics": 0, "nearest_class_mean": 0}
    names = new.classes
    for e, (classes, support, query) in enumerate(zip(episodes.classes, episodes.support, episodes.query, strict=True)):
        y, truth = (np.repeat(names[classes], rows.shape[1]) for rows in (support, query))
        fused = TextStatistics(statistics, new.texts, beta=0.5)
        ncm = NearestClassMean(preprocess=LETTERS, base_mean=statistics.prepared.centre)
        for key, model, accuracy in (("text_statistics", fused, found["fused"]), ("nearest_class_mean", ncm, found["ncm"])):
            right = model.fit(new.features[support.ravel()], y).predict(new.features[query.ravel()]) == truth
            differ[key] += int(abs(right.mean() - accuracy[e]) > 1e-5)
    return {"episodes": len(episodes), **{f"differ_from_{k}": v for k, v in differ.items()}}


# ---- a class is an emoji, its samples are drawings in four styles


def emoji_split(spec: dict[str, Any], split: int) -> dict[str, Any]:
    """Learn on the base classes of one split, choose on its validation classes, judge on its test classes.

    In-domain: the predictor has seen all styles. Across: it has not seen that of the queries, which is one for all.
    """
    w = world()
    groups = dict(zip(w.names.tolist(), w.groups.tolist(), strict=True)) if spec["grouped"] else None
    parts = split_classes(w.names, spec["shares"], np.random.default_rng([spec["seed"], split]), groups)
    held, new = (w.named(c, ALL, VIEWS) for c in parts[1:])
    found: dict[str, Any] = {"classes": [len(c) for c in parts], "cells": [], "notes": {}}
    for query in (None, *ALL):
        seen = [s for s in ALL if s != query]
        methods = METHODS if query is None else ACROSS
        learned = learn_all(methods, w.named(parts[0], seen), w.named(parts[1], seen), split)
        if query is None:
            found["notes"] = {kind: notes(s) for kind, s in learned.items()}
            found["notes"]["zero_shot_of_all"] = zero_shot_of_all(learned["wide"], w.named(parts[2], ALL))
            few = style_episodes(len(parts[2]), 10, 2, 10, np.random.default_rng(split), ALL)
            found["notes"]["check"] = check(learned["wide"], new, few, 2)
        for kind, ways, shots, support in emoji_cells(query, spec):
            seed = [spec["seed"], split, ways, shots]
            count = spec["episodes"] if query is None else spec["across_episodes"]
            drawn = style_episodes(len(parts[2]), ways, shots, count, np.random.default_rng([*seed, 0]), ALL, query, support)
            tries = style_episodes(len(parts[1]), ways, shots, spec["tries"], np.random.default_rng([*seed, 1]), seen)
            cell = judged(learned, methods, new, drawn, held, tries, shots)
            if query is None:
                cell |= extras(learned, new, drawn, held, tries, shots, np.random.default_rng([*seed, 2]))
            found["cells"].append({"at": [kind, ways, shots], "style": "any" if query is None else STYLES[query], **cell})
    return found


def emoji_cells(query: int | None, spec: dict[str, Any]) -> list[tuple[str, int, int, int | None]]:
    """Return (kind of episode, ways, shots, style of the shots)."""
    if query is None:
        return [("in-domain", ways, k, None) for ways in spec["ways"] for k in spec["shots"]]
    ways, others = spec["ways"][-1], [s for s in ALL if s != query]
    return [
        *(("to an unseen style", ways, k, None) for k in spec["shots"]),
        *(("one style to an unseen one", ways, 1, s) for s in others),
    ]


def zero_shot_of_all(statistics: TextToStatistics, new: NamedFeatures) -> dict[str, float]:
    """Return the accuracy of text alone among all test classes, pictures of all styles."""
    model = TextStatistics(statistics, new.texts).fit_texts()
    return {"classes": len(new.classes), "accuracy": round(float((model.predict(new.features) == new.labels).mean()), 4)}


def extras(
    learned: Mapping[str, TextToStatistics], new: NamedFeatures, drawn: Episodes, held: NamedFeatures, tries: Episodes,
    shots: int, rng: np.random.Generator,
) -> dict[str, Any]:  # fmt: skip
    """Return areas under the open-set curve, and the weight that is chosen where texts are shuffled."""
    found: dict[str, Any] = {"area": {}}
    for name, kind, alpha, beta in (
        ("ncm", "wide", 0.0, 0.0), ("mean", "wide", "closed", 0.0), ("axes: mean", "narrow", "closed", 0.0),
        ("axes: both", "narrow", "closed", 1.0),
    ):  # fmt: skip
        if shots or alpha != 0.0:
            found["area"][name] = open_set_area(learned[kind], new, drawn, alpha, beta, shots)
    if shots:
        wrong = choose(learned["wide"], shuffled(held, rng), tries, WIDE["mean, chosen"], shots)
        right = choose(learned["wide"], held, tries, WIDE["mean, chosen"], shots)
        found["chosen_with_shuffled_texts"] = {"true texts": right.alpha, "shuffled texts": wrong.alpha}
    return found


def open_set_area(
    statistics: TextToStatistics, new: NamedFeatures, episodes: Episodes, alpha: str | float, beta: float, shots: int
) -> float:
    """Return the ROC area of pairs (class, query), half of them matching, with each class's own scale."""
    from sklearn.metrics import roc_auc_score

    x, (means, spreads) = statistics.prepared(new.features), statistics.predict(new.text_rows)
    scores, same = [], []
    for classes, support, query in zip(episodes.classes, episodes.support, episodes.query, strict=True):
        scales = class_scales(spreads[classes], beta, relative=True)
        weights = whitening(scales.mean(axis=0))
        a = closed_alpha(statistics, np.full(len(classes), shots), weights) if alpha == "closed" else alpha
        centres = a * means[classes] + (1 - a) * x[support].mean(axis=1)
        queries = x[query[:, 0]]
        for other in (queries, np.roll(queries, 1, axis=0)):
            scores.append(-np.linalg.norm((other - centres) / scales, axis=1))
            same.append(np.full(len(classes), other is queries))
    return float(roc_auc_score(np.concatenate(same), np.concatenate(scores)))


# ---- a class is a subcategory, its samples are its emoji in one style


def subcategory_split(spec: dict[str, Any], split: int) -> dict[str, Any]:
    """Shots and queries are different emoji of a subcategory; the predictor sees one style, queries are in it or another."""
    w = world()
    names, counts = np.unique(w.groups, return_counts=True)
    names = names[counts >= spec["least"]]
    texts = dict(zip(names.tolist(), real_features.sentences([n.replace("-", " ") for n in names]).astype(np.float64), strict=True))
    parts = split_classes(names, spec["shares"], np.random.default_rng([spec["seed"], split]))
    style = split % len(STYLES)
    other = (style + 1 + split // len(STYLES)) % len(STYLES)

    def named(classes: np.ndarray, styles: Sequence[int]) -> NamedFeatures:
        rows = np.flatnonzero(np.isin(w.groups, classes))
        x = w.features[rows][:, list(styles), 0].transpose(1, 0, 2).reshape(-1, w.features.shape[-1])
        return NamedFeatures(x, np.tile(w.groups[rows], len(styles)), {c: texts[c] for c in classes.tolist()})

    methods = NCM | WIDE | AXES_FEW | CONTROLS
    base, held = named(parts[0], [style]), named(parts[1], [style])
    learned = learn_all(methods, base, held, split)
    found: dict[str, Any] = {"classes": [len(c) for c in parts], "cells": [], "notes": {k: notes(s) for k, s in learned.items()}}
    both = named(parts[2], [style, other])
    per_style = len(both.labels) // 2
    for shots in spec["shots"]:
        rng = np.random.default_rng([spec["seed"], split, shots])
        drawn = uniform(both.labels[:per_style], spec["ways"], max(shots, 1), spec["queries"], spec["episodes"], rng)
        tries = uniform(held.labels, spec["ways"], max(shots, 1), spec["queries"], spec["tries"], rng)
        for kind, shift in (("in-domain", 0), ("to another style", per_style)):
            moved = Episodes(drawn.classes, drawn.support, drawn.query + shift)
            cell = judged(learned, methods, both, moved, held, tries, shots)
            found["cells"].append({"at": [kind, spec["ways"], shots], "style": STYLES[style], **cell})
    return found


AXES_FEW = {name.replace("axes: ", "32 axes: "): Method("few axes", m.alpha, m.beta, m.texts) for name, m in AXES.items()}
LEARN["few axes"] = {"components": 32}
PARTS: dict[str, Callable[[dict[str, Any], int], dict[str, Any]]] = {"emoji": emoji_split, "subcategory": subcategory_split}
