"""Two small language models trained here on `small_text`: a causal one and a masked-diffusion one, byte-level BPE of 1,024 tokens.

They are for experiments and for trying the verbs of thrifty.llm. Training is kept in runs/small_lm/NAME and goes on from there;
the result is a Hugging Face folder with float16 weights (its configuration says float32: it is loaded so). The causal model
reads paragraphs that end with <end>, the diffusion model paragraphs that end with a line break, which it may write.
"""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import small_text
import torch
from tables import ROOT, load, table
from torch import Tensor, nn

VOCABULARY = 1024
PAD, END, MASK = 0, 1, 2
SPECIAL = ("<pad>", "<end>", "<mask>")
NAMES = {"small_causal": "causal (Llama's shape)", "small_masked_diffusion": "masked diffusion (ModernBERT's shape)"}


@functools.cache
def tokenizer() -> Any:
    """Return the tokenizer trained on the training split, as a transformers fast tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    raw.train_from_iterator(small_text.splits().train, trainer)
    pad, end, mask = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=pad, bos_token=end, eos_token=end, mask_token=mask, clean_up_tokenization_spaces=False,
        model_max_length=128,
    )  # fmt: skip


def stream(part: str, separator: str, tok: Any = None) -> Tensor:
    """Return the token ids (n,) of a split: its paragraphs in order, each followed by a separator."""
    raw = (tok or tokenizer()).backend_tokenizer
    rows = small_text.splits().by_name()[part]
    ids = [i for found in raw.encode_batch([row + separator for row in rows]) for i in found.ids]
    return torch.tensor(ids, dtype=torch.int16)


def windows(ids: Tensor, length: int) -> Tensor:
    """Return a stream in pieces (n, length); what is left over is dropped."""
    return ids[: len(ids) // length * length].view(-1, length).long()


def causal_model(spec: dict[str, Any]) -> nn.Module:
    """Return an untrained Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=spec["width"], intermediate_size=spec["hidden"], num_hidden_layers=spec["blocks"],
        num_attention_heads=spec["heads"], num_key_value_heads=spec["heads"], max_position_embeddings=spec["context"],
        tie_word_embeddings=True, pad_token_id=PAD, bos_token_id=END, eos_token_id=END,
    ))  # fmt: skip


def masked_model(spec: dict[str, Any]) -> nn.Module:
    """Return an untrained ModernBERT whose blocks all see the whole window."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    return ModernBertForMaskedLM(ModernBertConfig(
        vocab_size=VOCABULARY, hidden_size=spec["width"], intermediate_size=spec["hidden"], num_hidden_layers=spec["blocks"],
        num_attention_heads=spec["heads"], max_position_embeddings=spec["context"], layer_types=["full_attention"] * spec["blocks"],
        tie_word_embeddings=True, pad_token_id=PAD, bos_token_id=END, eos_token_id=END, cls_token_id=END, sep_token_id=END,
    ))  # fmt: skip


def causal_loss(model: Any, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Return the mean cross-entropy of the next token, nats."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def diffusion_loss(model: Any, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Return MDLM's bound, nats per token: cross-entropy of masked tokens times 1 / t; each token masked with probability t.

    t is spread over (0, 1) within the batch (low discrepancy): t_i = (u + i) / b with one u.
    """
    b = len(ids)
    t = ((torch.rand(1, generator=generator) + torch.arange(b)) / b).clamp(1e-3, 1.0)
    hidden = torch.rand(ids.shape, generator=generator) < t[:, None]
    return (masked_losses(model, ids, hidden) / t[:, None]).sum() / ids.numel()


def masked_losses(model: Any, ids: Tensor, hidden: Tensor) -> Tensor:
    """Return the cross-entropy (b, t) of the tokens that are hidden, 0 elsewhere; the mask itself cannot be answered."""
    logits = model(input_ids=ids.masked_fill(hidden, MASK)).logits.float()
    logits = logits.masked_fill(torch.arange(logits.shape[2]) == MASK, -torch.inf)
    found = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
    return found * hidden


def causal_score(model: Any, rows: Tensor, draws: int) -> dict[str, float]:
    """Return the mean over windows and its standard error."""
    found = []
    with torch.inference_mode():
        for ids in rows.split(64):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            found.append(losses.view(len(ids), -1).mean(1))
    return summary(torch.cat(found))


def diffusion_score(model: Any, rows: Tensor, draws: int) -> dict[str, float]:
    """Return the bound: with l masks the sum over them times 1 / l; every l of 1..T is drawn equally often.

    The same expectation as 1 / t over t in (0, 1), as the number of masks is uniform then, with less variance.
    """
    generator = torch.Generator().manual_seed(0)
    n, length = rows.shape
    found = []
    with torch.inference_mode():
        for _ in range(draws):
            masks = (torch.randperm(n, generator=generator) % length) + 1
            rank = torch.rand(n, length, generator=generator).argsort(1).argsort(1)
            hidden = rank < masks[:, None]
            sums = [masked_losses(model, i, h).sum(1) for i, h in zip(rows.split(64), hidden.split(64), strict=True)]
            found.append(torch.cat(sums) / masks)
    return summary(torch.stack(found).mean(0))


