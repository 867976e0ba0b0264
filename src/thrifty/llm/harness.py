"""lm-eval (EleutherAI's evaluation harness) on changed models, and on masked diffusion models.

Importing this module registers the model names "thrifty" and "thrifty-diffusion" with lm-eval. On the command line:
`python -m thrifty.llm.harness --model thrifty --model_args model=FOLDER,plan=10:15:3 --tasks ...`.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thrifty.errors import KnobError, ThriftyError, need
from thrifty.llm import d5p4
from thrifty.llm.changes import Changed, Changes, change, parse_attenuation, parse_plan
from thrifty.llm.d5p4.denoisers import Denoiser
from thrifty.llm.inner_loop import Plan
from thrifty.llm.loading import load_model, stored_dtype

_api: Any = need("lm_eval.api.model", extra="lm_eval")
_registry: Any = need("lm_eval.api.registry", extra="lm_eval")
_hf: Any = need("lm_eval.models.huggingface", extra="lm_eval")

__all__ = ["ChangedLM", "DiffusionLM", "ThriftyLM", "harness_model", "main"]

CANDIDATES = 16  # samples of the bound that decides between k outputs


class ChangedLM(_hf.HFLM):  # type: ignore[misc]
    """lm-eval's own adapter for Hugging Face models around a model that was changed in place; `undo()` restores it."""

    def __init__(self, model: Any, tokenizer: Any, changes: Changes | None = None, **options: Any) -> None:
        changes = changes or Changes()
        if changes.plan is not None and changes.plan.mode == "alignment" and changes.plan.scope == "last":
            raise KnobError("the plan's scope 'last' looks at padding in lm-eval's batches; use scope 'position'")
        self.changed: Changed = change(model, changes)
        try:
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **options)
        except BaseException:
            self.changed.undo()
            raise

    def undo(self) -> Any:
        """Give the model back as it was, bit for bit."""
        return self.changed.undo()

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes into its results; nothing is looked up on a hub."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "thrifty": self.changed.changes.to_json(),
        }


def harness_model(
    model: Any, tokenizer: Any, plan: Plan | None = None, attenuation: dict[int, float] | None = None,
    adapters: Sequence[str | Path] = (), placement: str = "attn", **options: Any,
) -> ChangedLM:  # fmt: skip
    """Return a Hugging Face causal language model, changed in place, as a model of lm-eval; `.undo()` restores it.

    options: of lm-eval's HFLM, such as batch_size, max_length, add_bos_token. Pass the result to
    `lm_eval.simple_evaluate(model=..., tasks=...)`. A model that was looped, attenuated or merged before needs no
    changes here. Raises what `change` does.
    """
    return ChangedLM(model, tokenizer, Changes(tuple(adapters), attenuation or {}, placement, plan), **options)


