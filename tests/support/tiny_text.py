"""A tokenizer of single characters, tiny models with it in folders, and denoisers whose likelihoods are known."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from tiny_llms import VOCABULARY, tiny

CAUSAL = ("<s>", "</s>", "<pad>")  # ids 0, 1, 2
MASKED = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 3
LETTERS = " " + string.ascii_letters + string.digits + ".,:;?!'-\n"


def characters(special: tuple[str, ...] = CAUSAL) -> Any:
    """Return a tokenizer whose tokens are the special ones and single characters; the vocabulary has 97 or fewer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*special, *LETTERS])}
    assert len(vocabulary) <= VOCABULARY
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    made.decoder = decoders.Fuse()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    if special == MASKED:
        names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def causal_folder(folder: Path, family: str = "llama", **config: Any) -> Path:
    """Save a tiny causal language model with its tokenizer."""
    tiny(family, **{"blocks": 4, "width": 16, **config}).save_pretrained(folder)
    characters().save_pretrained(folder)
    return folder


def masked_folder(folder: Path, mask: bool = True) -> Path:
    """Save a tiny BERT with a masked language modelling head and its tokenizer."""
    import transformers as hf

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = hf.BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=64, initializer_range=0.4, pad_token_id=0,
        )  # fmt: skip
        hf.BertForMaskedLM(config).save_pretrained(folder)
    characters(MASKED if mask else CAUSAL).save_pretrained(folder)
    return folder


def jsonl(path: Path, lines: list[dict[str, Any]]) -> Path:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Pair:
    """An exact denoiser of two-token texts (and of one token given the other) from a joint distribution.

    joint: (v, v) probabilities of (first, second); the mask is token v.
    """

    longest = None
    guidance = None

    def __init__(self, joint: torch.Tensor) -> None:
        self.joint, self.mask_id = joint.double(), len(joint)

    def passes(self, guided: bool = True) -> int:
        """One."""
        return 1

    def __call__(
        self, ids: torch.Tensor, given: Any = None, guided: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = []
        for first, second in ids.tolist():
            free = self.mask_id
            of_first = self.joint.sum(1) if second == free else self.joint[:, second]
            of_second = self.joint.sum(0) if first == free else self.joint[first]
            rows.append(torch.stack([of_first / of_first.sum(), of_second / of_second.sum()]))
        log_p = torch.stack(rows).log()
        log_p = torch.cat([log_p, torch.full_like(log_p[..., :1], -1e6)], -1)
        return log_p, torch.zeros(*ids.shape, 3)


class Unigram:
    """A denoiser that says the same distribution (v,) everywhere; the mask is token `mask_id`."""

    longest = 64
    guidance = None

    def __init__(self, p: torch.Tensor, mask_id: int) -> None:
        self.p, self.mask_id = p.double(), mask_id

    def passes(self, guided: bool = True) -> int:
        """One."""
        return 1

    def __call__(
        self, ids: torch.Tensor, given: Any = None, guided: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.p.log().expand(*ids.shape, -1).float(), torch.ones(*ids.shape, 3)
