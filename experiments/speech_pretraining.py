"""A HuBERT-like encoder pretrained here on spoken digits, and SKILL on it: does it matter which layers a student imitates?

The encoder predicts the k-means clusters of cepstral frames where its input is masked (HuBERT's first iteration, arXiv 2106.07447).
Half of the parameters of its layers are then removed by groups, single layers and random groups; beside them stand small encoders of
the same size that are untrained, or pretrained alone with the same steps. Pretraining and finished cells are kept in the temporary
directory: a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import layer_groups as base
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from thrifty.compress import layer_groups as lg
from thrifty.compress.layer_groups.checkpoint import Checkpoint, restore
from thrifty.data.speech import Framing, mfcc

HOP, AHEAD = 160, 112  # samples per frame, and before the window of the first one: centred where the encoder looks
SPARE = range(15)  # takes that no training without labels sees: for the probes
MATCHED = ("group", "single", "random_groups", "random")


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the result: the teacher, its groups, and every student."""
    torch.manual_seed(0)
    kept = base.Cells({k: v for k, v in spec.items() if not k.endswith("seeds")}, name)  # more seeds: the same cells
    world = DigitWorld(spec)
    made: dict[str, Pretrained] = {}

    def pretrained(key: str, model: nn.Module, seed: int) -> dict[str, Any]:
        made[key] = pretrain(world, model, spec["pretraining"], seed, kept.folder / f"{key}.safetensors")
        return made[key].history

    model = encoder(spec["model"], spec["teacher_seed"])
    history = kept.get("pretraining", lambda: pretrained("teacher_weights", model, spec["teacher_seed"]))
    world.teacher = (made.get("teacher_weights") or reread(kept.folder / "teacher_weights.safetensors", model)).model
    found = kept.get("groups", lambda: base.grouping(world, spec))
    groups = tuple(tuple(g) for g in found["groups"])
    layers = len(found["cka"]) - 1
    cells = {"cepstra": [kept.get("cepstra", lambda: {"accuracy": world.of_cepstra()})]}
    cells["whole_untrained"] = [kept.get("whole_untrained", lambda: judged(world, encoder(spec["model"], 100), {}))]
    cells["teacher"] = [kept.get("teacher", lambda: judged(world, world.teacher, {}))]

    def alone(seed: int) -> dict[str, Any]:
        smaller, masks = small(world, spec, seed)
        told = pretrained(f"scratch_{seed}_weights", smaller, seed)
        return {**judged(world, made[f"scratch_{seed}_weights"].model, masks), "pretraining": told}

    makers: dict[str, Callable[[int], dict[str, Any]]] = {
        m: lambda s, m=m: student(world, spec, m, s, groups, layers) for m in MATCHED
    }
    makers |= {"untrained": lambda s: judged(world, *small(world, spec, s)), "scratch": alone}
    for seed in spec["seeds"]:
        for method, make in makers.items():
            if method != "scratch" or seed in spec["scratch_seeds"]:
                cells.setdefault(method, []).append(kept.get(f"{method}_{seed}", lambda s=seed, make=make: make(s)))
    single = lg.Matching.single_layers(layers).groups
    return {**found, "single_layers": single, "pretraining": history, "clips": world.sizes(), "cells": cells}


