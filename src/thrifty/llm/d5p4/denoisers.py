"""Denoisers: what the sampling loop needs from a model, and adapters to MDLM, LLaDA and masked language models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from thrifty.errors import DataError, KnobError, close_to, need

__all__ = [
    "STYLES",
    "Bidirectional",
    "Denoiser",
    "Network",
    "Subs",
    "hugging_face",
    "load_masked_lm",
    "masked_lm",
    "shifted",
]

STYLES = ("subs", "bidirectional")
NEVER = -1e6  # logit of a token that cannot be
Network = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Token ids (b, t) -> logits (b, t, v) at the position of the token that they are about, hidden states (b, t, e)."""


class Denoiser(Protocol):
    """Token ids with masks (b, t) -> log-probabilities (b, t, v) of the clean tokens, hidden states (b, t, e)."""

    @property
    def mask_id(self) -> int:
        """The token that stands for "not decided"."""

    @property
    def longest(self) -> int | None:
        """The most positions a sequence may have; None where there is no limit."""

    @property
    def guidance(self) -> float | None:
        """The scale s of guidance, None for none."""

    def __call__(self, ids: Tensor, given: Tensor | None = None, guided: bool = True) -> tuple[Tensor, Tensor]:
        """given (t,) bool: the positions of the prompt; guided: whether guidance is on in this step."""

    def passes(self, guided: bool = True) -> int:
        """Return how many forward passes one sequence costs."""


