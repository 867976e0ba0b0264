"""Few-shot classification and its forecast on real features: `part` names one of PARTS."""

from __future__ import annotations

from typing import Any

import numpy as np
import real_features
from fewshot import compared
from tables import percent, result, table

from thrifty.data import emoji
from thrifty.fewshot import LogisticProbe, NearestClassMean, SoftKMeans, accuracies, evaluate, mean_interval, uniform
from thrifty.fewshot import generalization as g
from thrifty.fewshot.preprocess import preprocess

TITLES = {
    "emoji": "emoji: class = one emoji, samples = drawing styles",
    "emoji_kinds": "emoji (Apple): class = subcategory, samples = its emoji",
    "gtsrb": "GTSRB traffic signs",
    "cifar10": "CIFAR-10",
    "digits": "scikit-learn's digits, pixels",
}


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the result of one part."""
    return PARTS[spec["part"]](spec)


def features_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return features (n, d) and labels (n,)."""
    if name == "emoji":
        styles = [real_features.emoji(style) for style in emoji.STYLES]
        common = sorted(set.intersection(*(set(p.codes) for _, p in styles)))
        rows = [[p.codes.index(code) for code in common] for _, p in styles]
        x = np.concatenate([f[r] for (f, _), r in zip(styles, rows, strict=True)])
        return x, np.tile(np.arange(len(common)), len(styles))
    if name == "emoji_kinds":
        x, pictures = real_features.emoji("apple")
        _kinds, y, counts = np.unique(pictures.subcategories, return_inverse=True, return_counts=True)
        keep = counts[y] >= 24
        return x[keep], y[keep]
    if name == "gtsrb":
        return real_features.gtsrb("test")[:2]
    return {"cifar10": real_features.cifar10, "digits": real_features.digits}[name]()


