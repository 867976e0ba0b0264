"""Emoji pictures: read from a folder laid out like the npm packages."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from thrifty.data import emoji
from thrifty.errors import DataError, NoMatch


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two styles; the second does not draw the second picture."""
    rng = np.random.default_rng(0)
    monkeypatch.setenv("THRIFTY_EMOJI", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    entries = [
        {"name": n.upper(), "image": f"{c}.png", "category": "Faces", "subcategory": "face-" + n, "has_img_apple": True,
         "has_img_twitter": c != "1f601"}
        for n, c in (("sad", "1f602"), ("glad", "1f601"), ("cat", "1f600"))
    ]  # fmt: skip
    for style in ("apple", "twitter"):
        folder = tmp_path / f"emoji-datasource-{style}"
        (folder / "img" / style / "64").mkdir(parents=True)
        (folder / "emoji.json").write_text(json.dumps(entries))
        for entry in entries:
            if entry[f"has_img_{style}"]:
                pixels = rng.integers(0, 256, (64, 64, 4), np.uint8)
                Image.fromarray(pixels, "RGBA").save(folder / "img" / style / "64" / entry["image"])
    return tmp_path


def test_load_sorts_by_code_and_keeps_every_pixel(packages):
    found = emoji.load("apple")
    assert found.codes == ("1f600", "1f601", "1f602")
    assert found.names == ("cat", "glad", "sad")
    assert found.subcategories[0] == "face-cat"
    assert found.rgba.shape == (3, 64, 64, 4)
    file = packages / "emoji-datasource-apple" / "img" / "apple" / "64" / "1f601.png"
    assert (found.rgba[1] == np.asarray(Image.open(file))).all()
    assert (emoji.load("apple").rgba == found.rgba).all()  # the second time from the cache


def test_only_picks_in_the_order_asked(packages):
    assert emoji.load("twitter").codes == ("1f600", "1f602")
    picked = emoji.load("apple").only(("1f602", "1f600"))
    assert picked.names == ("sad", "cat")
    assert (picked.rgba[0] == emoji.load("apple").rgba[2]).all()
    with pytest.raises(NoMatch, match="no emoji 1f601"):
        emoji.load("twitter").only(("1f601",))


def test_what_is_not_there_is_named(packages, monkeypatch):
    with pytest.raises(NoMatch, match=r"did you mean|close"):
        emoji.load("aple")
    with pytest.raises(DataError, match=r"emoji-datasource-google.*npm install"):
        emoji.load("google")
    (packages / "emoji-datasource-apple" / "img" / "apple" / "64" / "1f601.png").unlink()
    with pytest.raises(DataError, match=r"1f601\.png"):
        emoji.load("apple")
    (packages / "emoji-datasource-twitter" / "emoji.json").write_text("[{}]")
    with pytest.raises(DataError, match="not the table"):
        emoji.load("twitter")


def test_background_rounds_half_up_and_keeps_opaque_pixels():
    rgba = np.array([[10, 20, 30, 255], [0, 0, 0, 0], [100, 100, 100, 128], [0, 0, 0, 127]], np.uint8)
    mixed = emoji.on_background(rgba, (255, 0, 50))
    exact = (rgba[:, :3] * (rgba[:, 3:] / 255.0)) + np.array([255, 0, 50]) * (1 - rgba[:, 3:] / 255.0)
    assert (mixed == np.floor(exact + 0.5)).all()
