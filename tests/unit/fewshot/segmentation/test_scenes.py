"""The composed benchmark: disjoint splits, exact masks, paired styles."""

import numpy as np
import pytest

from thrifty.data import emoji
from thrifty.data.source import find
from thrifty.errors import DataError, KnobError, NoMatch
from thrifty.fewshot.segmentation import SCENE_CLASSES, Scenes, presence
from thrifty.fewshot.segmentation.pictures import pair
from thrifty.fewshot.segmentation.scenes import GROUPS, PHOTOS, Layout, drawn


@pytest.fixture(scope="module")
def splits():
    try:
        find(PHOTOS)
        for style in emoji.STYLES:
            emoji.load(style)
    except DataError as err:
        pytest.skip(str(err))
    return {name: Scenes(name, count=30) for name in ("train", "validation", "test")}


@pytest.mark.data
def test_thirteen_classes_and_every_scene_is_sound(splits):
    assert len(SCENE_CLASSES) == 13 == 1 + len(GROUPS)
    data = splits["train"]
    for i in range(5):
        picture, mask = pair(data, i)
        assert picture.shape == (160, 160, 3)
        assert {int(v) for v in np.unique(mask)} <= {0} | {thing.target for thing in data.placed(i)}
        assert 3 <= len(data.placed(i)) <= 6
    assert presence(data)[:, 1:].any(0).sum() == 12


@pytest.mark.data
def test_splits_share_no_photograph_and_no_emoji(splits):
    names = list(splits)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        one, other = splits[names[a]], splits[names[b]]
        assert not set(one.photos) & set(other.photos)
        for group in GROUPS:
            assert not set(one.codes[group]) & set(other.codes[group])
    assert sum(len(s.photos) for s in splits.values()) == 1000
    every = {code for s in splits.values() for codes in s.codes.values() for code in codes}
    assert len(every) == sum(len(c) for s in splits.values() for c in s.codes.values())  # a code has one class
    assert all(len(s.codes[group]) >= 1 for s in splits.values() for group in GROUPS)


@pytest.mark.data
def test_the_same_seed_gives_the_same_scenes_whatever_the_count(splits):
    few, again, other = Scenes(count=2), splits["train"], Scenes(count=2, seed=1)
    assert (few.picture(1) == again.picture(1)).all()
    assert (few.mask(1) == again.mask(1)).all()
    assert other.placed(1) != few.placed(1)


@pytest.mark.data
def test_another_style_changes_the_drawing_and_nothing_else(splits):
    shifted = Scenes("test", ("twitter",), count=30)
    same = 0
    for i in range(10):
        here, there = splits["test"].placed(i), shifted.placed(i)
        assert {thing.style for thing in there} == {"twitter"}
        assert [(t.target, t.code, t.side, t.turn, t.mirrored, t.centre) for t in here] == [
            (t.target, t.code, t.side, t.turn, t.mirrored, t.centre) for t in there
        ]
        untouched = (splits["test"].mask(i) == 0) & (shifted.mask(i) == 0)
        far = untouched & (splits["test"].picture(i) == shifted.picture(i)).all(-1)
        same += far.sum() / untouched.sum() / 10
        assert (splits["test"].picture(i) != shifted.picture(i)).any()
    assert same > 0.9  # the photograph, but for soft edges
    assert {t.style for i in range(10) for t in splits["test"].placed(i)} == {"apple", "google"}


@pytest.mark.data
def test_later_objects_lie_on_top(splits):
    data = splits["train"]
    checked = 0
    for i in range(30):
        top = data.placed(i)[-1]
        _, alpha = drawn(data._drawn[top.style][top.code], top.side, top.turn, top.mirrored)
        opaque = alpha >= 128
        rows, columns = np.nonzero(opaque)
        rows, columns = rows + top.centre[0] - alpha.shape[0] // 2, columns + top.centre[1] - alpha.shape[1] // 2
        inside = (rows >= 0) & (rows < 160) & (columns >= 0) & (columns < 160)
        assert (data.mask(i)[rows[inside], columns[inside]] == top.target).all()
        assert (data.mask(i) == top.target).sum() >= inside.sum()
        checked += inside.sum()
    assert checked > 1000


def test_turning_keeps_a_plain_disc_and_its_colour():
    rows, columns = np.mgrid[:64, :64]
    disc = ((rows - 31.5) ** 2 + (columns - 31.5) ** 2 < 28**2)[..., None]
    rgba = np.where(disc, np.array([200, 40, 90, 255]), np.array([0, 0, 0, 0])).astype(np.uint8)
    colour, alpha = drawn(rgba, 64, 30.0, mirrored=True)
    assert abs((alpha >= 128).sum() - disc.sum()) < 0.03 * disc.sum()
    full = alpha == 255
    assert np.abs(colour[full] - [200, 40, 90]).max() <= 2
    edge = (alpha > 20) & ~full  # premultiplied: the rim has the disc's colour, no dark halo
    assert np.abs(colour[edge] / (alpha[edge] / 255)[:, None] - [200, 40, 90]).max() < 15


def test_wrong_knobs():
    with pytest.raises(NoMatch, match="no split 'trian'"):
        Scenes("trian")
    with pytest.raises(NoMatch, match="no drawing style 'appel'; close: apple"):
        Scenes(styles=("appel",))
    with pytest.raises(NoMatch):
        Scenes(styles=())
    with pytest.raises(KnobError, match="count"):
        Scenes(count=0)
    with pytest.raises(KnobError, match=r"size.*objects.*side.*turn"):
        Layout(500, (0, 3), (0.5, 0.2), -1)


@pytest.mark.data
def test_without_photographs_it_says_how_to_get_them(monkeypatch, tmp_path, splits):
    monkeypatch.setenv("THRIFTY_DATA", str(tmp_path))
    with pytest.raises(DataError, match="imagenet_samples"):
        Scenes()
