"""Few-shot experiments: `part` names one of PARTS. Synthetic features and scikit-learn's digits only."""

from __future__ import annotations

import random
import sys
import time
import types
import warnings
from typing import Any

import numpy as np

from thrifty.fewshot import NearestClassMean, accuracies, evaluate, forecast, mean_interval, uniform
from thrifty.fewshot import generalization as g


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the result of one part."""
    return PARTS[spec["part"]](spec)


def table_of(spec: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return features (n, d) float32 and labels: Gaussian classes, unit noise."""
    rng = np.random.default_rng(spec["seed"])
    y = np.repeat(np.arange(spec["classes"]), spec["per_class"])
    scale = spec["distance"] / np.sqrt(2 * spec["dimension"])
    x = scale * rng.standard_normal((spec["classes"], spec["dimension"]))[y]
    return (x + rng.standard_normal(x.shape)).astype(np.float32), y


def timed(work: Any, repeats: int = 1) -> tuple[float, Any]:
    """Return the seconds of the fastest of some runs, and what it returned."""
    best, found = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        found = work()
        best = min(best, time.perf_counter() - start)
    return best, found


# ---- episodes of nearest class mean


def speed_episodes(spec: dict[str, Any]) -> dict[str, Any]:
    """Time `episodes` episodes here, and fewer with easyfsl and with a plain loop, scaled to as many."""
    x, y = table_of(spec)
    ways, shots, queries, count = spec["ways"], spec["shots"], spec["queries"], spec["episodes"]
    draw, drawn = timed(lambda: uniform(y, ways, shots, queries, count, np.random.default_rng(spec["seed"])), 3)
    judge, found = timed(lambda: accuracies(x, drawn), 3)
    few = spec["few"]
    loop, looped = timed(lambda: plain_loop(x, drawn[:few]))
    estimator, estimated = timed(lambda: evaluate(NearestClassMean(), x, drawn[: few // 4]))
    result = {
        "episodes": count,
        "seconds_drawing": round(draw, 3),
        "seconds_judging": round(judge, 3),
        "threads": threads(),
        "accuracy": str(mean_interval(found)),
        "plain_numpy_loop": {"measured_episodes": few, "seconds_scaled": round(loop * count / few, 2)},
        "estimator_loop": {"measured_episodes": few // 4, "seconds_scaled": round(estimator * count / (few // 4), 2)},
        "labels_differ_from_loop": int((np.abs(looped - found[:few]) > 1e-6).sum()),
        "labels_differ_from_estimator": int((np.abs(estimated - found[: few // 4]) > 1e-6).sum()),
    }
    other = easyfsl_episodes(x, y, ways, shots, queries, few)
    if "seconds" in other:
        whole = other.pop("seconds") * count / few
        alone = other.pop("seconds_classifying") * count / few
        other["seconds_scaled"] = round(whole, 2)
        other["seconds_classifying_scaled"] = round(alone, 2)
        other["times_slower"] = round(whole / (draw + judge), 1)
        other["times_slower_classifying"] = round(alone / judge, 1)
    return {**result, "easyfsl": other}


def threads() -> dict[str, int]:
    """Return how many threads what is measured here may use; numba's are 0 where it is not installed."""
    import torch

    try:
        import numba
    except ImportError:
        return {"numba": 0, "torch": torch.get_num_threads()}
    return {"numba": numba.get_num_threads(), "torch": torch.get_num_threads()}


def plain_loop(x: np.ndarray, drawn: Any) -> np.ndarray:
    """Nearest class mean, one episode after the other, as one would write it first."""
    found = []
    for support, query in zip(drawn.support, drawn.query, strict=True):
        means = x[support].mean(axis=1)
        away = ((x[query][:, :, None] - means) ** 2).sum(axis=3)
        found.append((away.argmin(axis=2) == np.arange(len(means))[:, None]).mean())
    return np.array(found)


def easyfsl_episodes(
    x: np.ndarray, y: np.ndarray, ways: int, shots: int, queries: int, count: int
) -> dict[str, Any]:
    """Time easyfsl's own sampler, loader and PrototypicalNetworks on the features; not measured when absent."""
    stand_in_for_torchvision()
    try:
        import easyfsl.datasets
        import easyfsl.methods
        import easyfsl.samplers
    except ImportError as err:
        return {"not_measured": str(err)}
    import torch

    # easyfsl 1.5 passes an argument that torch's Sampler no longer takes
    torch.utils.data.Sampler.__init__ = lambda self, data_source=None: None  # type: ignore[method-assign]

    class Features(easyfsl.datasets.FewShotDataset):
        def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
            return embeddings[item], labels[item]

        def __len__(self) -> int:
            return len(labels)

        def get_labels(self) -> list[int]:
            return labels

    embeddings, labels = torch.from_numpy(x), y.tolist()
    random.seed(0)
    sampler = easyfsl.samplers.TaskSampler(Features(), ways, shots, queries, count)
    loader = torch.utils.data.DataLoader(Features(), batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn)
    model = easyfsl.methods.PrototypicalNetworks(torch.nn.Identity()).eval()
    right, classifying = [], 0.0
    start = time.perf_counter()
    with torch.no_grad():
        for support, support_labels, query, query_labels, _ in loader:
            begin = time.perf_counter()
            model.process_support_set(support, support_labels)
            scores = model(query)
            classifying += time.perf_counter() - begin
            right.append(float((scores.argmax(dim=1) == query_labels).float().mean()))
    seconds = time.perf_counter() - start
    return {
        "measured_episodes": count,
        "seconds": seconds,
        "seconds_classifying": classifying,
        "accuracy": str(mean_interval(right)),
        "note": "TaskSampler, DataLoader in this process, PrototypicalNetworks(Identity); torchvision replaced by "
        "empty modules (it does not load with a CPU build of torch here, nothing timed uses it), and the argument that "
        "torch's Sampler no longer takes is ignored; the rest is easyfsl 1.5.0 as published",
    }


def stand_in_for_torchvision() -> None:
    """Let easyfsl's imports of torchvision (backbones, transforms) succeed where torchvision does not load."""
    if "torchvision" in sys.modules:
        return
    names = {
        "torchvision": (), "torchvision.transforms": (), "torchvision.datasets": ("ImageFolder",),
        "torchvision.models": (), "torchvision.models.resnet": ("BasicBlock", "Bottleneck", "conv1x1", "conv3x3"),
    }  # fmt: skip
    for name, members in names.items():
        module = types.ModuleType(name)
        for member in members:
            setattr(module, member, type(member, (), {}))
        sys.modules[name] = module
        if "." in name:
            parent, child = name.rsplit(".", 1)
            setattr(sys.modules[parent], child, module)


# ---- the forecast


def speed_forecast(spec: dict[str, Any]) -> dict[str, Any]:
    """Time the forecast of many supports here, and the authors' Monte-Carlo steps on a few, scaled to as many."""
    x, y = table_of(spec)
    ways, shots, count, few = spec["ways"], spec["shots"], spec["episodes"], spec["few"]
    drawn = uniform(y, ways, shots, spec["queries"], count, np.random.default_rng(spec["seed"]))
    model = g.GaussianModel(samples=spec["samples"], rehearsals=0)
    ours, predicted = timed(lambda: g.forecast_episodes(x, drawn.support, model=model), 2)
    table_seconds, table = timed(lambda: authors_table(x.shape[1], shots, np.random.default_rng(1)))
    theirs, answers = timed(
        lambda: np.array([authors_forecast(x[s], table, np.random.default_rng(i)) for i, s in enumerate(drawn.support[:few])])
    )
    true = 1.0 - accuracies(x, drawn)
    gap = predicted[:few] - answers
    return {
        "episodes": count,
        "seconds": round(ours, 3),
        "samples_per_class": model.samples,
        "authors_steps": {
            "note": "our writing of the steps of specs/fewshot.md 1b.1-8: table with cubic interpolation, scikit-learn's "
            "metric MDS, 10,000 draws per class; the table is made once and not counted in seconds_scaled",
            "measured_episodes": few,
            "seconds_scaled": round(theirs * count / few, 2),
            "seconds_table": round(table_seconds, 2),
            "times_slower": round(theirs * count / few / ours, 1),
        },
        "mean_error_true": round(float(true[:few].mean()), 4),
        "mean_error_ours": round(float(predicted[:few].mean()), 4),
        "mean_error_authors": round(float(answers.mean()), 4),
        "mean_absolute_difference": round(float(np.abs(gap).mean()), 4),
        "absolute_error_ours": str(mean_interval(np.abs(predicted[:few] - true[:few]))),
        "absolute_error_authors": str(mean_interval(np.abs(answers - true[:few]))),
    }


def authors_table(d: int, k: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Step 6 shot by shot."""
    centre = np.full(d, 5 / np.sqrt(d))
    snr, ratio = [], []
    for scale in np.linspace(0.01, 6, 100):
        snrs, ratios = [], []
        for _ in range(100):
            shots = centre + scale * rng.standard_normal((k, d))
            estimate = shots.mean(axis=0)
            length = np.linalg.norm(estimate)
            snrs.append(length / (shots.std() if k > 1 else 1.0))
            ratios.append(centre @ estimate / length / length)
        snr.append(np.mean(snrs))
        ratio.append(np.mean(ratios))
    order = np.argsort(snr)
    return np.array(snr)[order], np.array(ratio)[order]


def authors_forecast(
    shots: np.ndarray, table: tuple[np.ndarray, np.ndarray], rng: np.random.Generator
) -> float:
    """Steps 1 to 8; shots: (C, k, d)."""
    from scipy.interpolate import interp1d
    from sklearn.manifold import MDS

    ways, k, _ = shots.shape
    means = shots.mean(axis=1)
    spread = np.sqrt(shots.var(axis=1, ddof=1).mean(axis=1))
    basis = np.linalg.qr((means - np.roll(means, 1, axis=0))[:-1].T)[0]
    centres, projected = means @ basis, shots @ basis
    rests = (projected - projected.mean(axis=1, keepdims=True)).reshape(ways * k, -1)
    scale = np.sqrt(rests.var(axis=0, ddof=1).mean())
    distances = np.linalg.norm(centres[:, None] - centres, axis=2)
    snr = distances / np.sqrt(spread[:, None] ** 2 + spread**2)
    ratio = interp1d(*table, kind="cubic", bounds_error=False, fill_value=(0.0, 1.0))(snr)
    corrected = distances * np.abs(ratio)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        points = MDS(n_components=ways - 1, dissimilarity="precomputed", random_state=0, n_init=4).fit_transform(corrected)
    samples = points[:, None] + scale * rng.standard_normal((ways, 10_000, ways - 1))
    away = np.linalg.norm(samples[:, :, None] - points, axis=3)
    return float((away.argmin(axis=2) != np.arange(ways)[:, None]).mean())


def gaussian_episodes(spec: dict[str, Any], shots: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a table, support rows (E, C, k) and true errors; fresh classes in every episode."""
    count, ways, d, asked = spec["episodes"], spec["ways"], spec["dimension"], spec["queries"]
    centres = spec["distance"] / np.sqrt(2 * d) * rng.standard_normal((count, ways, 1, d))
    x = centres + rng.standard_normal((count, ways, shots, d))
    means = x.mean(axis=2)
    true = np.empty(count)
    for e in range(count):
        mean = centres[e, :, 0] @ means[e].T - 0.5 * (means[e] ** 2).sum(axis=1)
        root = np.linalg.cholesky(means[e] @ means[e].T)
        scores = mean[:, None] + rng.standard_normal((ways, asked, ways)) @ root.T
        true[e] = 1 - (scores.argmax(axis=2) == np.arange(ways)[:, None]).mean()
    return x.reshape(-1, d), np.arange(count * ways * shots).reshape(count, ways, shots), true


def forecast_synthetic(spec: dict[str, Any]) -> dict[str, Any]:
    """MAPE of each correction and of leave-one-out, and coverage of the interval, where the model is true."""
    rows = []
    for shots in spec["shots"]:
        x, support, true = gaussian_episodes(spec, shots, np.random.default_rng([spec["seed"], shots]))
        rows.append({"shots": shots, **compared(x, support, true), **covered(x, support, true, spec["intervals"])})
    return {"rows": rows}


def compared(x: np.ndarray, support: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    """Return bias (points) and MAPE (%) of the corrections and of leave-one-out."""
    found = {
        c: g.forecast_episodes(x, support, model=g.GaussianModel(correction=c, samples=2000, rehearsals=0))
        for c in ("none", "asymptotic", "effective")
    }
    found["leave_one_out"] = g.leave_one_out_episodes(x, support)
    return {
        "true_error": round(float(true.mean()), 4),
        "bias_points": {k: round(100 * float((v - true).mean()), 2) for k, v in found.items()},
        "mape_percent": {k: round(100 * float((np.abs(v - true) / (1 - true)).mean()), 2) for k, v in found.items()},
        "mape_half_width": {
            k: round(100 * mean_interval(np.abs(v - true) / (1 - true)).half_width, 2) for k, v in found.items()
        },
    }


def covered(x: np.ndarray, support: np.ndarray, true: np.ndarray, count: int) -> dict[str, Any]:
    """Return how often the 95 % interval of the first supports holds the truth, and its mean width."""
    y = np.repeat(np.arange(support.shape[1]), support.shape[2])
    model = g.GaussianModel(samples=1000, rehearsals=300)
    found = [forecast(x[s.ravel()], y, model=model) for s in support[:count]]
    inside = [bool(f.low <= t <= f.high) for f, t in zip(found, true, strict=False)]
    width = np.mean([f.high - f.low for f in found])
    return {"interval_covers": round(float(np.mean(inside)), 3), "of": count, "interval_width": round(float(width), 3)}


def forecast_digits(spec: dict[str, Any]) -> dict[str, Any]:
    """The same on scikit-learn's digits (pixels / 16); then with the offset learned on other classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = digits.data / 16, digits.target
    rows, offsets = [], []
    for ways in spec["ways"]:
        for shots in spec["shots"]:
            rng = np.random.default_rng([spec["seed"], ways, shots])
            drawn = uniform(y, ways, shots, 174 - max(spec["shots"]), spec["episodes"], rng)
            true = 1.0 - accuracies(x, drawn)
            found = {**compared(x, drawn.support, true), **covered(x, drawn.support, true, spec["intervals"])}
            rows.append({"ways": ways, "shots": shots, **found})
    old = y < 5
    for shots in spec["shots"]:
        for covariance in ("shared", "full"):
            if covariance == "full" and shots < 3:
                continue
            model = g.GaussianModel(covariance=covariance, samples=2000, rehearsals=0)
            rng = np.random.default_rng([spec["seed"], shots])
            offset = g.learn_offset(x[old], y[old], 3, shots, rng, episodes=200, model=model)
            tried = g.trial(x[~old], y[~old], 3, shots, rng, episodes=200, model=model)
            low, high = np.quantile(offset.differences, [0.025, 0.975])
            gap = tried.predicted - tried.true
            left_out = g.leave_one_out_episodes(x[~old], tried.episodes.support)
            offsets.append({
                "ways": 3, "shots": shots, "covariance": covariance,
                "offset_points": round(100 * offset.value, 2),
                "absolute_error_points": {
                    "raw": round(100 * float(np.abs(gap).mean()), 2),
                    "with_offset": round(100 * float(np.abs(np.clip(tried.predicted - offset.value, 0, 1) - tried.true).mean()), 2),
                    "leave_one_out": round(100 * float(np.abs(left_out - tried.true).mean()), 2),
                },
                "interval_covers": round(float(((gap >= low) & (gap <= high)).mean()), 3),
            })  # fmt: skip
    return {"rows": rows, "offset_from_classes_0_to_4": offsets}


PARTS = {
    "speed_episodes": speed_episodes,
    "speed_forecast": speed_forecast,
    "forecast_synthetic": forecast_synthetic,
    "forecast_digits": forecast_digits,
}
