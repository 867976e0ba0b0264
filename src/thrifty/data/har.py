"""UCI-HAR: what a person does, from 2.56 seconds of a phone's accelerometer and gyroscope."""

from __future__ import annotations

import numpy as np

from thrifty.data.source import Source, find, provenance, read
from thrifty.task import Task

SOURCE = Source(
    title="UCI-HAR (subset)",
    origin="Anguita et al. 2013, A public domain dataset for human activity recognition using smartphones",
    licence="CC BY 4.0",
    shapes="2400 training and 950 test windows of 9 signals x 128 samples at 50 Hz, 6 classes",
    get="Download and unpack archive.ics.uci.edu/dataset/240; "
    "python -m thrifty.data.prepare har UNPACKED FOLDER (it gives all 7352 + 2947 windows).",
    files={"uci_har_subset.npz": "8c5858f278b28b3846f87eb1e1f7aa688abeda827eab23229731d897531b807c"},
)


def load(seed: int = 0) -> Task:
    """Return the windows, (n, 9, 128), each signal less its training mean, over its training deviation.

    15 % of the training windows, by class, are the validation split. Windows overlap by half and the file
    does not say whose they are, so validation is somewhat easier than the test split, which holds other
    people.
    """
    paths = find(SOURCE)
    file = read(paths["uci_har_subset.npz"])
    mean = file["x_train"].mean(axis=(0, 2), dtype=np.float64)
    std = file["x_train"].std(axis=(0, 2), dtype=np.float64)
    x, x_test = (((file[k] - mean[:, None]) / std[:, None]).astype(np.float32) for k in ("x_train", "x_test"))
    return Task.from_arrays(
        x,
        file["y_train"].astype(np.int64),
        x_test=x_test,
        y_test=file["y_test"].astype(np.int64),
        seed=seed,
        name="har",
        classes=tuple(file["classes"].tolist()),
        info={**provenance(SOURCE, paths), "mean": mean.tolist(), "std": std.tolist()},
    )
