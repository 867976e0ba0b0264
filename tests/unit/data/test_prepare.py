from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

from thrifty.data import load_task
from thrifty.data.prepare import HAR_SIGNALS, prepare
from thrifty.errors import DataError, NoMatch


@pytest.fixture
def download(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("THRIFTY_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "download"
    folder.mkdir()
    return folder


def test_har(download, tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 60), ("test", 12)):
        folder = download / "UCI HAR Dataset" / part / "Inertial Signals"
        folder.mkdir(parents=True)
        for i, signal in enumerate(HAR_SIGNALS):
            np.savetxt(folder / f"{signal}_{part}.txt", rng.normal(size=(n, 128)) + 10 * i)
        np.savetxt(folder.parent / f"y_{part}.txt", np.arange(n) % 6 + 1, fmt="%d")
    prepare("har", download, tmp_path / "data")
    task = load_task("har")
    assert (len(task.train), len(task.validation), len(task.test)) == (48, 12, 12)
    assert np.allclose(task.info["mean"], 10 * np.arange(9), atol=0.1)  # the signals are in their order
    assert not task.info["known"]


def test_spoken_digits(download, tmp_path):
    rng = np.random.default_rng(0)
    for digit in range(10):
        for take in range(12):
            with wave.open(str(download / f"{digit}_anna_{take}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(8000)
                file.writeframes(rng.integers(-999, 999, 3000 + take).astype("<i2").tobytes())
    (path,) = prepare("spoken-digits", download, tmp_path / "data")
    with np.load(path) as arrays:
        assert np.diff(arrays["offset"]).tolist()[:3] == [
            3000,
            3001,
            3010,
        ]  # takes 0, 1, 10: in the order of names
        assert arrays["index"][:3].tolist() == [0, 1, 10]
    assert np.bincount(load_task("spoken-digits").test.y).tolist() == [5] * 10


def test_cifar10_keeps_every_pixel(download, tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (100, 3073)).astype(np.uint8)
    rows[:, 0] = np.arange(100) % 10
    rows[:50].tofile(download / "data_batch_1.bin")
    rows[50:].tofile(download / "data_batch_2.bin")
    rows[:20].tofile(download / "test_batch.bin")
    prepare("cifar10", download, tmp_path / "data")
    task = load_task("cifar10")
    mean, std = (np.array(task.info[k])[:, None, None] for k in ("mean", "std"))
    pixels = ((task.test.x.numpy() * std + mean) * 255).round().astype(int)
    assert np.array_equal(pixels.reshape(20, -1), rows[:20, 1:])
    assert task.classes[task.test.y[3]] == "cat"


def test_gtsrb_crops_to_the_region(download, tmp_path):
    image = pytest.importorskip("PIL.Image")
    head = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"

    def sign(path: Path, level: int) -> None:
        pixels = np.zeros((20, 20, 3), np.uint8)
        pixels[5:15, 5:15] = level
        image.fromarray(pixels).save(path)

    for label in range(43):
        folder = download / "Final_Training" / "Images" / f"{label:05d}"
        folder.mkdir(parents=True)
        names = [f"{track:05d}_{frame:05d}.ppm" for track in range(3) for frame in range(2)]
        for name in names:
            sign(folder / name, 100 + label)
        lines = "".join(f"{n};20;20;5;5;15;15;{label}\n" for n in names)
        (folder / f"GT-{label:05d}.csv").write_text(head + lines)
    tests = download / "Final_Test" / "Images"
    tests.mkdir(parents=True)
    sign(tests / "00000.ppm", 77)
    (download / "GT-final_test.csv").write_text(head + "00000.ppm;20;20;5;5;15;15;9\n")
    prepare("gtsrb", download, tmp_path / "data")
    with np.load(tmp_path / "data" / "gtsrb_train.npz") as arrays:
        assert arrays["track"][:7].tolist() == [0, 0, 1, 1, 2, 2, 0]
    task = load_task("gtsrb")
    assert task.test.y.tolist() == [9]
    mean, std = (np.array(task.info[k])[:, None, None] for k in ("mean", "std"))
    assert np.array_equal(((task.test.x[0].numpy() * std + mean) * 255).round(), np.full((3, 32, 32), 77))


def test_what_is_not_there(download, tmp_path):
    with pytest.raises(NoMatch, match="close: cifar10"):
        prepare("cifar", download, tmp_path)
    with pytest.raises(DataError, match="there is no folder"):
        prepare("har", download / "none", tmp_path)
    for name in ("har", "spoken-digits", "cifar10", "gtsrb"):
        with pytest.raises(DataError, match="is it the unpacked download"):
            prepare(name, download, tmp_path)
