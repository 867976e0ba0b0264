"""mIoU from one pooled matrix: hand-made answers."""

import numpy as np
import pytest

from thrifty.errors import DataError, NoMatch
from thrifty.fewshot.segmentation import IGNORE, Confusion


def of(truth, predicted, classes=("a", "b")):
    confusion = Confusion(classes)
    confusion.add(np.asarray(truth), np.asarray(predicted))
    return confusion


def test_a_perfect_prediction_is_100():
    mask = np.array([[0, 1], [1, 0]])
    assert of(mask, mask).iou().tolist() == [100.0, 100.0]
    assert of(mask, mask).miou() == 100.0


def test_all_background_on_half_and_half():
    found = of([[0, 0, 1, 1]], [[0, 0, 0, 0]])
    assert found.iou().tolist() == [50.0, 0.0]
    assert found.miou() == 25.0


def test_ignored_pixels_change_nothing():
    truth, predicted = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 1])
    more = of([*truth, IGNORE, IGNORE], [*predicted, 0, 1])
    assert (more.counts == of(truth, predicted).counts).all()


def test_a_class_in_neither_is_left_out_and_one_only_predicted_counts_as_0():
    three = ("a", "b", "c")
    absent = of([0, 1], [0, 1], three)
    assert np.isnan(absent.iou()[2])
    assert absent.miou() == 100.0
    invented = of([0, 1, 1, 0], [0, 1, 2, 0], three)
    assert invented.iou().tolist() == [100.0, 50.0, 0.0]
    assert invented.miou() == 50.0


def test_pooled_over_pictures_not_averaged():
    together = Confusion(("a", "b"))
    parts = [([0, 0, 0, 1], [0, 0, 0, 0]), ([1, 1, 1, 1], [1, 1, 1, 1])]
    for truth, predicted in parts:
        together.add(np.array(truth), np.array(predicted))
    assert together.iou().tolist() == [75.0, 80.0]
    separate = [of(*p) for p in parts]
    assert ((separate[0] + separate[1]).counts == together.counts).all()
    assert np.mean([c.miou() for c in separate]) != together.miou()


def test_leaving_classes_out_of_the_mean():
    found = of([0, 1, 2, 2], [0, 1, 2, 1], ("a", "b", "c"))
    assert found.iou().tolist() == [100.0, 50.0, 50.0]
    assert found.miou(leave_out=["b"]) == 75.0
    with pytest.raises(NoMatch, match="no class 'd'"):
        found.miou(leave_out=["d"])


def test_refusals():
    with pytest.raises(DataError, match="shape"):
        of([0, 1], [0])
    with pytest.raises(DataError, match="there are 2 classes"):
        of([0, 2], [0, 1])
    with pytest.raises(DataError, match="no pixel"):
        Confusion(("a",)).miou()
    with pytest.raises(DataError, match="same classes"):
        Confusion(("a",)) + Confusion(("b",))