def encoder(options: dict[str, Any], seed: int) -> nn.Module:
    """Return an untrained HuBERT encoder."""
    import transformers

    config = transformers.HubertConfig(
        **options, num_feat_extract_layers=len(options["conv_dim"]), feat_extract_norm="layer", conv_bias=True,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=8, feat_proj_dropout=0.0, hidden_dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0, mask_time_prob=0.05,
        feat_extract_activation="relu", hidden_act="relu", attn_implementation="eager",  # the quick ones for clips as short as these
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.HubertModel(config).eval()


def small(world: DigitWorld, spec: dict[str, Any], seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return an untrained encoder of half the size: the same share of heads and units in every layer."""
    masks = lg.random_masks(lg.stack_of(world.teacher), spec["plan"]["sparsity"], lg.Plan().kinds, seed)
    return lg.prune(encoder(spec["model"], 200 + seed), masks), masks


def student(
    world: DigitWorld, spec: dict[str, Any], method: str, seed: int, groups: tuple[tuple[int, ...], ...], layers: int
) -> dict[str, Any]:
    """Make one student that imitates the teacher, and judge it."""
    plan = lg.Plan(seed=seed, **spec["plan"])
    matching = lg.Matching(groups)
    if method == "single":
        matching = lg.Matching.single_layers(layers)
    if method == "random_groups":
        matching = lg.Matching(drawn_groups([len(g) for g in groups], seed))
    masks = None
    if method == "random":
        masks = lg.random_masks(lg.stack_of(world.teacher), plan.sparsity, plan.kinds, seed)
        plan = replace(plan, steps_after=plan.steps + plan.steps_after, lr_after=plan.lr)
    made = lg.distill_and_prune(world.teacher, world.batches, matching, plan, masks)
    ends = [h["distance"] for h in made.history]
    told = {"matched": matching.groups, "loss_first": round(ends[0], 4), "loss_last": round(float(np.mean(ends[-10:])), 4)}
    return {**judged(world, made.model, made.masks), **told}


def drawn_groups(sizes: Sequence[int], seed: int) -> tuple[tuple[int, ...], ...]:
    """Return groups of these sizes with members at random."""
    order = np.random.default_rng(seed).permutation(sum(sizes)).tolist()
    ends = list(itertools.accumulate(sizes, initial=0))
    return tuple(tuple(sorted(order[a:b])) for a, b in itertools.pairwise(ends))


def judged(world: DigitWorld, model: nn.Module, masks: dict[str, Tensor]) -> dict[str, Any]:
    """Return what layer_groups.judged does."""
    return base.judged(world, model.eval(), masks)


# ---- pretraining


@dataclass
class Pretrained:
    """An encoder that was pretrained, and what its training showed."""

    model: nn.Module
    history: dict[str, Any]


def pretrain(world: DigitWorld, model: nn.Module, knobs: dict[str, Any], seed: int, path: Path) -> Pretrained:
    """Train the encoder and a linear head to name the clusters of masked frames; go on from `path` where it exists."""
    head = nn.Linear(model.config.hidden_size, world.count)
    parts = {"model": model, "head": head}
    weights = [p for part in parts.values() for p in part.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=knobs["lr"], weight_decay=knobs["weight_decay"], betas=(0.9, 0.98))
    file = Checkpoint(path, f"{seed} {knobs} {sum(p.numel() for p in weights)}", every=250)
    first, losses = 0, []
    if saved := file.read():
        restore(saved, parts, optimizer)
        first, losses = saved.step, list(saved.history)
    begin = time.process_time()
    for step, rows in enumerate(world.order(knobs["steps"], knobs["batch"], seed)):
        if step < first:
            continue
        for group in optimizer.param_groups:
            group["lr"] = knobs["lr"] * rate(step, knobs["steps"], knobs["warmup"])
        draws = torch.Generator().manual_seed(1_000_000 * seed + step)
        torch.manual_seed(1_000_000 * seed + step)  # dropout: the same where a run is taken up again
        batch = world.batch(rows)
        masked = spans(batch["frame_mask"], knobs["mask_start"], knobs["mask_length"], draws)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss, right = predicted(model.train(), head, batch, masked, world.targets(rows, masked.shape[1]))
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append({"loss": float(loss.detach()), "right": right})
        if file.due(step) or step + 1 == knobs["steps"]:
            file.write("pretraining", step + 1, losses, parts, optimizer, {})
            recent = [float(np.mean([h[k] for h in losses[-100:]])) for k in ("loss", "right")]
            print(f"  {path.stem} step {step + 1}: loss {recent[0]:.3f}, right {recent[1]:.3f}, {time.process_time() - begin:.0f} s", flush=True)
    model.eval()
    curve = [round(float(np.mean([h["loss"] for h in losses[i : i + 100]])), 4) for i in range(0, len(losses), 100)]
    spent = round(time.process_time() - begin, 1)
    return Pretrained(model, {"loss_per_100_steps": curve, **held_out(world, model, head, knobs), "training_cpu_seconds": spent})


def reread(path: Path, model: nn.Module) -> Pretrained:
    """Return the encoder that `pretrain` left at `path`."""
    from safetensors.torch import load_file

    values = {k.removeprefix("model."): v for k, v in load_file(path).items() if k.startswith("model.")}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(values[key])
    return Pretrained(model.eval(), {})


def rate(step: int, steps: int, warmup: float) -> float:
    """Return the factor of the step size: up, then down to 0, in straight lines."""
    rise = round(warmup * steps)
    return (step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise)


def spans(frames: Tensor, start: float, length: int, draws: torch.Generator) -> Tensor:
    """Return which frames are masked, (n, t) bool: spans from random starts, at least one in each clip, real frames only."""
    starts = torch.rand(frames.shape, generator=draws) < start
    forced = (torch.rand(len(frames), generator=draws) * frames.sum(1)).long()
    starts[torch.arange(len(frames)), forced] = True
    masked = starts.clone()
    for shift in range(1, length):
        masked[:, shift:] |= starts[:, :-shift]
    return masked & frames


def predicted(model: nn.Module, head: nn.Linear, batch: dict[str, Tensor], masked: Tensor, goals: Tensor) -> tuple[Tensor, float]:
    """Return the cross-entropy of the clusters of masked frames and the share that is right."""
    states = model(batch["input_values"], attention_mask=batch["attention_mask"], mask_time_indices=masked).last_hidden_state
    scores = head(states[masked]).float()
    wanted = goals[masked]
    return functional.cross_entropy(scores, wanted), float((scores.argmax(1) == wanted).float().mean())


@torch.no_grad()
def held_out(world: DigitWorld, model: nn.Module, head: nn.Linear, knobs: dict[str, Any]) -> dict[str, float]:
    """Return loss and accuracy on masked frames of clips that were not trained on, and the share of the commonest cluster."""
    draws = torch.Generator().manual_seed(0)
    found, goals = [], []
    for rows in np.array_split(world.rows, max(1, len(world.rows) // 64)):
        batch = world.batch(rows)
        masked = spans(batch["frame_mask"], knobs["mask_start"], knobs["mask_length"], draws)
        wanted = world.targets(rows, masked.shape[1])
        loss, right = predicted(model.eval(), head, batch, masked, wanted)
        found.append((float(loss), right, int(masked.sum())))
        goals.append(wanted[masked])
    sizes = [f[2] for f in found]
    every = torch.cat(goals).bincount(minlength=world.count)
    names = ("held_out_loss", "held_out_accuracy")
    means = {n: round(float(np.average([f[i] for f in found], weights=sizes)), 4) for i, n in enumerate(names)}
    return {**means, "commonest_cluster": round(float(every.max() / every.sum()), 4)}


# ---- data


class DigitWorld(base.World):
    """Spoken digits at 8 kHz. Takes from 15 on have no labels; of the first 15 the probes are made."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec, self.count = spec, spec["clusters"]
        self.shape = list(zip(spec["model"]["conv_kernel"], spec["model"]["conv_stride"], strict=True))
        with np.load(Path(os.environ["THRIFTY_DATA"]) / "spoken_digits.npz") as file:
            audio, offset = file["audio"], file["offset"]
            self.info = {k: np.unique(file[k], return_inverse=True)[1] for k in ("label", "speaker", "index")}
        self.clips = [standard(audio[a:b][: spec["clip_samples"]]) for a, b in itertools.pairwise(offset)]
        spare = np.isin(self.info["index"], SPARE)
        self.free = np.flatnonzero(~spare)
        self.rows = np.array(sorted(np.flatnonzero(spare), key=lambda i: len(self.clips[i])))  # little padding in a batch
        self.cepstra = [cepstra(c, self.frames(len(c))) for c in self.clips]
        self.clustered = self._clustered()
        size = spec["distil_batch"]
        everything = [self.batch(rows) for rows in self.order(len(self.free) // size, size, 0)]
        self.held_out, self.batches = everything[:8], everything[8:]

    def frames(self, samples: int) -> int:
        """Return how many frames the encoder makes of so many samples."""
        for kernel, stride in self.shape:
            samples = (samples - kernel) // stride + 1
        return samples

    def _clustered(self) -> list[np.ndarray]:
        """Return the cluster of every frame; k-means sees the clips without labels only."""
        from sklearn.cluster import KMeans

        known = np.concatenate([self.cepstra[i] for i in self.free])
        middle, spread = known.mean(0), known.std(0)
        means = KMeans(self.count, n_init=1, max_iter=60, random_state=0).fit((known - middle) / spread)
        return [means.predict((c - middle) / spread) for c in self.cepstra]

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return clips, padded to the longest, with the masks of their samples and frames."""
        clips = [self.clips[i] for i in rows]
        longest = max(map(len, clips))
        x, mask = torch.zeros(len(clips), longest), torch.zeros(len(clips), longest, dtype=torch.long)
        for i, clip in enumerate(clips):
            x[i, : len(clip)], mask[i, : len(clip)] = torch.from_numpy(clip), 1
        real = torch.tensor([self.frames(len(c)) for c in clips])
        frames = torch.arange(self.frames(longest))[None] < real[:, None]
        return {"input_values": x, "attention_mask": mask, "frame_mask": frames}

    def targets(self, rows: Sequence[int], frames: int) -> Tensor:
        """Return the clusters of the frames of clips, (n, frames), -1 where there is none."""
        found = torch.full((len(rows), frames), -1)
        for i, row in enumerate(rows):
            found[i, : len(self.clustered[row])] = torch.from_numpy(self.clustered[row])
        return found

    def order(self, steps: int, size: int, seed: int) -> list[np.ndarray]:
        """Return the clips of every step: each once a round, clips of like length together."""
        rng, found = np.random.default_rng(seed), []
        while len(found) < steps:
            mixed = rng.permutation(self.free)
            pools = np.array_split(mixed, max(1, len(mixed) // (8 * size)))
            ready = [part for pool in pools for part in self._by_length(pool, size)]
            found += [ready[i] for i in rng.permutation(len(ready))]
        return found[:steps]

    def _by_length(self, pool: np.ndarray, size: int) -> list[np.ndarray]:
        ordered = pool[np.argsort([len(self.clips[i]) for i in pool], kind="stable")]
        return np.array_split(ordered, max(1, len(ordered) // size))

    def labelled(self) -> list[dict[str, Tensor]]:
        return [self.batch(self.rows[i : i + 50]) for i in range(0, len(self.rows), 50)]

    def sizes(self) -> dict[str, Any]:
        """Return how much data there is."""
        seconds = [sum(len(self.clips[i]) for i in part) / 8000 for part in (self.free, self.rows)]
        return {"unlabelled": len(self.free), "probe": len(self.rows), "seconds": [round(s, 1) for s in seconds]}

    def features(self, model: Any) -> dict[str, np.ndarray]:
        """Return pooled features as base.World does, and those of single frames: as heard, and where the input is masked."""
        stack, knobs = lg.stack_of(model), self.spec["pretraining"]
        draws = torch.Generator().manual_seed(1)
        heard, hidden, which = [], [], []
        for batch in self.labelled():
            masked = spans(batch["frame_mask"], knobs["mask_start"], knobs["mask_length"], draws)
            with torch.no_grad():
                plain = lg.hidden_states(stack, batch)
                blind = lg.hidden_states(stack, {**batch, "mask_time_indices": masked})
            heard.append(torch.cat([s[batch["frame_mask"]] for s in plain[1:]], dim=1))
            hidden.append(torch.cat([s[masked] for s in blind[1:]], dim=1))
            which.append(masked[batch["frame_mask"]])
        self.masked = torch.cat(which).numpy()
        return {**super().features(model), "heard": torch.cat(heard).numpy(), "hidden": torch.cat(hidden).numpy()}

    def scores(self, features: dict[str, np.ndarray]) -> dict[str, float]:
        """Return the accuracy of linear probes; speakers of the test rows are not in the training rows."""
        digit, speaker = (self.info[k][self.rows] for k in ("label", "speaker"))
        found = {}
        for kind in ("last", "all"):
            folds = [np.isin(speaker, pair) for pair in ((0, 1), (2, 3), (4, 5))]
            found[f"digit of unseen speakers, {kind}"] = float(np.mean([base.ridge(features[kind], digit, ~f, f) for f in folds]))
        goals = np.concatenate([self.clustered[i] for i in self.rows])
        clip = np.repeat(np.arange(len(self.rows)), [len(self.clustered[i]) for i in self.rows])
        test = clip % 3 == 0
        found["cluster of a frame, all"] = linear(features["heard"], goals, ~test, test)
        found["cluster of a masked frame, all"] = linear(features["hidden"], goals[self.masked], ~test[self.masked], test[self.masked])
        return found

    def of_cepstra(self) -> dict[str, float]:
        """Return the digit accuracy of the mean and deviation of a clip's cepstra, with no encoder."""
        digit, speaker = (self.info[k][self.rows] for k in ("label", "speaker"))
        x = np.stack([np.concatenate([self.cepstra[i].mean(0), self.cepstra[i].std(0)]) for i in self.rows])
        folds = [np.isin(speaker, pair) for pair in ((0, 1), (2, 3), (4, 5))]
        return {"digit of unseen speakers, all": float(np.mean([base.ridge(x, digit, ~f, f) for f in folds]))}


def standard(clip: np.ndarray) -> np.ndarray:
    """Return a clip with mean 0 and deviation 1, float32."""
    x = clip.astype(np.float32)
    return (x - x.mean()) / max(float(x.std()), 1e-5)


def cepstra(clip: np.ndarray, frames: int) -> np.ndarray:
    """Return 13 cepstral coefficients and their first two differences for every frame of the encoder, (frames, 39)."""
    framing = Framing(frames=frames)
    part = np.zeros(framing.samples)
    part[: len(clip[AHEAD : AHEAD + framing.samples])] = clip[AHEAD : AHEAD + framing.samples] / 16
    plain = mfcc(part, framing).T
    first = np.gradient(plain, axis=0)
    return np.concatenate([plain, first, np.gradient(first, axis=0)], axis=1)


def linear(x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """Return the test accuracy of ridge regression on one-hot classes, standardised features, strength 100."""
    middle, spread = x[train].mean(0), x[train].std(0) + 1e-6
    z = ((x - middle) / spread).astype(np.float32)
    goals = np.eye(int(y.max()) + 1, dtype=np.float32)[y]
    centre = goals[train].mean(0)
    weights = np.linalg.solve(z[train].T @ z[train] + 100 * np.eye(z.shape[1], dtype=np.float32), z[train].T @ (goals[train] - centre))
    return float(((z[test] @ weights + centre).argmax(1) == y[test]).mean())


# ---- tables

WORDS = {
    "cepstra": "no encoder: mean and deviation of the cepstra",
    "whole_untrained": "whole encoder, untrained",
    "teacher": "teacher: whole encoder, pretrained here",
    "group": "groups (SKILL)",
    "single": "single layers (DPHuBERT's choice)",
    "random_groups": "random groups of the same sizes",
    "random": "random pruning, groups distilled as long",
    "untrained": "small encoder, untrained",
    "scratch": "small encoder, pretrained alone",
}
NAME = "layer_groups_pretrained"


def finished() -> dict[str, Any] | None:
    """Return the result, if there is one."""
    import tables

    return tables.load("speech_pretraining").get(NAME)


def students_table() -> str:
    """Return sizes, distances and accuracies."""
    import tables

    if (found := finished()) is None:
        return "Not measured."
    tasks = list(found["cells"]["teacher"][0]["accuracy"])
    whole = found["cells"]["teacher"][0]["layer_parameters"]
    rows = []
    for method, words in WORDS.items():
        cells = found["cells"][method]
        scores = [base.spread([c["accuracy"][t] for c in cells]) if t in cells[0]["accuracy"] else "–" for t in tasks]
        sized, smaller = "layer_parameters" in cells[0], cells[0].get("layer_parameters", whole) < whole
        removed = base.spread([1 - c["layer_parameters"] / whole for c in cells]) if smaller else "–"
        away = base.spread([c["distance"] for c in cells], 1.0, 3) if sized and method != "teacher" else "–"
        spent = f"{np.mean([_seconds(c) for c in cells]):.0f} s" if method in (*MATCHED, "scratch") else "–"
        rows.append([words, len(cells) if smaller else "–", removed, away, *scores, spent])
    head = ("method", "seeds", "% of layer parameters removed", "distance", *tasks, "CPU time, after the teacher's")
    return tables.table(head, rows)


def _seconds(cell: dict[str, Any]) -> float:
    """Return the CPU seconds of making and judging a cell."""
    return float(cell["cpu_seconds"])


def encoder_table() -> str:
    """Return what was pretrained, how well it predicts, and its groups."""
    import tables

    if (found := finished()) is None:
        return "Not measured."
    spec, told, clips = found["spec"], found["pretraining"], found["clips"]
    alone = [c["pretraining"] for c in found["cells"]["scratch"]]
    whole = found["cells"]["teacher"][0]

    def groups(given: Sequence[Sequence[int]]) -> str:
        return " ".join("{" + ", ".join(map(str, g)) + "}" for g in given)

    rows = [
        ["clips without labels / of the probes", f"{clips['unlabelled']} ({clips['seconds'][0] / 60:.0f} min) / {clips['probe']}"],
        ["parameters, of them in layers", f"{whole['parameters']:,}, {whole['layer_parameters']:,}"],
        ["steps x clips, CPU time", f"{spec['pretraining']['steps']} x {spec['pretraining']['batch']}, {told['training_cpu_seconds']:.0f} s"],
        ["loss, first and last hundred steps", f"{told['loss_per_100_steps'][0]:.2f}, {told['loss_per_100_steps'][-1]:.2f}"],
        ["right cluster of masked frames, clips held out", f"{100 * told['held_out_accuracy']:.1f} % of {spec['clusters']} clusters"],
        ["the same, small encoder pretrained alone", f"{base.spread([a['held_out_accuracy'] for a in alone])} %"],
        ["the same, always the commonest cluster", f"{100 * told['commonest_cluster']:.1f} %"],
        ["least CKA between two representations", f"{np.min(found['cka']):.2f}"],
        ["groups (0 is the input)", groups(found["groups"])],
        ["single layers", " ".join(str(g[0]) for g in found["single_layers"])],
        ["random groups", "; ".join(groups(c["matched"]) for c in found["cells"]["random_groups"])],
    ]  # fmt: skip
    return tables.table(("what", "value"), rows)


TABLES = {NAME: students_table, f"{NAME}_encoder": encoder_table}
