"""Tables and pictures of the experiments on SmolLM2: docs/inner_loop.md and docs/causal_shift.md."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from tables import result, table

SCAN, OVERHEAD, SHIFT = "inner_loop_scan", "inner_loop_overhead", "causal_shift"
NAMES = {"text": "log p of a token of text, nats", "right": "log p of the right choice, nats", "chosen": "questions answered right, points"}


def interval(values: Sequence[float], digits: int = 3, factor: float = 1.0) -> str:
    """Return mean and interval; bold where the interval is above zero."""
    mean, low, high = (factor * v for v in values)
    words = f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"**{words}**" if low > 0 else words


def shown(row: dict[str, Any], measure: str, against: str) -> str:
    return interval(row[against][measure], *((1, 100.0) if measure == "chosen" else (3, 1.0)))


def span(limits: Sequence[int]) -> str:
    """Return a range by its first and last block."""
    return f"{limits[0]}–{limits[1] - 1}" if limits[1] - limits[0] > 1 else f"{limits[0]}"


def splits_table() -> str:
    """Return what the model itself does on both splits."""
    r = result(SCAN)
    rows = []
    for name, key in (("tuning", "tune"), ("test", "test")):
        s = r[key]
        each = " / ".join(f"{100 * s['by task'][t]['chosen']:.0f}" for t in ("kinds", "arithmetic", "numbers"))
        rows.append([name, s["questions"], f"{100 * s['chosen']:.1f}", each, f"{s['right']:.3f}", s["sequences"], f"{s['text']:.3f}"])
    head = ("split", "questions", "right, %", "kinds / arithmetic / numbers, %", "log p of the right choice", "sequences of text", "log p of a token")
    return table(head, rows)


def tuning_table() -> str:
    """Return what the scan says of each mode: how many ranges help on the tuning split, and the best of them."""
    cells, rows = result(SCAN)["cells"], []
    for mode in result(SCAN)["spec"]["scan_modes"]:
        mine = [c for c in cells if c["mode"] == mode]
        row: list[Any] = [mode, len(mine)]
        for measure in ("text", "right"):
            best = max(mine, key=lambda c: c[measure][0])
            row += [sum(c[measure][1] > 0 for c in mine), f"{span(best['range'])}: {interval(best[measure])}"]
        rows.append(row)
    head = ("mode, two passes", "ranges", "interval above zero: text", "best: text", "interval above zero: questions", "best: questions, log p")
    return table(head, rows)


def ranges_table() -> str:
    """Return the ranges that went to the test split, and why."""
    return table(("blocks", "chosen as"), [[span(c["range"]), c["why"]] for c in result(SCAN)["ranges"]])


def judged_table(measure: str, against: str) -> Callable[[], str]:
    """Return a table of one measure: a row for a range and a mode, a column for each number of passes."""

    def made() -> str:
        r = result(SCAN)
        passes, rows = r["spec"]["passes"], []
        for limits in dict.fromkeys(tuple(row["range"]) for row in r["judged"]):
            for mode in r["spec"]["modes"]:
                if against == "to noise" and mode == "noise":
                    continue
                mine = {row["passes"]: row for row in r["judged"] if tuple(row["range"]) == limits and row["mode"] == mode}
                rows.append([span(limits), mode, *(shown(mine[p], measure, against) for p in passes)])
        return table(("blocks", "mode", *(f"{p} passes" for p in passes)), rows)

    return made


def verdict_table() -> str:
    """Return how many of the judged plans are better than the model itself, and than noise, with the interval above zero."""
    r, rows = result(SCAN), []
    for mode in r["spec"]["modes"]:
        mine = [row for row in r["judged"] if row["mode"] == mode]
        counts = [sum(row[a][m][1] > 0 for row in mine) for m in NAMES for a in ("to base", "to noise")]
        below = [sum(row["to base"][m][2] < 0 for row in mine) for m in NAMES]
        cells = [f"{counts[2 * i]} / {below[i]} / {counts[2 * i + 1] if mode != 'noise' else '–'}" for i in range(3)]
        rows.append([mode, len(mine), *cells])
    return table(("mode", "plans", *(f"{name.split(',')[0]}" for name in NAMES.values())), rows)


def temperature_table() -> str:
    """Return what one temperature does to text, without and with the best loop."""
    t = result(SCAN)["temperature"]
    plan = f"blocks {span(t['plan']['range'])}, {t['plan']['passes']} passes, {t['plan']['mode']}"
    rows = [
        [f"the loop ({plan})", interval(t["loop"])],
        [f"no loop, temperature {t['base at']:g}", interval(t["base"])],
        [f"the loop, temperature {t['loop at']:g}", interval(t["both"])],
        ["the loop beyond temperature: both minus temperature alone", interval(t["loop beyond temperature"])],
    ]
    return table(("text, test split", "difference in log p of a token, nats"), rows)


def cost_table() -> str:
    """Return what the scan cost."""
    r = result(SCAN)
    rows = [["scan", len(r["cells"]), f"{r['scan_seconds'] / 60:.1f}"], ["test", len(r["judged"]), f"{r['test_seconds'] / 60:.1f}"]]
    return table(("stage", "plans", "CPU minutes"), rows)


def overhead_table() -> str:
    """Return the time of each mode beside the physical copy."""
    r, rows = result(OVERHEAD), []
    for mode in r["spec"]["modes"]:
        more = (interval([x - 1 for x in r[part][mode]], 1, 100.0).replace("**", "") for part in ("prefill", "decode"))
        rows.append([mode, *(f"{100 * r['mixing'][part][mode]:.2f}" for part in ("prefill", "decode")), *more])
    head = ("mode", "mixing alone, % of prefill", "% of decoding", "prefill: % more than the copy", "decoding: % more than the copy")
    return table(head, rows)


def transitions_table() -> str:
    """Return the transition by each pair of measures."""
    r = result(SHIFT)
    found = {
        "lens: next token more often than own token": r["transitions"]["match"],
        "– Python library only": r["by text"]["Python library"], "– WordNet only": r["by text"]["WordNet"],
        "cosine to the embeddings": r["transitions"]["cosine"], "cosine, embeddings centred": r["transitions"]["centred"],
        "lens: next token more often than the most frequent one": r["above unigram"],
    }  # fmt: skip
    rows = []
    for name, t in found.items():
        known = t["crossing"] is not None
        rows.append([name, t["depth"] if known else "never", f"{t['crossing']:.2f} ({t['low']:.2f} to {t['high']:.2f})" if known else "–"])
    return table(("measure", "first depth", "crossing (95 % interval over sequences)"), rows)


def depths_table() -> str:
    """Return the curves at a few depths."""
    r, rows = result(SHIFT), []
    names = ("input_match", "output_match", "self_match", "random_match", "cosine_in", "cosine_out", "projection_in", "projection_out", "norm", "entropy")
    for depth in (0, 1, 5, 10, 15, 20, 22, 24, 26, 28, 29, 30):
        values = [r["curves"][n]["mean"][depth] for n in names]
        rows.append([depth, *(f"{100 * v:.1f}" for v in values[:4]), *(f"{v:.3f}" for v in values[4:6]), *(f"{v:.1f}" for v in values[6:9]), f"{values[9]:.2f}"])
    head = ("depth", "own token, %", "next token, %", "final prediction, %", "token of another place, %", "cosine in", "cosine out",
            "projection in", "projection out", "norm", "entropy of the lens, nats")  # fmt: skip
    return table(head, rows)


def counts_table() -> str:
    """Return how many positions count and why others do not."""
    r = result(SHIFT)
    rows = [["counted", r["positions"]], *([why, n] for why, n in r["excluded"].items() if n)]
    rows += [["sequences", r["sequences"]], ["tokens read", r["tokens"]], ["always the most frequent next token, % right", f"{100 * r['unigram']:.1f}"]]
    return table(("positions", "number"), rows)


def ablation_table() -> str:
    """Return the loss that every cut adds."""
    r = result(SHIFT)["ablation"]
    alphas = sorted({c["alpha"] for c in r["cuts"]}, reverse=True)
    rows = []
    for layer in dict.fromkeys(c["layer"] for c in r["cuts"]):
        rows.append([layer, *(interval(next(c for c in r["cuts"] if (c["layer"], c["alpha"]) == (layer, a))["difference"]).replace("**", "") for a in alphas)])
    return f"Loss of the model itself: {r['loss']:.3f} nats a token, {r['sequences']} sequences.\n\n" + table(("block", *(f"alpha {a:g}" for a in alphas)), rows)


def drawn(rows: int, columns: int, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """Return the SVG of a figure, the same bytes each time."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    style = {"svg.hashsalt": "thrifty", "font.size": 9, "svg.fonttype": "path", "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    return out.getvalue()


