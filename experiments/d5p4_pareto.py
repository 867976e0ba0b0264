"""Quality against diversity on a trained masked-diffusion model: every selector from the same noise, at equal forward passes.

A pool is a prompt (or none) and a seed; a method turns it into k texts. Quality: negative log-likelihood of the new tokens under a
causal model of the same text, and under the denoiser as they were decided; entropy of the tokens within a text guards against
repetition. Diversity: embeddings of all-MiniLM-L6-v2, which selects nothing, and n-grams. Decoded pools are kept in
runs/d5p4_pareto, one file a method, so that a run that was interrupted goes on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from tables import ROOT, result, table
from torch import Tensor

from thrifty.llm import d5p4
from thrifty.llm.d5p4 import metrics

PAD, END, MASK = 0, 1, 2
RANDOM = {"width": 128, "hidden": 344, "blocks": 2, "heads": 4, "context": 128}
METRICS = {
    "nll": "NLL, causal LM", "own": "NLL, own", "entropy": "token entropy", "apart": "1 − cosine", "vendi": "Vendi",
    "distinct": "distinct-2", "self_bleu": "self-BLEU",
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A point of the picture: a family, its knob, and how the loop is run."""

    family: str
    knob: str
    selector: d5p4.Select | None
    temperature: float = 1.0
    best: str = ""  # of a finished independent run: "all" or "group"

    @property
    def name(self) -> str:
        return f"{self.family} {self.knob}".strip()

    @property
    def cell(self) -> str:
        """The decoded pools that it reads: best of N reads those of independent sampling."""
        return self.plain if self.best else self.name

    @property
    def plain(self) -> str:
        """Independent sampling at the same temperature."""
        return Method("independent", "" if self.temperature == 1 else f"at temperature {self.temperature:g}", None).name


def methods(spec: dict[str, Any]) -> list[Method]:
    """Return all points, independent sampling first."""
    found = [Method("independent", "", None), Method("best of N", "", None, best="all")]
    found += [Method("best of each group", "", None, best="group")]
    found += [Method("independent", f"at temperature {t:g}", None, t) for t in spec["temperatures"]]
    found += [Method("greedy beam", "", d5p4.Select("greedy_beam"))]
    found += [Method("D5P4+", knob(b), d5p4.Select(beta=b)) for b in spec["betas"]]
    found += [Method("D5P4×", f"β = {b:g}", d5p4.Select(form="multiplicative", beta=b)) for b in spec["multiplicative"]]
    found += [Method("diverse beam", f"α = {a:g}", d5p4.Select("diverse_beam", alpha=a)) for a in spec["alphas"]]
    beta, middle = spec["masked_entropy"], spec["multiplicative"][len(spec["multiplicative"]) // 2]
    found += [Method("masked entropy", "greedy beam", d5p4.Select("greedy_beam", quality="masked_entropy"))]
    found += [Method("masked entropy", f"D5P4+ β = {beta:g}", d5p4.Select(beta=beta, quality="masked_entropy"))]
    cool, name = spec["temperatures"][0], f"at temperature {spec['temperatures'][0]:g}"
    found += [Method(name, "best of N", None, cool, "all"), Method(name, f"D5P4+ β = {beta:g}", d5p4.Select(beta=beta), cool)]
    surest = d5p4.Select("greedy_beam", quality="masked_entropy")
    found += [Method(name, "masked entropy greedy beam", surest, cool)]
    both = d5p4.Select(beta=beta, quality="masked_entropy")
    found += [Method(name, f"masked entropy D5P4+ β = {beta:g}", both, cool)]
    return [*found, Method("k-DPP", f"× β = {middle:g}", d5p4.Select("k_dpp", form="multiplicative", beta=middle))]


def knob(beta: float) -> str:
    return "similarity alone" if beta < 0 else f"β = {beta:g}"


@dataclass(frozen=True)
class Models:
    """What decodes: the denoiser, its tokenizer, and the token of a line break."""

    denoiser: d5p4.Denoiser
    tokenizer: Any
    line: int


def models(spec: dict[str, Any]) -> Models:
    """Return the denoiser; `random = true` in the specification tries the experiment on untrained models."""
    import transformers

    if spec.get("random"):
        import small_lm

        torch.manual_seed(0)
        masked, tokenizer = small_lm.masked_model(RANDOM), small_lm.tokenizer()
    else:
        masked = transformers.AutoModelForMaskedLM.from_pretrained(ROOT / spec["masked"])
        tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / spec["masked"])
    masked = masked.eval().to(getattr(torch, spec["dtype"]))
    masked.set_attn_implementation("eager")  # quicker than "sdpa" at this size
    denoiser = d5p4.masked_lm(masked, MASK, never=(PAD, END))
    return Models(denoiser, tokenizer, tokenizer.backend_tokenizer.encode("\n").ids[0])


