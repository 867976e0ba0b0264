"""Draw the pictures of docs/results.md from experiments/results/*.json: `python experiments/pictures.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from tables import NETWORKS, PEERS, load

OUT = Path(__file__).resolve().parent.parent / "docs" / "_static"
STYLE = {"svg.hashsalt": "thrifty", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
OURS, CMSIS, QUALIA = "#1f6feb", "#9aa4b2", "#d0b36b"


def save(figure: Any, name: str) -> None:
    """Write a picture without a date, so that equal results give equal files."""
    OUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT / name, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    print(f"written: {OUT / name}")


def log_axis(axes: Any) -> None:
    """A logarithmic axis with plain numbers on it."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def cost_picture(result: dict[str, Any]) -> None:
    """Instructions per multiply-accumulate, beside the peers."""
    rows = result["networks"][::-1]
    figure, axes = plt.subplots(figsize=(7.2, 4.2))
    for i, row in enumerate(rows):
        cmsis, qualia = PEERS.get(row["name"], (None, None))
        for offset, value, colour in ((0.25, row["instructions"], OURS), (0, cmsis, CMSIS), (-0.25, qualia, QUALIA)):
            if value:
                axes.barh(i + offset, value / row["macs"], 0.23, color=colour)
                axes.text(value / row["macs"] + 0.08, i + offset, f"{value / row['macs']:.2f}", va="center", fontsize=7.5)
    axes.set_yticks(range(len(rows)), [r["name"] for r in rows])
    axes.set_xlabel("instructions per multiply-accumulate, Cortex-M4 (less is better)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (OURS, CMSIS, QUALIA)]
    axes.legend(handles, ["thrifty", "CMSIS-NN", "Qualia-CodeGen"], frameon=False, loc="lower right")
    save(figure, "cost.svg")


def precision_picture(results: dict[str, dict[str, Any]]) -> None:
    """Flash against accuracy of each precision, one panel per network."""
    columns = 3
    figure, panels = plt.subplots(-(-len(results) // columns), columns, figsize=(10, 2.9 * -(-len(results) // columns)))
    for axes in panels.flat[len(results) :]:
        axes.set_visible(False)
    colours = plt.get_cmap("tab10")
    for axes, result in zip(panels.flat, results.values()):
        for k, v in enumerate(result["variants"]):
            axes.plot(v["flash_bytes"] / 1024, 100 * v["test"], "o", color=colours(k), label=v["name"])
        axes.set_title(NETWORKS[result["network"]], fontsize=8.5)
        log_axis(axes)
        axes.set_xlabel("flash, KiB")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, high - 2), high + 0.2)
    panels.flat[0].set_ylabel("test accuracy, %")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    save(figure, "precision.svg")


def optimize_picture(results: dict[str, dict[str, Any]]) -> None:
    """Every measured recipe: flash against validation score; the chosen one in colour."""
    figure, panels = plt.subplots(1, len(results), figsize=(2.9 * len(results), 3), squeeze=False)
    for axes, result in zip(panels.flat, results.values()):
        tried = [t for t in result["tried"] if t["score"] is not None and t.get("flash_bytes")]
        floor = 100 * (tried[0]["score"] - result["spec"]["max_drop"])
        axes.axhline(floor, color="#c0392b", lw=0.8, ls="--")
        axes.plot([t["flash_bytes"] / 1024 for t in tried], [100 * t["score"] for t in tried], "o", color=CMSIS, ms=4)
        chosen = result["chosen"]
        axes.plot(chosen["flash_bytes"] / 1024, 100 * chosen["validation"], "o", color="#d35400", ms=7)
        log_axis(axes)
        axes.set_ylim(max(axes.get_ylim()[0], floor - 8), None)
        axes.set_title(NETWORKS[result["network"]], fontsize=8)
        axes.set_xlabel("flash, KiB")
    panels.flat[0].set_ylabel("validation accuracy, %")
    figure.tight_layout()
    save(figure, "optimize.svg")


def main() -> int:
    """Draw what has results."""
    with plt.rc_context(STYLE):
        costs = load("cost")
        if "cost_cortex_m4" in costs:
            cost_picture(costs["cost_cortex_m4"])
        for kind, draw in (("deploy", precision_picture), ("optimize", optimize_picture)):
            if load(kind):
                draw(load(kind))
    return 0


if __name__ == "__main__":
    sys.exit(main())