@_registry.register_model("thrifty")
class ThriftyLM(ChangedLM):
    """A checkpoint on this machine, changed: `--model thrifty --model_args model=FOLDER,plan=10:15:3,mode=uniform`.

    model: a folder or a GGUF file. plan: START:END:PASSES, or a JSON file. mode, granularity, kv: of the plan. adapter:
    files of sparse adapters, joined by "+". attenuate: BLOCK:ALPHA, joined by "+". placement: of the attenuation.
    dtype: the checkpoint's where it is left out. options: of lm-eval's HFLM.
    """

    def __init__(
        self, model: str, plan: str = "", mode: str = "", granularity: str = "", kv: str = "", adapter: str = "",
        attenuate: str = "", placement: str = "attn", dtype: str = "", attention: str | None = None,
        device: str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        knobs = {"mode": mode, "granularity": granularity, "kv_mode": kv}
        knobs = {key: value for key, value in knobs.items() if value}
        if knobs and not plan:
            raise KnobError(f"{', '.join(knobs)} without a plan; add plan=START:END:PASSES")
        changes = Changes(
            tuple(a for a in adapter.split("+") if a),
            parse_attenuation([a for a in attenuate.split("+") if a]),
            placement,
            parse_plan(plan, **knobs) if plan else None,
        )
        loaded, tokenizer = load_model(model, dtype or stored_dtype(model), attention, _present(device))
        super().__init__(loaded, tokenizer, changes, **options)


@_registry.register_model("thrifty-diffusion")
class DiffusionLM(_api.LM):  # type: ignore[misc]
    """A masked diffusion (or masked) language model for lm-eval.

    model: a checkpoint folder, or a denoiser with its tokenizer. Log-likelihoods are the Monte Carlo bound of
    `d5p4.log_likelihood_bound` (`samples` random masks, one for a single token); is_greedy says whether decoding one
    token a step, the surest first, gives the answer. Texts are generated by `d5p4.sample` with k groups of w; of k > 1
    outputs the one with the highest bound per token is returned, and `outputs` keeps all k for each request.
    tokens: generated when the task does not say; steps: of decoding, 0 = one a token. temperature: None takes the
    task's (0 for greedy tasks, but 1 where k w > 1, since copies of one text cannot be chosen from). Answers depend on
    the seed and the text of the request, not on their order.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, style: str = "subs", guidance: float | None = None, k: int = 1,
        w: int = 1, steps: int = 0, tokens: int = 64, form: str = "additive", beta: float = 1.0,
        method: str = "greedy_map", samples: int = d5p4.likelihood.SAMPLES, temperature: float | None = None,
        block: int = 0, seed: int = 0, batch_size: int | str = 16, max_length: int = 0, device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        del max_batch_size
        self._device = _present(device)
        self.rows = int(batch_size) if str(batch_size).isdigit() else 16
        rules = {
            f"k is {k}; it must be at least 1": k >= 1,
            f"w is {w}; it must be at least 1": w >= 1,
            f"steps is {steps}; it must be 0 or more": steps >= 0,
            f"tokens is {tokens}; it must be at least 1": tokens >= 1,
            f"samples is {samples}; it must be at least 1": samples >= 1,
            f"block is {block}; it must be 0 or more": block >= 0,
            "a denoiser needs its tokenizer": isinstance(model, (str, Path)) or tokenizer is not None,
        }
        if wrong := [sentence for sentence, fine in rules.items() if not fine]:
            raise KnobError("; ".join(wrong))
        if isinstance(model, (str, Path)):
            model, tokenizer = d5p4.load_masked_lm(model, style, guidance, self.rows, self._device)
        self.denoiser: Denoiser = model
        self.tokenizer = tokenizer
        self.k, self.w, self.steps, self.tokens, self.block = k, w, steps, tokens, block
        self.samples, self.temperature, self.seed = samples, temperature, seed
        self.selector = d5p4.Select(method, form=form, beta=beta, seed=seed) if k > 1 or w > 1 else None
        self.longest = max_length or model.longest or 1024
        self.outputs: list[list[str]] = []
        self.passes = 0  # forward passes spent so far

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (bound of the log-likelihood, whether greedy decoding gives it) of each continuation."""
        found = []
        for request in _bar(requests, "loglikelihood", disable_tqdm):
            context, continuation = request.args
            before, answer = self._pair(context, continuation)
            if len(answer) > self.longest:
                raise KnobError(f"a continuation has {len(answer)} tokens; the model takes {self.longest}")
            if not answer:
                raise KnobError(f"the continuation {continuation!r} has no tokens")
            before = before[max(0, len(before) + len(answer) - self.longest) :]
            ids = torch.tensor([*before, *answer])
            asked = torch.arange(len(ids)) >= len(before)
            bound = self._bound(ids, asked, f"{context}\0{continuation}")
            found.append((bound, d5p4.is_greedy(self.denoiser, ids, asked, self._device)))
            self.cache_hook.add_partial("loglikelihood", request.args, found[-1])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the bound of each whole text; long ones in pieces, each read after the one before."""
        found = []
        for request in _bar(requests, "loglikelihood_rolling", disable_tqdm):
            (text,) = request.args
            ids = torch.tensor(self._encode(text), dtype=torch.long)
            total = 0.0
            for first, start, end in _pieces(len(ids), self.longest):
                asked = torch.arange(first, end) >= start
                total += self._bound(ids[first:end], asked, f"{start} {text}")
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a text for each context, up to the first stop sequence."""
        self.outputs, found = [], []
        for request in _bar(requests, "generate_until", disable_tqdm):
            context, options = request.args
            size = int(options.get("max_gen_toks") or options.get("max_new_tokens") or self.tokens)
            if size >= self.longest:
                raise KnobError(f"{size} tokens are to be generated; the model takes {self.longest} with the context")
            before = self._encode(context)[-(self.longest - size) :]
            rows, best = self._decode(before, size, options, context)
            until = options.get("until") or []
            texts = [_until(self._text(row), [until] if isinstance(until, str) else until) for row in rows]
            self.outputs.append(texts)
            found.append(texts[best])
            self.cache_hook.add_partial("generate_until", request.args, texts[best])
        return found

    def _decode(self, before: list[int], size: int, options: dict[str, Any], context: str) -> tuple[Tensor, int]:
        """Return the generated tokens (k, size), and which row is the likeliest."""
        start = torch.tensor([*before, *[self.denoiser.mask_id] * size])
        heat = self.temperature
        if heat is None:
            asked = options.get("temperature", 0.0) if options.get("do_sample") else 0.0
            heat = float(asked) or (1.0 if self.k * self.w > 1 else 0.0)
        process: Any = d5p4.Blocks(self.block, temperature=heat) if self.block else d5p4.Mdlm(heat)
        steps = self.steps or size
        made = d5p4.sample(
            self.denoiser, self.k, self.w, steps, self.selector, start=start, process=process,
            generator=self._generator(context), device=self._device,
        )  # fmt: skip
        self.passes += made.passes
        rows = made.representatives.cpu()
        asked_of = torch.arange(len(start)) >= len(before)
        scores = [self._bound(row, asked_of, context, CANDIDATES) for row in rows] if self.k > 1 else [0.0]
        return rows[:, len(before) :], max(range(len(rows)), key=scores.__getitem__)

    def _bound(self, ids: Tensor, answer: Tensor, text: str, samples: int = 0) -> float:
        found = d5p4.log_likelihood_bound(
            self.denoiser, ids, answer, self._generator(text), samples or self.samples, self.rows, self._device
        )
        self.passes += found.passes
        return found.value

    def _generator(self, text: str) -> torch.Generator:
        """Return the random numbers of one request: they depend on the seed and its text."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + zlib.crc32(text.encode()))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of both; blanks at the end of the context go with the continuation, as lm-eval does it."""
        stripped = context.rstrip()
        whole = self._encode(context + continuation)
        before = self._encode(stripped)
        return before, whole[len(before) :]

    def _text(self, row: Tensor) -> str:
        ids = row.tolist()
        end = getattr(self.tokenizer, "eos_token_id", None)
        return str(self.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True))

    @property
    def tokenizer_name(self) -> str:
        """Return a name for lm-eval's caches."""
        return str(getattr(self.tokenizer, "name_or_path", "")).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the tokenizer's chat template."""
        return str(getattr(self.tokenizer, "chat_template", None) or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text. Raises KnobError when the tokenizer has no chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise KnobError("the tokenizer has no chat template; leave --apply_chat_template out")
        made = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(made)

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes into its results."""
        return {"thrifty": {"k": self.k, "w": self.w, "samples": self.samples, "seed": self.seed}}


def _present(device: str | None) -> str:
    """Return the device, or "cpu" where there is no such one: lm-eval's command line asks for cuda:0 by itself."""
    wanted = device or "cpu"
    return "cpu" if wanted.startswith("cuda") and not torch.cuda.is_available() else wanted


def _until(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop, maxsplit=1)[0] if stop else text
    return text


def _pieces(length: int, longest: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first token that is read, first that is scored, end): each token is scored once.

    >>> list(_pieces(4, 4)), list(_pieces(5, 4))
    ([(0, 0, 4)], [(0, 0, 4), (1, 4, 5)])
    """
    start = 0
    while start < length:
        size = longest if start == 0 else max(1, longest // 2)
        end = min(length, start + size)
        yield max(0, end - longest), start, end
        start = end


def _bar(requests: Sequence[Any], what: str, hidden: bool) -> Any:
    return need("tqdm", extra="lm_eval").tqdm(requests, desc=f"Running {what} requests", disable=hidden)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run lm-eval's own command line, which knows the names "thrifty" and "thrifty-diffusion" here."""
    if arguments is not None:
        sys.argv = ["lm-eval", *arguments]
    try:
        need("lm_eval.__main__", extra="lm_eval").cli_evaluate()
    except ThriftyError as err:
        sys.exit(f"thrifty: {err}")


if __name__ == "__main__":
    main()
