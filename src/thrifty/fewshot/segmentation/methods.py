"""The five ways to adapt an encoder: what of it is trained, and what the head sees."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from thrifty.errors import NoMatch, close_to
from thrifty.fewshot.segmentation.encoder import Encoder, frozen
from thrifty.fewshot.segmentation.lora import apply_lora
from thrifty.fewshot.segmentation.svf import apply_svf


@dataclass(frozen=True)
class Linear:
    """Train the head alone, on the last map."""

    name = "linear"
    multilayer = False
    trains_encoder = False

    def prepare(self, encoder: Encoder, generator: torch.Generator) -> Encoder:
        """Return a frozen copy of the encoder."""
        return frozen(encoder)


@dataclass(frozen=True)
class Multilayer:
    """Train the head alone, on all maps joined."""

    name = "multilayer"
    multilayer = True
    trains_encoder = False

    def prepare(self, encoder: Encoder, generator: torch.Generator) -> Encoder:
        """Return a frozen copy of the encoder."""
        return frozen(encoder)


@dataclass(frozen=True)
class Svf:
    """Train the head and the encoder's singular values; unless `strict`, also its norms and embeddings."""

    strict: bool = False
    name = "svf"
    multilayer = False
    trains_encoder = True

    def prepare(self, encoder: Encoder, generator: torch.Generator) -> Encoder:
        """Return a copy of the encoder with trainable singular values."""
        made = copy.deepcopy(encoder)
        apply_svf(made, self.strict)
        return made


@dataclass(frozen=True)
class Lora:
    """Train the head and low-rank corrections of some layers."""

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.1
    targets: tuple[str, ...] = ()  # ends of layer names; empty: the encoder's own
    name = "lora"
    multilayer = False
    trains_encoder = True

    def prepare(self, encoder: Encoder, generator: torch.Generator) -> Encoder:
        """Return a copy of the encoder with adapters."""
        made = copy.deepcopy(encoder)
        apply_lora(made, self.targets or encoder.lora_targets, self.rank, self.alpha, self.dropout, generator)
        return made


@dataclass(frozen=True)
class FineTune:
    """Train everything."""

    name = "finetune"
    multilayer = False
    trains_encoder = True

    def prepare(self, encoder: Encoder, generator: torch.Generator) -> Encoder:
        """Return a copy of the encoder, all of it trainable."""
        made = copy.deepcopy(encoder)
        for parameter in made.parameters():
            parameter.requires_grad_(True)
        return made


Method = Linear | Multilayer | Svf | Lora | FineTune
METHODS: dict[str, type[Method]] = {m.name: m for m in (Linear, Multilayer, Svf, Lora, FineTune)}


def method_of(method: str | Method) -> Method:
    """Return the method of a name, with its defaults; raises NoMatch."""
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise NoMatch(f"no method '{method}'; {close_to(method, METHODS)}")
    return METHODS[method]()


def trainable(module: nn.Module) -> int:
    """Return how many numbers of a module are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
