"""Pictures with a class number for every pixel: what a labelled set is, and how it is read, resized and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from thrifty.errors import DataError, need

IGNORE = 255  # the pixel value that counts for nothing: not in training, not in the score
Pixels = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]


class LabelledPictures(Protocol):
    """A set of pictures and masks, read one at a time."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes 0..M-1."""

    def __len__(self) -> int: ...

    def picture(self, i: int) -> Pixels:
        """Return picture i: (H, W, 3) uint8."""

    def mask(self, i: int) -> Pixels:
        """Return its mask: (H, W) uint8, class numbers 0..M-1 or IGNORE."""


@dataclass(frozen=True, eq=False)
class InMemory:
    """A set held in memory: two sequences of arrays of the same length.

    >>> data = InMemory([np.zeros((4, 4, 3), np.uint8)], [np.zeros((4, 4), np.uint8)], ("background",))
    >>> len(data), data.mask(0).shape
    (1, (4, 4))
    """

    pictures: Sequence[Pixels] | Pixels  # n of (H, W, 3) uint8
    masks: Sequence[Pixels] | Pixels  # n of (H, W) uint8
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.pictures) != len(self.masks):
            raise DataError(f"{len(self.pictures)} pictures but {len(self.masks)} masks; there must be one for each")

    def __len__(self) -> int:
        return len(self.pictures)

    def picture(self, i: int) -> Pixels:
        """Return picture i: (H, W, 3) uint8."""
        return np.asarray(self.pictures[i])

    def mask(self, i: int) -> Pixels:
        """Return its mask: (H, W) uint8."""
        return np.asarray(self.masks[i])


def pair(data: LabelledPictures, i: int) -> tuple[Pixels, Pixels]:
    """Return picture and mask i, checked: sizes equal, 8 bits, no class number that the set does not have.

    Raises DataError.
    """
    picture, mask = data.picture(i), data.mask(i)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise DataError(f"picture {i} is {picture.dtype} of shape {picture.shape}; it must be uint8 (H, W, 3)")
    if mask.dtype != np.uint8 or mask.shape != picture.shape[:2]:
        raise DataError(
            f"mask {i} is {mask.dtype} of shape {mask.shape}; it must be uint8 {picture.shape[:2]} as its picture"
        )
    _known(mask, len(data.classes), i)
    return picture, mask


def presence(data: LabelledPictures, least: int = 1, progress: Progress | None = None) -> npt.NDArray[np.bool_]:
    """Return which classes occur in which picture: (n, M), with at least `least` pixels. IGNORE is no class.

    progress: called with (done, all). Raises DataError for a value that is no class.
    """
    found = np.zeros((len(data), len(data.classes)), bool)
    for i in range(len(data)):
        mask = data.mask(i)
        _known(mask, len(data.classes), i)
        found[i] = np.bincount(mask.reshape(-1), minlength=256)[: len(data.classes)] >= least
        if progress is not None:
            progress(i + 1, len(data))
    return found


def _known(mask: Pixels, classes: int, i: int) -> None:
    values = np.unique(mask)
    strange = [int(v) for v in values if v >= classes and v != IGNORE]
    if strange:
        raise DataError(
            f"mask {i} has the values {strange[:5]}; there are {classes} classes (0..{classes - 1}), and {IGNORE} "
            "means ignore. Convert the labels first"
        )


def resize_picture(picture: Pixels, height: int, width: int) -> Pixels:
    """Return a picture (H, W, 3) in another size, bilinear with antialiasing."""
    return _resize(picture, height, width, "BILINEAR")


def resize_mask(mask: Pixels, height: int, width: int) -> Pixels:
    """Return a mask (H, W) in another size: nearest pixel only, so that no value appears that was not there.

    >>> np.unique(resize_mask(np.array([[0, 9], [9, 0]], np.uint8), 7, 5)).tolist()
    [0, 9]
    """
    return _resize(mask, height, width, "NEAREST")


def _resize(pixels: Pixels, height: int, width: int, how: str) -> Pixels:
    if pixels.shape[:2] == (height, width):
        return pixels
    image: Any = need("PIL.Image", extra="data")
    return np.asarray(image.fromarray(pixels).resize((width, height), image.Resampling[how]))


def read_picture(path: Any) -> Pixels:
    """Return a picture file as (H, W, 3) uint8; raises DataError for a file that is none."""
    return np.asarray(_open(path).convert("RGB"))


def read_mask(path: Any) -> Pixels:
    """Return a mask file as (H, W) uint8: its grey values, or its palette numbers."""
    image = _open(path)
    if image.mode not in ("L", "P", "1", "I;16", "I"):
        raise DataError(f"{path} has colours ({image.mode}); a mask has one number for each pixel")
    values = np.asarray(image)
    if values.ndim != 2 or values.max(initial=0) > 255:
        raise DataError(f"{path} has values up to {values.max()}; a mask has 8 bits")
    return values.astype(np.uint8)


def _open(path: Any) -> Any:
    image: Any = need("PIL.Image", extra="data")
    try:
        opened = image.open(path)
        opened.load()
    except OSError as err:
        raise DataError(f"{path} cannot be read as a picture: {err}") from err
    return opened