def summary(values: Tensor) -> dict[str, float]:
    return {"nats": float(values.mean()), "error": float(values.std() / len(values) ** 0.5), "windows": len(values)}


KINDS: dict[str, dict[str, Callable[..., Any]]] = {
    "causal": {"make": causal_model, "loss": causal_loss, "score": causal_score},
    "masked_diffusion": {"make": masked_model, "loss": diffusion_loss, "score": diffusion_score},
}


def baselines(train: Tensor, validation: Tensor, test: Tensor, vocabulary: int, length: int) -> dict[str, dict[str, float]]:
    """Return the nats per token of a unigram and a bigram predictor; the bigram's weight is chosen on validation."""
    one = torch.bincount(train.long(), minlength=vocabulary).double() + 1.0
    pairs = train[:-1].long() * vocabulary + train[1:].long()
    two = torch.bincount(pairs, minlength=vocabulary**2).double().view(vocabulary, vocabulary)
    share = one / one.sum()

    def bigram(rows: Tensor, weight: float) -> float:
        p = (two + weight * share) / (two.sum(1, keepdim=True) + weight)
        return float(-p[rows[:, :-1], rows[:, 1:]].log().mean())

    known, unseen = windows(validation, length), windows(test, length)
    weight = min((1.0, 3.0, 10.0, 30.0, 100.0, 300.0), key=lambda w: bigram(known, w))
    return {
        "validation": {"unigram": float(-share[known].log().mean()), "bigram": bigram(known, weight)},
        "test": {"unigram": float(-share[unseen].log().mean()), "bigram": bigram(unseen, weight)},
    }


def rate(step: int, spec: dict[str, Any]) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine down to a twentieth."""
    if step < spec["warm_up"]:
        return float(spec["rate"] * (step + 1) / spec["warm_up"])
    done = (step - spec["warm_up"]) / max(1, spec["steps"] - spec["warm_up"])
    return float(spec["rate"] * (0.05 + 0.475 * (1 + math.cos(math.pi * done))))


def trained(spec: dict[str, Any], name: str, ids: Tensor, validation: Tensor) -> tuple[Any, dict[str, Any]]:
    """Return the trained model and its log; goes on from runs/small_lm/NAME when it was interrupted."""
    kind = KINDS[spec["model"]]
    torch.manual_seed(spec["seed"])
    model = kind["make"](spec)
    groups = [{"params": [p for p in model.parameters() if (p.dim() >= 2) == big], "weight_decay": 0.1 * big} for big in (True, False)]
    optimiser = torch.optim.AdamW(groups, lr=spec["rate"], betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(spec["seed"])
    log: dict[str, Any] = {"seconds": 0.0, "validation": []}
    state, first = ROOT / "runs" / "small_lm" / f"{name}.pt", 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        if kept["spec"] != json.dumps(spec):
            raise SystemExit(f"{state} is of another specification; remove it")
        model.load_state_dict(kept["model"])
        optimiser.load_state_dict(kept["optimiser"])
        generator.set_state(kept["generator"])
        first, log = kept["step"], json.loads(kept["log"])
    state.parent.mkdir(parents=True, exist_ok=True)
    model.train()
    model.set_attn_implementation("eager")  # at this size its backward pass takes a third of that of "sdpa" on a CPU
    fast = torch.compile(model) if spec.get("compile") else model
    start = time.process_time()
    for step in range(first, spec["steps"]):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, spec)
        starts = torch.randint(len(ids) - spec["context"], (spec["batch"],), generator=generator)
        rows = ids[starts[:, None] + torch.arange(spec["context"])].long()
        with torch.autocast("cpu", torch.bfloat16):
            loss = kind["loss"](fast, rows, generator)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % spec["keep"] == 0 or step + 1 == spec["steps"]:
            log["seconds"] += time.process_time() - start
            found = scored(model, spec, validation[:: max(1, len(validation) // 256)], 1)["nats"]
            log["validation"].append([step + 1, found])
            print(f"{name}: step {step + 1}, loss {loss.item():.3f}, validation {found:.4f}, {log['seconds']:.0f} s", flush=True)
            start = time.process_time()
            partial = state.with_suffix(".partial")
            torch.save({
                "spec": json.dumps(spec), "model": model.state_dict(), "optimiser": optimiser.state_dict(),
                "generator": generator.get_state(), "step": step + 1, "log": json.dumps(log),
            }, partial)  # fmt: skip
            os.replace(partial, state)
    model.set_attn_implementation("sdpa")
    return model.eval(), log


def scored(model: Any, spec: dict[str, Any], rows: Tensor, draws: int) -> dict[str, float]:
    """Return the score of windows in evaluation mode; the model trains on afterwards."""
    model.eval()
    found: dict[str, float] = KINDS[spec["model"]]["score"](model, rows, draws)
    model.train()
    return found


def saved(model: Any, spec: dict[str, Any]) -> Path:
    """Write the Hugging Face folder, with float16 weights and a configuration that loads them as float32."""
    folder = ROOT / str(spec["folder"])
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer().save_pretrained(folder)
    return folder


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Train, save, load again, and score what was loaded."""
    import transformers

    ids = {part: stream(part, spec["separator"]) for part in ("train", "validation", "test")}
    rows = {part: windows(ids[part], spec["context"]) for part in ("validation", "test")}
    model, log = trained(spec, name, ids["train"], rows["validation"])
    folder = saved(model, spec)
    kind = transformers.AutoModelForCausalLM if spec["model"] == "causal" else transformers.AutoModelForMaskedLM
    loaded = kind.from_pretrained(folder).eval()
    scores = {part: scored(loaded, spec, rows[part], spec["draws"]) for part in rows}
    text = small_text.splits()
    bytes_of = {part: sum(len(r) + 1 for r in text.by_name()[part]) for part in ids}
    return {
        "parameters": sum(p.numel() for p in loaded.parameters()),
        "dtype": str(loaded.dtype),
        "file_bytes": (folder / "model.safetensors").stat().st_size,
        "text": text.sizes(),
        "tokens": {part: len(found) for part, found in ids.items()},
        "bytes_per_token": {part: bytes_of[part] / len(ids[part]) for part in ids},
        "tokens_seen": spec["steps"] * spec["batch"] * spec["context"],
        "scores": scores,
        "baselines": baselines(ids["train"], ids["validation"], ids["test"], VOCABULARY, spec["context"]),
        "log": log,
        "samples": samples(loaded, spec),
    }


