"""A folder of one's own pictures: labels are the names of its sub-folders."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from thrifty.fewshot.easy import Crops, average_views
from thrifty.fewshot.features.encoders import Encoder, Features
from thrifty.fewshot.features.extraction import Progress, extract
from thrifty.fewshot.features.pictures import SUFFIXES, WHITE, Colour, CroppedPictures, PictureFiles
from thrifty.fewshot.preprocess import InputError

UNLABELLED = ""  # the label of pictures that lie in no sub-folder
CROP_SIZE = 224  # of crops for encoders that do not state their input size


@dataclass(frozen=True)
class PictureFolder:
    """Which pictures a folder holds."""

    root: Path
    files: tuple[Path, ...]  # relative to root, sorted by label, then name
    labels: tuple[str, ...]  # "" for pictures at the top level
    ignored: tuple[Path, ...] = ()  # files that are no pictures

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels, sorted, without the empty one."""
        return tuple(sorted(set(self.labels) - {UNLABELLED}))

    @property
    def counts(self) -> dict[str, int]:
        """How many pictures each class has."""
        found = Counter(self.labels)
        return {c: found[c] for c in self.classes}

    def pictures(self, background: Colour = WHITE) -> PictureFiles:
        """Return the pictures as a sequence that reads each when it is asked for."""
        return PictureFiles(tuple(self.root / f for f in self.files), background)


@dataclass(frozen=True)
class FolderFeatures:
    """Features of the pictures of a folder, row by row with labels and files."""

    features: Features  # (n, d)
    labels: npt.NDArray[np.str_]  # (n,) names of sub-folders; "" for pictures at the top level
    files: tuple[str, ...]  # (n,) relative to the folder, with forward slashes
    classes: tuple[str, ...]  # (C,) sorted

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labelled(self) -> npt.NDArray[np.bool_]:
        """Which rows have a label (n,)."""
        found: npt.NDArray[np.bool_] = self.labels != UNLABELLED
        return found

    def part(self, rows: npt.ArrayLike) -> FolderFeatures:
        """Return some rows, by index or mask; the classes are those left."""
        chosen = np.arange(len(self))[np.asarray(rows)]
        labels = self.labels[chosen]
        classes = tuple(sorted(set(labels.tolist()) - {UNLABELLED}))
        return FolderFeatures(self.features[chosen], labels, tuple(self.files[i] for i in chosen), classes)


def find_pictures(folder: str | Path) -> PictureFolder:
    """Return the pictures of a folder: FOLDER/LABEL/.../picture.png, and unlabelled ones at the top level.

    Files and folders whose name starts with a dot are passed over; files that are no pictures by their suffix are
    listed in `ignored`. Raises InputError that names every class without pictures, or says that there are none.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root} is no folder; give a folder of pictures, one sub-folder per class")
    files: list[Path] = []
    labels: list[str] = []
    ignored: list[Path] = []
    empty: list[str] = []
    for entry in sorted(p for p in root.iterdir() if not p.name.startswith(".")):
        inside = _all_files(entry) if entry.is_dir() else [entry]
        chosen = [p for p in inside if p.suffix.lower() in SUFFIXES]
        ignored += [p.relative_to(root) for p in inside if p.suffix.lower() not in SUFFIXES]
        files += [p.relative_to(root) for p in chosen]
        labels += [entry.name if entry.is_dir() else UNLABELLED] * len(chosen)
        if entry.is_dir() and not chosen:
            empty.append(f"'{entry.name}'")
    if empty:
        raise InputError(
            f"{root}: no pictures in {', '.join(empty)}; put some in, or take the sub-folder away "
            f"(pictures end in {', '.join(sorted(SUFFIXES))})"
        )
    if not files:
        raise InputError(f"{root} holds no pictures ({', '.join(sorted(SUFFIXES))}) and no sub-folders with some")
    return PictureFolder(root, tuple(files), tuple(labels), tuple(ignored))


def _all_files(folder: Path) -> list[Path]:
    found = (p for p in folder.rglob("*") if p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def folder_features(
    folder: str | Path | PictureFolder, encoder: Encoder, *, background: Colour = WHITE, crops: Crops | None = None,
    seed: int = 0, batch: int = 32, progress: Progress | None = None, cache: str | Path | None = None,
) -> FolderFeatures:  # fmt: skip
    """Return the features of all pictures of a folder (see `find_pictures`), with labels.

    background: the colour under transparent pictures, white by default. crops: average the features of several
    random crops of each picture (EASY's augmented samples), drawn with `seed`. batch, progress, cache: of
    `extract`. Classes may have different numbers of pictures.

    Raises InputError that names all pictures that cannot be read, or all empty classes.
    """
    found = folder if isinstance(folder, PictureFolder) else find_pictures(folder)
    features = picture_features(
        found.pictures(background), encoder, crops=crops, seed=seed, batch=batch, progress=progress, cache=cache
    )
    files = tuple(f.as_posix() for f in found.files)
    return FolderFeatures(features, np.array(found.labels, dtype=np.str_), files, found.classes)


def picture_features(
    pictures: PictureFiles, encoder: Encoder, *, crops: Crops | None = None, seed: int = 0, batch: int = 32,
    progress: Progress | None = None, cache: str | Path | None = None,
) -> Features:  # fmt: skip
    """Return the features (n, d) of picture files, averaged over random crops where `crops` is given."""
    if crops is None:
        return extract(encoder, pictures, batch=batch, progress=progress, cache=cache)
    cut = CroppedPictures(pictures, crops, encoder.size or CROP_SIZE, seed)
    views = extract(encoder, cut, batch=batch, progress=progress, cache=cache)
    return average_views(views.reshape(len(pictures), crops.views, -1)).astype(np.float32)
