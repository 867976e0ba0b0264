"""COCO from a local folder, in its official layout: instances drawn into one mask of 80 classes and background."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.errors import DataError, need
from thrifty.fewshot.segmentation.pictures import IGNORE, Pixels, read_picture


class Coco:
    """Pictures SPLIT/NAME.jpg with annotations/instances_SPLIT.json; classes: "background", then the categories.

    Every instance is drawn with its category; pixels of two or more instances are IGNORE, as in the benchmark; so are
    the regions marked as crowds (our choice). Polygons are drawn with Pillow, which differs from pycocotools at the
    border pixels; run-length masks are read exactly. Only pictures that are in the folder count. Raises DataError.

    Source: Lin et al. 2014 (arXiv:1405.0312); cocodataset.org, under its own terms.
    """

    def __init__(self, folder: str | Path, split: str = "train2017") -> None:
        base = Path(folder)
        path = base / "annotations" / f"instances_{split}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            categories = sorted((int(c["id"]), str(c["name"])) for c in content["categories"])
            entries = sorted(content["images"], key=lambda e: int(e["id"]))
            instances: dict[int, list[dict[str, Any]]] = defaultdict(list)
            for instance in content["annotations"]:
                instances[int(instance["image_id"])].append(instance)
            self.classes = ("background", *(name for _, name in categories))
            self.entries = [e for e in entries if (base / split / e["file_name"]).is_file()]
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise DataError(
                f"{path} is not COCO's instances file ({err!r}); unpack annotations_trainval2017.zip there"
            ) from err
        if not self.entries:
            raise DataError(
                f"none of the {len(entries)} pictures of {path.name} is in {base / split}; unpack {split}.zip there"
            )
        self.folder = base / split
        self.instances = instances
        self.numbers = {category: i + 1 for i, (category, _) in enumerate(categories)}

    def __len__(self) -> int:
        return len(self.entries)

    def picture(self, i: int) -> Pixels:
        """Return picture i: (H, W, 3) uint8."""
        return read_picture(self.folder / self.entries[i]["file_name"])

    def mask(self, i: int) -> Pixels:
        """Return its mask: 0..80, or IGNORE."""
        entry = self.entries[i]
        height, width = int(entry["height"]), int(entry["width"])
        mask, count = np.zeros((height, width), np.uint8), np.zeros((height, width), np.uint8)
        try:
            for instance in self.instances.get(int(entry["id"]), []):
                region = region_of(instance["segmentation"], height, width)
                if instance.get("iscrowd"):
                    count[region] = 2
                else:
                    mask[region] = self.numbers[int(instance["category_id"])]
                    count[region] = np.minimum(count[region] + 1, 2)
        except (KeyError, ValueError, TypeError, IndexError) as err:
            raise DataError(f"the instances of {entry['file_name']} cannot be read: {err!r}") from err
        mask[count > 1] = IGNORE
        return mask


def region_of(segmentation: Any, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Return the pixels (H, W) of one instance: polygons [[x, y, x, y, ...], ...], or run lengths.

    Run lengths {"counts": list or text, "size": [H, W]} go down the columns and begin with what is outside.

    >>> region_of({"counts": [1, 2, 1], "size": [2, 2]}, 2, 2).astype(int).tolist()
    [[0, 1], [1, 0]]
    """
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        runs = np.asarray(decode_counts(counts) if isinstance(counts, str) else counts, np.int64)
        if runs.sum() != height * width or (runs < 0).any():
            raise ValueError(f"run lengths add up to {int(runs.sum())}, the picture has {height * width} pixels")
        flags = np.arange(len(runs)) % 2 == 1
        return np.repeat(flags, runs).reshape(width, height).T
    image: Any = need("PIL.Image", extra="data")
    draw: Any = need("PIL.ImageDraw", extra="data")
    canvas = image.new("1", (width, height))
    pen = draw.Draw(canvas)
    for polygon in segmentation:
        if len(polygon) >= 6:
            pen.polygon([(x, y) for x, y in zip(polygon[::2], polygon[1::2])], fill=1)
    return np.asarray(canvas, bool)


def decode_counts(text: str) -> list[int]:
    """Return the run lengths of COCO's compressed text: 5 bits and a flag in each character, 48 added; from the fourth
    run on, the difference to the last but one.

    >>> decode_counts("121")
    [1, 2, 1]
    """
    runs: list[int] = []
    at = 0
    while at < len(text):
        value = shift = 0
        more = True
        while more:
            part = ord(text[at]) - 48
            value |= (part & 0x1F) << shift
            more = bool(part & 0x20)
            shift += 5
            at += 1
            if not more and part & 0x10:
                value |= -1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs
