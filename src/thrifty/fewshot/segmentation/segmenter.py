"""An encoder with a segmentation head: predicting masks, saving and loading what was trained."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from thrifty.errors import StoreError
from thrifty.fewshot.segmentation.confusion import Confusion
from thrifty.fewshot.segmentation.encoder import Encoder, check, fingerprint
from thrifty.fewshot.segmentation.methods import METHODS, Method, method_of
from thrifty.fewshot.segmentation.pictures import (
    LabelledPictures,
    Pixels,
    Progress,
    pair,
    resize_mask,
    resize_picture,
)

FORMAT = 1


class Head(nn.Module):
    """Batch norm over the channels, then a 1x1 convolution to M classes: C * M + M + 2 C trained numbers."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.classify = nn.Conv2d(channels, classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, M, h, w) of features (B, C, h, w)."""
        logits: Tensor = self.classify(self.norm(features))
        return logits


class Segmenter(nn.Module):
    """Pictures in, masks out. Made by `adapt`, or by `Segmenter.load`.

    origin: fingerprint of the encoder before adaptation; a saved model is put together with that encoder only.
    """

    def __init__(self, encoder: Encoder, head: Head, method: Method, classes: tuple[str, ...], origin: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.method = method
        self.classes = classes
        self.origin = origin

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, M, h, w) at the grid of the features. x: pictures as Encoder.prepare makes them."""
        logits: Tensor = self.head(self.encoder.features(x, self.method.multilayer))
        return logits

    @torch.no_grad()
    def predict(self, pictures: Pixels) -> Pixels:
        """Return masks (B, H, W) uint8 of pictures (B, H, W, 3) uint8: the largest logit, upsampled bilinearly."""
        was = self.training
        self.eval()
        try:
            logits = self(self.encoder.prepare(pictures))
        finally:
            self.train(was)
        return upsampled(logits, pictures.shape[1:3]).argmax(1).to(torch.uint8).cpu().numpy()

    def save(self, path: str | Path) -> None:
        """Write what was trained (head, adapters or weights, and buffers that moved) to one safetensors file.

        The frozen encoder is not in it. Raises StoreError.
        """
        names = {n for n, p in self.named_parameters() if p.requires_grad} | {n for n, _ in self.head_tensors()}
        if self.method.trains_encoder:  # statistics that moved; singular vectors are made again from the encoder
            names |= {n for n, _ in self.named_buffers() if ".parametrizations." not in n}
        state = self.state_dict()
        tensors = {n: state[n].detach().cpu().contiguous() for n in sorted(names & set(state))}
        about = {
            "format": FORMAT, "method": self.method.name, "knobs": asdict(self.method), "classes": self.classes,
            "origin": self.origin,
        }  # fmt: skip
        target = Path(path)
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        try:
            save_file(tensors, partial, metadata={"thrifty": json.dumps(about)})
            os.replace(partial, target)
        except (OSError, SafetensorError) as err:
            partial.unlink(missing_ok=True)
            raise StoreError(f"{path} cannot be written: {err}") from err

    def head_tensors(self) -> list[tuple[str, Tensor]]:
        """Return the named tensors of the head."""
        return [(f"head.{n}", t) for n, t in self.head.state_dict().items()]

    @classmethod
    def load(cls, path: str | Path, encoder: Encoder) -> Segmenter:
        """Return a saved model on the encoder that it was made from.

        Raises StoreError for a file that is none, or another encoder.
        """
        check(encoder)
        try:
            with safe_open(path, framework="pt") as file:
                about: dict[str, Any] = json.loads((file.metadata() or {})["thrifty"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            knobs: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in about["knobs"].items()}
            method = METHODS[about["method"]](**knobs)
            origin, classes = str(about["origin"]), tuple(about["classes"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as err:
            raise StoreError(f"{path} is not a saved segmenter: {err!r}") from err
        if about["format"] != FORMAT:
            raise StoreError(f"{path} has format {about['format']}; this version reads {FORMAT}")
        if fingerprint(encoder) != origin:
            raise StoreError(f"{path} was made with another encoder; give the one it was adapted from, unchanged")
        made = build(encoder, method, classes, torch.Generator().manual_seed(0), origin)
        wrong = made.load_state_dict(tensors, strict=False).unexpected_keys
        if wrong:
            raise StoreError(f"{path} has weights that the model lacks, such as {wrong[0]}")
        return made.eval()


def build(
    encoder: Encoder, method: str | Method, classes: tuple[str, ...], generator: torch.Generator, origin: str = ""
) -> Segmenter:
    """Return an untrained Segmenter on a prepared copy of the encoder."""
    chosen = method_of(method)
    origin = origin or fingerprint(encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        head = Head(encoder.width(chosen.multilayer), len(classes))
    head.to(next(encoder.parameters(), torch.empty(0)).device)
    return Segmenter(chosen.prepare(encoder, generator), head, chosen, classes, origin)


def upsampled(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Return logits (B, M, h, w) at the size (H, W) of the masks, bilinear, corners not aligned."""
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def evaluate(
    model: Segmenter, data: LabelledPictures, batch: int = 8, size: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> Confusion:  # fmt: skip
    """Return the confusion of a model on a whole set: one matrix over all pictures, none selected, none left out.

    size: (H, W) that pictures and masks are first resized to (the benchmark: 1024x1024, which changes the aspect
    ratio); None: masks as they are. Pictures of one size after the other go through in batches.
    """
    confusion = Confusion(data.classes)
    waiting: list[tuple[Pixels, Pixels]] = []

    def flush() -> None:
        if waiting:
            pictures, masks = (np.stack(part) for part in zip(*waiting))
            confusion.add(masks, model.predict(pictures))
            waiting.clear()

    for i in range(len(data)):
        picture, mask = pair(data, i)
        if size is not None:
            picture, mask = resize_picture(picture, *size), resize_mask(mask, *size)
        if waiting and (len(waiting) == batch or waiting[0][1].shape != mask.shape):
            flush()
        waiting.append((picture, mask))
        if progress is not None:
            progress(i + 1, len(data))
    flush()
    return confusion