def scorer(spec: dict[str, Any]) -> Any:
    """Return the causal model."""
    import transformers

    if spec.get("random"):
        import small_lm

        return small_lm.causal_model(RANDOM).eval()
    return transformers.AutoModelForCausalLM.from_pretrained(ROOT / spec["causal"]).eval()


def prompts(mode: dict[str, Any], found: Models) -> tuple[list[Tensor], list[Tensor]]:
    """Return start states (t,) and, where there is a prompt, the held-out tokens (t,) that stood there."""
    if not mode["prompt"]:
        return [torch.full((mode["new"],), MASK)] * mode["prompts"], []
    import small_text

    size = mode["prompt"] + mode["new"]
    texts = [e.ids for e in found.tokenizer.backend_tokenizer.encode_batch(list(small_text.splits().test))]
    whole = [torch.tensor([found.line, *ids[: size - 1]]) for ids in texts if len(ids) >= size]
    chosen = whole[:: len(whole) // mode["prompts"]][: mode["prompts"]]
    starts = [torch.cat([ids[: mode["prompt"]], torch.full((mode["new"],), MASK)]) for ids in chosen]
    return starts, chosen


def decoded(spec: dict[str, Any], name: str, method: Method, found: Models, folder: Path) -> list[dict[str, Any]]:
    """Return the pools of a method, decoded or read: all k w sequences and their scores."""
    method = next(m for m in methods(spec) if m.name == method.cell)
    mode, file = spec["modes"][name], folder / f"{name}_{method.name.replace(' ', '_').replace('=', '')}.json"
    wanted = json.dumps([spec["masked"], spec["dtype"], spec["k"], spec["w"], mode, spec["seeds"], repr(method)])
    if file.exists() and (kept := json.loads(file.read_text(encoding="utf-8")))["wanted"] == wanted:
        pools: list[dict[str, Any]] = kept["pools"]
        return pools
    pools = []
    for number, start in enumerate(prompts(mode, found)[0]):
        for seed in spec["seeds"]:
            noise = torch.Generator().manual_seed(1000 * seed + number)
            samples = d5p4.sample(
                found.denoiser, spec["k"], spec["w"], mode["steps"], method.selector, start=start, generator=noise,
                process=d5p4.Mdlm(method.temperature),
            )  # fmt: skip
            pools.append({"ids": samples.ids.tolist(), "scores": samples.scores.tolist(), "passes": samples.passes})
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"wanted": wanted, "pools": pools}), encoding="utf-8")
    os.replace(partial, file)
    print(f"{name}: decoded {method.name}, {time.process_time():.0f} s of CPU so far", flush=True)
    return pools


