"""Labelled pictures, which of them are the shots, and what augmentation does to them."""

import numpy as np
import pytest
from shape_worlds import shapes

from thrifty.errors import DataError, KnobError, NoMatch
from thrifty.fewshot.segmentation import (
    IGNORE,
    Augment,
    InMemory,
    Support,
    presence,
    sample,
    sample_centres,
    sample_pictures,
)
from thrifty.fewshot.segmentation.augment import FILL
from thrifty.fewshot.segmentation.pictures import pair, resize_mask


def rng(seed=0):
    return np.random.default_rng(seed)


def masks_only(masks, classes):
    masks = [np.array(m, np.uint8) for m in masks]
    return InMemory([np.zeros((*m.shape, 3), np.uint8) for m in masks], masks, classes)


# ---- shots


@pytest.mark.parametrize("shots", [1, 2, 5])
def test_k_different_pictures_for_each_class_that_show_it(shots):
    data = shapes(40)
    few = sample(data, shots, rng())
    assert len(few) == 3 * shots == len({item.picture for item in few.items})
    for target in (1, 2, 3):
        chosen = [item.picture for item in few.items if item.target == target]
        assert len(chosen) == shots
        assert all((data.mask(i) == target).any() for i in chosen)


def test_the_same_generator_gives_the_same_shots():
    data = shapes(40)
    assert sample(data, 2, rng(3)).items == sample(data, 2, rng(3)).items
    assert sample(data, 2, rng(3)).items != sample(data, 2, rng(4)).items


def test_a_rare_class_gets_its_shots_although_its_pictures_show_others():
    masks = [[[1, 2]], [[1, 1]], [[1, 1]], [[1, 2]]]
    data = masks_only(masks, ("ground", "often", "rare"))
    for seed in range(20):  # a picture with both counts for the rare one, whatever the order
        few = sample(data, 2, rng(seed))
        assert {i.picture for i in few.items if i.target == 2} == {0, 3}


def test_ignored_pixels_are_no_class_and_small_ones_may_not_count():
    data = masks_only([[[IGNORE, 0]], [[1, 0]], [[1, 1]]], ("ground", "thing"))
    assert presence(data).tolist() == [[True, False], [True, True], [False, True]]
    assert [i.picture for i in sample(data, 1, rng(), least=2).items] == [2]


def test_too_few_pictures_are_refused_by_class():
    data = masks_only([[[1, 0]], [[2, 0]], [[2, 0]]], ("ground", "one", "two"))
    with pytest.raises(DataError, match="'one' 1 of 2"):
        sample(data, 2, rng())
    assert len(sample(data, 2, rng(), classes=["two"])) == 2
    with pytest.raises(NoMatch):
        sample(data, 1, rng(), classes=["three"])
    with pytest.raises(KnobError):
        sample(data, 0, rng())


def test_places_in_large_pictures():
    mask = np.zeros((8, 16), np.uint8)
    mask[1:3, 9:13] = 1
    mask[6, 2] = IGNORE
    data = masks_only([mask, np.full((8, 16), 1)], ("ground", "thing"))
    few = sample_centres(data, 2, rng(), tile=8)
    assert len(few) == 4
    for item in few.items:
        assert data.mask(item.picture)[item.centre] == item.target
    assert {i.centre for i in sample_centres(data, 3, rng(), ["thing"], tile=8).items} == {(1, 10), (3, 3), (3, 11)}
    with pytest.raises(DataError, match="too few places: 'ground' 2 of 3"):
        sample_centres(data, 3, rng(), tile=8)


def test_pictures_whatever_they_show_and_splits():
    data = shapes(10)
    few = sample_pictures(data, 4, rng(1))
    assert len({i.picture for i in few.items}) == 4
    first, second = few.split(0.25, rng())
    assert (len(first), len(second)) == (3, 1)
    assert {i.picture for p in (first, second) for i in p.items} == {i.picture for i in few.items}
    with pytest.raises(KnobError):
        sample_pictures(data, 11, rng())
    with pytest.raises(DataError, match="empty"):
        Support(data, ())


