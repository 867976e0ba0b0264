"""A causal language model in a local folder, through transformers; this file imports neither it nor torch by itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thrifty.errors import DataError, KnobError, need


@dataclass(frozen=True)
class LocalModel:
    """Answers from a Hugging Face folder or a GGUF file, on the CPU, without network.

    folder: with config, weights and tokenizer, or with the file `gguf_file`. Decoding is greedy at temperature 0;
    above, each prompt is sampled alone from a seed made of `seed` and the prompt, so an answer depends on neither
    order nor batch. Greedy answers of a batch are padded on the left; batch=1 removes even the rounding that this
    brings. The prompt goes through the tokenizer's chat template when there is one.

    Raises MissingExtra without transformers, DataError for a folder without a model.
    """

    folder: str | Path
    gguf_file: str | None = None
    name: str | None = None  # as stored beside the answers; default the folder's or file's name
    max_new_tokens: int = 96
    temperature: float = 0.0
    repetition_penalty: float = 1.1
    seed: int = 0
    batch: int = 8
    chat: bool = True  # through the tokenizer's chat template, when it has one; else the prompt is continued as it is
    stop: str | None = None  # the answer ends before this text, e.g. a line feed
    _loaded: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch < 1 or self.temperature < 0 or self.repetition_penalty <= 0:
            raise KnobError(
                "max_new_tokens and batch must be 1 or more, temperature 0 or more, repetition_penalty positive"
            )

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the answers depend on."""
        return {
            "kind": "local", "model": self.name or self.gguf_file or Path(self.folder).name,
            "max_new_tokens": self.max_new_tokens, "temperature": self.temperature,
            "repetition_penalty": self.repetition_penalty, "seed": self.seed, "batch": self.batch, "chat": self.chat,
            "stop": self.stop,
        }  # fmt: skip

    def answer(self, prompts: Sequence[str]) -> list[str]:
        """Return one answer to each prompt, in order."""
        step = 1 if self.temperature > 0 else self.batch
        found: list[str] = []
        for start in range(0, len(prompts), step):
            found += self._generate(list(prompts[start : start + step]))
        return found

    def _generate(self, prompts: list[str]) -> list[str]:
        tokenizer, model = self._tokenizer, self._model
        tokens = tokenizer(
            [self._chat(p) for p in prompts], return_tensors="pt", padding=True, add_special_tokens=False
        )
        tokens.pop("token_type_ids", None)
        options: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            digest = hashlib.sha256(f"{self.seed}\n{prompts[0]}".encode()).digest()
            need("transformers", extra="llm").set_seed(int.from_bytes(digest[:4], "big"))
            options = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        out = model.generate(
            **tokens, max_new_tokens=self.max_new_tokens, repetition_penalty=self.repetition_penalty,
            pad_token_id=tokenizer.pad_token_id, **options,
        )  # fmt: skip
        asked = tokens["input_ids"].shape[1]
        texts = tokenizer.batch_decode(out[:, asked:], skip_special_tokens=True)
        return [str(text).split(self.stop)[0].strip() if self.stop else str(text).strip() for text in texts]

    def _chat(self, prompt: str) -> str:
        if not self.chat or not getattr(self._tokenizer, "chat_template", None):
            return prompt
        turns = [{"role": "user", "content": prompt}]
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    @property
    def _tokenizer(self) -> Any:
        self._load()
        return self._loaded["tokenizer"]

    @property
    def _model(self) -> Any:
        self._load()
        return self._loaded["model"]

    def _load(self) -> None:
        if self._loaded:
            return
        if not Path(self.folder).is_dir():
            raise DataError(f"{self.folder} is no folder; give the local folder of a Hugging Face model")
        transformers = need("transformers", extra="llm")
        more = {"gguf_file": self.gguf_file} if self.gguf_file else {}
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True, **more)
            model = transformers.AutoModelForCausalLM.from_pretrained(self.folder, local_files_only=True, **more)
        except (OSError, ValueError, KeyError) as err:
            raise DataError(f"{self.folder} holds no causal language model that transformers can load: {err}") from err
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        whole = (
            model.eval() if self.gguf_file else model.eval().float()
        )  # GGUF is already made float32, and says it is not
        self._loaded.update(tokenizer=tokenizer, model=whole)