def episodes(spec: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of nearest class mean on many 5-way episodes, and of the others on the first of them, paired."""
    base = preprocess(real_features.imagenet_samples()[0].astype(np.float64), "").mean(axis=0)
    rows = []
    for name, (shots_list, queries) in spec["sets"].items():
        x, y = features_of(name)
        centre = base if x.shape[1] == len(base) else x.mean(axis=0) * 0
        ready = preprocess(x.astype(np.float64), "ME", centre).astype(np.float32)
        for shots in shots_list:
            drawn = uniform(y, spec["ways"], shots, queries, spec["episodes"], np.random.default_rng([spec["seed"], shots]))
            few = drawn[: spec["few"]]
            raw, centred = accuracies(x, drawn), accuracies(ready, drawn)
            others = {
                "logistic_probe": evaluate(LogisticProbe(), ready, few),
                "soft_kmeans": transductive(ready, few),
            }
            check = evaluate(NearestClassMean(), x, few[:200])
            rows.append({
                "set": name, "classes": len(np.unique(y)), "samples": len(y), "dimension": x.shape[1], "shots": shots,
                "queries": queries, "episodes": len(drawn), "raw": row(raw), "centred": row(centred),
                "gain_points": row(100 * (centred - raw)),
                "few": {k: {**row(v), "over_centred_points": row(100 * (v - centred[: len(v)]))} for k, v in others.items()},
                "estimator_differs": int((np.abs(check - raw[: len(check)]) > 1e-9).sum()),
            })  # fmt: skip
            print(name, shots, rows[-1]["raw"], rows[-1]["centred"], flush=True)
    return {"rows": rows}


def transductive(x: np.ndarray, drawn: Any) -> np.ndarray:
    """Soft k-means sees all queries of the episode together."""
    found = []
    for support, y, queries, truth in drawn.arrays(x):
        found.append(float((SoftKMeans().fit(support, y).predict(queries) == truth).mean()))
    return np.array(found)


def row(values: np.ndarray) -> dict[str, float]:
    """Return mean and half width of the 95 % interval."""
    found = mean_interval(values)
    return {"mean": round(found.mean, 5), "half_width": round(found.half_width, 5), "of": found.count}


def forecasts(spec: dict[str, Any]) -> dict[str, Any]:
    """MAPE of the forecast and of leave-one-out; with the offset of other classes; and forecasts at more shots."""
    rows, offsets, later = [], [], []
    for name, shots_list in spec["sets"].items():
        x, y = features_of(name)
        smallest = int(np.bincount(y)[np.unique(y)].min())
        for shots in shots_list:
            rng = np.random.default_rng([spec["seed"], shots])
            drawn = uniform(y, spec["ways"], shots, min(100, smallest - shots), spec["episodes"], rng)
            rows.append({"set": name, "shots": shots, **compared(x, drawn.support, 1.0 - accuracies(x, drawn))})
            offsets.append({"set": name, "shots": shots, **with_offset(x, y, shots, spec)})
            print(name, shots, rows[-1]["mape_percent"], offsets[-1]["absolute_error_points"], flush=True)
        for at in spec["later"]:
            if at < smallest:
                model = g.GaussianModel(samples=2000, rehearsals=0)
                rng = np.random.default_rng([spec["seed"], at])
                tried = g.trial(x, y, spec["ways"], spec["from"], rng, at=at, episodes=spec["episodes"], model=model)
                later.append({
                    "set": name, "from": spec["from"], "at": at, "predicted": row(tried.predicted), "true": row(tried.true),
                    "absolute_error": row(np.abs(tried.predicted - tried.true)),
                })  # fmt: skip
    return {"rows": rows, "offsets": offsets, "later": later}


def with_offset(x: np.ndarray, y: np.ndarray, shots: int, spec: dict[str, Any]) -> dict[str, Any]:
    """Learn the offset on half of the classes (drawn with the seed), use it on the other half."""
    classes = np.random.default_rng(spec["seed"]).permutation(np.unique(y))
    old = np.isin(y, classes[: len(classes) // 2])
    ways = min(spec["ways"], len(classes) // 2)
    model = g.GaussianModel(samples=2000, rehearsals=0)
    rng = np.random.default_rng([spec["seed"], shots, 1])
    offset = g.learn_offset(x[old], y[old], ways, shots, rng, episodes=200, model=model)
    tried = g.trial(x[~old], y[~old], ways, shots, rng, episodes=200, model=model)
    left_out = g.leave_one_out_episodes(x[~old], tried.episodes.support)
    low, high = np.quantile(offset.differences, [0.025, 0.975])
    gap = tried.predicted - tried.true
    moved = np.clip(tried.predicted - offset.value, 0, 1) - tried.true
    errors = {"raw": gap, "with_offset": moved, "leave_one_out": left_out - tried.true}
    return {
        "ways": ways,
        "offset_points": round(100 * offset.value, 2),
        "absolute_error_points": {k: round(100 * float(np.abs(v).mean()), 2) for k, v in errors.items()},
        "interval_covers": round(float(((gap >= low) & (gap <= high)).mean()), 3),
    }


PARTS = {"episodes": episodes, "forecasts": forecasts}


# ---- tables


def episodes_table() -> str:
    """Return accuracies with intervals."""
    rows = []
    for r in result("few_real_episodes")["rows"]:
        few = r["few"]
        rows.append([
            TITLES[r["set"]], r["classes"], r["shots"], interval(r["raw"]), interval(r["centred"]),
            *(points(few[k]["over_centred_points"]) for k in ("logistic_probe", "soft_kmeans")),
        ])  # fmt: skip
    head = ("features", "classes", "shots", "NCM %", "NCM, 'ME' %", "logistic probe, points", "soft k-means, points")
    return table(head, rows)


def interval(found: dict[str, float]) -> str:
    """Return percent ± half width."""
    return f"{percent(found['mean'])} ± {percent(found['half_width'])}"


def points(found: dict[str, float]) -> str:
    """Return points ± half width, with a sign."""
    return f"{found['mean']:+.2f} ± {found['half_width']:.2f}"


def forecasts_table() -> str:
    """Return MAPE and the offset's effect."""
    made = result("few_real_forecast")
    rows = []
    for r, o in zip(made["rows"], made["offsets"], strict=True):
        m, e = r["mape_percent"], o["absolute_error_points"]
        rows.append([
            TITLES[r["set"]], r["shots"], percent(r["true_error"]), m["none"], m["asymptotic"], m["effective"], m["leave_one_out"],
            o["ways"], e["raw"], e["with_offset"], e["leave_one_out"],
        ])  # fmt: skip
    head = ("features", "shots", "true error %", "MAPE none", "MAPE asymptotic", "MAPE forecast", "MAPE leave-one-out",
            "ways", "points raw", "points with offset", "points leave-one-out")  # fmt: skip
    return table(head, rows)


def later_table() -> str:
    """Return forecasts at more shots than there are."""
    rows = [
        [TITLES[r["set"]], r["from"], r["at"], interval(r["predicted"]), interval(r["true"]), interval(r["absolute_error"])]
        for r in result("few_real_forecast")["later"]
    ]
    return table(("features", "shots", "forecast at", "predicted error %", "true error %", "mean absolute error, points"), rows)


def worlds_table(name: str, ways: bool) -> str:
    """Return MAPE and coverage of the forecast where the model is true, or on digits."""
    rows = []
    for r in result(name)["rows"]:
        m = r["mape_percent"]
        first = [r["ways"]] if ways else []
        rows.append([
            *first, r["shots"], m["effective"], m["leave_one_out"], m["none"], m["asymptotic"],
            f"{100 * r['interval_covers']:.0f} % of {r['of']}",
        ])  # fmt: skip
    head = ("shots", "forecast", "leave-one-out", "no correction", "asymptotic", "interval held")
    return table(("ways", *head) if ways else head, rows)


def speed_table() -> str:
    """Return seconds of 10,000 episodes, beside others."""
    made = result("fewshot_speed_episodes")
    other, ours = made["easyfsl"], made["seconds_drawing"] + made["seconds_judging"]
    rows = [
        ["thrifty, drawing", made["seconds_drawing"], ""],
        ["thrifty, drawing and judging", round(ours, 3), "1"],
        ["a plain NumPy loop, judging", made["plain_numpy_loop"]["seconds_scaled"], ""],
        ["easyfsl, classifying alone", other["seconds_classifying_scaled"], f"{other['times_slower_classifying']} (to judging)"],
        ["easyfsl, sampler, loader and classifying", other["seconds_scaled"], other["times_slower"]],
    ]
    return table((f"{made['episodes']:,} episodes", "seconds", "times"), rows)


def forecast_speed_table() -> str:
    """Return seconds of 1,000 forecasts, beside the authors' steps."""
    made = result("fewshot_speed_forecast")
    steps = made["authors_steps"]
    rows = [
        ["thrifty", made["seconds"], 1, made["mean_error_ours"], made["absolute_error_ours"]],
        ["the authors' Monte-Carlo steps, in our writing", steps["seconds_scaled"], steps["times_slower"],
         made["mean_error_authors"], made["absolute_error_authors"]],
    ]  # fmt: skip
    return table((f"{made['episodes']:,} forecasts", "seconds", "times", "mean forecast error", "off the true error by"), rows)


TABLES = {
    "few-worlds": lambda: worlds_table("fewshot_forecast_synthetic", ways=False),
    "few-digits": lambda: worlds_table("fewshot_forecast_digits", ways=True),
    "few-speed": speed_table,
    "few-forecast-speed": forecast_speed_table,
    "few-real-episodes": episodes_table,
    "few-real-forecast": forecasts_table,
    "few-real-later": later_table,
}
