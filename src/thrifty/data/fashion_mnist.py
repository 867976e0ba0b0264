"""Fashion-MNIST: 28x28 grey pictures of clothes, from the Debian package."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.data.images import channel_statistics, normalised
from thrifty.data.source import FOLDER_VARIABLE, Source, provenance
from thrifty.errors import DataError
from thrifty.task import Task

Array = npt.NDArray[Any]

SOURCE = Source(
    title="Fashion-MNIST",
    origin="Xiao et al. 2017, arXiv 1708.07747; the copy in Debian's package dataset-fashion-mnist",
    licence="MIT",
    shapes="60000 training and 10000 test images 1x28x28, 10 classes",
    get="apt-get install dataset-fashion-mnist, or put its four *-ubyte.gz files into THRIFTY_DATA.",
)
FOLDERS = ("/usr/share/datasets/fashion-mnist", "/usr/share/dataset-fashion-mnist")
NAMES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle-boot"]


def idx(path: Path) -> Array:
    """Return the array of an IDX file of bytes: a big-endian header (0, 0, 8, axes, sizes...), then the
    values.
    """
    with gzip.open(path, "rb") as file:
        raw = file.read()
    axes = raw[3] if len(raw) > 3 and raw[:3] == b"\0\0\x08" else 0
    head = raw[4 : 4 + 4 * axes]
    shape = tuple(int(n) for n in np.frombuffer(head[: len(head) // 4 * 4], ">u4"))
    if not axes or len(shape) != axes or len(raw) != 4 + 4 * axes + int(np.prod(shape)):
        raise DataError(f"{path} is not an IDX file of bytes")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def find() -> dict[str, Path]:
    """Return the four files. Raises DataError with what to do."""
    names = [f"{p}-{k}-ubyte.gz" for p in ("train", "t10k") for k in ("images-idx3", "labels-idx1")]
    for folder in (os.environ.get(FOLDER_VARIABLE, ""), *FOLDERS):
        paths = {n: Path(folder) / n for n in names}
        if folder and all(p.is_file() for p in paths.values()):
            return paths
    raise DataError(f"Fashion-MNIST is not on this machine. {SOURCE.get}")


def load(seed: int = 0) -> Task:
    """Return the pictures, (n, 1, 28, 28), less the training mean, over its deviation; 10 % validation, by
    class.
    """
    paths = find()
    pixels, labels, test, test_labels = (idx(p) for p in paths.values())
    mean, std = channel_statistics(pixels[:, None])
    return Task.from_arrays(
        normalised(pixels[:, None], mean, std),
        labels.astype(np.int64),
        x_test=normalised(test[:, None], mean, std),
        y_test=test_labels.astype(np.int64),
        validation=0.1,
        seed=seed,
        name="fashion-mnist",
        classes=tuple(NAMES),
        info={**provenance(SOURCE, paths), "mean": mean.tolist(), "std": std.tolist()},
    )