def samples(model: Any, spec: dict[str, Any]) -> list[str]:
    """Return a few continuations of the causal model; the diffusion model's come from thrifty.llm.d5p4."""
    if spec["model"] != "causal":
        return []
    tok = tokenizer()
    torch.manual_seed(0)
    found = []
    for prompt in ("Return the", "bird (noun): ", "If the argument"):
        ids = torch.tensor([tok.backend_tokenizer.encode(prompt).ids])
        out = model.generate(ids, do_sample=True, temperature=0.7, max_new_tokens=48, attention_mask=torch.ones_like(ids))
        found.append(tok.decode(out[0], skip_special_tokens=True))
    return found


def small_lm_table() -> str:
    """Return both models against the unigram and bigram predictors."""
    found = load("small_lm")
    if not found:
        raise FileNotFoundError("experiments/results/small_*.json")
    rows = []
    for name, r in found.items():
        per_byte = 1 / math.log(2) / r["bytes_per_token"]["test"]
        test, one, two = r["scores"]["test"]["nats"], r["baselines"]["test"]["unigram"], r["baselines"]["test"]["bigram"]
        bound = "" if r["spec"]["model"] == "causal" else "≤ "
        shown = f"{bound}{test:.3f} ± {1.96 * r['scores']['test']['error']:.3f}"
        rows.append([
            NAMES.get(name, name), f"{r['parameters'] / 1e6:.2f} M", f"{r['tokens_seen'] / 1e6:.1f} M", f"{r['log']['seconds'] / 60:.1f} min",
            f"{bound}{r['scores']['validation']['nats']:.3f}", shown, f"{bound}{test * per_byte:.3f}", f"{two:.3f}", f"{one:.3f}",
        ])  # fmt: skip
    head = ("model", "parameters", "tokens seen", "CPU of training", "validation nats/token", "test nats/token", "test bits/byte", "bigram", "unigram")
    return table(head, rows)


def small_text_table() -> str:
    """Return what the text is made of."""
    found = load("small_lm")
    if not found:
        raise FileNotFoundError("experiments/results/small_*.json")
    text = next(iter(found.values()))["text"]
    rows = [[name, s["documents"], s["paragraphs"], f"{s['bytes'] / 1e6:.2f}"] for name, s in text["sources"].items()]
    parts = ", ".join(f"{p}: {s['bytes'] / 1e6:.2f} MB" for p, s in text["splits"].items())
    note = f"{parts}. Fingerprint `{text['fingerprint'][:16]}`: another machine, with other versions, has other text."
    return f"{table(('source', 'documents', 'paragraphs', 'MB'), rows)}\n\n{note}"


TABLES: dict[str, Callable[[], str]] = {"small_lm": small_lm_table, "small_text": small_text_table}
