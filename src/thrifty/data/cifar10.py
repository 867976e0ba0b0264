"""CIFAR-10: 32x32 colour pictures of ten things."""

from __future__ import annotations

import numpy as np

from thrifty.data.images import channel_statistics, normalised, pixels_of
from thrifty.data.source import Source, find, provenance, read
from thrifty.task import Task

SOURCE = Source(
    title="CIFAR-10 (JPEG)",
    origin="Krizhevsky 2009, Learning multiple layers of features from tiny images",
    licence="research use",
    shapes="50000 training and 10000 test images 3x32x32, stored as JPEG, 10 classes",
    get="Download and unpack cifar-10-binary.tar.gz from www.cs.toronto.edu/~kriz/cifar.html; "
    "python -m thrifty.data.prepare cifar10 UNPACKED FOLDER.",
    files={
        "cifar10_train.npz": "9434901cfb98d0572d02115cce064f67116d5e37088136e5300ac41a1424b02b",
        "cifar10_test.npz": "f5ad4b757374893a9d717d727038484d4ce2944b565a459779259c4d0d2a1b1f",
    },
)


def load(seed: int = 0, size: int = 32) -> Task:
    """Return the pictures, (n, 3, size, size), each channel less its training mean, over its training
    deviation.

    10 % of the training pictures, by class, are the validation split.
    """
    paths = find(SOURCE)
    train, test = read(paths["cifar10_train.npz"]), read(paths["cifar10_test.npz"])
    pixels = pixels_of(paths["cifar10_train.npz"], train, size)
    mean, std = channel_statistics(pixels)
    return Task.from_arrays(
        normalised(pixels, mean, std),
        train["label"].astype(np.int64),
        x_test=normalised(pixels_of(paths["cifar10_test.npz"], test, size), mean, std),
        y_test=test["label"].astype(np.int64),
        validation=0.1,
        seed=seed,
        name="cifar10",
        classes=tuple(train["classes"].tolist()),
        info={**provenance(SOURCE, paths), "mean": mean.tolist(), "std": std.tolist(), "size": size},
    )
