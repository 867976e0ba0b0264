"""Cityscapes, COCO and PPD from tiny folders in their official layouts."""

import json

import numpy as np
import pytest
from PIL import Image

from thrifty.errors import DataError, NoMatch
from thrifty.fewshot.segmentation import CITYSCAPES_REDUCED, IGNORE, Cityscapes, Coco, Confusion, Ppd
from thrifty.fewshot.segmentation.coco import decode_counts, region_of
from thrifty.fewshot.segmentation.pictures import pair


def put(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)


def colours(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3))


# ---- Cityscapes


def cityscapes(folder, kind="labelTrainIds", values=((0, 18), (IGNORE, 13))):
    for city, number in (("aachen", "000000"), ("bochum", "000001")):
        name = f"{city}_{number}_000019"
        put(folder / "leftImg8bit/train" / city / f"{name}_leftImg8bit.png", colours(2, 2))
        put(folder / "gtFine/train" / city / f"{name}_gtFine_{kind}.png", values)
    return folder


def test_cityscapes(tmp_path):
    data = Cityscapes(cityscapes(tmp_path))
    assert len(data) == 2
    assert len(data.classes) == 19
    assert data.classes[0] == "road"
    assert data.classes[13] == "car"
    assert (data.picture(1) == colours(2, 2)).all()
    assert data.mask(0).tolist() == [[0, 18], [IGNORE, 13]]
    pair(data, 0)


def test_cityscapes_without_the_official_conversion(tmp_path):
    data = Cityscapes(cityscapes(tmp_path, "labelIds", ((7, 33), (4, 26))))
    assert data.mask(0).tolist() == [[0, 18], [IGNORE, 13]]


def test_the_reduced_score_leaves_three_classes_out():
    assert [Cityscapes.classes.index(c) for c in CITYSCAPES_REDUCED] == [14, 15, 16]
    found = Confusion(Cityscapes.classes, np.diag(np.arange(19) % 2))
    found.add(np.array([14]), np.array([15]))
    assert found.miou(CITYSCAPES_REDUCED) == 100.0
    assert found.miou() < 100.0


def test_cityscapes_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="leftImg8bit"):
        Cityscapes(tmp_path)
    with pytest.raises(NoMatch):
        Cityscapes(tmp_path, "training")
    next((cityscapes(tmp_path) / "gtFine/train/aachen").iterdir()).unlink()
    with pytest.raises(DataError, match="1 pictures lack"):
        Cityscapes(tmp_path)


# ---- COCO


def encode(runs):
    """The compressed text of run lengths, written from the format's description; the reader must undo it."""
    text = ""
    for i, run in enumerate(runs):
        x = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            part = x & 0x1F
            x >>= 5
            more = x != -1 if part & 0x10 else x != 0
            text += chr((part | 0x20 if more else part) + 48)
    return text


def coco(folder):
    square = [[1, 1, 1, 4, 4, 4, 4, 1]]
    put(folder / "val2017/000000000009.jpg", colours(8, 10))
    put(folder / "val2017/000000000025.jpg", colours(8, 10, 1))
    block = np.zeros((8, 10), int)
    block[3:6, 3:8] = 1
    flat = block.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    crowd = np.zeros((8, 10), int)
    crowd[7] = 1
    ends = np.flatnonzero(np.diff(crowd.T.reshape(-1))) + 1
    content = {
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
        "images": [
            {"id": i, "file_name": f"{i:012d}.jpg", "height": 8, "width": 10} for i in (25, 9, 30)
        ],
        "annotations": [
            {"image_id": 9, "category_id": 1, "segmentation": square, "iscrowd": 0},
            {"image_id": 9, "category_id": 90, "segmentation": {"counts": encode(runs), "size": [8, 10]}, "iscrowd": 0},
            {"image_id": 9, "category_id": 1, "iscrowd": 1,
             "segmentation": {"counts": np.diff([0, *ends, 80]).tolist(), "size": [8, 10]}},
        ],
    }  # fmt: skip
    (folder / "annotations").mkdir()
    (folder / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return folder


def test_coco(tmp_path):
    data = Coco(coco(tmp_path), "val2017")
    assert data.classes == ("background", "person", "toothbrush")
    assert len(data) == 2  # the third picture is not in the folder
    mask = data.mask(0)
    wanted = np.zeros((8, 10), np.uint8)
    wanted[1:5, 1:5] = 1
    wanted[3:6, 3:8] = 2
    wanted[3:5, 3:5] = IGNORE  # two instances
    wanted[7] = IGNORE  # a crowd
    assert mask.tolist() == wanted.tolist()
    assert not data.mask(1).any()
    pair(data, 0)


def test_run_lengths_of_every_size():
    rng = np.random.default_rng(0)
    for _ in range(50):
        runs = rng.integers(0, 10 ** rng.integers(1, 7), rng.integers(1, 30)).tolist()
        assert decode_counts(encode(runs)) == runs
    with pytest.raises(ValueError, match="add up"):
        region_of({"counts": [1, 2], "size": [2, 2]}, 2, 2)


def test_coco_that_is_not_there_or_damaged(tmp_path):
    with pytest.raises(DataError, match="annotations_trainval2017"):
        Coco(tmp_path)
    coco(tmp_path)
    path = tmp_path / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 5
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="000000000009"):
        Coco(tmp_path, "val2017").mask(0)
    for file in (tmp_path / "val2017").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="none of the 3 pictures"):
        Coco(tmp_path, "val2017")


# ---- PPD


def ppd(folder, counts=(3, 2, 4)):
    for name, count in zip(("A1", "A2", "A4"), counts):
        for i in range(count):
            put(folder / name / f"plant{i:03d}_rgb.png", colours(4, 5, i))
            if i:
                put(folder / name / f"plant{i:03d}_fg.png", np.eye(4, 5) * 255)
            else:
                put(folder / name / f"plant{i:03d}_label.png", np.eye(4, 5) * 3)
    return folder


def test_ppd(tmp_path):
    parts = {part: Ppd(ppd(tmp_path), part) for part in ("train", "validation", "all")}
    assert [len(p) for p in parts.values()] == [4, 4, 9]
    assert not set(parts["train"].files) & set(parts["validation"].files)
    assert Ppd(tmp_path).files == parts["train"].files != Ppd(tmp_path, seed=1).files
    for i in range(9):
        assert (parts["all"].mask(i) == np.eye(4, 5)).all()
    pair(parts["all"], 0)


def test_ppd_with_the_benchmarks_own_list(tmp_path):
    names = frozenset({"A1/plant001", "A4/plant000"})
    train, rest = (Ppd(ppd(tmp_path), part, train_names=names) for part in ("train", "validation"))
    assert [f"{f.parent.name}/{f.name}" for f in train.files] == ["A1/plant001_rgb.png", "A4/plant000_rgb.png"]
    assert len(rest) == 7
    with pytest.raises(NoMatch):
        Ppd(tmp_path, train_names=frozenset({"A1/plant999"}))


def test_ppd_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="CVPPP"):
        Ppd(tmp_path)
    ppd(tmp_path)
    (tmp_path / "A1/plant001_fg.png").unlink()
    with pytest.raises(DataError, match="have no _fg"):
        Ppd(tmp_path)


def test_masks_with_colours_or_damage_are_refused(tmp_path):
    cityscapes(tmp_path)
    put(tmp_path / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png", colours(2, 2))
    data = Cityscapes(tmp_path)
    with pytest.raises(DataError, match="one number for each pixel"):
        data.mask(0)
    data.files[1].write_bytes(b"no picture")
    with pytest.raises(DataError, match="cannot be read"):
        data.picture(1)
