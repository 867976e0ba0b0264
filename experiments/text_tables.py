"""Tables and a picture of docs/text_statistics.md, from the results of text_statistics.py."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from emoji_worlds import STYLES
from tables import percent, result, table

SHUFFLED = ("texts shuffled, closed", "base texts shuffled, closed")
BRIEF = ("mean, closed", "mean, per dimension", "mean, chosen", "both, chosen", *SHUFFLED)
SPLITS = {"text_emoji": "at random", "text_emoji_grouped": "by subcategory"}


def rows_of(name: str, episodes: str, shots: bool = True) -> list[dict[str, Any]]:
    """Return the rows of one kind of episode, with or without shots."""
    return [r for r in result(name)["rows"] if r["episodes"] == episodes and bool(r["shots"]) == shots]


def accuracy(row: dict[str, Any], name: str) -> str:
    """Return percent ± half width."""
    found = row["methods"][name]
    return f"{percent(found['mean'])} ± {percent(found['half_width'])}"


def gain(found: dict[str, Any]) -> str:
    """Return points ± half width, with a sign."""
    return f"{found['mean']:+.1f} ± {found['half_width']:.1f}"


def gain_table(names: Sequence[str], episodes: str, titles: Sequence[str] = ()) -> str:
    """Return nearest class mean and the gains of methods, on both kinds of splits."""
    rows = [
        [f"{title}, {r['ways']} ways", r["shots"], accuracy(r, "ncm"), *(gain(r["methods"][n]["gain_points"]) for n in names)]
        for title_of, title in SPLITS.items() for r in rows_of(title_of, episodes)
    ]  # fmt: skip
    return table(("split", "shots", "NCM %", *(titles or names)), rows)


def splits_table() -> str:
    """Return the gain of the closed form on each split of the classes by itself."""
    rows = [
        [f"{title}, {r['ways']} ways", r["shots"], *(f"{v:+.1f}" for v in r["methods"]["mean, closed"]["gain_of_each_split"])]
        for name, title in SPLITS.items() for r in rows_of(name, "in-domain")
    ]  # fmt: skip
    return table(("split", "shots", *(f"{i + 1}" for i in range(len(rows[0]) - 2))), rows)


def style_table() -> str:
    """Return the gain of the closed form for each style that the predictor had not seen."""
    rows = [
        [f"{title}, {r['episodes']}", r["shots"], *(gain(r["methods"]["mean, closed"]["gain_by_style"][s]) for s in STYLES)]
        for name, title in SPLITS.items()
        for kind in ("to an unseen style", "one style to an unseen one") for r in rows_of(name, kind)
    ]  # fmt: skip
    return table(("split, episodes (20 ways)", "shots", *STYLES), rows)


def zero_table() -> str:
    """Return accuracies without shots."""
    kinds = ("in-domain", "to an unseen style")
    names = ("mean, closed", "texts shuffled, closed", "axes: mean, closed", "axes: both")
    rows = []
    for name, title in SPLITS.items():
        for r in (r for kind in kinds for r in rows_of(name, kind, shots=False)):
            shown = [accuracy(r, n) if n in r["methods"] else "–" for n in names]
            rows.append([f"{title}, {r['episodes']}", r["ways"], *shown])
        every = [n["zero_shot_of_all"] for n in result(name)["notes"]]
        share = f"{percent(float(np.mean([e['accuracy'] for e in every])))}"
        sizes = sorted({e["classes"] for e in every})
        rows.append([f"{title}, all test classes", "–".join(map(str, dict.fromkeys((sizes[0], sizes[-1])))), share, "–", "–", "–"])
    return table(("split, episodes", "ways", "text mean %", "its texts shuffled %", "128 axes: text mean %", "and spread %"), rows)


def weights_table() -> str:
    """Return the weight of the text mean: in closed form, chosen on validation classes, with true and shuffled texts."""
    rows = []
    for name, title in SPLITS.items():
        for r in rows_of(name, "in-domain"):
            closed = np.mean([n["wide"]["alpha_closed"][str(r["shots"])] for n in result(name)["notes"]])
            found = r["chosen_with_shuffled_texts"]
            rows.append([f"{title}, {r['ways']} ways", r["shots"], f"{closed:.2f}", f"{found['true texts']:.2f}", f"{found['shuffled texts']:.2f}"])
    return table(("split", "shots", "closed form", "chosen", "chosen, texts shuffled"), rows)


def area_table() -> str:
    """Return open-set areas at the larger number of ways."""
    rows = [
        [title, r["shots"], *(f"{r['area'][n]:.3f}" if n in r["area"] else "–" for n in ("ncm", "mean", "axes: mean", "axes: both"))]
        for name, title in SPLITS.items()
        for r in (*rows_of(name, "in-domain", shots=False), *rows_of(name, "in-domain")) if r["ways"] == max(result(name)["spec"]["ways"])
    ]  # fmt: skip
    return table(("split", "shots", "shots only", "text mean", "128 axes: text mean", "128 axes: mean and own spread"), rows)


def predictor_table() -> str:
    """Return held-out errors of the predictors over that of a constant guess."""
    rows = []
    for name in (*SPLITS, "text_subcategory"):
        made = result(name)
        sizes = made["classes"][0]
        for kind in ("wide", "narrow", "few axes", "perceptron", "full", "wide, base texts shuffled"):
            each = [n[kind] for n in made["notes"] if kind in n]
            if each:
                epochs = sorted(line.split(": ")[2].split(" ")[0] for n in each for line in n["log"] if line.startswith("mean: epoch"))
                rows.append([
                    SPLITS.get(name, "subcategories as classes"), sizes[0], KINDS_OF_STATISTICS[kind],
                    f"{np.mean([n['mean_ratio'] for n in each]):.2f}", f"{np.mean([n['spread_ratio'] for n in each]):.2f}",
                    f"{np.mean([n['beta_closed'] for n in each]):.2f}", ", ".join(epochs) or "–",
                ])  # fmt: skip
    return table(("split", "base classes", "predictor", "mean: error ratio", "spread: error ratio", "closed beta", "best epochs"), rows)


KINDS_OF_STATISTICS = {
    "wide": "ridge, 1,280 features", "narrow": "ridge, 128 axes", "few axes": "ridge, 32 axes", "perceptron": "perceptron, 128 axes",
    "full": "ridge, 128 axes, covariances", "wide, base texts shuffled": "ridge, 1,280 features, texts shuffled",
}  # fmt: skip


def subcategory_table() -> str:
    """Return the same with subcategories as classes."""
    names = (*BRIEF, "32 axes: both")
    rows = []
    for r in result("text_subcategory")["rows"]:
        if r["shots"]:
            shown = [gain(r["methods"][n]["gain_points"]) for n in names]
            rows.append([r["episodes"], r["shots"], accuracy(r, "ncm"), *shown])
        else:
            rows.append([r["episodes"], 0, f"(text alone) {accuracy(r, 'mean, closed')}", *["–"] * len(names)])
    return table(("queries", "shots", "NCM %", *names), rows)


def gain_picture() -> str:
    """Return the gain of the closed form over shots, in-domain, most ways."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "text-statistics", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(7, 3.6))
        axes.axhline(0.0, color="0.6", linewidth=0.8)
        for (name, title), colour in zip(SPLITS.items(), ("C0", "C1"), strict=True):
            found = [r for r in rows_of(name, "in-domain") if r["ways"] == max(result(name)["spec"]["ways"])]
            for method, label, style in (("mean, closed", "text", "o-"), ("texts shuffled, closed", "shuffled text", "s--")):
                each = [r["methods"][method]["gain_points"] for r in found]
                axes.errorbar(
                    [r["shots"] for r in found], [e["mean"] for e in each], [e["half_width"] for e in each],
                    fmt=style, color=colour, capsize=3, markersize=4, label=f"{label}, classes split {title}",
                )  # fmt: skip
        axes.set(xlabel="shots", ylabel="points over nearest class mean", title="20 emoji, text helps with the mean", xticks=(1, 2, 4))
        axes.legend(frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return text.getvalue()


TABLES = {
    "text-emoji": lambda: gain_table(
        ("mean, closed", "mean, per dimension", "mean, chosen", "both, chosen", "spread alone", *SHUFFLED), "in-domain"
    ),
    "text-emoji-axes": lambda: gain_table(
        ("axes: ncm", "axes: mean, closed", "axes: spread alone", "axes: spread without text", "axes: both", "axes: both, chosen"),
        "in-domain", ("NCM there", "mean", "spread", "spread without text", "mean and spread", "both, chosen"),
    ),
    "text-emoji-full": lambda: gain_table(
        ("full: spread alone", "full: spread without text", "full: both", "full: mean, spread without text", "perceptron: mean, closed"),
        "in-domain", ("covariance", "covariance without text", "mean and covariance", "mean, covariance without text", "perceptron: mean"),
    ),
    "text-emoji-across": lambda: gain_table(BRIEF, "to an unseen style"),
    "text-emoji-one-style": lambda: gain_table(BRIEF, "one style to an unseen one"),
    "text-emoji-splits": splits_table,
    "text-emoji-styles": style_table,
    "text-emoji-zero": zero_table,
    "text-weights": weights_table,
    "text-open-set": area_table,
    "text-predictors": predictor_table,
    "text-subcategory": subcategory_table,
}  # fmt: skip
PICTURES = {"text_statistics.svg": gain_picture}
