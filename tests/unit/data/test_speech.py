from __future__ import annotations

import numpy as np
import pytest

from thrifty.data.speech import Framing, centred, cosine_bank, from_mel, log_mel, mel_bank, mfcc, to_mel

F = Framing()


def tone(hz: float, seconds: float = 1.0, level: float = 0.5) -> np.ndarray:
    return (level * 32767 * np.sin(2 * np.pi * hz * np.arange(int(8000 * seconds)) / 8000)).astype(np.int16)


@pytest.mark.parametrize("hz", [200.0, 700.0, 1500.0, 3000.0])
def test_a_tone_is_loudest_in_the_band_around_it(hz):
    edges = from_mel(np.linspace(to_mel(F.low_hz), to_mel(F.high_hz), F.bands + 2))
    loudest = log_mel(tone(hz), F).mean(axis=1).argmax()
    assert edges[loudest] < hz < edges[loudest + 2]


def test_shapes_do_not_depend_on_the_length():
    for seconds in (0.05, 0.5, 2.0):
        assert mfcc(tone(440, seconds), F).shape == (13, 39)
        assert log_mel(tone(440, seconds), F).shape == (26, 39)


def test_silence_is_finite_and_flat():
    quiet = mfcc(np.zeros(1000, np.int16), F)
    assert np.isfinite(quiet).all()
    assert np.allclose(quiet[1:], 0, atol=1e-9)
    assert np.allclose(quiet[0], np.sqrt(26) * np.log(F.floor))


def test_loudness_moves_the_first_coefficient_only():
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 8000)
    assert (log_mel(noise / 2, F) > np.log(F.floor)).all()  # no band at the floor, or the shapes would differ
    loud, soft = mfcc(noise, F), mfcc(noise / 2, F)
    assert np.allclose(loud[0] - soft[0], np.sqrt(26) * np.log(4))
    assert np.allclose(loud[1:], soft[1:])


def test_floats_and_integers_mean_the_same():
    audio = tone(600)
    assert np.allclose(mfcc(audio, F), mfcc(audio / 32768, F))


def test_transform_is_scipys():
    fft = pytest.importorskip("scipy.fft")
    x = np.random.default_rng(0).normal(size=(26, 5))
    assert np.allclose(cosine_bank(26, 13) @ x, fft.dct(x, type=2, axis=0, norm="ortho")[:13])


def test_bank_covers_its_range_without_gaps():
    bank = mel_bank(Framing(bands=20, fft=512))
    assert bank.shape == (20, 257)
    assert (bank >= 0).all()
    assert (bank.max(axis=1) > 0.5).all()
    hz = np.arange(257) * 8000 / 512
    inside = (hz > 150) & (hz < 3200)
    assert (bank.sum(axis=0)[inside] > 0.99).all()


def test_centring():
    assert centred(np.array([1, 2, 3]), 6).tolist() == [0, 1, 2, 3, 0, 0]
    assert centred(np.arange(7), 3).tolist() == [2, 3, 4]
    assert centred(np.arange(4), 4).tolist() == [0, 1, 2, 3]