# ---- checks


def test_bad_pictures_and_masks_are_refused():
    fine = np.zeros((4, 4, 3), np.uint8)
    for picture, mask, words in (
        (fine, np.full((4, 4), 7, np.uint8), r"values \[7\]"),
        (fine, np.zeros((4, 5), np.uint8), "shape"),
        (fine.astype(float), np.zeros((4, 4), np.uint8), "uint8"),
        (fine, np.zeros((4, 4), int), "int64"),
    ):
        with pytest.raises(DataError, match=words):
            pair(InMemory([picture], [mask], ("a", "b")), 0)
    with pytest.raises(DataError, match="one for each"):
        InMemory([fine], [], ("a",))


# ---- augmentation


def test_labels_are_resized_with_nearest_only():
    mask = rng().choice(np.array([0, 3, 18, IGNORE], np.uint8), (13, 17))
    for size in ((26, 34), (7, 5), (64, 9)):
        assert set(np.unique(resize_mask(mask, *size))) <= set(np.unique(mask))


def test_the_set_of_label_values_does_not_grow():
    data = shapes(4)
    change = Augment(crop=(40, 56), short_side=(30, 80), operations=3, magnitude=1.0)
    for seed in range(30):
        picture, mask = change(data.picture(seed % 4), data.mask(seed % 4), rng(seed))
        assert picture.shape == (40, 56, 3)
        assert mask.shape == (40, 56)
        assert set(np.unique(mask)) <= {*np.unique(data.mask(seed % 4)), IGNORE}


def test_picture_and_mask_move_together():
    """A picture that shows its own mask: every moved pixel still agrees, but where interpolation blends."""
    mask = shapes(1).mask(0)
    picture = np.repeat((mask * 60)[..., None], 3, axis=2)
    for seed in range(20):
        moved, label = Augment(crop=(40, 40), short_side=(44, 60))(picture, mask, rng(seed))
        agree = np.abs(moved[..., 0].astype(int) - 60 * label.astype(int)) < 10
        assert agree[label != IGNORE].mean() > 0.85


def test_small_pictures_are_padded_with_ignore():
    picture, mask = np.zeros((4, 4, 3), np.uint8), np.ones((4, 4), np.uint8)
    moved, label = Augment(crop=(6, 8), flip=False)(picture, mask, rng())
    assert (label == 1).sum() == 16
    assert (moved[label == IGNORE] == FILL).all()


def test_the_centre_stays_in_the_window():
    mask = np.zeros((100, 200), np.uint8)
    mask[80, 10] = 1
    picture = np.zeros((100, 200, 3), np.uint8)
    for seed in range(40):
        _, label = Augment(crop=(32, 32))(picture, mask, rng(seed), centre=(80, 10))
        assert (label == 1).sum() == 1


def test_two_views_are_the_picture_and_its_mirror():
    data = shapes(1)
    twice = [Augment(views=2)(data.picture(0), data.mask(0), rng(), view=v) for v in (0, 1)]
    assert (twice[0][0] == data.picture(0)).all()
    assert (twice[1][0] == data.picture(0)[:, ::-1]).all()
    assert (twice[1][1] == data.mask(0)[:, ::-1]).all()


@pytest.mark.parametrize("which", range(7))
def test_every_operation_of_randaugment_changes_the_picture(which):
    data = shapes(1, noise=5)

    class Chosen:
        def integers(self, *_):
            return which

        def random(self):
            return 0.0

    moved, label = Augment(flip=False, operations=1, magnitude=0.5)(data.picture(0), data.mask(0), Chosen())
    assert (moved != data.picture(0)).any()
    assert (label != data.mask(0)).any() == (which == 2)


def test_bad_knobs_all_at_once():
    with pytest.raises(KnobError, match=r"crop.*short_side.*magnitude"):
        Augment(crop=(0, 3), short_side=(9, 3), magnitude=2.0)
