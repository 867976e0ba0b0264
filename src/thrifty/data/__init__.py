"""Named data sets. `load_task` makes a Task of one; the table says where each comes from and under which
licence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from thrifty.data import cifar10, digits, fashion_mnist, gtsrb, har, spoken_digits
from thrifty.data.source import Source
from thrifty.errors import KnobError, NoMatch, close_to
from thrifty.task import Task

__all__ = ["DATASETS", "SOURCES", "Source", "load_task"]

DATASETS: dict[str, Callable[..., Task]] = {
    "digits": digits.load,
    "har": har.load,
    "spoken-digits": spoken_digits.load,
    "gtsrb": gtsrb.load,
    "cifar10": cifar10.load,
    "fashion-mnist": fashion_mnist.load,
}
SOURCES: dict[str, Source] = {
    "digits": digits.SOURCE,
    "har": har.SOURCE,
    "spoken-digits": spoken_digits.SOURCE,
    "gtsrb": gtsrb.SOURCE,
    "cifar10": cifar10.SOURCE,
    "fashion-mnist": fashion_mnist.SOURCE,
}


def load_task(name: str, seed: int = 0, limit: int | None = None, **options: Any) -> Task:
    """Return the named data set as a Task, prepared as its module says.

    seed: carves the validation split. limit: use only this many rows of train, validation and test each
    (drawn with the seed, in proportion to the classes), for quick tries. options: of the data set, such as
    size=16 for "gtsrb" or form="2d" for "spoken-digits". Raises NoMatch for an unknown name, KnobError for an
    unknown option, DataError when the files are not there (it says how to get them).

    >>> task = load_task("digits", limit=100)
    >>> task.train.x.shape
    torch.Size([100, 1, 8, 8])
    """
    if name not in DATASETS:
        raise NoMatch(f"no data set '{name}'; {close_to(name, DATASETS)}")
    load = DATASETS[name]
    known = [p for p in inspect.signature(load).parameters if p != "seed"]
    strange = [f"'{o}' ({close_to(o, known) if known else 'it has none'})" for o in options if o not in known]
    if strange:
        raise KnobError(f"data set '{name}' has no option {', '.join(strange)}")
    task = load(seed=seed, **options)
    return task if limit is None else task.limited(limit)
