"""Speech features: log mel energies and cepstral coefficients of a recording.

The usual chain (Davis and Mermelstein 1980): pre-emphasis, overlapping frames under a Hann window, power
spectrum, a bank of triangles that are equally wide on the mel scale, logarithm, and for cepstral coefficients
a cosine transform.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Framing:
    """How a recording is cut into frames and bands."""

    rate: int = 8000  # samples per second
    frame: int = 200  # samples of a frame: 25 ms at 8 kHz
    hop: int = 160  # samples from frame to frame: 20 ms
    frames: int = 39  # longer recordings are cut and shorter ones padded with silence, about the middle
    fft: int = 256
    bands: int = 26
    low_hz: float = 80.0
    high_hz: float = 3800.0
    emphasis: float = 0.97
    floor: float = 1e-5  # least band energy, for samples in [-1, 1]: the level of silence

    @property
    def samples(self) -> int:
        """Samples that the frames cover.

        >>> Framing().samples
        6280
        """
        return (self.frames - 1) * self.hop + self.frame


def to_mel(hz: Array | float) -> Array:
    """Return the mel pitch of a frequency, 2595 log10(1 + f/700) (O'Shaughnessy 1987)."""
    return np.asarray(2595 * np.log10(1 + np.asarray(hz) / 700))


def from_mel(mel: Array | float) -> Array:
    """Return the frequency in Hz of a mel pitch.

    >>> round(float(from_mel(to_mel(440.0))), 6)
    440.0
    """
    return np.asarray(700 * (10 ** (np.asarray(mel) / 2595) - 1))


def mel_bank(framing: Framing) -> Array:
    """Return the weights of the bands, (bands, fft // 2 + 1): triangles of height 1, each from centre to
    centre.
    """
    edges = from_mel(np.linspace(to_mel(framing.low_hz), to_mel(framing.high_hz), framing.bands + 2))
    hz = np.arange(framing.fft // 2 + 1) * framing.rate / framing.fft
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bank: Array = np.maximum(0, np.minimum((hz - low) / (centre - low), (high - hz) / (high - centre)))
    return bank


def cosine_bank(bands: int, coefficients: int) -> Array:
    """Return the orthonormal cosine transform (type II), (coefficients, bands).

    >>> np.allclose(cosine_bank(8, 8) @ cosine_bank(8, 8).T, np.eye(8))
    True
    """
    k, n = np.arange(coefficients)[:, None], np.arange(bands)[None, :]
    bank = np.sqrt(2 / bands) * np.cos(np.pi * k * (n + 0.5) / bands)
    bank[0] /= np.sqrt(2)
    return np.asarray(bank)


def centred(audio: Array, samples: int) -> Array:
    """Return exactly `samples` samples about the middle of the recording, with zeros beyond its ends."""
    extra = len(audio) - samples
    if extra >= 0:
        return audio[extra // 2 : extra // 2 + samples]
    padded: Array = np.pad(audio, (-extra // 2, -extra - -extra // 2))
    return padded


def log_mel(audio: Array, framing: Framing) -> Array:
    """Return log band energies, (bands, frames) float64. audio: (n,) int16, or floats in [-1, 1]."""
    x = np.asarray(audio, dtype=np.float64)
    if np.issubdtype(np.asarray(audio).dtype, np.integer):
        x = x / 32768
    x = centred(x, framing.samples)
    x = np.append(x[:1], x[1:] - framing.emphasis * x[:-1])
    cut = np.lib.stride_tricks.sliding_window_view(x, framing.frame)[:: framing.hop]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(framing.frame) / framing.frame)
    power = np.abs(np.fft.rfft(cut * window, framing.fft)) ** 2 / framing.fft
    return np.asarray(np.log(np.maximum(mel_bank(framing) @ power.T, framing.floor)))


def mfcc(audio: Array, framing: Framing, coefficients: int = 13) -> Array:
    """Return cepstral coefficients, (coefficients, frames) float64; the first is the loudness."""
    return np.asarray(cosine_bank(framing.bands, coefficients) @ log_mel(audio, framing))
