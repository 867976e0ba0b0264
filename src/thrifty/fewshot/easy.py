"""What EASY adds to frozen features: shots averaged over crops, and several backbones side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thrifty.fewshot.preprocess import Array, InputError, OptionError, unit

Images = npt.NDArray[np.floating]
Extract = Callable[[Images], npt.NDArray[np.floating]]


@dataclass(frozen=True)
class Crops:
    """Random crops, resized: a share of the area, an aspect ratio, a place, each drawn anew."""

    views: int = 30  # crops of each image
    scale: tuple[float, float] = (0.08, 1.0)  # share of the area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height
    size: tuple[int, int] | None = None  # height, width of the result; None: as the image

    def __post_init__(self) -> None:
        """Refuse values outside their range, all at once."""
        bad = []
        if self.views < 1:
            bad.append(f"views is {self.views}; it must be at least 1")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            bad.append(f"scale is {self.scale}; it must be ascending, in (0, 1]")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            bad.append(f"ratio is {self.ratio}; it must be ascending and positive")
        if self.size is not None and min(self.size) < 1:
            bad.append(f"size is {self.size}; it must be at least (1, 1)")
        if bad:
            raise OptionError("Crops: " + "; ".join(bad))

    def __call__(self, images: Images, rng: np.random.Generator) -> Images:
        """Return one crop of each image; images: (n, channels, height, width). Bilinear."""
        n, _, height, width = images.shape
        out = self.size or (height, width)
        area = rng.uniform(*self.scale, n) * height * width
        ratio = np.exp(rng.uniform(np.log(self.ratio[0]), np.log(self.ratio[1]), n))
        tall = np.minimum(np.sqrt(area / ratio), height)
        wide = np.minimum(np.sqrt(area * ratio), width)
        top, left = rng.random(n) * (height - tall), rng.random(n) * (width - wide)
        rows, down = _places(top, tall, out[0], height)
        columns, right = _places(left, wide, out[1], width)
        lines = _blend(images, rows, down, axis=2)
        return _blend(lines, columns, right, axis=3).astype(images.dtype, copy=False)


def _places(start: Array, length: Array, out: int, size: int) -> tuple[npt.NDArray[np.int64], Array]:
    """Return the lower pixel (n, out) and the weight of the next one, sampling at pixel centres."""
    at = start[:, None] + (np.arange(out) + 0.5) * (length[:, None] / out) - 0.5
    at = np.clip(at, 0.0, size - 1.0)
    low = np.minimum(at.astype(np.int64), max(size - 2, 0))
    return low, at - low


def _blend(images: Images, low: npt.NDArray[np.int64], weight: Array, axis: int) -> Images:
    shape = (len(low), 1, -1, 1) if axis == 2 else (len(low), 1, 1, -1)
    high = np.minimum(low + 1, images.shape[axis] - 1)
    first = np.take_along_axis(images, low.reshape(shape), axis=axis)
    second = np.take_along_axis(images, high.reshape(shape), axis=axis)
    w = weight.reshape(shape)
    result: Images = first * (1.0 - w) + second * w
    return result


def augmented_shots(
    images: Images, extract: Extract, rng: np.random.Generator, crops: Crops | None = None
) -> Array:
    """Return the features (n, d) of images averaged over random crops of each.

    images: (n, channels, height, width). extract: (n, channels, height, width) -> (n, d), a frozen backbone.

    Source: EASY (Bendou et al. 2022, arXiv:2201.09699), "augmented samples".

    >>> flat = np.ones((2, 1, 4, 4))
    >>> augmented_shots(flat, lambda x: x.mean(axis=(2, 3)), np.random.default_rng(0), Crops(views=3))
    array([[1.],
           [1.]])
    """
    crops = crops or Crops()
    if images.ndim != 4:
        raise InputError(f"images have shape {images.shape}; they must be (n, channels, height, width)")
    total: Array | None = None
    for _ in range(crops.views):
        found = np.asarray(extract(crops(images, rng)), np.float64)
        if found.ndim != 2 or len(found) != len(images):
            raise InputError(f"extract returned shape {found.shape} for {len(images)} images; it must be (n, d)")
        total = found if total is None else total + found
    result: Array = np.asarray(total) / crops.views
    return result


def average_views(features: npt.ArrayLike) -> Array:
    """Return features (n, d) averaged over views (n, views, d) that were extracted before."""
    found = np.asarray(features, np.float64)
    if found.ndim != 3 or not found.shape[1]:
        raise InputError(f"features have shape {found.shape}; they must be (n, views, d)")
    result: Array = found.mean(axis=1)
    return result


def ensemble(features: Sequence[npt.ArrayLike], normalise: bool = False) -> Array:
    """Return the features of several backbones side by side: (n, d1), (n, d2), ... give (n, d1 + d2 + ...).

    normalise: bring each backbone to unit length first, so that none outweighs the others; EASY does not.

    Source: EASY (Bendou et al. 2022, arXiv:2201.09699), the ensemble of its title.

    >>> ensemble([[[1.0]], [[2.0, 3.0]]])
    array([[1., 2., 3.]])
    """
    parts = [np.asarray(f, np.float64) for f in features]
    if not parts or any(p.ndim != 2 or len(p) != len(parts[0]) for p in parts):
        raise InputError(f"shapes are {[p.shape for p in parts]}; each must be (n, d), of equal n")
    return np.concatenate([unit(p) for p in parts] if normalise else parts, axis=1)
