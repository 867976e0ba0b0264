"""Which pictures are the few labelled ones: k for each class, the same for the same generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from thrifty.errors import DataError, KnobError, NoMatch, close_to
from thrifty.fewshot.segmentation.pictures import IGNORE, LabelledPictures, Pixels, presence

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Item:
    """One labelled example: a picture, the class it was drawn for (-1: none), and where to cut it (row, column)."""

    picture: int
    target: int = -1
    centre: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Support:
    """The few labelled examples of a set."""

    data: LabelledPictures
    items: tuple[Item, ...] = field(repr=False)

    def __post_init__(self) -> None:
        if not self.items:
            raise DataError("the support is empty; give at least one labelled picture")

    @classmethod
    def whole(cls, data: LabelledPictures) -> Support:
        """Return all pictures of a set as support."""
        return cls(data, tuple(Item(i) for i in range(len(data))))

    def __len__(self) -> int:
        return len(self.items)

    def split(self, share: float, rng: np.random.Generator) -> tuple[Support, Support]:
        """Return two parts, the second with about `share` of the items, at least one in each; for choosing knobs."""
        if len(self) < 2:
            raise DataError("one labelled picture cannot be split; give validation pictures")
        held = min(max(1, round(share * len(self))), len(self) - 1)
        order = rng.permutation(len(self))
        first, second = np.sort(order[held:]), np.sort(order[:held])
        parts = [Support(self.data, tuple(self.items[i] for i in part)) for part in (first, second)]
        return parts[0], parts[1]


def sample(
    data: LabelledPictures, shots: int, rng: np.random.Generator,
    classes: Sequence[str] | None = None, least: int = 1, found: Flags | None = None,
) -> Support:  # fmt: skip
    """Return `shots` pictures for each class: the rule of the benchmark for COCO.

    The pictures are shuffled and walked once; a picture is taken if one of its classes still needs a shot, and counts
    for one class: of those that need one, the one that the fewest pictures show. So there are shots * len(classes)
    different pictures. classes: names that need shots (None: all but the first, which is taken for the background).
    least: pixels that a class must have. found: `presence(data, least)`, when it is known.
    Raises DataError, naming the classes, when some have too few pictures; KnobError; NoMatch.

    Source: Bensaid et al. 2025 (arXiv:2401.11311) and its code; which class a picture counts for is our choice.
    """
    if shots < 1:
        raise KnobError(f"shots is {shots}; it must be at least 1")
    wanted = _numbers(data, classes)
    found = presence(data, least) if found is None else found
    missing = dict.fromkeys(wanted, shots)
    often = found.sum(0)
    items = []
    for i in rng.permutation(len(data)):
        useful = [c for c in wanted if missing[c] and found[i, c]]
        if useful:
            target = min(useful, key=lambda c: (often[c], c))
            missing[target] -= 1
            items.append(Item(int(i), target))
    _refuse(data, missing, shots, "pictures")
    return Support(data, tuple(sorted(items, key=lambda item: (item.target, item.picture))))


def sample_centres(
    data: LabelledPictures, shots: int, rng: np.random.Generator,
    classes: Sequence[str] | None = None, tile: int = 1024, least: int = 1,
) -> Support:  # fmt: skip
    """Return `shots` places for each class, to be cut out of large pictures: the rule of the benchmark for Cityscapes.

    Each picture is cut into tiles of `tile` pixels; the mean position of a class in a tile is a candidate; `shots` of
    the candidates of each class are drawn without replacement. classes: names (None: all). One picture may come several
    times. Raises as `sample`.

    Source: Bensaid et al. 2025 (arXiv:2401.11311) and its code, which uses class-uniform sampling (Zhu et al. 2019).
    """
    if shots < 1 or tile < 1:
        raise KnobError(f"shots is {shots} and tile {tile}; both must be at least 1")
    wanted = _numbers(data, classes, background=True)
    places: dict[int, list[tuple[int, tuple[int, int]]]] = {c: [] for c in wanted}
    for i in range(len(data)):
        for c, centre in centroids(data.mask(i), tile, least):
            if c in places:
                places[c].append((i, centre))
    _refuse(data, {c: shots - min(shots, len(p)) for c, p in places.items()}, shots, "places")
    items = []
    for c in wanted:
        for j in np.sort(rng.choice(len(places[c]), shots, replace=False)):
            i, centre = places[c][j]
            items.append(Item(i, c, centre))
    return Support(data, tuple(items))


def sample_pictures(data: LabelledPictures, count: int, rng: np.random.Generator) -> Support:
    """Return `count` different pictures, whatever they show: the benchmark's rule for PPD, with count = 2 * shots."""
    if not 1 <= count <= len(data):
        raise KnobError(f"count is {count}; it must be in 1..{len(data)}, the number of pictures")
    return Support(data, tuple(Item(int(i)) for i in np.sort(rng.choice(len(data), count, replace=False))))


def centroids(mask: Pixels, tile: int, least: int = 1) -> list[tuple[int, tuple[int, int]]]:
    """Return (class, (row, column)) for every class of every tile: the mean position of its pixels there, rounded.

    >>> centroids(np.array([[0, 0, 3, 3]], np.uint8), 2)
    [(0, (0, 0)), (3, (0, 2))]
    """
    found = []
    for top in range(0, mask.shape[0], tile):
        for left in range(0, mask.shape[1], tile):
            part = mask[top : top + tile, left : left + tile]
            for c in np.unique(part[part != IGNORE]):
                rows, columns = np.nonzero(part == c)
                if len(rows) >= least:
                    found.append((int(c), (top + int(rows.mean()), left + int(columns.mean()))))
    return found


def _numbers(data: LabelledPictures, names: Sequence[str] | None, background: bool = False) -> list[int]:
    if names is None:
        return list(range(0 if background or len(data.classes) == 1 else 1, len(data.classes)))
    strange = [n for n in names if n not in data.classes]
    if strange:
        raise NoMatch(f"no class '{strange[0]}'; {close_to(strange[0], data.classes)}")
    return sorted({data.classes.index(n) for n in names})


def _refuse(data: LabelledPictures, missing: dict[int, int], shots: int, what: str) -> None:
    short = [f"'{data.classes[c]}' {shots - n} of {shots}" for c, n in missing.items() if n]
    if short:
        raise DataError(f"too few {what}: {', '.join(short)}; ask for fewer shots, or name the classes that need them")
