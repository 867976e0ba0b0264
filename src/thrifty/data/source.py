"""Where a data set comes from, finding its files, and the cache of decoded images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.errors import DataError

Array = npt.NDArray[Any]
FOLDER_VARIABLE = "THRIFTY_DATA"


@dataclass(frozen=True)
class Source:
    """Provenance of one data set."""

    title: str
    origin: str  # who made it, and where it is published
    licence: str
    shapes: str  # what the files hold
    get: str  # what a user does who does not have it
    files: Mapping[str, str] = field(default_factory=dict)  # name -> sha256 of the copy in use here


def find(source: Source) -> dict[str, Path]:
    """Return the path of each file of a data set in the folder THRIFTY_DATA.

    Raises DataError that names the missing files and says how to get them.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    where = f"{FOLDER_VARIABLE} is not set" if not folder else f"not in {folder} ({FOLDER_VARIABLE})"
    paths = {name: Path(folder or "") / name for name in source.files}
    missing = [name for name, path in paths.items() if not folder or not path.is_file()]
    if missing:
        raise DataError(
            f"{source.title}: no {' and no '.join(missing)}; {where}. {source.get} "
            f"Then: export {FOLDER_VARIABLE}=FOLDER-WITH-THE-FILES"
        )
    return paths


def read(path: Path) -> dict[str, Array]:
    """Return the arrays of an .npz file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {k: file[k] for k in file.files}
    except (OSError, ValueError) as err:
        raise DataError(f"{path} is not a readable .npz file: {err}") from err


def checksum(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def provenance(source: Source, paths: Mapping[str, Path]) -> dict[str, Any]:
    """Return what a task's info says about its data: origin, licence, checksums and whether they are the
    known ones.
    """
    sums = {name: checksum(path) for name, path in paths.items()}
    known = all(sums[n] == s for n, s in source.files.items())
    return {
        "data": source.title,
        "origin": source.origin,
        "licence": source.licence,
        "sha256": sums,
        "known": known,
    }


def cache_folder() -> Path:
    """Return the folder for decoded data: $XDG_CACHE_HOME/thrifty, or ~/.cache/thrifty."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "thrifty"


def cached(key: str, make: Callable[[], Array]) -> Array:
    """Return the array stored under `key`; make and store it if it is not there (or the folder is not
    writable).
    """
    path = cache_folder() / f"{key}.npy"
    if path.is_file():
        try:
            kept: Array = np.load(path, allow_pickle=False)
            return kept
        except (OSError, ValueError):
            pass  # damaged: make it again
    array = make()
    partial = path.with_name(f"{key}.{os.getpid()}.partial.npy")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(partial, array)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
    return array
