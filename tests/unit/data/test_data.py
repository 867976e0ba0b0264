from __future__ import annotations

import gzip
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from thrifty.data import DATASETS, SOURCES, load_task
from thrifty.data.images import channel_statistics, decode, normalised
from thrifty.data.source import cached, find
from thrifty.errors import DataError, KnobError, NoMatch

have = pytest.mark.skipif(not os.environ.get("THRIFTY_DATA"), reason="THRIFTY_DATA is not set")


def jpegs(n: int, size: int = 8) -> dict[str, np.ndarray]:
    image = pytest.importorskip("PIL.Image")
    parts = []
    for i in range(n):
        file = io.BytesIO()
        image.new("RGB", (size, size), (20 * i, 100, 200)).save(file, "JPEG", quality=95)
        parts.append(np.frombuffer(file.getvalue(), np.uint8))
    return {"jpeg": np.concatenate(parts), "offset": np.cumsum([0, *map(len, parts)])}


def test_every_data_set_says_where_it_is_from():
    assert set(SOURCES) == set(DATASETS)
    for source in SOURCES.values():
        assert all((source.title, source.origin, source.licence, source.shapes, source.get))
        assert all(len(s) == 64 for s in source.files.values())


def test_digits_need_no_files(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.delenv("THRIFTY_DATA", raising=False)
    task = load_task("digits")
    assert (len(task.train), len(task.validation), len(task.test)) == (1169, 269, 359)
    assert task.example.shape == (1, 1, 8, 8)
    assert float(task.train.x.max()) == 1
    assert torch.equal(task.train.x, load_task("digits").train.x)
    assert not torch.equal(task.train.x, load_task("digits", seed=1).train.x)
    assert len(load_task("digits", limit=50).train) == 50


def test_unknown_names_and_options():
    with pytest.raises(NoMatch, match="close: digits"):
        load_task("digit")
    with pytest.raises(KnobError, match="it has none"):
        load_task("digits", size=3)
    with pytest.raises(KnobError, match="close: size"):
        load_task("gtsrb", sice=16)


@pytest.mark.parametrize("name", [n for n, s in SOURCES.items() if s.files])
def test_missing_files_say_how_to_get_them(name, tmp_path, monkeypatch):
    monkeypatch.setenv("THRIFTY_DATA", str(tmp_path))
    with pytest.raises(DataError) as err:
        load_task(name)
    assert str(tmp_path) in str(err.value)
    assert SOURCES[name].get in str(err.value)
    monkeypatch.delenv("THRIFTY_DATA")
    with pytest.raises(DataError, match="THRIFTY_DATA is not set"):
        find(SOURCES[name])


def test_decoding_and_statistics():
    pixels = decode(*jpegs(3).values(), 8)
    assert pixels.shape == (3, 3, 8, 8)
    assert np.abs(pixels[2, :, 4, 4].astype(int) - [40, 100, 200]).max() <= 3
    assert decode(*jpegs(2).values(), 4).shape == (2, 3, 4, 4)
    mean, std = channel_statistics(pixels)
    assert np.allclose(mean, pixels.mean((0, 2, 3)) / 255, atol=1e-4)
    assert np.allclose(std, pixels.std((0, 2, 3)) / 255, atol=1e-4)
    wide = np.random.default_rng(0).integers(0, 256, (50, 3, 8, 8)).astype(np.uint8)
    x = normalised(wide, *channel_statistics(wide))
    assert np.abs(x.mean((0, 2, 3))).max() < 1e-3
    assert np.abs(x.std((0, 2, 3)) - 1).max() < 1e-3


def test_damaged_images_are_reported():
    files = jpegs(2)
    files["jpeg"][files["offset"][1] :] = 0
    with pytest.raises(DataError, match="image 1 cannot be decoded"):
        decode(files["jpeg"], files["offset"], 8)


def test_cache_is_used_repaired_and_optional(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def make() -> np.ndarray:
        calls.append(1)
        return np.arange(3)

    assert cached("k", make).tolist() == cached("k", make).tolist() == [0, 1, 2]
    assert len(calls) == 1
    (tmp_path / "thrifty" / "k.npy").write_bytes(b"damaged")
    assert cached("k", make).tolist() == [0, 1, 2]
    assert len(calls) == 2
    assert [p.name for p in (tmp_path / "thrifty").iterdir()] == ["k.npy"]
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert cached("k", make).tolist() == [0, 1, 2]


def test_gtsrb_from_small_files_keeps_tracks_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("THRIFTY_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    n = 43 * 6
    label = np.repeat(np.arange(43), 6)
    track = np.tile(np.repeat(np.arange(3), 2), 43)
    files = jpegs(1)
    many = {"jpeg": np.tile(files["jpeg"], n), "offset": np.arange(n + 1) * len(files["jpeg"])}
    np.savez(tmp_path / "gtsrb_train.npz", **many, label=label, track=track)
    np.savez(tmp_path / "gtsrb_test.npz", **jpegs(3), label=np.arange(3), track=np.arange(3))
    task = load_task("gtsrb", size=8)
    assert task.train.x.shape[1:] == (3, 8, 8)
    assert not task.info["known"]
    assert np.bincount(task.validation.y).max() in (2, 4)
    assert (np.bincount(task.validation.y) % 2 == 0).all()
    with pytest.raises(KnobError, match="size is 1"):
        load_task("gtsrb", size=1)


def test_fashion_mnist_reads_idx_files(tmp_path, monkeypatch):
    def idx(path: Path, array: np.ndarray) -> None:
        head = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
        path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))

    rng = np.random.default_rng(0)
    for part, n in (("train", 100), ("t10k", 20)):
        idx(tmp_path / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28)))
        idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(n) % 10)
    monkeypatch.setenv("THRIFTY_DATA", str(tmp_path))
    task = load_task("fashion-mnist")
    assert (len(task.train), len(task.validation), len(task.test)) == (90, 10, 20)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03abc"))
    with pytest.raises(DataError, match="not an IDX file"):
        load_task("fashion-mnist")


@have
@pytest.mark.data
def test_har():
    task = load_task("har")
    assert task.train.x.shape == (2041, 9, 128)
    assert (len(task.validation), len(task.test)) == (359, 950)
    assert task.info["known"]
    both = torch.cat([task.train.x, task.validation.x])
    assert torch.allclose(both.mean((0, 2)), torch.zeros(9), atol=1e-4)
    assert torch.allclose(both.std((0, 2)), torch.ones(9), atol=1e-3)


@have
@pytest.mark.data
def test_spoken_digits():
    task = load_task("spoken-digits")
    assert task.train.x.shape[1:] == (13, 39)
    assert len(task.test) == 300
    assert np.bincount(task.test.y).tolist() == [30] * 10
    flat = load_task("spoken-digits", form="2d")
    assert torch.equal(flat.train.x[:, 0].transpose(1, 2), task.train.x)
    with pytest.raises(KnobError, match="form is '3d'"):
        load_task("spoken-digits", form="3d")


@have
@pytest.mark.data
def test_spoken_frames_are_a_reconstruction_task():
    task = load_task("spoken-digits", form="frames", limit=200)
    assert task.train.x.shape == (200, 640)
    assert torch.equal(task.train.x, task.train.y)
    assert task.classes == ()
    assert task.score_outputs(np.zeros((200, 640))) == pytest.approx(-1, abs=0.3)
