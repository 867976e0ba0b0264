"""Local checkpoints and local data: a folder or a GGUF file -> (model, tokenizer); a JSONL file -> batches."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from thrifty.errors import DataError, KnobError, close_to, need
from thrifty.llm.families import parts_of

__all__ = [
    "DTYPES", "Batch", "Encoded", "Example", "batches", "collate", "completion_logits", "completion_losses", "encode",
    "load_model", "load_tokenizer", "read_jsonl", "rows_of", "stored_dtype",
]  # fmt: skip

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
T = TypeVar("T")
IGNORED = -100  # label of a token that is not learned


def load_model(
    path: str | Path, dtype: str = "float32", attention: str | None = None, device: str = "cpu"
) -> tuple[Any, Any]:
    """Return (model in eval mode, tokenizer) of a local checkpoint; nothing is downloaded.

    path: a folder with config.json, weights and tokenizer, or a GGUF file. dtype: a key of DTYPES. attention: the
    implementation, such as "sdpa" or "eager"; None leaves the choice to transformers.
    Raises DataError when the path holds no checkpoint, KnobError for an unknown dtype, UnsupportedModel (`parts_of`).
    """
    if dtype not in DTYPES:
        raise KnobError(f"dtype is '{dtype}'; {close_to(str(dtype), DTYPES)}")
    hf = need("transformers", extra="llm")
    where, options = _source(Path(path))
    if "gguf_file" in options:
        need("gguf", extra="llm")
        need("accelerate", extra="llm")
    more: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if "gguf_file" in options and hasattr(hf, "GgufConfig"):  # newer releases would keep the weights packed
        more["quantization_config"] = hf.GgufConfig(dequantize=True)
    try:
        model = hf.AutoModelForCausalLM.from_pretrained(where, dtype=DTYPES[dtype], **options, **more)
        tokenizer = hf.AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError, ImportError) as err:
        raise DataError(f"{path} cannot be loaded as a causal language model: {err}") from err
    model = _plain(model).to(device).eval()
    parts_of(model)
    return model, tokenizer


def _plain(model: Any) -> Any:
    """Return a model read from GGUF, whose weights are floats now, without the marks of a quantised one.

    With them it could not be saved or trained.
    """
    if getattr(model, "quantization_method", None) is not None and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
        del model.quantization_method
    return model


def stored_dtype(path: str | Path) -> str:
    """Return the dtype that a checkpoint folder says its weights have; float32 where it says nothing, and for GGUF."""
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "float32"
    found = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return found if found in DTYPES else "float32"


def load_tokenizer(path: str | Path) -> Any:
    """Return the tokenizer of a local checkpoint (see `load_model`)."""
    hf = need("transformers", extra="llm")
    where, options = _source(Path(path))
    return hf.AutoTokenizer.from_pretrained(where, **options)


def _source(path: Path) -> tuple[str, dict[str, Any]]:
    """Return what from_pretrained takes for a folder or a GGUF file."""
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    if not path.exists():
        raise DataError(f"{path} does not exist; give a checkpoint folder or a .gguf file on this machine")
    if path.is_file():
        raise DataError(f"{path} is no .gguf file; give a checkpoint folder or a .gguf file")
    if not (path / "config.json").is_file():
        gguf = sorted(path.glob("*.gguf"))
        hint = f"; did you mean {gguf[0]}?" if gguf else "; a checkpoint folder has a config.json"
        raise DataError(f"{path} holds no config.json{hint}")
    return str(path), {"local_files_only": True}


@dataclass(frozen=True)
class Example:
    """One line of data: the completion is learned and scored, the prompt is only read. Plain text has no prompt."""

    completion: str
    prompt: str = ""


def read_jsonl(path: str | Path) -> list[Example]:
    """Return the examples of a JSONL file: {"prompt", "completion"} or {"text"} on each line; further keys are ignored.

    Raises DataError that names the lines that are neither, and for an empty file.
    """
    return rows_of(path, _example, "prompt and completion, or text,", "examples")


def rows_of(path: str | Path, make: Callable[[Any], T], keys: str, what: str) -> list[T]:
    """Return what `make` gives for each line of a JSONL file; blank lines do not count.

    keys, what: words for refusals. Raises DataError that names the lines for which `make` raises ValueError or
    TypeError, and for an empty file.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is no file; give a JSONL file with {keys} on each line")
    found: list[T] = []
    bad: list[str] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                found.append(make(json.loads(line)))
            except (ValueError, TypeError) as err:
                bad.append(f"line {number}: {err}")
    if bad:
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(f"{path}: {'; '.join(bad[:5])}{more}")
    if not found:
        raise DataError(f"{path} has no {what}")
    return found


def _example(line: Any) -> Example:
    if not isinstance(line, Mapping):
        raise TypeError("no JSON object")
    keys = ("text",) if "text" in line else ("prompt", "completion")
    wrong = [key for key in keys if not isinstance(line.get(key), str)]
    if wrong:
        raise TypeError(f"{' and '.join(wrong)} must be text; a line has prompt and completion, or text")
    if not str(line[keys[-1]]).strip():
        raise ValueError(f"{keys[-1]} is empty")
    return Example(line[keys[-1]], "" if len(keys) == 1 else line["prompt"])


