"""Write docs/results.md, the table in README.md and the tables and pictures of every page from experiments/results/*.json.

`python experiments/tables.py` writes; `python experiments/tables.py --check` fails when what is written is not what the
results say (of pictures, whose bytes differ between versions of matplotlib, only that they are there). A page of docs/ (or README.md) holds `<!-- table: NAME -->` ... `<!-- /table -->`; NAME is a key of `TABLES` in
some module of this folder, a function that returns Markdown. A table without its result says "Not measured." `PICTURES` (file name -> function that returns SVG text) go to
docs/pictures/.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
MARK = ("<!-- results: begin, written by experiments/tables.py -->", "<!-- results: end -->")

# Measured by others; ../shared/anchors.md section 0 and 5.1: TFLM + CMSIS-NN (instructions of the official model, or of the
# kernels alone for ResNetv1-6), Qualia-CodeGen int8 (whole generated network, -Ofast), same compiler and counter.
PEERS = {
    "ResNetv1-6, HAR, 16 filters": (1_350_000, 1_210_000),
    "ResNetv1-6, HAR, 80 filters": (15_140_000, 72_900_000),
    "ResNetv1-6, 32x32x3, 32 filters": (40_330_000, 150_700_000),
    "ResNet-8 (MLPerf Tiny image classification)": (29_860_000, None),
    "DS-CNN (MLPerf Tiny keyword spotting)": (7_700_000, None),
    "MobileNetV1 0.25 (MLPerf Tiny visual wake words)": (24_100_000, None),
    "Autoencoder (MLPerf Tiny anomaly detection)": (583_000, None),
}
NETWORKS = {
    "har_resnetv1_6_16": "UCI-HAR (subset), ResNetv1-6, 16 filters",
    "har_resnetv1_6_80": "UCI-HAR (subset), ResNetv1-6, 80 filters",
    "spoken_resnetv1_6_16": "Spoken digits, ResNetv1-6 1-D, 16 filters",
    "spoken_resnetv1_6_32": "Spoken digits, ResNetv1-6 1-D, 32 filters",
    "spoken_ds_cnn": "Spoken digits, DS-CNN",
    "gtsrb_resnetv1_6_16": "GTSRB 32x32, ResNetv1-6 2-D, 16 filters",
    "gtsrb_resnetv1_6_32": "GTSRB 32x32, ResNetv1-6 2-D, 32 filters",
    "cifar10_resnet8": "CIFAR-10, ResNet-8",
}


def load(kind: str) -> dict[str, dict[str, Any]]:
    """Return the results of one kind, by name."""
    found = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(RESULTS.glob("*.json"))}
    return {name: r for name, r in found.items() if r["spec"]["kind"] == kind}


def result(name: str) -> dict[str, Any]:
    """Return one result by the name of its file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table; the first column is left-aligned, the rest right."""
    rule = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, rule, *rows))


def count(value: float | None) -> str:
    """Return a number of things, short: 12.3 M."""
    if value is None:
        return "–"
    if value >= 1e6:
        return f"{value / 1e6:.2f} M"
    return f"{value / 1e3:.0f} k" if value >= 1e4 else f"{value:.0f}"


def kib(value: float | None) -> str:
    """Return bytes as KiB."""
    return "–" if value is None else f"{value / 1024:.1f}"


def percent(value: float) -> str:
    """Return a share as percent."""
    return f"{100 * value:.2f}"


def cost_table(result: dict[str, Any]) -> str:
    """Return the instruction counts beside those of the peers."""
    rows = []
    for row in result["networks"]:
        cmsis, qualia = PEERS.get(row["name"], (None, None))
        factor = f"{cmsis / row['instructions']:.2f}x" if cmsis else "–"
        rows.append([
            row["name"], count(row["macs"]), count(row["instructions"]), f"{row['instructions_per_mac']:.2f}", count(cmsis),
            factor, count(qualia), kib(row["flash_bytes"]), kib(row["ram_bytes"]),
        ])  # fmt: skip
    head = ("int8 network", "MACs", "instructions", "per MAC", "CMSIS-NN", "fewer", "Qualia", "flash KiB", "RAM KiB")
    return table(head, rows)


def deploy_table(result: dict[str, Any]) -> str:
    """Return one network at several precisions."""
    rows = [
        [
            v["name"], percent(v["test"]), kib(v["weight_bytes"]), kib(v["flash_bytes"]), kib(v["ram_bytes"]),
            count(v["instructions"]), f"{v['instructions_per_mac']:.2f}",
        ]
        for v in result["variants"]
    ]  # fmt: skip
    return table(("precision", "test accuracy %", "weights KiB", "flash KiB", "RAM KiB", "instructions", "per MAC"), rows)


def optimize_table(results: dict[str, dict[str, Any]]) -> str:
    """Return what the search found, per data set."""
    rows = []
    for r in results.values():
        f, q, c = r["originals"]["float32"], r["originals"]["int8"], r["chosen"]
        rows.append([
            NETWORKS[r["network"]], percent(f["test"]), percent(c["test"]), kib(f["flash_bytes"]), kib(c["flash_bytes"]),
            f"{r['flash_ratio_to_float']:.1f}x", count(q["instructions"]), count(c["instructions"]), len(r["tried"]),
            f"{sum(t['seconds'] for t in r['tried']) / 60:.1f} min",
        ])  # fmt: skip
    head = ("network", "float test %", "chosen test %", "float flash KiB", "chosen flash KiB", "less flash",
            "int8 instructions", "chosen instructions", "recipes measured", "their time")  # fmt: skip
    return table(head, rows)


def parity_table(result: dict[str, Any]) -> str:
    """Return how many examples each engine ran; the differing ones are in the last column."""
    engines = list(dict.fromkeys(e for n in result["networks"] for e in n["samples"]))
    rows = [
        [n["name"], *(n["samples"].get(e, "–") for e in engines), sum(n["differing"].values())] for n in result["networks"]
    ]
    return table(("network", *engines, "differ"), rows)


def train_table(results: dict[str, dict[str, Any]]) -> str:
    """Return the float training runs."""
    rows = []
    for name, r in results.items():
        scores = r["scores"]
        test = percent(scores["test"]) if r["metric"] == "accuracy" else f"{scores['test']:.4f}"
        rows.append([name, r["parameters"], r["spec"]["fit"]["epochs"], test, f"{r.get('training_seconds', r['seconds']):.0f} s"])
    return table(("experiment", "parameters", "epochs", "float test accuracy %", "training"), rows)


def results_page() -> str:
    """Return docs/results.md."""
    parts = ["# Results", INTRO]
    costs = load("cost")
    if costs:
        parts += ["## What the code costs on a Cortex-M4", COST]
        parts += [cost_table(r) for r in costs.values()]
        parts.append(picture("cost.svg", "Instructions per multiply-accumulate beside CMSIS-NN and Qualia-CodeGen"))
    deployed = load("deploy")
    if deployed:
        parts += ["## Precision", DEPLOY, picture("precision.svg", "Flash against test accuracy, per network and precision")]
        parts += [f"### {NETWORKS[r['network']]}\n\n{deploy_note(r)}\n\n{deploy_table(r)}" for r in deployed.values()]
    found = load("optimize")
    if found:
        parts += ["## Optimize within one point", OPTIMIZE, optimize_table(found)]
        parts.append(picture("optimize.svg", "Every measured recipe: flash against validation accuracy"))
        parts += [f"```toml\n# {NETWORKS[r['network']]}\n{r['recipe'].strip()}\n```" for r in found.values()]
    same = load("parity")
    if same:
        parts += ["## The same bits everywhere", PARITY]
        parts += [parity_table(r) for r in same.values()]
    parts += ["## The networks", TRAIN, train_table(load("train"))]
    return "\n\n".join(parts) + "\n"


def picture(name: str, text: str) -> str:
    """Return an image of docs/_static, which experiments/pictures.py draws."""
    return f"![{text}](_static/{name})"


def deploy_note(result: dict[str, Any]) -> str:
    """Return a sentence about one table."""
    return f"{result['test_examples']} test examples; torch float32 scores {percent(result['torch_test'])} %."


INTRO = """Every number on this page was written by `python experiments/tables.py` from `experiments/results/*.json`, which
`python experiments/run.py experiments/KIND/NAME.toml` made; each result holds its seed, versions and git hash. Instructions are
*measured*: executed instructions of one inference on an emulated core. Flash and RAM are *measured* on the linked image (code,
constants, a minimal start-up; arena, data and stack)."""
COST = """arm-none-eabi-gcc, `-O3`, batch 1. The CMSIS-NN column is TFLM + CMSIS-NN on the official MLPerf Tiny model, or CMSIS-NN's
kernels alone for ResNetv1-6; the Qualia column is the C that Qualia-CodeGen generates with its default flags. Both were measured
with the same compiler and counter; they are quoted, not made by this repository's experiments."""
DEPLOY = """One trained float network, six precisions. Accuracy is that of the *deployed program* on the whole test split, computed by its
C on the host; the report proves that the Cortex-M4 gives the same bytes. The defaults of `Quantize` (ranges, headroom) were chosen
while looking at the HAR and spoken-digit networks and at ResNet-8 on GTSRB, test splits included; CIFAR-10 was not looked at."""
OPTIMIZE = """`thrifty optimize` with `max_drop = 1 %` and nothing else: the least flash. The search sees training and validation data
only; the test split is scored once. The run of UCI-HAR has the default teacher of recovery; the other three are
older than it: they are what `--no-teacher` gives. Time is that of making and measuring the recipes, on one thread of a machine that was busy with other work."""
PARITY = """How many real examples each engine computed, and how many outputs differed from the NumPy program in any byte. Engines: the
hard torch model, the program, C on the host under two compilers, C on emulated cores."""
TRAIN = """Trained by `experiments/train/*.toml` on one CPU thread. They are modest networks for measuring deployment, not records;
schedules are shorter than the literature's. The experiments of the tier `gpu` were not run: no GPU was available."""


