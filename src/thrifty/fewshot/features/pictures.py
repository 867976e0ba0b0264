"""Pictures as uint8 arrays: read from files the way a person sees them, made square, cropped at random."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.errors import close_to, need
from thrifty.fewshot.easy import Crops
from thrifty.fewshot.preprocess import InputError, OptionError

Picture = npt.NDArray[np.uint8]  # (height, width, 3)
Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
FITS = ("crop", "pad", "stretch")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
BOUND = 2.0  # random crops are cut from a picture whose shorter side is at most so many times the encoder's size


def check_pictures(pictures: Any) -> list[Picture]:
    """Return pictures as a list of uint8 (height, width, 3); raise InputError for anything else."""
    found = list(pictures)
    for i, picture in enumerate(found):
        if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8:
            kind = getattr(picture, "dtype", type(picture).__name__)
            raise InputError(f"picture {i} is {kind}; pictures are uint8 with values 0 to 255")
        if picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
            hint = "; for grey ones: np.repeat(grey[..., None], 3, axis=-1)" if picture.ndim == 2 else ""
            raise InputError(f"picture {i} has shape {picture.shape}; it must be (height, width, 3){hint}")
    return found


def read_picture(path: str | Path, background: Colour = WHITE) -> Picture:
    """Return a picture file as uint8 (height, width, 3).

    Turned as its EXIF orientation says; of several frames the first; transparent parts show `background`; 16-bit
    grey is brought to 8 bits. Raises InputError when the file is no picture that can be read.
    """
    image = need("PIL.Image", extra="data")
    operations = need("PIL.ImageOps", extra="data")
    try:
        with image.open(path) as file:
            picture = operations.exif_transpose(file)
            if picture.mode.startswith("I;16"):
                grey = (np.asarray(picture) >> 8).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=-1)
            if picture.mode in ("I", "F"):
                raise ValueError(f"pixels of mode '{picture.mode}'; save it with 8 bits per channel")
            if picture.has_transparency_data:
                under = image.new("RGBA", picture.size, (*background, 255))
                picture = image.alpha_composite(under, picture.convert("RGBA"))
            return np.array(picture.convert("RGB"), np.uint8)
    except Exception as err:  # decoders raise whatever they like on a damaged file
        raise InputError(f"{path}: {err or type(err).__name__}") from err


def fit_picture(picture: Picture, size: int, fit: str = "crop", background: Colour = WHITE) -> Picture:
    """Return a picture as (size, size, 3), bicubic with antialiasing.

    fit: "crop" takes the centre square, "pad" adds `background` until it is square, "stretch" changes proportions.

    >>> fit_picture(np.zeros((4, 8, 3), np.uint8), 2).shape
    (2, 2, 3)
    """
    height, width = picture.shape[:2]
    if height != width:
        if fit == "crop":
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            picture = picture[top : top + side, left : left + side]
        elif fit == "pad":
            side = max(height, width)
            square = np.full((side, side, 3), background, np.uint8)
            top, left = (side - height) // 2, (side - width) // 2
            square[top : top + height, left : left + width] = picture
            picture = square
        elif fit != "stretch":
            raise OptionError(f"fit is '{fit}'; {close_to(fit, FITS)}")
    return resized(picture, size, size)


def resized(picture: Picture, height: int, width: int) -> Picture:
    """Return a picture with so many rows and columns; itself when it has them."""
    if picture.shape[:2] == (height, width):
        return picture
    image = need("PIL.Image", extra="data")
    made = image.fromarray(np.ascontiguousarray(picture)).resize((width, height), image.Resampling.BICUBIC)
    return np.array(made, np.uint8)


def picture_key(picture: Picture) -> bytes:
    """Return the sha256 of a picture's shape and pixels."""
    hashed = hashlib.sha256(b"picture %d %d " % picture.shape[:2])
    hashed.update(np.ascontiguousarray(picture).data)
    return hashed.digest()


@dataclass(frozen=True)
class PictureFiles(Sequence[Picture]):
    """Picture files as a sequence that reads each one when it is asked for."""

    paths: tuple[Path, ...]
    background: Colour = WHITE

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return PictureFiles(self.paths[index], self.background)
        return read_picture(self.paths[index], self.background)

    def key(self, index: int) -> bytes:
        """Return the sha256 of a file's bytes and of the background."""
        try:
            content = self.paths[index].read_bytes()
        except OSError as err:
            raise InputError(f"{self.paths[index]}: {err.strerror or err}") from err
        return hashlib.sha256(b"file %d %d %d " % self.background + content).digest()

    def check(self, indices: Sequence[int]) -> None:
        """Raise InputError that names every one of these files that cannot be read."""
        bad = []
        for index in indices:
            try:
                read_picture(self.paths[index], self.background)
            except InputError as err:
                bad.append(str(err))
        if bad:
            lines = "\n".join(f"  - {words}" for words in bad)
            raise InputError(f"{len(bad)} picture(s) cannot be read; mend them or take them away:\n{lines}")


@dataclass(frozen=True)
class CroppedPictures(Sequence[Picture]):
    """Random crops of pictures, as a sequence: all crops of the first, then all of the second, and so on.

    A crop depends on the picture, the number of the crop and the seed, not on the other pictures, so that
    features of crops can be cached. size: rows and columns of a crop, the encoder's.
    """

    pictures: Sequence[Picture]
    crops: Crops
    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Remember the picture read last: its crops are asked for one after the other."""
        object.__setattr__(self, "_picture", lru_cache(maxsize=1)(self._read))

    def __len__(self) -> int:
        return len(self.pictures) * self.crops.views

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row, view = divmod(index % len(self), self.crops.views)
        planes, key = self._picture(row)  # type: ignore[attr-defined]
        rng = np.random.default_rng([self.seed, view, *np.frombuffer(key, np.uint32).tolist()])
        cut = Crops(1, self.crops.scale, self.crops.ratio, (self.size, self.size))(planes, rng)
        return np.clip(np.rint(cut[0].transpose(1, 2, 0)), 0, 255).astype(np.uint8)

    def key(self, index: int) -> bytes:
        """Return the sha256 of the picture's key and everything that decides the crop."""
        row, view = divmod(index, self.crops.views)
        knobs = f" crop {view} {self.seed} {self.size} {self.crops.scale} {self.crops.ratio}"
        return hashlib.sha256(self._key(row) + knobs.encode()).digest()

    def check(self, indices: Sequence[int]) -> None:
        """Check the pictures behind these crops, if they can be checked."""
        if isinstance(self.pictures, PictureFiles):
            self.pictures.check(sorted({index // self.crops.views for index in indices}))

    def _key(self, row: int) -> bytes:
        if isinstance(self.pictures, PictureFiles):
            return self.pictures.key(row)
        return picture_key(self.pictures[row])

    def _read(self, row: int) -> tuple[npt.NDArray[np.float64], bytes]:
        picture = check_pictures([self.pictures[row]])[0]
        height, width = picture.shape[:2]
        shrink = BOUND * self.size / min(height, width)
        if shrink < 1:  # crops are bilinear: take the finest detail away first
            picture = resized(picture, round(height * shrink), round(width * shrink))
        return picture.transpose(2, 0, 1)[None].astype(np.float64), self._key(row)