@dataclass(frozen=True)
class Encoded:
    """The token ids of one example; those from `start` on are learned and scored (the first token never is)."""

    ids: tuple[int, ...]
    start: int = 0

    @property
    def learned(self) -> int:
        """How many tokens are predicted."""
        return len(self.ids) - max(self.start, 1)


def encode(
    examples: Sequence[Example], tokenizer: Any, max_tokens: int, end: bool = True, chat: bool = False
) -> list[Encoded]:
    """Return the token ids of examples, at most `max_tokens` each; too long prompts lose their beginning.

    end: put the end-of-text token behind each completion. chat: write the prompt with the tokenizer's chat template.
    Prompt and completion are encoded apart, so that the border between them is a border between tokens.
    Raises DataError when a completion alone is longer than `max_tokens`, or nothing is left to learn.
    """
    if max_tokens < 2:
        raise KnobError(f"max_tokens is {max_tokens}; it must be at least 2")
    close = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
    found, bad = [], []
    for number, example in enumerate(examples):
        prompt = _prompt_ids(example.prompt, tokenizer, chat)
        special = not prompt  # plain text begins as the tokenizer begins a text
        completion = [*tokenizer(example.completion, add_special_tokens=special)["input_ids"], *close]
        room = max_tokens - len(completion)
        if room < 0 and example.prompt:
            bad.append(f"example {number}: the completion has {len(completion)} tokens")
            continue
        completion = completion[:max_tokens]
        kept = prompt[max(0, len(prompt) - room) :] if room > 0 else []
        entry = Encoded((*kept, *completion), len(kept))
        if entry.learned < 1:
            bad.append(f"example {number}: nothing to predict, it has {len(entry.ids)} token(s)")
        found.append(entry)
    if bad:
        raise DataError(f"with max_tokens = {max_tokens}: {'; '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}")
    return found


def _prompt_ids(prompt: str, tokenizer: Any, chat: bool) -> list[int]:
    if not prompt:
        return []
    if not chat:
        return list(tokenizer(prompt)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise KnobError("chat = True, but the tokenizer has no chat template")
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class Batch:
    """Token ids (b, t), padded on the right; attention (b, t), 1 = a token; learned (b, t) bool, True = predicted."""

    ids: Tensor
    attention: Tensor
    learned: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> Tensor:
        """The ids where they are learned, -100 elsewhere, as transformers models take them; (b, t)."""
        return self.ids.masked_fill(~self.learned, IGNORED)

    def inputs(self) -> dict[str, Tensor]:
        """Return the keyword arguments of a model's forward."""
        return {"input_ids": self.ids, "attention_mask": self.attention}

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        return Batch(self.ids.to(device), self.attention.to(device), self.learned.to(device))


def collate(encoded: Sequence[Encoded], pad: int = 0, length: int | None = None) -> Batch:
    """Return one batch, as long as its longest example, or `length`; `pad` fills up on the right.

    >>> collate([Encoded((5, 6, 7), start=1), Encoded((8, 9))]).learned.int().tolist()
    [[0, 1, 1], [0, 1, 0]]
    """
    longest = max(*(len(e.ids) for e in encoded), length or 0)
    ids = torch.full((len(encoded), longest), pad, dtype=torch.long)
    attention = torch.zeros_like(ids)
    learned = torch.zeros_like(ids, dtype=torch.bool)
    for row, e in enumerate(encoded):
        ids[row, : len(e.ids)] = torch.tensor(e.ids)
        attention[row, : len(e.ids)] = 1
        learned[row, max(e.start, 1) : len(e.ids)] = True
    return Batch(ids, attention, learned)


def batches(
    encoded: Sequence[Encoded], size: int, pad: int = 0, generator: torch.Generator | None = None
) -> Iterator[Batch]:
    """Yield all examples in batches of `size` (the last may be smaller); a generator shuffles them."""
    if not encoded:
        raise DataError("there are no examples")
    if size < 1:
        raise KnobError(f"the batch size is {size}; it must be at least 1")
    order = range(len(encoded)) if generator is None else torch.randperm(len(encoded), generator=generator).tolist()
    order = list(order)
    for start in range(0, len(order), size):
        yield collate([encoded[i] for i in order[start : start + size]], pad)


def completion_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return each example's mean cross-entropy over its learned tokens, (b,), float32.

    Logits are made only for positions at which some example has something to learn.
    """
    logits, goal, learned = completion_logits(model, batch)
    tokens = nn.functional.cross_entropy(logits.float().flatten(0, 1), goal.flatten(), reduction="none").view_as(goal)
    return (tokens * learned).sum(1) / learned.sum(1).clamp_min(1)


def completion_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logits (b, p, v), the ids that they should predict (b, p), which of them are learned (b, p) bool).

    p: the positions at which some example has something to learn.
    """
    goal, learned = batch.ids[:, 1:], batch.learned[:, 1:]
    places = learned.any(0).nonzero().flatten()
    plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if "logits_to_keep" in inspect.signature(plain.forward).parameters:
        logits = model(**batch.inputs(), use_cache=False, logits_to_keep=places).logits
    else:
        logits = model(**batch.inputs(), use_cache=False).logits[:, places]
    return logits, goal[:, places], learned[:, places]