def readme_table() -> str:
    """Return the short table of the README."""
    costs = load("cost").get("cost_cortex_m4")
    return "" if costs is None else cost_table(costs)


def collect(attribute: str) -> dict[str, Callable[[], str]]:
    """Return what the experiment modules of this folder offer under a name such as TABLES; a name used twice is an error."""
    sys.path.insert(0, str(HERE))
    found: dict[str, Callable[[], str]] = {}
    for path in sorted(HERE.glob("*.py")):
        if path.stem in ("run", "tables", "pictures") or attribute not in path.read_text(encoding="utf-8"):
            continue
        for name, make in getattr(importlib.import_module(path.stem), attribute, {}).items():
            if name in found:
                raise SystemExit(f"{attribute}: '{name}' is in two modules; the second is {path.name}")
            found[name] = make
    return found


BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def filled(text: str, tables: dict[str, Callable[[], str]], page: str, problems: list[str]) -> str:
    """Return a page with every table block written anew; what cannot be written stays and is a problem."""
    if text.count("<!-- table: ") != len(BLOCK.findall(text)):
        problems.append(f"{page}: a table block is not of the form <!-- table: NAME --> ... <!-- /table -->")

    def block(match: re.Match[str]) -> str:
        if match[2] not in tables:
            problems.append(f"{page}: no table '{match[2]}' in any module of experiments/")
            return match[0]
        try:
            content = tables[match[2]]().strip()
        except FileNotFoundError:  # an experiment that was not run
            content = "Not measured."
        return f"{match[1]}\n{content}\n\n{match[3]}"

    return BLOCK.sub(block, text)


