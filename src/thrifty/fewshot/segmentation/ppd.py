"""Plant phenotyping pictures (CVPPP 2017 leaf segmentation, A1 + A2 + A4) from a local folder: plant against ground."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from thrifty.errors import DataError, NoMatch, close_to
from thrifty.fewshot.segmentation.pictures import Pixels, read_mask, read_picture

PARTS = ("train", "validation", "all")
END = "_rgb.png"


class Ppd:
    """Pictures A1/NAME_rgb.png, A2/..., A4/... with masks NAME_fg.png or, without one, NAME_label.png; 2 classes.

    The set has no official test part here: it is halved with `seed`, 391 for training and 391 for validation of the 783
    (one is left over). The benchmark's own fixed halves are a list in its repository; give its train half as
    `train_names` ("A1/plant001") to use it, the rest is then the validation part.

    Source: Minervini et al. 2016, Pattern Recognition Letters 81; plant-phenotyping.org/datasets, under its own terms.
    """

    classes = ("background", "plant")

    def __init__(
        self, folder: str | Path, part: str = "train", seed: int = 0, train_names: frozenset[str] | None = None,
        folders: tuple[str, ...] = ("A1", "A2", "A4"),
    ) -> None:  # fmt: skip
        if part not in PARTS:
            raise NoMatch(f"no part '{part}'; {close_to(part, PARTS)}")
        base = Path(folder)
        every = [f for name in folders for f in sorted((base / name).glob(f"*{END}"))]
        if not every:
            raise DataError(f"no {base}/{folders[0]}/*{END}; give the 'training' folder of the CVPPP 2017 archive")
        missing = [f.name for f in every if _mask_file(f) is None]
        if missing:
            raise DataError(f"{len(missing)} pictures have no _fg.png or _label.png, such as {missing[0]}")
        names = [f"{f.parent.name}/{f.name.removesuffix(END)}" for f in every]
        if train_names is None:
            order, half = np.random.default_rng(seed).permutation(len(every)), len(every) // 2
            first, second = order[:half], order[half : 2 * half]
        else:
            strange = sorted(train_names - set(names))
            if strange:
                raise NoMatch(f"no picture '{strange[0]}'; {close_to(strange[0], names)}")
            flags = np.array([n in train_names for n in names])
            first, second = np.flatnonzero(flags), np.flatnonzero(~flags)
        rows = {"train": first, "validation": second, "all": np.arange(len(every))}[part]
        self.files = [every[i] for i in sorted(rows)]

    def __len__(self) -> int:
        return len(self.files)

    def picture(self, i: int) -> Pixels:
        """Return picture i: (H, W, 3) uint8."""
        return read_picture(self.files[i])

    def mask(self, i: int) -> Pixels:
        """Return its mask: 1 where there is a plant."""
        path = _mask_file(self.files[i])
        if path is None:
            raise DataError(f"{self.files[i]} has no mask")
        return (read_mask(path) > 0).astype(np.uint8)


def _mask_file(picture: Path) -> Path | None:
    stem = picture.name.removesuffix(END)
    for kind in ("fg", "label"):
        path = picture.with_name(f"{stem}_{kind}.png")
        if path.is_file():
            return path
    return None