def scan_picture() -> str:
    """Draw the scan: starts by lengths, a strip for each mode and measure."""
    import numpy as np
    from matplotlib.colors import SymLogNorm

    r = result(SCAN)
    lengths, modes = r["spec"]["lengths"], r["spec"]["scan_modes"]

    def draw(axes: Any) -> None:
        for column, measure in enumerate(("text", "right")):
            values = np.full((len(modes), len(lengths), 30), np.nan)
            for c in r["cells"]:
                start, end = c["range"]
                values[modes.index(c["mode"]), lengths.index(end - start), start] = c[measure][0]
            scale = SymLogNorm(0.01, linscale=0.4, vmin=-1, vmax=1)
            for row, mode in enumerate(modes):
                axis = axes[row][column]
                image = axis.imshow(values[row], cmap="RdBu", norm=scale, aspect="auto", interpolation="nearest")
                axis.set_yticks(range(len(lengths)), lengths)
                axis.set_ylabel(f"{mode}\nblocks in the range" if column == 0 else "")
                if row == 0:
                    axis.set_title(f"difference in {NAMES[measure]}", fontsize=9)
                if row == len(modes) - 1:
                    axis.set_xlabel("first block of the range")
            bar = axes[0][0].figure.colorbar(image, ax=[axes[i][column] for i in range(len(modes))], extend="both", shrink=0.8)
            bar.set_ticks([-1, -0.1, -0.01, 0, 0.01, 0.1, 1], labels=["-1", "-0.1", "-0.01", "0", "0.01", "0.1", "1"])
            bar.minorticks_off()

    return drawn(len(modes), 2, (9, 1.35 * len(modes) + 0.6), draw)


