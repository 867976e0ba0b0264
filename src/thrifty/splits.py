"""Splits of data: tensors with targets, carved from arrays, read from images and loaders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thrifty.errors import DataError, need

Array = npt.NDArray[Any]

LOADER_BYTES = 4 * 2**30  # a DataLoader is read into memory up to this many bytes
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".gif", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Split:
    """Inputs x: float32 (n, ...), and targets y: int64 (n,) labels or float32 (n, ...) values."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)


def first(mask: Tensor) -> int:
    """Return the place of the first True."""
    return int(mask.nonzero()[0, 0])


def as_split(x: Any, y: Any) -> Split:
    """Return a split on the CPU: x float32 (8-bit integers divided by 255), y int64, or float32 if float."""
    x = torch.as_tensor(x).detach().cpu()
    y = torch.as_tensor(y).detach().cpu()
    scaled = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    return Split(scaled.contiguous(), (y.float() if y.is_floating_point() else y.long()).contiguous())


def number_labels(labels: Any, names: Sequence[str]) -> Any:
    """Return the place of each text label in `names`; raises DataError for labels that are not there."""
    if labels is None:
        return None
    strange = sorted(set(np.asarray(labels).tolist()) - set(names))
    if strange:
        raise DataError(f"labels {strange[:5]} are not among the classes {list(names)}")
    places = {n: i for i, n in enumerate(names)}
    return np.array([places[v] for v in np.asarray(labels).tolist()], dtype=np.int64)


def stratified(y: Array, share: float, seed: int, groups: Array | None = None) -> tuple[Array, Array]:
    """Return the sorted rows to keep and the rows to carve, about `share` of every class, whole groups only.

    y: (n,) integer labels; other targets are carved without regard to their value. groups: (n,) or None.
    Raises DataError when the share is less than one group.
    """
    rng = np.random.default_rng(seed)
    groups = np.arange(len(y)) if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1)
    if not 0 < share < 1:
        raise DataError(f"the share to carve from {len(y)} rows is {share:.3g}; it must be in (0, 1)")
    labels, first_rows = np.unique(groups, return_index=True)
    plain = y.dtype.kind in "iub" and y.ndim == 1
    kind = y[first_rows] if plain else np.zeros(len(labels), int)
    if plain and (kind[np.searchsorted(labels, groups)] != y).any():
        kind = np.zeros(len(labels), int)  # groups hold several classes: carve them whole
    sizes = np.bincount(groups)
    chosen: list[int] = []
    for value in np.unique(kind):
        members = rng.permutation(labels[kind == value])
        wanted, taken = round(share * sizes[members].sum()), 0
        for group in members[:-1]:
            if taken + sizes[group] / 2 > wanted:
                break
            chosen.append(int(group))
            taken += int(sizes[group])
    carved = np.isin(groups, chosen)
    if not carved.any():
        raise DataError(
            f"{share:.0%} of {len(y)} rows in {len(labels)} group(s) is less than one group: "
            "give the validation and test data yourself, or more data"
        )
    return np.flatnonzero(~carved), np.flatnonzero(carved)


def draw(y: Array, rows: int, seed: int) -> Array:
    """Return `rows` sorted places in y (fewer than it has), by class in equal proportion when y are labels.

    >>> draw(np.array([0, 0, 0, 0, 1, 1]), 3, seed=0).size
    3
    """
    order = np.random.default_rng(seed).permutation(len(y))
    if y.dtype.kind in "iub" and y.ndim == 1:
        rank = np.empty(len(y))  # of a row within its class, in [0, 1)
        for value, count in zip(*np.unique(y, return_counts=True)):
            rank[order[y[order] == value]] = (np.arange(count) + 0.5) / count
        order = order[np.argsort(rank[order], kind="stable")]
    return np.sort(order[:rows])


def read_images(folder: Path, classes: Sequence[str], size: tuple[int, int] | None) -> tuple[Array, Array]:
    """Return pixels (n, 3, H, W) float32 in [0, 1] and labels (n,); DataError names all that is wrong."""
    image = need("PIL.Image", extra="data")
    pixels, labels, bad = [], [], []
    for label, name in enumerate(classes):
        for file in sorted((folder / name).glob("*")):
            if file.suffix.lower() not in IMAGE_ENDINGS:
                continue
            try:
                with image.open(file) as picture:
                    rgb = picture.convert("RGB")
            except OSError as err:
                bad.append(f"{file}: {err}")
                continue
            pixels.append(np.asarray(rgb.resize(size[::-1], image.Resampling.BILINEAR) if size else rgb))
            labels.append(label)
    strange = sorted(d.name for d in folder.iterdir() if d.is_dir() and d.name not in classes)
    bad += [f"{folder / s}: a class without training images" for s in strange]
    shapes = sorted({p.shape[:2] for p in pixels})
    if len(shapes) > 1:
        bad.append(
            f"the images have {len(shapes)} sizes, {shapes[0]} to {shapes[-1]}: give size=(height, width)"
        )
    if not pixels:
        bad.append(f"no images ({', '.join(IMAGE_ENDINGS)}) in {folder}")
    if bad:
        raise DataError("the images cannot be used:\n" + "\n".join(f"  - {b}" for b in bad[:20]))
    return np.stack(pixels).transpose(0, 3, 1, 2).astype(np.float32) / 255, np.array(labels, dtype=np.int64)


def read_loader(loader: Iterable[Any]) -> tuple[Array, Array]:
    """Return all (x, y) batches of a loader as two arrays."""
    xs, ys, size = [], [], 0
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(f"the loader yields {type(batch).__name__}; it must yield pairs (x, y)")
        x, y = as_split(*batch).x, torch.as_tensor(batch[1])
        size += x.nbytes
        if size > LOADER_BYTES:
            raise DataError(f"the loader holds more than {LOADER_BYTES // 2**30} GiB; give a subset")
        xs.append(x.numpy())
        ys.append(y.numpy())
    if not xs:
        raise DataError("the loader yields nothing")
    return np.concatenate(xs), np.concatenate(ys)