@dataclass(frozen=True)
class _Adapter:
    """What both styles share: one convention of guidance, tokens that never come, rows in pieces.

    guidance None: plain; a float s: logits are u + s (c - u), c with the prompt and u with masks in its place. So s = 1
    is plain decoding, 0 ignores the prompt, and more than 1 follows it more. (LLaDA's own script counts from 0.)
    never: further tokens that are not generated. batch: rows in one call of the network, 0 = all.
    """

    network: Network
    mask_id: int
    guidance: float | None = None
    never: tuple[int, ...] = ()
    batch: int = 0
    longest: int | None = None
    points: ClassVar[bool] = False  # whether decided positions are point masses: selection then reads the others only

    def __post_init__(self) -> None:
        """Refuse values outside their range, all at once."""
        rules = {
            f"mask_id is {self.mask_id}; it must be a token id": self.mask_id >= 0,
            f"guidance is {self.guidance}; it must be None, or at least 0": self.guidance is None or self.guidance >= 0,
            f"batch is {self.batch}; it must be 0 or more": self.batch >= 0,
        }
        if wrong := [sentence for sentence, fine in rules.items() if not fine]:
            raise KnobError("; ".join(wrong))

    def passes(self, guided: bool = True) -> int:
        """Return how many forward passes one sequence costs: 2 where guidance mixes, else 1."""
        return 1 if not guided or self.guidance in (None, 0.0, 1.0) else 2

    def __call__(self, ids: Tensor, given: Tensor | None = None, guided: bool = True) -> tuple[Tensor, Tensor]:
        """Return log-probabilities (b, t, v) and hidden states (b, t, e) of states (b, t), without gradients.

        given (t,): the positions of the prompt, needed by guidance. The hidden states are those of the pass with the
        prompt (without it where s = 0).
        """
        scale = self.guidance if guided and self.guidance is not None else 1.0
        if scale != 1.0 and (given is None or not bool(given.any())):
            raise KnobError("guidance needs a prompt: decided tokens in the start state")
        with torch.inference_mode():
            pieces = [self._piece(part, given, scale) for part in torch.split(ids, self.batch or len(ids))]
            return torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])

    def _piece(self, ids: Tensor, given: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        if scale == 1.0:
            logits, hidden = self.network(ids)
        else:
            blind = ids.masked_fill(given, self.mask_id) if given is not None else ids
            logits, hidden = self.network(blind)
            if scale != 0.0:
                found, hidden = self.network(ids)
                logits = logits.float() + scale * (found.float() - logits.float())
        if logits.shape[:2] != ids.shape or self.mask_id >= logits.shape[2]:
            raise DataError(
                f"logits of shape {tuple(logits.shape)} for states {tuple(ids.shape)} with mask id {self.mask_id}; "
                "they must be (b, t, v), v above the mask id"
            )
        logits = logits.to(torch.float32, copy=True)
        logits[..., [self.mask_id, *self.never]] = NEVER
        return self._decided(torch.log_softmax(logits, -1), ids), hidden

    def _decided(self, log_p: Tensor, ids: Tensor) -> Tensor:
        """Return the log-probabilities, changed in place, with what the style says of decided positions."""
        return log_p


class Bidirectional(_Adapter):
    """LLaDA-style: a bidirectional transformer's log-softmax as it is, also where a token is decided.

    The mask's logit is -1e6 here too, so that no mask is ever drawn.
    """


class Subs(_Adapter):
    """MDLM-style (SUBS): the mask's logit is -1e6, a decided position is a point mass on its token."""

    points: ClassVar[bool] = True

    def _decided(self, log_p: Tensor, ids: Tensor) -> Tensor:
        decided = ids != self.mask_id
        log_p.masked_fill_(decided[..., None], NEVER)
        own = ids.clamp(max=log_p.shape[2] - 1)[..., None]
        return log_p.scatter_(2, own, torch.where(decided[..., None], 0.0, log_p.gather(2, own)))


def hugging_face(model: Any, before: Sequence[int] = (), after: Sequence[int] = ()) -> Network:
    """Return the network of a Hugging Face masked language model.

    before, after: token ids that the model reads around the sequence, such as BERT's [CLS] and [SEP]; they are cut off
    again. The hidden state is the last one that the model gives (for BERT behind the last layer's norm).
    """

    def run(ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = len(ids)
        ends = [torch.tensor(list(e), dtype=ids.dtype, device=ids.device).expand(rows, -1) for e in (before, after)]
        found = model(input_ids=torch.cat([ends[0], ids, ends[1]], 1), output_hidden_states=True)
        inside = slice(len(before), len(before) + ids.shape[1])
        return found.logits[:, inside], found.hidden_states[-1][:, inside]

    return run


def shifted(network: Network) -> Network:
    """Return a network whose logits are about the next token (Dream's way) as one whose logits are about their own.

    The first position takes its own logits. Whether a checkpoint needs this is for its card to say.
    """

    def run(ids: Tensor) -> tuple[Tensor, Tensor]:
        logits, hidden = network(ids)
        return torch.cat([logits[:, :1], logits[:, :-1]], 1), hidden

    return run


def masked_lm(
    model: Any, mask_id: int, before: Sequence[int] = (), after: Sequence[int] = (), never: Sequence[int] = (),
    style: str = "subs", guidance: float | None = None, batch: int = 0,
) -> Subs | Bidirectional:  # fmt: skip
    """Return a denoiser on any Hugging Face masked language model (`AutoModelForMaskedLM`); see `hugging_face`.

    Such a model was trained with 15 % masks or so: what it draws from many masks is no measure of diffusion models.
    Raises KnobError.
    """
    if style not in STYLES:
        raise KnobError(f"style is '{style}'; {close_to(str(style), STYLES)}")
    made = Subs if style == "subs" else Bidirectional
    room = getattr(model.config, "max_position_embeddings", None)
    longest = None if room is None else int(room) - _skipped(model) - len(before) - len(after)
    return made(hugging_face(model, before, after), mask_id, guidance, tuple(never), batch, longest)


def _skipped(model: Any) -> int:
    """Return how many rows of the position table no token uses: RoBERTa counts from behind its padding id."""
    positions = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(positions, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def load_masked_lm(
    path: str | Path, style: str = "subs", guidance: float | None = None, batch: int = 0, device: str = "cpu"
) -> tuple[Any, Any]:
    """Return (denoiser, tokenizer) of a checkpoint folder with a masked language model; nothing is downloaded.

    Special tokens are never generated; the classifier and separator tokens are put around the sequence.
    device: where it runs; `sample` needs the same. Raises DataError when the folder holds no such model, KnobError.
    """
    hf = need("transformers", extra="llm")
    if not (Path(path) / "config.json").is_file():
        raise DataError(f"{path} holds no config.json; give the folder of a masked language model")
    try:
        model = hf.AutoModelForMaskedLM.from_pretrained(str(path), local_files_only=True).eval().to(device)
        tokenizer = hf.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as err:
        raise DataError(f"{path} cannot be loaded as a masked language model: {err}") from err
    if tokenizer.mask_token_id is None:
        raise DataError(f"the tokenizer in {path} has no mask token")
    before = [i for i in (tokenizer.cls_token_id,) if i is not None]
    after = [i for i in (tokenizer.sep_token_id,) if i is not None]
    never = [i for i in tokenizer.all_special_ids if i != tokenizer.mask_token_id]
    return masked_lm(model, tokenizer.mask_token_id, before, after, never, style, guidance, batch), tokenizer