def shift_picture() -> str:
    """Draw the lens matches and the cosines over depth."""
    r = result(SHIFT)
    panels = (
        ("share of positions", {"input_match": "own token", "output_match": "next token", "self_match": "final prediction", "random_match": "token of another place"}),
        ("cosine to the embedding", {"cosine_in": "own token", "cosine_out": "next token", "cosine_predicted": "final prediction"}),
    )

    def draw(axes: Any) -> None:
        for axis, (title, names) in zip(axes[0], panels):
            for number, (name, words) in enumerate(names.items()):
                c = r["curves"][name]
                colour = f"C{3 if name == 'random_match' else number}"
                axis.plot(c["mean"], color=colour, label=words, linewidth=1.4)
                axis.fill_between(range(len(c["mean"])), c["low"], c["high"], color=colour, alpha=0.2, linewidth=0)
            if "match" in next(iter(names)):
                axis.axhline(r["unigram"], color="#888", linestyle=":", linewidth=1, label="most frequent token")
            axis.set_xlabel("depth (0: what enters block 0)")
            axis.set_title(title, fontsize=9)
            axis.legend(frameon=False, fontsize=8)

    return drawn(1, 2, (9, 3.3), draw)


TABLES = {
    "inner_loop_smollm": splits_table,
    "inner_loop_smollm_tuning": tuning_table,
    "inner_loop_smollm_ranges": ranges_table,
    "inner_loop_smollm_verdict": verdict_table,
    "inner_loop_smollm_text": judged_table("text", "to base"),
    "inner_loop_smollm_chosen": judged_table("chosen", "to base"),
    "inner_loop_smollm_noise": judged_table("text", "to noise"),
    "inner_loop_smollm_temperature": temperature_table,
    "inner_loop_smollm_cost": cost_table,
    "inner_loop_smollm_overhead": overhead_table,
    "causal_shift_smollm": transitions_table,
    "causal_shift_smollm_depths": depths_table,
    "causal_shift_smollm_counts": counts_table,
    "causal_shift_smollm_ablation": ablation_table,
}
PICTURES = {"inner_loop_smollm_scan.svg": scan_picture, "causal_shift_smollm.svg": shift_picture}
