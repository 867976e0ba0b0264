"""Tables and the picture of docs/one_class.md, from the results of experiments/one_class.py."""

from __future__ import annotations

from typing import Any

import tables

SHOWN = ("FT", "max-negative", "ANP raw", "ANP", "ANP+FT", "ANP+FT, weight calibrated", "softmax", "EOE", "oracle threshold")
SOURCES = {"smollm2": "SmolLM2-135M", "wordnet": "WordNet siblings", "taxonomy": "nearest classes of the data set", "random": "random names"}
WORLDS = {"emoji": "Emoji", "imagenet": "ImageNet superclasses"}
SPECIFICATION = {  # specs/fewshot.md 3f.5: one world
    "siblings, confusing names": {"FT": 53.5, "max-negative": 71.4, "ANP raw": 51.8, "ANP": 75.8, "ANP+FT": 62.2, "oracle threshold": 79.5},
    "far, confusing names": {"FT": 82.0, "max-negative": 74.0, "ANP raw": 68.1, "ANP": 83.9, "ANP+FT": 86.0, "oracle threshold": 90.7},
}


LEVELS = ("same subcategory", "same category", "other category", "siblings", "2 steps", "3-4 steps", "5 or more")


def in_order(by_level: dict[str, Any]) -> dict[str, Any]:
    """Return levels from near to far."""
    return {level: by_level[level] for level in LEVELS if level in by_level}


def points(pair: list[float]) -> str:
    """Return a mean and its half width in points."""
    return f"{100 * pair[0]:.1f} ± {100 * pair[1]:.1f}"


def gap(pair: list[float]) -> str:
    """Return a difference in points, bold where its interval leaves out zero."""
    text = f"{100 * pair[0]:+.1f} ± {100 * pair[1]:.1f}"
    return f"**{text}**" if abs(pair[0]) > pair[1] else text


def toy_table() -> str:
    """Macro F1 in the toy worlds, beside the specification's."""
    found = tables.result("one_class_toy")["macro_f1"]
    head = ["rule"]
    for column in found:
        head += [column] + (["one world (spec)"] if column in SPECIFICATION else [])
    rows = []
    for method in next(iter(found.values())):
        row = [method]
        for column, values in found.items():
            row += [points(values[method])] + ([f"{SPECIFICATION[column][method]:.1f}"] if column in SPECIFICATION else [])
        rows.append(row)
    return tables.table(head, rows)


def toy_gaps() -> str:
    """Paired differences over the toy worlds."""
    found = tables.result("one_class_toy")
    rows = [[name, *(gap(by[name]) for by in found["differences"].values())] for name in next(iter(found["differences"].values()))]
    note = f"{found['worlds']} worlds; ANP above max-negative on siblings in {100 * found['worlds_with_anp_above_max_negative']:.0f} % of them."
    return tables.table(["difference", *found["differences"]], rows) + f"\n\n{note}"


def answers_table() -> str:
    """What the language model gave."""
    r = tables.result("one_class_answers")
    head = ["labels asked", "names kept on average", "ten names", "fewer than three", "none"]
    return tables.table(head, [[r["labels"], r["mean_names_kept"], r["ten"], r["fewer_than_three"], r["none"]]])


def methods_table(world: str, split: str, source: str = "smollm2") -> str:
    """Macro F1 of every rule by level."""
    r = tables.result(f"one_class_{world}_{split}")
    levels = in_order(r["sources"][source]["levels"])
    rows = [[m, *(points(v["macro_f1"][m]) for v in levels.values())] for m in SHOWN]
    return tables.table(["rule", *(f"{n} ({v['tasks']} tasks)" for n, v in levels.items())], rows)


def ordering_table(world: str, split: str) -> str:
    """Paired differences between rules by level, for every source of negatives."""
    r = tables.result(f"one_class_{world}_{split}")
    rows = []
    for source, title in SOURCES.items():
        found = in_order(r["ordering"][source])
        rows += [[title, name, *(gap(by[name]) for by in found.values())] for name in next(iter(found.values()))]
    return tables.table(["negatives", "difference", *in_order(r["ordering"]["random"])], rows)


def sources_table(world: str, split: str) -> str:
    """Macro F1 of the adaptive rules by source of negatives."""
    r = tables.result(f"one_class_{world}_{split}")
    rows = []
    for source, title in {**SOURCES, "negation": 'negation ("not a X")', "nouns": "500 nouns of WordNet"}.items():
        for method in ("ANP",) if source == "negation" else ("softmax",) if source == "nouns" else ("max-negative", "ANP", "ANP+FT"):
            rows.append([title, method, *(points(v["macro_f1"][method]) for v in in_order(r["sources"][source]["levels"]).values())])
    return tables.table(["negatives", "rule", *in_order(r["sources"]["random"]["levels"])], rows)


def confusing_table() -> str:
    """What names that know the target gain over random ones."""
    rows = []
    for world, title in WORLDS.items():
        r = tables.result(f"one_class_{world}_classes")
        for source, by in r["confusing_minus_random"].items():
            for level, methods in in_order(by).items():
                rows.append([title, SOURCES[source], level, *(gap(methods[m]) for m in ("max-negative", "ANP", "ANP+FT"))])
    return tables.table(["world", "negatives instead of random names", "level", "max-negative", "ANP", "ANP+FT"], rows)