def chosen(pool: dict[str, Any], method: Method, k: int) -> tuple[Tensor, Tensor]:
    """Return the k texts (k, t) of a method and their scores (k,)."""
    ids, scores = torch.tensor(pool["ids"]), torch.tensor(pool["scores"], dtype=torch.float64)
    if method.best:
        picked = list(d5p4.greedy_beam(scores, k, method.best == "group").indices)
    else:
        picked = list(range(0, len(ids), len(ids) // k))
    return ids[picked], scores[picked]


def external(causal: Any, ids: Tensor, prompt: int, line: int) -> Tensor:
    """Return the mean negative log-likelihood (b,) of the new tokens of ids (b, t) under the causal model, nats."""
    ids = ids.masked_fill(ids == line, END)  # what stands between paragraphs in its training text
    whole = ids if prompt else torch.cat([torch.full((len(ids), 1), END), ids], 1)
    with torch.inference_mode():
        log_p = torch.log_softmax(causal(input_ids=whole, use_cache=False).logits[:, :-1].float(), -1)
    losses = -log_p.gather(2, whole[:, 1:, None])[..., 0].clamp_min(-metrics.NLL_CAP)
    return losses[:, max(0, prompt - 1) :].double().mean(1)


Scorers = tuple[Any, Any]  # causal model, sentence encoder


def measured(
    mode: dict[str, Any], method: Method, pools: list[dict[str, Any]], k: int, found: Models, scorers: Scorers
) -> dict[str, list[float]]:
    """Return every metric, a number a pool."""
    causal, encoder = scorers
    texts = [chosen(pool, method, k) for pool in pools]
    every = torch.cat([ids for ids, _ in texts])
    new = every[:, mode["prompt"] :]
    nll = torch.cat([external(causal, part, mode["prompt"], found.line) for part in every.split(64)])
    words = [t.strip() or "." for t in found.tokenizer.batch_decode(new)]
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = torch.cat([torch.from_numpy(encoder(words[i : i + 32])) for i in range(0, len(words), 32)])
    rows: dict[str, list[float]] = {m: [] for m in METRICS}
    for number, (_, scores) in enumerate(texts):
        part = slice(number * k, (number + 1) * k)
        tokens = new[part].tolist()
        rows["nll"].append(float(nll[part].mean()))
        rows["own"].append(float(-scores.mean()))
        rows["entropy"].append(sum(map(metrics.token_entropy, tokens)) / k)
        rows["apart"].append(1 - metrics.mean_cosine(embeddings[part]))
        rows["vendi"].append(metrics.vendi(d5p4.gram(embeddings[part])))
        rows["distinct"].append(metrics.distinct(tokens, 2))
        rows["self_bleu"].append(metrics.self_bleu(tokens))
    return rows


def interval(values: Tensor, times: int) -> list[float]:
    """Return the mean of (n,) and its 95 % bootstrap interval over pools."""
    draws = torch.randint(len(values), (times, len(values)), generator=torch.Generator().manual_seed(0))
    means = values[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype))
    return [round(float(v), 5) for v in (values.mean(), *means)]


def one_mode(spec: dict[str, Any], name: str, found: Models, scorers: Scorers, folder: Path) -> dict[str, Any]:
    """Return the points of a mode, the held-out text beside them, and a few texts."""
    mode, k = spec["modes"][name], spec["k"]
    rows, samples, plain = [], {}, {}  # of plain: every independent run
    for method in methods(spec):
        pools = decoded(spec, name, method, found, folder)
        values = {m: torch.tensor(v, dtype=torch.float64) for m, v in measured(mode, method, pools, k, found, scorers).items()}
        if method.family == "independent":
            plain[method.name] = values
        first = next(iter(plain.values()))
        same = first if method.family == "independent" else plain[method.plain]
        row: dict[str, Any] = {"family": method.family, "knob": method.knob, "passes": pools[0]["passes"], "pools": len(pools)}
        row |= {m: interval(v, spec["bootstrap"]) for m, v in values.items()}
        for name_of, base in (("more", first), ("same", same)):
            row |= {f"{m}_{name_of}": interval(values[m] - base[m], spec["bootstrap"]) for m in ("nll", "apart")}
        rows.append(row)
        samples[method.name] = found.tokenizer.batch_decode(chosen(pools[0], method, k)[0])[:2]
        print(f"{name}: {method.name} NLL {row['nll'][0]:.3f} apart {row['apart'][0]:.3f}", flush=True)
    real = prompts(mode, found)[1]
    held: dict[str, float] = {}
    if real:
        whole = torch.stack(real)
        new = whole[:, mode["prompt"] :].tolist()
        held = {"nll": float(external(scorers[0], whole, mode["prompt"], found.line).mean())}
        held["entropy"] = sum(map(metrics.token_entropy, new)) / len(new)
    return {"points": rows, "held_out": held, "texts": {m: samples[m] for m in list(samples)[:8]}}


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Decode and measure every point of every mode."""
    from thrifty.fewshot.features import sentence_encoder

    found, folder = models(spec), ROOT / "runs" / "d5p4_pareto" / name
    for mode in spec["modes"]:
        for method in methods(spec):
            decoded(spec, mode, method, found, folder)
    scorers = scorer(spec), sentence_encoder()
    return {"modes": {mode: one_mode(spec, mode, found, scorers, folder) for mode in spec["modes"]}}


def front(points: Sequence[dict[str, Any]]) -> list[bool]:
    """Return which points no other beats in both the NLL of the causal model and 1 - cosine, by their means."""
    own = [d5p4.Point(None, {"nll": p["nll"][0], "alike": -p["apart"][0]}, (), 0) for p in points]
    return [p.pareto for p in d5p4.pareto(own, ("nll", "alike"))]


def pareto_table() -> str:
    """Return every point of both modes."""
    found = result("d5p4_pareto")
    spec, parts = found["spec"], []
    for name, mode in found["modes"].items():
        asked, points = spec["modes"][name], mode["points"]
        lines = []
        for point, best in zip(points, front(points), strict=True):
            cells = [f"{point[m][0]:.3f}" if m != "self_bleu" else f"{point[m][0]:.1f}" for m in METRICS]
            more = [f"{point[m][0]:+.3f} [{point[m][1]:+.3f}, {point[m][2]:+.3f}]" for m in ("nll_same", "apart_same")]
            same = point["family"] == "independent" and not point["knob"]
            label = f"{point['family']} {point['knob']}".strip()
            lines.append([f"**{label}**" if best else label, *cells, *(["–", "–"] if same else more)])
        if mode["held_out"]:
            blank = [f"{mode['held_out'][m]:.3f}" if m in mode["held_out"] else "–" for m in METRICS]
            lines.append(["held-out text itself", *blank, "–", "–"])
        start = f"{asked['prompt']} tokens of a held-out paragraph given, " if asked["prompt"] else ""
        note = (
            f"**{name.capitalize()}**: {start}{asked['new']} new tokens, {asked['steps']} steps and the clean-up, k = {spec['k']}, w = {spec['w']}: "
            f"{points[0]['passes']} forward passes a pool for every method; {points[0]['pools']} pools a point ({asked['prompts']} × {len(spec['seeds'])} seeds)."
        )
        header = [f"{spec['k']} texts", *METRICS.values(), "NLL less plain", "1 − cosine less plain"]
        parts.append(f"{note}\n\n{table(header, lines)}")
    return "\n\n".join(parts) + (
        "\n\nNLL in nats a token, of new tokens. Bold: nothing has both a lower NLL (causal LM) and a higher 1 − cosine, by means. In "
        "brackets the 95 % bootstrap interval over pools of the paired difference to plain independent sampling at the same temperature "
        "(of independent sampling: at temperature 1), from the same prompt and noise."
    )


FAMILIES = {
    "independent": ("#000000", "o"), "best of N": ("#7f7f7f", "s"), "best of each group": ("#b0b0b0", "s"),
    "greedy beam": ("#d62728", "D"), "D5P4+": ("#1f77b4", "o"), "D5P4×": ("#17becf", "^"), "diverse beam": ("#ff7f0e", "v"),
    "masked entropy": ("#8c564b", "*"), "at temperature 0.6": ("#2ca02c", "X"),
}  # fmt: skip
OUTSIDE = "k-DPP"  # so much less diverse that the picture would show nothing else


def picture() -> str:
    """Return NLL against 1 - cosine, each as a difference to independent sampling, a panel a mode."""
    found = result("d5p4_pareto")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"svg.hashsalt": "d5p4-pareto", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(1, len(found["modes"]), figsize=(10.5, 5.6), squeeze=False, constrained_layout=True)
        for axis, (name, mode) in zip(axes[0], found["modes"].items(), strict=True):
            points, best = mode["points"], front(mode["points"])
            axis.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
            axis.axvline(0, color="#cccccc", linewidth=0.8, zorder=0)
            for family, (colour, shape) in FAMILIES.items():
                own = sorted((p for p in points if p["family"] == family), key=lambda p: p["nll_more"][0])
                if not own:
                    continue
                x, y = ([p[m][0] for p in own] for m in ("apart_more", "nll_more"))
                spread = [[[p[m][0] - p[m][1] for p in own], [p[m][2] - p[m][0] for p in own]] for m in ("apart_more", "nll_more")]
                drawn = {"color": colour, "marker": shape, "markersize": 5, "linewidth": 0.9, "elinewidth": 0.4, "label": family}
                axis.errorbar(x, y, xerr=spread[0], yerr=spread[1], **drawn)
                for p, at in zip(own, zip(x, y, strict=True), strict=True):
                    words = p["knob"].replace("at temperature ", "T = ")
                    axis.annotate(words, at, (4, 4), textcoords="offset points", fontsize=6.5, color=colour)
            kept = sorted((p["apart_more"][0], p["nll_more"][0]) for p, b in zip(points, best, strict=True) if b)
            axis.plot(*zip(*kept, strict=True), color="#e377c2", linewidth=4, alpha=0.2, zorder=0, label="Pareto set")
            out = next(p for p in points if p["family"] == OUTSIDE)
            axis.set_title(f"{name} ({OUTSIDE}, without a partition, is at {out['apart_more'][0]:.2f}, {out['nll_more'][0]:.2f})", fontsize=8.5)
            axis.set_xlabel("1 − mean cosine (MiniLM), less that of independent sampling")
            axis.set_ylabel("NLL a token (causal LM), less that of independent sampling")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=7)
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return text.getvalue()


TABLES: dict[str, Callable[[], str]] = {"d5p4_pareto": pareto_table}
PICTURES: dict[str, Callable[[], str]] = {"d5p4_pareto.svg": picture}
