"""Handwritten digits, 8x8: the small real data set that comes with scikit-learn."""

from __future__ import annotations

import numpy as np

from thrifty.data.source import Source
from thrifty.errors import need
from thrifty.task import Task

SOURCE = Source(
    title="Optical recognition of handwritten digits",
    origin="Alpaydin and Kaynak 1998, UCI repository 80; the copy inside scikit-learn (load_digits)",
    licence="CC BY 4.0",
    shapes="1797 images 1x8x8, grey levels 0..16, 10 classes",
    get="pip install scikit-learn",
)


def load(seed: int = 0) -> Task:
    """Return the digits: x (n, 1, 8, 8) in [0, 1], 20 % test and 15 % validation, carved with the seed by
    class.
    """
    data = need("sklearn.datasets", extra="data").load_digits()
    return Task.from_arrays(
        (data.images[:, None] / 16).astype(np.float32),
        data.target,
        test=0.2,
        seed=seed,
        name="digits",
        classes=tuple("0123456789"),
        info={"data": SOURCE.title, "origin": SOURCE.origin, "licence": SOURCE.licence, "scale": 1 / 16},
    )
