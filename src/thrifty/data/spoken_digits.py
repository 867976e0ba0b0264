"""Free Spoken Digit Dataset: "zero" to "nine", six speakers, 8 kHz."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.data.source import Source, cached, find, provenance, read
from thrifty.data.speech import Framing, log_mel, mfcc
from thrifty.errors import KnobError, close_to
from thrifty.task import Task

Array = npt.NDArray[Any]

SOURCE = Source(
    title="Free Spoken Digit Dataset",
    origin="Jackson et al., github.com/Jakobovski/free-spoken-digit-dataset",
    licence="CC BY-SA 4.0",
    shapes="3000 recordings of 0.1 to 2.3 s at 8 kHz, int16; 10 classes, 6 speakers, 50 takes each",
    get="git clone https://github.com/Jakobovski/free-spoken-digit-dataset; "
    "python -m thrifty.data.prepare spoken-digits free-spoken-digit-dataset FOLDER.",
    files={"spoken_digits.npz": "f6eb53b1dc84c25a58aafefac2784edcc8c2a604460782560d9ed1acb147df24"},
)
FORMS = ("1d", "2d", "frames")
VERSION = 1  # of the features, for the cache
STACK = 5  # frames of log mel energies that one row of the form "frames" holds
STACK_BANDS = 128


def load(seed: int = 0, form: str = "1d") -> Task:
    """Return the recordings as features, z-scored with training statistics; takes 0 to 4 are the test split.

    form: "1d", (n, 13, 39): 13 cepstral coefficients as channels over 39 frames of 25 ms, every 20 ms; "2d",
    the same as one picture, (n, 1, 39, 13), time first; "frames", (n, 640): five frames in a row of 128 log
    mel bands, the input of MLPerf Tiny's autoencoder, with the inputs as targets. Validation: 15 % of the
    rest, by class (for "frames": by recording).
    """
    if form not in FORMS:
        raise KnobError(f"form is '{form}'; {close_to(form, FORMS)}")
    paths = find(SOURCE)
    file = read(paths["spoken_digits.npz"])
    info = provenance(SOURCE, paths)
    kind, make = ("frames", stacked_features) if form == "frames" else ("mfcc", cepstral_features)
    key = f"spoken_digits_{kind}_v{VERSION}_{info['sha256']['spoken_digits.npz'][:16]}"
    features = cached(key, lambda: make(file))
    test = file["index"] < 5
    if form == "frames":
        return frames_task(features, test, seed, info)
    mean = features[~test].mean(axis=(0, 2), dtype=np.float64)
    std = features[~test].std(axis=(0, 2), dtype=np.float64)
    x = ((features - mean[:, None]) / std[:, None]).astype(np.float32)
    if form == "2d":
        x = x.transpose(0, 2, 1)[:, None]
    label = file["label"].astype(np.int64)
    return Task.from_arrays(
        x[~test],
        label[~test],
        x_test=x[test],
        y_test=label[test],
        seed=seed,
        name="spoken-digits",
        classes=tuple("0123456789"),
        info={**info, "mean": mean.tolist(), "std": std.tolist(), "form": form},
    )


def recordings(file: dict[str, Array]) -> list[Array]:
    """Return the recordings, each (samples,) int16."""
    return [file["audio"][a:b] for a, b in zip(file["offset"][:-1], file["offset"][1:])]


def cepstral_features(file: dict[str, Array]) -> Array:
    """Return (n, 13, 39) float32."""
    framing = Framing(rate=int(file["rate"]))
    return np.stack([mfcc(audio, framing) for audio in recordings(file)]).astype(np.float32)


def stacked_features(file: dict[str, Array]) -> Array:
    """Return (n, 7, 640) float32: 35 frames of 128 log mel bands of each recording, five in a row."""
    framing = Framing(rate=int(file["rate"]), frame=400, frames=35, fft=1024, bands=STACK_BANDS)
    energies = np.stack([log_mel(audio, framing) for audio in recordings(file)])
    return energies.transpose(0, 2, 1).reshape(len(energies), -1, STACK * STACK_BANDS).astype(np.float32)


def frames_task(features: Array, test: Array, seed: int, info: dict[str, Any]) -> Task:
    """Return the reconstruction task: x = y = (rows, 640), no recording in two splits."""
    mean, std = features[~test].mean(dtype=np.float64), features[~test].std(dtype=np.float64)
    x = ((features - mean) / std).astype(np.float32)
    rows, rows_test = x[~test].reshape(-1, x.shape[2]), x[test].reshape(-1, x.shape[2])
    return Task.from_arrays(
        rows,
        rows,
        groups=np.repeat(np.arange(len(x[~test])), x.shape[1]),
        x_test=rows_test,
        y_test=rows_test,
        seed=seed,
        name="spoken-digits-frames",
        info={**info, "mean": float(mean), "std": float(std), "form": "frames"},
    )
