"""Cityscapes from a local folder, in its official layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from thrifty.errors import DataError, NoMatch, close_to
from thrifty.fewshot.segmentation.pictures import IGNORE, Pixels, read_mask, read_picture

# number in gtFine_labelIds -> name; the order is that of the 19 training numbers
LABELS = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
CITYSCAPES_REDUCED = ("truck", "bus", "train")  # left out of the benchmark's second, "reduced" mIoU
SPLITS = ("train", "val", "test")
END = "_leftImg8bit.png"


class Cityscapes:
    """Pictures leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png with masks gtFine/SPLIT/CITY/NAME_gtFine_*.png; 19 classes.

    Masks are read from *_labelTrainIds.png where the official script has made them, else from *_labelIds.png, converted
    here by the same table; everything else is IGNORE. Raises DataError for a folder without pictures or masks.

    Source: Cordts et al. 2016 (arXiv:1604.01685); get it from cityscapes-dataset.com under its own terms.
    """

    classes = tuple(LABELS.values())

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        if split not in SPLITS:
            raise NoMatch(f"no split '{split}'; {close_to(split, SPLITS)}")
        base = Path(folder)
        self.files = sorted((base / "leftImg8bit" / split).glob(f"*/*{END}"))
        if not self.files:
            raise DataError(f"no {base}/leftImg8bit/{split}/CITY/*{END}; unpack leftImg8bit_trainvaltest.zip there")
        self.masks = [self._mask_file(base / "gtFine" / split, file) for file in self.files]
        missing = [f.name for f, m in zip(self.files, self.masks) if m is None]
        if missing:
            raise DataError(
                f"{len(missing)} pictures lack their gtFine mask, such as {missing[0]}; unpack gtFine_trainvaltest.zip"
            )

    @staticmethod
    def _mask_file(folder: Path, picture: Path) -> Path | None:
        stem = picture.name.removesuffix(END)
        for kind in ("labelTrainIds", "labelIds"):
            path = folder / picture.parent.name / f"{stem}_gtFine_{kind}.png"
            if path.is_file():
                return path
        return None

    def __len__(self) -> int:
        return len(self.files)

    def picture(self, i: int) -> Pixels:
        """Return picture i: (1024, 2048, 3) uint8."""
        return read_picture(self.files[i])

    def mask(self, i: int) -> Pixels:
        """Return its mask: 0..18, or IGNORE."""
        path = self.masks[i]
        if path is None:
            raise DataError(f"{self.files[i]} has no mask")
        values = read_mask(path)
        return values if path.name.endswith("labelTrainIds.png") else _TABLE[values]


_TABLE = np.full(256, IGNORE, np.uint8)
_TABLE[list(LABELS)] = np.arange(len(LABELS))
