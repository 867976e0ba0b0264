"""Incremental learning on frozen features: classes come one by one; TILDA and its on-chip forms beside other learners.

`part` names one of PARTS. "streams" learns a data set class by class in several orders; "device" runs learners on the
emulated Cortex-M4 behind a network that knows half of the classes, or alone on the features of a large network.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import real_features
from sklearn.neighbors import KNeighborsClassifier
from tables import count, kib, load, result, table

from thrifty.associative import Anchors, Codes, Memory, hardware
from thrifty.deploy.learner import CLASSIFY, LEARN, Learner, Requests, rehearse_learner, replay
from thrifty.fewshot import NearestClassMean, OnChipAnchors, OnChipCodes, Tilda, mean_interval

Array = np.ndarray
SETS = {
    "gtsrb": "GTSRB, EfficientNet-Lite0",
    "cifar10": "CIFAR-10, EfficientNet-Lite0",
    "digits": "scikit-learn's digits, pixels",
}


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the result of one part."""
    return PARTS[spec["part"]](spec)


# ---- the data and the learners


def data_of(spec: dict[str, Any]) -> dict[str, Array]:
    """Return what to learn (x, y, groups), what to test (queries, truth), and unlabelled features for calibration."""
    rng = np.random.default_rng(spec["seed"])
    if spec["set"] == "digits":
        x, y = real_features.digits()
        order = rng.permutation(len(y))
        x, y = x[order][:, rng.permutation(64)], y[order]
        return {"x": x[:1200], "y": y[:1200], "groups": np.arange(1200), "queries": x[1200:], "truth": y[1200:],
                "calibration": x[:200]}  # fmt: skip
    if spec["set"] == "gtsrb":
        x, y, track = real_features.gtsrb("train")
        queries, truth, _ = real_features.gtsrb("test")
        groups = 65536 * y + track  # a track shows one sign from nearer and nearer; numbered within a class
    else:
        x, y = real_features.cifar10("train")
        queries, truth = real_features.cifar10("test")
        groups = np.arange(len(y))
    pick = rng.permutation(len(truth))[: spec["queries"]]
    return {"x": x, "y": y, "groups": groups, "queries": queries[pick], "truth": truth[pick],
            "calibration": real_features.imagenet_samples()[0]}  # fmt: skip


class StreamingLda:
    """Linear discriminant analysis, one example at a time: counted means, one pooled covariance of all classes.

    S += n / (n + 1) (x - m)(x - m)' before the mean m of the example's class, of n examples, takes it in: the exact
    pooled scatter. Scores: m' L x - m' L m / 2 with L the inverse of (1 - e) S / N + e I. e = 1e-4 is the shrinkage of
    avalanche's Deep SLDA; this is our own.
    """

    shrinkage = 1e-4

    def __init__(self) -> None:
        self.means: dict[int, Array] = {}
        self.counts: dict[int, int] = {}
        self.scatter: Array | None = None

    def partial_fit(self, x: Array, y: Array) -> StreamingLda:
        x = x.astype(np.float64)
        if self.scatter is None:
            self.scatter = np.zeros((x.shape[1], x.shape[1]))
        for c in np.unique(y).tolist():
            rows, n, old = x[y == c], self.counts.get(c, 0), self.means.get(c, np.zeros(x.shape[1]))
            mean = rows.mean(axis=0)
            centred = rows - mean
            self.scatter += centred.T @ centred
            if n:
                gap = mean - old
                self.scatter += n * len(rows) / (n + len(rows)) * np.outer(gap, gap)
            self.counts[c] = n + len(rows)
            self.means[c] = old + (mean - old) * len(rows) / self.counts[c]
        return self

    def predict(self, x: Array) -> Array:
        labels = np.array(sorted(self.means))
        means = np.stack([self.means[c] for c in labels])
        covariance = (1 - self.shrinkage) * self.scatter / sum(self.counts.values())
        covariance.flat[:: len(covariance) + 1] += self.shrinkage
        weights = np.linalg.solve(covariance, means.T)
        return labels[(x.astype(np.float64) @ weights - 0.5 * (means.T * weights).sum(axis=0)).argmax(axis=1)]


