"""The causal shift on small models: lens curves of the trained one, and training from scratch with attenuation.

Cells (variant, seed) that are done are kept in runs/causal_shift/NAME.json. A gate frozen at 1 is the baseline itself, which
the run checks; the other control multiplies what a block gives by a constant, residual path and increment alike.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import small_lm
import torch
from inner_loop import batches_of, interval, measured, rows_of
from run import write_json
from tables import ROOT, result, table
from torch import Tensor, nn

from thrifty.llm.causal_shift import Attenuated, BlockGate, attenuate, curves, train
from thrifty.llm.families import first_tensor, parts_of, with_first
from thrifty.llm.loading import load_model

CURVES, ATTENUATION = "causal_shift_curves_small", "causal_shift_attenuation"


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Run one of the two parts."""
    return {"curves": run_curves, "attenuation": run_attenuation}[spec["part"]](spec, name)


def run_curves(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the lens curves of a checkpoint on test windows."""
    model, tok = load_model(ROOT / spec["model"])
    rows = rows_of(tok, "test", spec["context"], spec["sequences"])
    return {"sequences": len(rows), **curves(model, batches_of(rows), skip=spec["skip"], seed=spec["seed"]).to_json()}


def untrained(spec: dict[str, Any], seed: int) -> Any:
    """Return the model of a seed before training; the same for every variant."""
    torch.manual_seed(seed)
    model = small_lm.causal_model(spec)
    model.set_attn_implementation("eager")
    return model


def prepared(model: Any, variant: dict[str, Any]) -> Attenuated:
    """Put what a variant asks for into a model."""
    for block, factor in variant.get("rescale", {}).items():
        def hook(_module: nn.Module, _args: Any, output: Any, factor: float = factor) -> Any:
            return with_first(output, factor * first_tensor(output))

        parts_of(model).blocks[int(block)].register_forward_hook(hook)
    gate = variant.get("gate") or {int(b): a for b, a in variant.get("cut", {}).items()}
    return attenuate(model, gate, variant.get("placement", "attn"), form="module")


def drawn(ids: Tensor, spec: dict[str, Any], seed: int) -> list[Tensor]:
    """Return the batches of a seed, (batch, context) each; the same for every variant."""
    generator = torch.Generator().manual_seed(1000 + seed)
    starts = torch.randint(len(ids) - spec["context"], (spec["steps"], spec["batch"]), generator=generator)
    return [ids[s[:, None] + torch.arange(spec["context"])].long() for s in starts]


def cell(spec: dict[str, Any], variant: dict[str, Any], seed: int, ids: Tensor, test: Tensor) -> dict[str, Any]:
    """Train one variant with one seed; return test losses of each sequence, alphas, transition and CPU seconds."""
    start = time.process_time()
    model = untrained(spec, seed)
    attenuated = prepared(model, variant)
    plain = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(plain)
    log = train(attenuated, drawn(ids, spec, seed), spec["rate"], warm_up=spec["warm_up"], steps=spec["steps"])
    model.forward = plain
    batches = batches_of(test)
    found = curves(model, batches_of(test[:: len(test) // spec["lens"]]), skip=4)
    match = found.transition()
    return {
        "losses": measured(model, batches)[0].round(5).tolist(),
        "alphas": log[-1],
        "lens": {k: found.mean(k).tolist() for k in ("input_match", "output_match")},
        "transition": [match.crossing, match.low, match.high],
        "seconds": time.process_time() - start,
    }


def frozen_is_base(spec: dict[str, Any], ids: Tensor) -> bool:
    """Return whether a gate at 1 gives the loss and gradients of the model itself, bit for bit."""
    found = []
    for gate in (None, BlockGate(spec["blocks"])):
        model = untrained(spec, 0)
        if gate is not None:
            attenuate(model, gate, form="module")
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def run_attenuation(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Train every variant with every seed, and compare with the baseline of the same seed on the same sequences."""
    _, tok = load_model(ROOT / "experiments/weights/small_causal_lm")
    ids = small_lm.stream("train", small_lm.SPECIAL[small_lm.END], tok)
    test = rows_of(tok, "test", spec["context"], spec["sequences"])
    state = ROOT / "runs" / "causal_shift" / f"{name}.json"
    kept: dict[str, Any] = json.loads(state.read_text(encoding="utf-8")) if state.exists() else {}
    for seed in spec["seeds"]:
        for title, variant in spec["variants"].items():
            key = json.dumps([spec, title, seed])
            if key not in kept:
                kept[key] = cell(spec, variant, seed, ids, test)
                write_json(state, kept)
                print(f"{name}: {title}, seed {seed}: {np.mean(kept[key]['losses']):.4f}, {kept[key]['seconds']:.0f} s", flush=True)
    rows = []
    for title in spec["variants"]:
        cells = [kept[json.dumps([spec, title, s])] for s in spec["seeds"]]
        bases = [kept[json.dumps([spec, "baseline", s])] for s in spec["seeds"]]
        away = [np.array(c["losses"]) - np.array(b["losses"]) for c, b in zip(cells, bases, strict=True)]
        rows.append({
            "variant": title, "loss": [float(np.mean(c["losses"])) for c in cells], "difference": [interval(d, 0) for d in away],
            "alphas": [c["alphas"] for c in cells], "transition": [c["transition"] for c in cells],
            "lens": [c["lens"] for c in cells], "seconds": [c["seconds"] for c in cells],
        })  # fmt: skip
    parameters = sum(p.numel() for p in untrained(spec, 0).parameters())
    same = frozen_is_base(spec, drawn(ids, spec, 0)[0])
    return {"parameters": parameters, "train_tokens": spec["steps"] * spec["batch"] * spec["context"], "gate_at_1_is_base": same, "rows": rows}


def curves_table() -> str:
    """Return the lens by depth."""
    found = result(CURVES)
    names = ("input_match", "output_match", "self_match", "random_match", "cosine_in", "cosine_out", "centred_in", "centred_out", "norm", "entropy")
    means = {n: found["curves"][n]["mean"] for n in names}
    rows = []
    for depth in range(len(means["norm"])):
        shares = [f"{100 * means[n][depth]:.1f}" for n in names[:4]]
        rows.append([depth, *shares, *(f"{means[n][depth]:.3f}" for n in names[4:8]), f"{means['norm'][depth]:.1f}", f"{means['entropy'][depth]:.2f}"])
    header = ("depth", "x_t %", "x_(t+1) %", "final prediction %", "another's token %", "cos in", "cos out", "centred in", "centred out", "norm", "entropy")
    left = sum(found["excluded"].values())
    note = (
        f"{found['positions']} positions of {found['sequences']} test sequences; {left} do not count (of these "
        f"{found['excluded']['next token is the same']} have the same next token). Always saying the most frequent next token is right in "
        f"{100 * found['unigram']:.1f} %."
    )
    return f"{table(header, rows)}\n\n{note}\n\n{transition_table(found['transitions'])}"


def transition_table(found: dict[str, Any]) -> str:
    """Return where out passes in, by measure."""
    rows = []
    for kind, t in found.items():
        where = "never" if t["crossing"] is None else f"{t['crossing']:.2f} [{t['low']:.2f}, {t['high']:.2f}]"
        rows.append([kind, "–" if t["depth"] is None else t["depth"], where])
    return table(("transition by", "first depth for good", "crossing and 95 % interval"), rows)


def attenuation_table() -> str:
    """Return test losses, differences to the baseline of the same seed, transition and alphas."""
    found = result(ATTENUATION)
    rows = []
    for r in found["rows"]:
        away = "–" if r["variant"] == "baseline" else ", ".join(f"{m:+.3f} [{lo:+.3f}, {hi:+.3f}]" for m, lo, hi in r["difference"])
        depths = ", ".join("never" if t[0] is None else f"{t[0]:.2f}" for t in r["transition"])
        rows.append([r["variant"], " / ".join(f"{v:.3f}" for v in r["loss"]), away, depths])
    spec = found["spec"]
    minutes = sum(sum(r["seconds"]) for r in found["rows"]) / 60
    note = (
        f"{found['parameters'] / 1e6:.2f} M parameters, {spec['blocks']} blocks (counted from 0) of width {spec['width']}, {spec['steps']} steps of "
        f"{spec['batch']} × {spec['context']} tokens, seeds {' and '.join(map(str, spec['seeds']))}, {minutes:.0f} minutes of CPU in all; loss in nats on "
        f"{spec['sequences']} test sequences. Brackets: 95 % bootstrap over sequences, which does not cover the spread over seeds. A gate at 1 gives "
        f"the baseline's loss and gradients bit for bit: {'yes' if found['gate_at_1_is_base'] else 'no'}."
    )
    return f"{table(('variant', 'test loss', 'minus baseline', 'transition depth'), rows)}\n\n{note}"


def alphas_table() -> str:
    """Return what the gates have learned."""
    found = result(ATTENUATION)
    rows = [
        [f"{r['variant']}, seed {seed}", *(f"{a:.3f}" for a in alphas)]
        for r in found["rows"] if r["variant"].startswith("gate")
        for seed, alphas in zip(found["spec"]["seeds"], r["alphas"], strict=True)
    ]  # fmt: skip
    return table(("alpha of block", *range(found["spec"]["blocks"])), rows)


def curves_picture() -> str:
    """Return matches and cosines over depth with their intervals."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    found = result(CURVES)
    panels_of = {
        "share of positions, %": {"input_match": "the token itself", "output_match": "the next token", "self_match": "the final prediction", "random_match": "another position's token (control)"},
        "cosine": {"cosine_in": "with the token itself", "cosine_out": "with the next token", "centred_in": "itself, embeddings centred", "centred_out": "next, embeddings centred"},
    }  # fmt: skip
    colours = ("#d95f02", "#1f6feb", "#2e7d32", "#9aa4b2"), ("#d95f02", "#1f6feb", "#d95f02", "#1f6feb")
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "thrifty", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.2), constrained_layout=True)
        for axes, (unit, names), shades in zip(panels, panels_of.items(), colours, strict=True):
            scale = 100 if "%" in unit else 1
            for (name, words), colour in zip(names.items(), shades, strict=True):
                curve = {k: scale * np.array(v) for k, v in found["curves"][name].items()}
                axes.plot(curve["mean"], "--" if name.startswith("centred") else "-", color=colour, label=words, linewidth=1.3)
                axes.fill_between(range(len(curve["mean"])), curve["low"], curve["high"], color=colour, alpha=0.2, linewidth=0)
            axes.set(xlabel="depth (0: what enters the first block)", ylabel=unit)
            axes.legend(frameon=False, fontsize=7)
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()


TABLES: dict[str, Callable[[], str]] = {
    CURVES: curves_table,
    ATTENUATION: attenuation_table,
    "causal_shift_alphas": alphas_table,
}
PICTURES: dict[str, Callable[[], str]] = {f"{CURVES}.svg": curves_picture}
