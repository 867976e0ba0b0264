"""GTSRB: 43 classes of German traffic signs, cropped, in colour."""

from __future__ import annotations

import numpy as np

from thrifty.data.images import channel_statistics, normalised, pixels_of
from thrifty.data.source import Source, find, provenance, read
from thrifty.task import Task

SOURCE = Source(
    title="GTSRB",
    origin="Stallkamp et al. 2012, Man vs. computer: benchmarking machine learning algorithms for traffic "
    "sign recognition",
    licence="research use",
    shapes="39209 training and 12630 test images 3x32x32 (regions of interest, JPEG), 43 classes, tracks",
    get="Download and unpack GTSRB_Final_Training_Images.zip, GTSRB_Final_Test_Images.zip and "
    "GTSRB_Final_Test_GT.zip from benchmark.ini.rub.de/gtsrb_dataset.html; "
    "python -m thrifty.data.prepare gtsrb UNPACKED FOLDER.",
    files={
        "gtsrb_train.npz": "f523e79cf4625c1c071561b82d044720ad43346a1082038cef00c38c29092ec3",
        "gtsrb_test.npz": "89a794bf39257971fffea23648632861304ff895d8aed61f8f25b91498a4555d",
    },
)


def load(seed: int = 0, size: int = 32) -> Task:
    """Return the signs, (n, 3, size, size), each channel less its training mean, over its training deviation.

    The validation split is 15 % of the training images of every class, whole tracks only: the 30 pictures of
    one track show one sign from nearer and nearer, and a split by image would measure memory. Tracks are
    numbered within a class, so (class, track) is the group.
    """
    paths = find(SOURCE)
    train, test = read(paths["gtsrb_train.npz"]), read(paths["gtsrb_test.npz"])
    pixels = pixels_of(paths["gtsrb_train.npz"], train, size)
    mean, std = channel_statistics(pixels)
    return Task.from_arrays(
        normalised(pixels, mean, std),
        train["label"].astype(np.int64),
        groups=train["label"].astype(np.int64) * 65536 + train["track"],
        x_test=normalised(pixels_of(paths["gtsrb_test.npz"], test, size), mean, std),
        y_test=test["label"].astype(np.int64),
        seed=seed,
        name="gtsrb",
        classes=tuple(str(i) for i in range(43)),
        info={**provenance(SOURCE, paths), "mean": mean.tolist(), "std": std.tolist(), "size": size},
    )