def mixed_table() -> str:
    """Six names of the model and four random ones, as in the toy world: macro F1 and differences."""
    rows = []
    for world, title in WORLDS.items():
        r = tables.result(f"one_class_{world}_mixed")
        levels, gaps = in_order(r["sources"]["mixed"]["levels"]), r["ordering"]["mixed"]
        for level, v in levels.items():
            shown = (points(v["macro_f1"][m]) for m in ("FT", "max-negative", "ANP raw", "ANP", "ANP+FT"))
            rows.append([title, level, *shown, *(gap(gaps[level][d]) for d in ("ANP - FT", "ANP - max-negative", "ANP+FT - ANP"))])
    head = ["world", "level", "FT", "max-negative", "ANP raw", "ANP", "ANP+FT", "ANP - FT", "ANP - max-negative", "ANP+FT - ANP"]
    return tables.table(head, rows)


def auroc_table() -> str:
    """AUROC of x.t, of max-negative and of ANP."""
    rows = []
    for world, title in WORLDS.items():
        for split in ("classes", "branches"):
            levels = in_order(tables.result(f"one_class_{world}_{split}")["sources"]["smollm2"]["levels"])
            for level, v in levels.items():
                shown = (v["auroc"][m] for m in ("FT", "max-negative", "ANP", "ANP+FT"))
                rows.append([title, split, level, v["tasks"], *(points(i) for i in shown)])
    return tables.table(["world", "split by", "level", "tasks", "x.t", "max-negative", "ANP", "ANP+FT"], rows)


def setting_table() -> str:
    """What was asked, in numbers."""
    rows = []
    for world, title in WORLDS.items():
        for split in ("classes", "branches"):
            r = tables.result(f"one_class_{world}_{split}")
            notes: list[dict[str, Any]] = r["calibrations"]
            fitted = sum(n["fit_classes"] for n in notes) / len(notes)
            tuned = sum(n["calibration_tasks"] for n in notes) / len(notes)
            weights = [n["smollm2"]["weight"] for n in notes]
            rows.append([
                title, split, r["classes"], r["all_pictures"], f"{fitted:.0f}", f"{tuned:.0f}", r["targets"], r["groups"],
                f"{min(weights)}–{max(weights)}", sum(r["skipped"].values()), r["tested_targets_without_enough_names"],
            ])  # fmt: skip
    head = ["world", "split by", "classes", "pictures", "classes of the map", "calibration tasks", "targets", "groups",
            "calibrated weight", "pairs skipped", "targets without three names"]  # fmt: skip
    return tables.table(head, rows)


def levels_picture() -> str:
    """Draw macro F1 by level: four rules, both worlds."""
    import io

    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.hashsalt": "thrifty", "font.size": 9, "svg.fonttype": "path"}):
        figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
        for axis, (world, title) in zip(axes, WORLDS.items()):
            levels = in_order(tables.result(f"one_class_{world}_classes")["sources"]["smollm2"]["levels"])
            for i, method in enumerate(("FT", "max-negative", "ANP", "ANP+FT", "oracle threshold")):
                pairs = [v["macro_f1"][method] for v in levels.values()]
                places = [p + 0.05 * (i - 2) for p in range(len(pairs))]
                style = {"color": "0.6", "ls": ":"} if method.startswith("oracle") else {"color": f"C{i}"}
                axis.errorbar(places, [100 * p[0] for p in pairs], [100 * p[1] for p in pairs], label=method, marker="o", ms=3, **style)
            axis.set(title=title, xticks=range(len(levels)))
            axis.set_xticklabels(list(levels), rotation=15)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("macro F1, %")
        axes[1].legend(frameon=False, fontsize=8, loc="upper left")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    return out.getvalue()


TABLES = {
    "one_class_toy": toy_table,
    "one_class_toy_gaps": toy_gaps,
    "one_class_answers": answers_table,
    "one_class_setting": setting_table,
    "one_class_emoji": lambda: methods_table("emoji", "classes"),
    "one_class_imagenet": lambda: methods_table("imagenet", "classes"),
    "one_class_emoji_branches": lambda: methods_table("emoji", "branches"),
    "one_class_imagenet_branches": lambda: methods_table("imagenet", "branches"),
    "one_class_emoji_ordering": lambda: ordering_table("emoji", "classes"),
    "one_class_imagenet_ordering": lambda: ordering_table("imagenet", "classes"),
    "one_class_emoji_sources": lambda: sources_table("emoji", "classes"),
    "one_class_imagenet_sources": lambda: sources_table("imagenet", "classes"),
    "one_class_confusing": confusing_table,
    "one_class_auroc": auroc_table,
    "one_class_mixed": mixed_table,
}
PICTURES = (
    {"one_class_levels.svg": levels_picture}
    if all((tables.RESULTS / f"one_class_{w}_classes.json").exists() for w in WORLDS)
    else {}
)
