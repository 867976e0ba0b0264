"""Make the files that `load_task` reads from what the publishers offer.

    python -m thrifty.data.prepare NAME UNPACKED-DOWNLOAD FOLDER

writes FOLDER/*.npz; then set THRIFTY_DATA to FOLDER. Pictures are kept without loss, so scores may differ a
little from those made with the copies that the provenance table knows.
"""

from __future__ import annotations

import csv
import io
import os
import sys
import wave
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.errors import DataError, NoMatch, close_to, need

Array = npt.NDArray[Any]
HAR_SIGNALS = [f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz"]
HAR_CLASSES = ["walking", "walking_upstairs", "walking_downstairs", "sitting", "standing", "laying"]
CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def prepare(name: str, download: str | Path, folder: str | Path) -> list[Path]:
    """Write the files of a data set and return their paths.

    download: the unpacked download, anything below which the publisher's own file names are found. Raises
    NoMatch for an unknown name, DataError when the publisher's files are not there.
    """
    if name not in PREPARE:
        raise NoMatch(f"nothing to prepare for '{name}'; {close_to(name, PREPARE)}")
    if not Path(download).is_dir():
        raise DataError(f"there is no folder {download}; unpack the download of '{name}' first")
    Path(folder).mkdir(parents=True, exist_ok=True)
    written = []
    for file, arrays in PREPARE[name](Path(download)).items():
        path = Path(folder) / file
        partial = path.with_name(f"{path.stem}.{os.getpid()}.partial.npz")
        np.savez_compressed(partial, **arrays)  # type: ignore[arg-type]  # its stub takes them for a flag
        os.replace(partial, path)
        written.append(path)
    return written


def below(download: Path, pattern: str) -> list[Path]:
    """Return the files below the download that match, sorted; raises DataError when there are none."""
    found = sorted(download.rglob(pattern))
    if not found:
        raise DataError(f"no {pattern} below {download}: is it the unpacked download?")
    return found


def png(pixels: Array) -> bytes:
    """Return a picture, (H, W, 3) uint8, as a PNG file."""
    file = io.BytesIO()
    need("PIL.Image", extra="data").fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def in_a_row(files: Iterable[bytes]) -> dict[str, Array]:
    """Return all files one after the other, and where each begins."""
    parts = list(files)
    return {
        "jpeg": np.frombuffer(b"".join(parts), np.uint8),
        "offset": np.cumsum([0, *map(len, parts)], dtype=np.int64),
    }


def har(download: Path) -> dict[str, dict[str, Array]]:
    """UCI-HAR: the folder 'UCI HAR Dataset'."""
    arrays: dict[str, Array] = {"signals": np.array(HAR_SIGNALS), "classes": np.array(HAR_CLASSES)}
    for part in ("train", "test"):
        signals = [
            np.loadtxt(below(download, f"{s}_{part}.txt")[0], np.float32, ndmin=2) for s in HAR_SIGNALS
        ]
        arrays[f"x_{part}"] = np.stack(signals, axis=1)
        label = np.loadtxt(below(download, f"y_{part}.txt")[0], np.int64, ndmin=1)
        arrays[f"y_{part}"] = (label - 1).astype(np.uint8)
    return {"uci_har_subset.npz": arrays}


def spoken_digits(download: Path) -> dict[str, dict[str, Array]]:
    """Free Spoken Digit Dataset: the repository; recordings are called DIGIT_SPEAKER_TAKE.wav."""
    audio, names, rates = [], [], set()
    for path in below(download, "[0-9]_*_*.wav"):
        with wave.open(str(path)) as file:
            if (file.getnchannels(), file.getsampwidth()) != (1, 2):
                raise DataError(f"{path} is not a recording of one channel of 16 bits")
            audio.append(np.frombuffer(file.readframes(file.getnframes()), "<i2"))
            rates.add(file.getframerate())
        names.append(path.stem.split("_"))
    if len(rates) > 1:
        raise DataError(f"the recordings have several rates: {sorted(rates)}")
    arrays: dict[str, Array] = {
        "audio": np.concatenate(audio).astype(np.int16),
        "offset": np.cumsum([0, *map(len, audio)], dtype=np.int64),
        "label": np.array([int(n[0]) for n in names], np.uint8),
        "speaker": np.array([n[1] for n in names]),
        "index": np.array([int(n[2]) for n in names], np.uint8),
        "rate": np.array(rates.pop()),
    }
    return {"spoken_digits.npz": arrays}


def cifar10(download: Path) -> dict[str, dict[str, Array]]:
    """CIFAR-10: the binary version (cifar-10-batches-bin)."""
    found = {}
    for part, pattern in (("train", "data_batch_*.bin"), ("test", "test_batch.bin")):
        raw = np.concatenate([np.fromfile(p, np.uint8) for p in below(download, pattern)])
        if raw.size % 3073:
            raise DataError(f"{pattern} below {download}: not rows of 3073 bytes")
        rows = raw.reshape(-1, 3073)
        pixels = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        found[f"cifar10_{part}.npz"] = {
            **in_a_row(png(np.ascontiguousarray(p)) for p in pixels),
            "label": rows[:, 0],
            "classes": np.array(CIFAR_CLASSES),
        }
    return found


def gtsrb(download: Path) -> dict[str, dict[str, Array]]:
    """GTSRB: Final_Training/Images, and Final_Test/Images with GT-final_test.csv (the extended
    annotations).
    """
    image = need("PIL.Image", extra="data")
    tables = {"train": below(download, "GT-000[0-9][0-9].csv"), "test": below(download, "GT-final_test.csv")}
    found = {}
    for part, paths in tables.items():
        files: list[bytes] = []
        label: list[int] = []
        track: list[int] = []
        for table in paths:
            images = table.parent if part == "train" else below(download, "00000.ppm")[0].parent
            with table.open(newline="") as text:
                rows = list(csv.DictReader(text, delimiter=";"))
            for row in rows:
                box = tuple(int(row[k]) for k in ("Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2"))
                with image.open(images / row["Filename"]) as picture:
                    sign = picture.convert("RGB").crop(box).resize((32, 32), image.Resampling.BILINEAR)
                files.append(png(np.asarray(sign)))
                label.append(int(row["ClassId"]))
                track.append(int(row["Filename"].split("_")[0]) if part == "train" else len(track))
        found[f"gtsrb_{part}.npz"] = {
            **in_a_row(files),
            "label": np.array(label, np.uint8),
            "track": np.array(track, np.uint16),
        }
    return found


PREPARE: dict[str, Callable[[Path], dict[str, dict[str, Array]]]] = {
    "har": har,
    "spoken-digits": spoken_digits,
    "cifar10": cifar10,
    "gtsrb": gtsrb,
}

if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        prepare(*sys.argv[1:])
    except (DataError, NoMatch) as err:
        sys.exit(str(err))