def pages(problems: list[str]) -> dict[Path, str]:
    """Return the whole text of every file that this program writes; what is missing goes to `problems`."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if MARK[0] in text:
        head, _, rest = text.partition(MARK[0])
        text = f"{head}{MARK[0]}\n\n{readme_table()}\n\n{MARK[1]}{rest.partition(MARK[1])[2]}"
    found = {ROOT / "docs" / "results.md": results_page(), readme: text}
    for path in sorted((ROOT / "docs").rglob("*.md")):
        if "_build" not in path.parts:
            found.setdefault(path, path.read_text(encoding="utf-8"))
    tables = collect("TABLES")
    found = {path: filled(text, tables, path.name, problems) for path, text in found.items()}
    pictures = ROOT / "docs" / "pictures"
    for name, draw in collect("PICTURES").items():
        try:
            found[pictures / name] = draw()
        except FileNotFoundError as err:
            if (pictures / name).exists():
                problems.append(f"picture {name} has no result {err.filename}")
    return found


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale: list[str] = []
    problems: list[str] = []
    for path, content in pages(problems).items():
        if not path.exists() or (path.read_text(encoding="utf-8") != content and not (check and path.suffix == ".svg")):
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content, encoding="utf-8")
    print(("stale: " if check else "written: ") + (", ".join(stale) or "nothing"))
    for problem in problems:
        print(f"problem: {problem}")
    return 1 if problems or (check and stale) else 0


if __name__ == "__main__":
    sys.exit(main())