class Neighbours:
    """k nearest neighbours over all that was seen."""

    def __init__(self, k: int = 5) -> None:
        self.k, self.x, self.y = k, [], []

    def partial_fit(self, x: Array, y: Array) -> Neighbours:
        self.x.append(x)
        self.y.append(y)
        return self

    def predict(self, x: Array) -> Array:
        y = np.concatenate(self.y)
        model = KNeighborsClassifier(min(self.k, len(y)), algorithm="brute")
        return model.fit(np.concatenate(self.x).astype(np.float32), y).predict(x.astype(np.float32))


def learners(spec: dict[str, Any], data: dict[str, Array], chosen: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Return fresh learners by name; what must be calibrated is, on features that the stream does not label."""
    calibration = data["calibration"]
    limits = (0.0, 1.0) if spec["set"] == "digits" else (0.0, float(np.percentile(calibration, 99.9)))

    def on_chip(**knobs: Any) -> Callable[[], Any]:
        return lambda: OnChipAnchors(limits=limits, **knobs).calibrate(calibration)

    def codes(**knobs: Any) -> Callable[[], Any]:
        return lambda: OnChipCodes(limits=limits, **knobs).calibrate(calibration)

    same = {**chosen, "policy": {"balanced": "turns"}.get(chosen["policy"], chosen["policy"])}
    return {
        "nearest class mean": NearestClassMean,
        "5 nearest neighbours": Neighbours,
        "streaming LDA": StreamingLda,
        "TILDA, 16 parts, 4 anchors": lambda: Tilda(16, 4, dtype="float32"),
        "TILDA, chosen": lambda: Tilda(dtype="float32", **chosen),
        "on chip, 16 parts, 4 anchors": on_chip(parts=16, anchors=4, n_max=257),
        "on chip, chosen": on_chip(n_max=257, **same),
        "on chip, same, 8-bit means, L1": on_chip(n_max=257, fraction=0, metric="l1", **same),
        "on chip, same, stochastic mean": on_chip(form="mean", fraction=6, rounding="stochastic", **same),
        "on chip, 1 anchor": on_chip(parts=chosen["parts"], anchors=1),
        "on chip, 64 codewords, bits": codes(parts=16, words=64),
        "on chip, 64 codewords, counts": codes(parts=16, words=64, cells="counts"),
    }


def choose(spec: dict[str, Any], data: dict[str, Array]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return TILDA's knobs with the best accuracy on a fifth of the groups (tracks) of the training data, and all."""
    rng = np.random.default_rng(spec["seed"] + 1)
    groups = np.unique(data["groups"])
    held = np.isin(data["groups"], rng.permutation(groups)[: len(groups) // 5])
    x, y, queries, truth = data["x"][~held], data["y"][~held], data["x"][held], data["y"][held]
    queries, truth = queries[:2000], truth[:2000]
    tried = []
    for parts in spec["parts"]:
        for anchors in spec["anchors"]:
            for policy in ("balanced", "nearest") if anchors > 1 else ("balanced",):
                knobs = {"parts": parts, "anchors": anchors, "policy": policy}
                right = float((Tilda(**knobs).fit(x, y).predict(queries) == truth).mean())
                tried.append({**knobs, "accuracy": round(right, 4)})
                print(f"  {tried[-1]}", flush=True)
    best = max(tried, key=lambda t: t["accuracy"])
    return {k: best[k] for k in ("parts", "anchors", "policy")}, tried


# ---- streams


def streams(spec: dict[str, Any]) -> dict[str, Any]:
    """Learn the classes one after the other in several orders; judge after some of them, on the classes seen so far."""
    data = data_of(spec)
    chosen, tried = choose(spec, data)
    rows = []
    for name, fresh in learners(spec, data, chosen).items():
        found = [
            one_order(spec, data, fresh, np.random.default_rng([spec["seed"], order]))
            for order in range(spec["orders"])
        ]
        rows.append(summary(name, fresh, found, data))
        print(f"  {rows[-1]}", flush=True)
    return {
        "chosen": chosen, "tried": tried, "rows": rows, "examples": len(data["y"]), "queries": len(data["truth"]),
        "classes": int(data["y"].max()) + 1, "dimension": int(data["x"].shape[1]), "after": judged_after(spec, data),
    }  # fmt: skip


def judged_after(spec: dict[str, Any], data: dict[str, Array]) -> list[int]:
    """Return after how many classes the learners are judged."""
    classes = int(data["y"].max()) + 1
    return [n for n in range(1, classes + 1) if n % spec["every"] == 0 or n == classes]


def one_order(spec: dict[str, Any], data: dict[str, Array], fresh: Callable[[], Any], rng: np.random.Generator) -> Any:
    """Return what happened in one order of the classes."""
    order, steps = rng.permutation(int(data["y"].max()) + 1), judged_after(spec, data)
    shuffled = rng.permutation(len(data["y"]))
    x, y = data["x"][shuffled], data["y"][shuffled]
    model, scores, by_class, kept = fresh(), [], [], {}
    for n, c in enumerate(order, 1):
        model.partial_fit(x[y == c], y[y == c])
        kept[c] = words_of(model, c)
        if n in steps:
            seen = np.isin(data["truth"], order[:n])
            right = model.predict(data["queries"][seen]) == data["truth"][seen]
            scores.append(float(right.mean()))
            by_class.append({int(k): float(right[data["truth"][seen] == k].mean()) for k in order[:n]
                             if (data["truth"][seen] == k).any()})  # fmt: skip
    changed = sum(int((words_of(model, c) != kept[c]).sum()) for c in order if kept[c] is not None)
    lost = [max(s[k] for s in by_class if k in s) - by_class[-1][k] for k in by_class[-1]]
    mixed = fresh().partial_fit(x, y)
    last = float((mixed.predict(data["queries"]) == data["truth"]).mean())
    return {"scores": scores, "changed": changed, "lost": float(np.mean(lost)), "shuffled": last,
            "recalls": list(by_class[-1].values()), "model": model}  # fmt: skip


def words_of(model: Any, c: int) -> Array | None:
    """Return the words that a learner holds about one class; None where it holds every example."""
    if isinstance(model, Tilda):
        return model.anchors_[np.flatnonzero(model.classes_ == c)[0]].reshape(-1).copy()
    if isinstance(model, (OnChipAnchors, OnChipCodes)):
        slot = model.known_.index(c)
        return np.concatenate([model.state_[f.name][slot].reshape(-1).astype(np.int64) for f in model.state_.fields
                               if not f.shared])  # fmt: skip
    if isinstance(model, NearestClassMean):
        return model.sums_[np.flatnonzero(model.classes_ == c)[0]].copy()
    if isinstance(model, StreamingLda):  # what it decides with, all of it: the scatter too
        return np.concatenate([model.means[c], model.scatter.reshape(-1)])
    return None


def state_bytes(model: Any) -> int:
    """Return the bytes of what was learned, floats counted as 4."""
    if isinstance(model, (Tilda, OnChipAnchors, OnChipCodes)):
        return int(model.footprint_.state_bytes)
    if isinstance(model, NearestClassMean):
        return 4 * model.sums_.size + 4 * len(model.counts_)
    if isinstance(model, StreamingLda):
        return 4 * (model.scatter.size + sum(m.size for m in model.means.values()) + len(model.counts))
    return sum(4 * x.size + 4 * y.size for x, y in zip(model.x, model.y, strict=True))


def summary(name: str, fresh: Callable[[], Any], found: list[Any], data: dict[str, Array]) -> dict[str, Any]:
    """Return a row: means and 95 % intervals over the orders, bytes and times of the last learner."""
    model = found[-1]["model"]

    def interval(values: list[float]) -> dict[str, float]:
        i = mean_interval(np.array(values))
        return {"mean": round(float(i.mean), 4), "half": round(float(i.half_width), 4)}

    return {
        "name": name,
        "curve": [round(float(v), 4) for v in np.mean([f["scores"] for f in found], axis=0)],
        "last": interval([f["scores"][-1] for f in found]),
        "average": interval([float(np.mean(f["scores"])) for f in found]),
        "shuffled": interval([f["shuffled"] for f in found]),
        "lost": interval([f["lost"] for f in found]),
        "words_changed": None if isinstance(model, Neighbours) else max(f["changed"] for f in found),
        "lowest_recall": round(float(min(found[-1]["recalls"])), 4),
        "mean_recall": round(float(np.mean(found[-1]["recalls"])), 4),
        "state_bytes": state_bytes(model),
        "constant_bytes": int(getattr(getattr(model, "footprint_", None), "constant_bytes", 0)),
        **times(fresh, model, data),
    }


def times(fresh: Callable[[], Any], model: Any, data: dict[str, Array]) -> dict[str, float]:
    """Return microseconds per example: learning and judging one by one, and in batches; one thread, the fastest of three."""
    x, y = data["x"][:200], data["y"][:200]
    single = (lambda: [model_one.partial_fit(x[i : i + 1], y[i : i + 1]) for i in range(len(y))], len(y))
    model_one = fresh().partial_fit(data["x"][200:400], data["y"][200:400])
    few = 20
    batch = data["queries"][:500]
    learner = fresh()

    def clock(work: Callable[[], Any], n: int, repeats: int = 3) -> float:
        best = min(_seconds(work) for _ in range(repeats))
        return round(1e6 * best / n, 1)

    return {
        "learn_one_us": clock(*single),
        "learn_batch_us": clock(lambda: learner.partial_fit(x, y), len(y)),
        "predict_one_us": clock(lambda: [model.predict(batch[i : i + 1]) for i in range(few)], few),
        "predict_batch_us": clock(lambda: model.predict(batch), len(batch)),
    }


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ---- on the device


def device(spec: dict[str, Any]) -> dict[str, Any]:
    """Run learners on the emulated core: behind a network, and alone on quantised features of a large one."""
    rows = [device_row(*case) for case in (*behind_network(spec), *alone(spec))]
    return {"rows": rows, "target": "cortex-m4"}


def device_row(where: str, name: str, learner: Learner, requests: Requests) -> dict[str, Any]:
    """Return what one learner took and whether every byte agreed."""
    made = rehearse_learner(learner, requests)
    answers, asked = replay(learner, requests).answers, requests.what == CLASSIFY
    last = np.flatnonzero(asked)[-int(asked.sum()) // 5 :]
    modelled = hardware(learner.memory, lanes=16)
    row = {
        "where": where, "name": name, "requests": len(requests), "learned": int((requests.what == LEARN).sum()),
        "classes": learner.memory.classes, "features": learner.memory.features,
        "accuracy": round(float((answers[last] == requests.labels[last]).mean()), 4), "judged": len(last),
        "learn": made.learn_instructions, "classify": made.classify_instructions, "network": made.network_instructions,
        "most": dict(made.most_instructions), "flash_bytes": made.flash_bytes, "ram_bytes": made.ram_bytes,
        "state_bytes": made.state_bytes, "arena_bytes": made.arena_bytes, "stack_bytes": made.stack_bytes,
        "samples": dict(made.parity.samples), "differ": dict(made.parity.mismatches),
        "modelled": {"learn_cycles": modelled.learn_cycles, "classify_cycles": modelled.classify_cycles,
                     "memory_bits": modelled.memory_bits, "block_rams": modelled.block_rams},
    }  # fmt: skip
    print(f"  {row}", flush=True)
    return row


def memories(features: int, classes: int, levels: Array, large: bool) -> dict[str, Memory]:
    """Return learners of one size; levels: (n, features), for codebooks."""
    parts = 16 if large else 8
    book = OnChipCodes(parts=parts, words=32, limits=(0, 255)).calibrate(levels.astype(np.float32)).memory_.codebook
    few = 2 if large else 4
    what = f"{few} anchors"
    return {
        f"exact sums, {what}, in turns": Anchors(features, classes, parts, few, n_max=257),
        f"exact sums, {what}, nearest": Anchors(features, classes, parts, few, policy="nearest", n_max=257),
        f"8-bit means, L1, {what}, nearest": Anchors(
            features, classes, parts, few, fraction=0, policy="nearest", metric="l1", n_max=257),
        f"stochastic means, {what}, nearest": Anchors(
            features, classes, parts, few, fraction=6, policy="nearest", form="mean", rounding="stochastic"),
        "32 codewords, bits": Codes(book, classes, parts),
        "32 codewords, counts": Codes(book, classes, parts, cells="counts"),
    }  # fmt: skip


def behind_network(spec: dict[str, Any]) -> list[tuple[str, str, Learner, Requests]]:
    """Return the learners behind a LeNet that was trained on the digits 0 to 4, int8."""
    import torch
    from torch import nn

    from thrifty.capture import capture
    from thrifty.compress import Quantize
    from thrifty.data import load_task
    from thrifty.deploy.lower import lower
    from thrifty.deploy.run import quantize_input
    from thrifty.deploy.run import run as interpret
    from thrifty.task import Split, Task
    from thrifty.zoo import create

    torch.manual_seed(spec["seed"])
    whole = load_task("digits", seed=spec["seed"])
    five = [Split(s.x[s.y < 5], s.y[s.y < 5]) for s in (whole.train, whole.validation)]
    known = Task(*five, name="digits 0-4", classes=tuple("01234"))
    model = create("lenet", input_shape=(1, 8, 8), classes=5)
    known.fit(model, epochs=25, lr=0.05, batch=32)
    frozen = nn.Sequential(model.features, *model.head[:-1]).eval()
    program = lower(capture(Quantize(bits=8).edit(frozen, known), whole.example), "model")
    rng = np.random.default_rng(spec["seed"])
    what, labels, rows = [], [], []
    learn, test = whole.train, whole.test
    for c in range(10):
        new = rng.permutation(np.flatnonzero(learn.y.numpy() == c))[: spec["each"]]
        old = rng.choice(np.flatnonzero(test.y.numpy() <= c), spec["tests"])
        what += [LEARN] * len(new) + [CLASSIFY] * len(old)
        labels += [c] * len(new) + test.y[old].tolist()
        rows += [learn.x[new], test.x[old]]
    requests = Requests(
        np.array(what, np.uint8), np.array(labels, np.int32), quantize_input(program, torch.cat(rows).numpy())
    )
    features = interpret(program, quantize_input(program, known.train.x.numpy())).reshape(len(known.train.x), -1)
    port = program.buffers[program.output]
    levels = Learner.behind(program, Anchors(port.size, 10)).feed.levels(features)[0]
    return [("LeNet, digits 0-4", name, Learner.behind(program, m), requests)
            for name, m in memories(port.size, 10, levels, large=False).items()]  # fmt: skip


def alone(spec: dict[str, Any]) -> list[tuple[str, str, Learner, Requests]]:
    """Return learners of GTSRB's 43 classes on 1280 features of a large network, quantised to bytes beforehand."""
    x, y, _ = real_features.gtsrb("train")
    queries, truth, _ = real_features.gtsrb("test")
    calibration = real_features.imagenet_samples()[0]
    limits = (0.0, float(np.percentile(calibration, 99.9)))
    quantise = OnChipAnchors(limits=limits).calibrate(calibration).range_.levels
    rng = np.random.default_rng(spec["seed"])
    what, labels, rows = [], [], []
    for c in range(43):
        new = rng.permutation(np.flatnonzero(y == c))[: spec["signs"]]
        old = rng.choice(np.flatnonzero(truth <= c), spec["signs"])
        what += [LEARN] * len(new) + [CLASSIFY] * len(old)
        labels += [c] * len(new) + truth[old].tolist()
        rows += [quantise(x[new])[0], quantise(queries[old])[0]]
    inputs = np.concatenate(rows)[:, None, None, :]
    requests = Requests(np.array(what, np.uint8), np.array(labels, np.int32), inputs)
    return [("alone, GTSRB", name, Learner.alone(m), requests)
            for name, m in memories(1280, 43, quantise(calibration)[0], large=True).items()]  # fmt: skip


PARTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"streams": streams, "device": device}


# ---- tables and pictures


def _share(value: dict[str, float]) -> str:
    return f"{100 * value['mean']:.1f} ± {100 * value['half']:.1f}"


def streams_table(name: str) -> str:
    """Return the learners on one data set."""
    found = result(name)
    rows = [
        [
            r["name"], _share(r["last"]), _share(r["average"]), _share(r["shuffled"]), _share(r["lost"]),
            "–" if r["words_changed"] is None else r["words_changed"], f"{100 * r['lowest_recall']:.0f}",
            kib(r["state_bytes"]),
        ]
        for r in found["rows"]
    ]  # fmt: skip
    head = ("learner", "all classes, %", "mean of increments, %", "shuffled stream, %", "lost by old classes, points",
            "words of old classes changed", "lowest recall, %", "state, KiB")  # fmt: skip
    what = (f"{SETS[found['spec']['set']]}: {found['classes']} classes, {found['examples']} examples to learn, "
            f"{found['queries']} to test, {found['dimension']} features; {found['spec']['orders']} orders of the classes. "
            f"Chosen on training data: {words(found['chosen'])}.")  # fmt: skip
    return f"{what}\n\n{table(head, rows)}"


def words(chosen: dict[str, Any]) -> str:
    """Return TILDA's knobs in words."""
    return f"{chosen['parts']} parts, {chosen['anchors']} anchors, {chosen['policy']}"


def times_table() -> str:
    """Return microseconds per example."""
    rows = [
        [SETS[f["spec"]["set"]], r["name"], *(r[k] for k in ("learn_one_us", "learn_batch_us", "predict_one_us", "predict_batch_us"))]
        for f in load("incremental").values() if f["spec"]["part"] == "streams" for r in f["rows"]
    ]  # fmt: skip
    head = (
        "features",
        "learner",
        "learn one by one, µs",
        "learn 200 at once, µs",
        "judge one by one, µs",
        "judge 500 at once, µs",
    )
    return table(head, rows)


def tried_table() -> str:
    """Return TILDA's accuracy on held-out training data by parts, anchors and policy."""
    parts = []
    for found in load("incremental").values():
        if found["spec"]["part"] != "streams":
            continue
        tried = found["tried"]
        columns = sorted({t["parts"] for t in tried})
        lines = sorted({(t["anchors"], t["policy"]) for t in tried})
        by = {(t["anchors"], t["policy"], t["parts"]): t["accuracy"] for t in tried}
        rows = [[f"k = {a}, {p}", *(f"{100 * by[a, p, c]:.1f}" for c in columns)] for a, p in lines]
        parts.append(f"{SETS[found['spec']['set']]}\n\n{table(('', *(f'P = {c}' for c in columns)), rows)}")
    return "\n\n".join(parts)


def device_table() -> str:
    """Return what learning on the emulated Cortex-M4 takes."""
    rows = [
        [
            f"{r['where']}: {r['name']}", f"{r['classes']} × {r['features']}", count(r["learn"]), count(r["classify"]), count(r["most"]["classify"]),
            count(r["network"]) if r["network"] > 1 else "–", kib(r["flash_bytes"]), kib(r["ram_bytes"]), kib(r["state_bytes"]),
            f"{100 * r['accuracy']:.1f}", r["learned"], sum(r["differ"].values()),
        ]
        for r in result("incremental_device")["rows"]
    ]  # fmt: skip
    head = ("learner", "classes × features", "learn, instructions", "classify, mean", "classify, most", "network", "flash KiB", "RAM KiB", "state KiB",
            "accuracy %, last fifth", "learned", "requests that differ")  # fmt: skip
    return table(head, rows)


def hardware_table() -> str:
    """Return the modelled circuit of each learner."""
    rows = [
        [f"{r['where']}: {r['name']}", *(r["modelled"][k] for k in ("learn_cycles", "classify_cycles", "memory_bits", "block_rams"))]
        for r in result("incremental_device")["rows"]
    ]  # fmt: skip
    return table(("learner, 16 lanes", "cycles to learn", "cycles to classify", "memory bits", "36-kbit RAMs"), rows)


def curves(name: str) -> str:
    """Return accuracy over the classes seen so far, as they come."""
    import io

    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "thrifty"
    from matplotlib import pyplot as plt

    found = result(name)
    figure, axes = plt.subplots(figsize=(7, 3.6), constrained_layout=True)
    styles = ["-", "--", ":", "-."]
    shown = [r for r in found["rows"] if "same" not in r["name"]]
    for i, r in enumerate(shown):
        axes.plot(found["after"], [100 * v for v in r["curve"]], styles[i // 3 % 4], label=r["name"], linewidth=1.4)
    axes.set(xlabel="classes learned", ylabel="accuracy on them, %", title=SETS[found["spec"]["set"]])
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    return text.getvalue()


TABLES: dict[str, Callable[[], str]] = {
    "incremental_gtsrb": lambda: streams_table("incremental_gtsrb"),
    "incremental_cifar10": lambda: streams_table("incremental_cifar10"),
    "incremental_digits": lambda: streams_table("incremental_digits"),
    "incremental_times": times_table,
    "incremental_tried": tried_table,
    "incremental_device": device_table,
    "incremental_hardware": hardware_table,
}
PICTURES: dict[str, Callable[[], str]] = {
    "incremental_gtsrb.svg": lambda: curves("incremental_gtsrb"),
    "incremental_cifar10.svg": lambda: curves("incremental_cifar10"),
}
