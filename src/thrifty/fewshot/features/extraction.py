"""Features of many inputs: in batches, with progress, kept in a cache that an interrupted run goes on from."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.errors import StoreError
from thrifty.fewshot.features.encoders import Encoder, Features, TextEncoder
from thrifty.fewshot.preprocess import InputError, OptionError

Progress = Callable[[int, int, str], None]
SHARD = 512  # rows of a file of the cache
DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


def extract(
    encoder: Encoder | TextEncoder, inputs: Sequence[Any], *, batch: int = 32,
    progress: Progress | None = None, cache: str | Path | None = None,
) -> Features:  # fmt: skip
    """Return the features (n, d) float32 of pictures, or texts, in their order.

    inputs: pictures (n, height, width, 3) uint8, a sequence of pictures of any sizes, PictureFiles,
    CroppedPictures, or texts for a TextEncoder. batch: inputs run at once; it changes results by rounding only
    (a relative 1e-5 of the largest feature). progress: called with (done, total, text). cache: a folder; features
    are kept there under the sha256 of the encoder and of each input, in files of some hundred rows written as
    they are made, also when the run is interrupted or fails: a second call computes what is missing. Equal inputs
    are computed once.

    Raises OptionError, InputError, StoreError when the cache cannot be written.

    >>> from thrifty.fewshot.features import pixels
    >>> extract(pixels(2), np.zeros((3, 8, 8, 3), np.uint8)).shape
    (3, 12)
    """
    if not isinstance(batch, (int, np.integer)) or batch < 1:
        raise OptionError(f"batch is {batch!r}; it must be at least 1")
    if isinstance(inputs, str):
        raise InputError("inputs is one text; give a list of texts")
    total = len(inputs)
    if cache is None:
        _check(inputs, range(total))
        return _compute(encoder, inputs, range(total), batch, progress, total, lambda _rows, _features: None)
    keys = [_key(encoder, inputs, i) for i in range(total)]
    store = FeatureStore(Path(cache), encoder)
    known = store.read(set(keys))
    missing = list({key: i for i, key in reversed(list(enumerate(keys))) if key not in known}.values())[::-1]
    _check(inputs, missing)
    if missing:

        def keep(rows: Sequence[int], features: Features) -> None:
            store.add([keys[i] for i in rows], features)
            known.update((keys[i], f) for i, f in zip(rows, features, strict=True))

        try:
            _compute(encoder, inputs, missing, batch, progress, total, keep)
        finally:
            store.flush()
    found = np.zeros((total, encoder.dimension), np.float32)
    for i, key in enumerate(keys):
        found[i] = known[key]
    return found


def _compute(
    encoder: Encoder | TextEncoder, inputs: Sequence[Any], rows: Sequence[int], batch: int,
    progress: Progress | None, total: int, keep: Callable[[Sequence[int], Features], None],
) -> Features:  # fmt: skip
    """Return the features of these rows, handing over each batch as it is made."""
    found = np.zeros((len(rows), encoder.dimension), np.float32)
    before = total - len(rows)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        made = encoder([inputs[i] for i in part])
        found[start : start + len(part)] = made
        keep(part, made)
        if progress is not None:
            progress(before + start + len(part), total, encoder.name)
    return found


def _key(encoder: Encoder | TextEncoder, inputs: Sequence[Any], index: int) -> bytes:
    own = getattr(inputs, "key", None)
    key: bytes = own(index) if own is not None else encoder.key(inputs[index])
    return key


def _check(inputs: Sequence[Any], rows: Sequence[int]) -> None:
    """Let inputs that can do so refuse all broken ones at once, before the first is encoded."""
    own = getattr(inputs, "check", None)
    if own is not None:
        own(rows)


class FeatureStore:
    """The features of one encoder in a folder: files of (keys, features), each whole or not there."""

    def __init__(self, cache: Path, encoder: Encoder | TextEncoder) -> None:
        self.folder = cache / encoder.identity[:32]
        self.encoder = encoder
        self.keys: list[bytes] = []  # not yet written
        self.rows: list[Features] = []

    def read(self, wanted: set[bytes]) -> dict[bytes, Features]:
        """Return the wanted features that are there; damaged files count as absent."""
        found: dict[bytes, Features] = {}
        for path in sorted(self.folder.glob("*.npz")):
            with contextlib.suppress(*DAMAGED):
                found.update(self._read_file(path, wanted))
        return found

    def _read_file(self, path: Path, wanted: set[bytes]) -> dict[bytes, Features]:
        with np.load(path, allow_pickle=False) as file:
            keys = [k.tobytes() for k in file["keys"]]
            rows = [i for i, k in enumerate(keys) if k in wanted]
            if not rows:
                return {}
            features: npt.NDArray[Any] = file["features"]
        if features.shape != (len(keys), self.encoder.dimension) or features.dtype != np.float32:
            raise ValueError(f"{path} holds {features.dtype} {features.shape}")
        return {keys[i]: features[i] for i in rows}

    def add(self, keys: Sequence[bytes], features: Features) -> None:
        """Keep features, and write a file when there are enough."""
        self.keys += keys
        self.rows += list(features)
        if len(self.keys) >= SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what is not yet written."""
        if not self.keys:
            return
        buffer = io.BytesIO()
        keys = np.frombuffer(b"".join(self.keys), np.uint8).reshape(len(self.keys), -1)
        np.savez(buffer, keys=keys, features=np.stack(self.rows))
        name = hashlib.sha256(b"".join(self.keys)).hexdigest()[:24]
        about = {"encoder": self.encoder.name, "dimension": self.encoder.dimension, "identity": self.encoder.identity}
        if not (self.folder / "encoder.json").exists():
            _write(self.folder / "encoder.json", (json.dumps(about, indent=1) + "\n").encode())
        _write(self.folder / f"{name}.npz", buffer.getvalue())
        self.keys, self.rows = [], []


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a temporary file beside it, then renamed."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError as err:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise StoreError(f"cannot write the cache {path}: {err.strerror or err}; choose another folder") from err
