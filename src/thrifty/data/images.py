"""Images that are stored as JPEG files in a row."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.data.source import cached, checksum
from thrifty.errors import DataError, KnobError, need

Array = npt.NDArray[Any]
LEAST_STD = 1e-3  # stands in for the deviation of a channel that does not vary


def decode(data: Array, offset: Array, size: int) -> Array:
    """Return pixels (n, 3, size, size) uint8. data: (bytes,) uint8, all JPEG files in a row; offset: (n +
    1,).
    """
    image = need("PIL.Image", extra="data")
    raw = data.tobytes()
    pixels = np.empty((len(offset) - 1, 3, size, size), dtype=np.uint8)
    for i, (start, end) in enumerate(itertools.pairwise(offset)):
        try:
            picture = image.open(io.BytesIO(raw[start:end])).convert("RGB")
        except OSError as err:
            raise DataError(f"image {i} cannot be decoded: {err}") from err
        if picture.size != (size, size):
            picture = picture.resize((size, size), image.Resampling.BOX)
        pixels[i] = np.asarray(picture).transpose(2, 0, 1)
    return pixels


def pixels_of(path: Path, arrays: dict[str, Array], size: int) -> Array:
    """Return the pixels of a file (see `decode`), decoded once and then kept in the cache under the
    checksum.
    """
    if not 4 <= size <= 64:
        raise KnobError(f"size is {size}; it must be in 4..64 (the files hold 32x32 pixels)")
    key = f"{path.stem}_{size}_{checksum(path)[:16]}"
    return cached(key, lambda: decode(arrays["jpeg"], arrays["offset"], size))


def normalised(pixels: Array, mean: Array, std: Array) -> Array:
    """Return (pixels / 255 - mean) / std as float32. pixels: (n, C, H, W) uint8; mean, std: (C,)."""
    scale = (1 / (255 * std)).astype(np.float32)[:, None, None]
    shift = (mean / std).astype(np.float32)[:, None, None]
    result: Array = pixels.astype(np.float32) * scale - shift
    return result


def channel_statistics(pixels: Array) -> tuple[Array, Array]:
    """Return mean and standard deviation of pixels / 255 for each channel, (C,) float64, rounded to 4
    digits.
    """
    counts = [np.bincount(pixels[:, c].reshape(-1), minlength=256) for c in range(pixels.shape[1])]
    values = np.arange(256) / 255
    mean = np.array([(c * values).sum() / c.sum() for c in counts])
    square = np.array([(c * values**2).sum() / c.sum() for c in counts])
    return mean.round(4), np.maximum(np.sqrt(np.maximum(square - mean**2, 0)).round(4), LEAST_STD)
