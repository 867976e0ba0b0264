"""A benchmark that needs no download: drawn objects with alpha masks, pasted over real photographs.

Twelve classes of emoji over ImageNet photographs. Training, validation and test share no photograph and no emoji; the
test set can be drawn again, object by object, in drawing styles that training has not seen: a domain shift where
nothing but the style has changed.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.data import emoji
from thrifty.data.source import Source, find, read
from thrifty.errors import DataError, KnobError, NoMatch, close_to, need
from thrifty.fewshot.segmentation.pictures import Pixels

GROUPS: dict[str, tuple[str, ...]] = {  # class -> subcategories of emoji
    "face": ("face-smiling", "face-affection", "face-tongue", "face-neutral-skeptical", "face-concerned"),
    "cat": ("cat-face",),
    "heart": ("heart",),
    "hand": ("hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed"),
    "mammal": ("animal-mammal",),
    "bird": ("animal-bird",),
    "fruit": ("food-fruit",),
    "flower": ("plant-flower",),
    "vehicle": ("transport-ground",),
    "building": ("place-building",),
    "clothing": ("clothing",),
    "clock": ("time",),
}
SCENE_CLASSES = ("background", *GROUPS)
SPLITS = ("train", "validation", "test")
SHARES = (0.5, 0.2, 0.3)  # of the photographs, and of the emoji of each class
PHOTO_SIDE = 224
OPAQUE = 128  # alpha from which a pixel belongs to the object
PHOTOS = Source(
    title="ImageNet samples, one photograph for each of 1,000 classes",
    origin="ImageNet (Deng et al. 2009)",
    licence="research use",
    shapes="1,000 JPEG files of 224x224 in a row",
    get="No package carries them; any .npz with 'jpeg' (all files in a row) and 'offset' (n + 1) does.",
    files={"imagenet_samples.npz": ""},
)


@dataclass(frozen=True)
class Layout:
    """How a scene is laid out; lengths are shares of its side."""

    size: int = 160  # side of the scene, pixels
    objects: tuple[int, int] = (3, 6)  # least and largest number
    side: tuple[float, float] = (0.25, 0.55)  # of an object
    turn: float = 40.0  # largest rotation to either side, degrees

    def __post_init__(self) -> None:
        """Refuse values outside their range, all at once."""
        rules = {
            f"size is {self.size}; it must be in 32..{PHOTO_SIDE}": 32 <= self.size <= PHOTO_SIDE,
            f"objects is {self.objects}; it must be (least, largest), at least 1": 1
            <= self.objects[0]
            <= self.objects[1],
            f"side is {self.side}; it must be (least, largest) in (0, 1]": 0 < self.side[0] <= self.side[1] <= 1,
            f"turn is {self.turn}; it must be in [0, 180]": 0 <= self.turn <= 180,
        }
        bad = [sentence for sentence, fine in rules.items() if not fine]
        if bad:
            raise KnobError("Layout: " + "; ".join(bad))


@dataclass(frozen=True)
class Placed:
    """One object of a scene, in drawing order: later ones lie on top."""

    target: int  # class number, 1..12
    code: str  # of the emoji
    style: str
    side: int  # pixels
    turn: float  # degrees
    mirrored: bool
    centre: tuple[int, int]  # row, column


class Scenes:
    """`count` scenes of one split, made on demand; the same for the same seed, whatever `count` is.

    split: "train", "validation" or "test". styles: the drawing styles that objects are drawn in; scene i of other
    styles has the same photograph, objects and places, so results across styles are paired. Only emoji that all four
    styles draw are used. Reads imagenet_samples.npz (THRIFTY_DATA) and the emoji packages (see thrifty.data.emoji).
    Raises NoMatch, KnobError, DataError.
    """

    classes = SCENE_CLASSES

    def __init__(
        self, split: str = "train", styles: Sequence[str] = ("apple", "google"), count: int = 100, seed: int = 0,
        layout: Layout | None = None,
    ) -> None:  # fmt: skip
        if split not in SPLITS:
            raise NoMatch(f"no split '{split}'; {close_to(split, SPLITS)}")
        strange = [s for s in styles if s not in emoji.STYLES] or ([] if styles else [""])
        if strange:
            raise NoMatch(f"no drawing style '{strange[0]}'; {close_to(strange[0], emoji.STYLES)}")
        if count < 1:
            raise KnobError(f"count is {count}; it must be at least 1")
        self.split, self.styles, self.count, self.seed = split, tuple(styles), count, seed
        self.layout = layout or Layout()
        world = {style: emoji.load(style) for style in emoji.STYLES}
        self.codes = emoji_of(split, world, seed)
        used = sorted({code for codes in self.codes.values() for code in codes})
        self._drawn = {s: dict(zip(used, world[s].only(used).rgba)) for s in self.styles}
        path = find(PHOTOS)["imagenet_samples.npz"]
        arrays = read(path)
        try:
            self._jpeg, self._offset = arrays["jpeg"], arrays["offset"]
        except KeyError as err:
            raise DataError(f"{path} has no array {err}; it must have 'jpeg' and 'offset'") from err
        self.photos = _part(np.random.default_rng([seed, 0]).permutation(len(self._offset) - 1), split)

    def __len__(self) -> int:
        return self.count

    def picture(self, i: int) -> Pixels:
        """Return scene i: (size, size, 3) uint8."""
        return self.scene(i)[0]

    def mask(self, i: int) -> Pixels:
        """Return its mask: (size, size) uint8, 0..12."""
        return self.scene(i)[1]

    def scene(self, i: int) -> tuple[Pixels, Pixels]:
        """Return scene i and its mask."""
        if not 0 <= i < self.count:
            raise IndexError(f"scene {i} of {self.count}")
        photo, placed = self._plan(i)
        picture = photo.astype(np.float32)
        mask = np.zeros(photo.shape[:2], np.uint8)
        for thing in placed:
            colour, alpha = drawn(self._drawn[thing.style][thing.code], thing.side, thing.turn, thing.mirrored)
            here, there = _window(thing.centre, alpha.shape, mask.shape)
            share = alpha[there][..., None].astype(np.float32) / 255
            picture[here] = picture[here] * (1 - share) + colour[there]
            mask[here][alpha[there] >= OPAQUE] = thing.target
        return np.clip(picture + 0.5, 0, 255).astype(np.uint8), mask

    def placed(self, i: int) -> tuple[Placed, ...]:
        """Return what lies in scene i, from the lowest to the topmost."""
        return self._plan(i)[1]

    def _plan(self, i: int) -> tuple[Pixels, tuple[Placed, ...]]:
        lay, which = self.layout, SPLITS.index(self.split)
        rng = np.random.default_rng([self.seed, 1, which, i])
        style_rng = np.random.default_rng([self.seed, 2, which, i])  # its own: places do not depend on styles
        photo = self._photo(int(self.photos[rng.integers(len(self.photos))]))
        top, left = rng.integers(0, PHOTO_SIDE - lay.size + 1, 2)
        photo = photo[top : top + lay.size, left : left + lay.size]
        photo = photo[:, ::-1] if rng.random() < 0.5 else photo
        placed = []
        for _ in range(int(rng.integers(lay.objects[0], lay.objects[1] + 1))):
            target = int(rng.integers(1, len(SCENE_CLASSES)))
            codes = self.codes[SCENE_CLASSES[target]]
            code = codes[int(rng.integers(len(codes)))]
            side = round(lay.size * rng.uniform(*lay.side))
            turn, mirrored = float(rng.uniform(-lay.turn, lay.turn)), bool(rng.random() < 0.5)
            row, column = (int(v) for v in rng.integers(side // 4, lay.size - side // 4, 2))
            style = self.styles[int(style_rng.random() * len(self.styles))]
            placed.append(Placed(target, code, style, side, turn, mirrored, (row, column)))
        return photo, tuple(placed)

    def _photo(self, i: int) -> Pixels:
        image: Any = need("PIL.Image", extra="data")
        raw = self._jpeg[self._offset[i] : self._offset[i + 1]].tobytes()
        try:
            opened = image.open(io.BytesIO(raw)).convert("RGB")
        except OSError as err:
            raise DataError(f"photograph {i} cannot be decoded: {err}") from err
        if opened.size != (PHOTO_SIDE, PHOTO_SIDE):
            opened = opened.resize((PHOTO_SIDE, PHOTO_SIDE), image.Resampling.BICUBIC)
        return np.asarray(opened)


def emoji_of(split: str, world: dict[str, emoji.Pictures], seed: int = 0) -> dict[str, tuple[str, ...]]:
    """Return the codes of each class in one split; the splits are disjoint, and every style draws every code.

    Variants of one drawing (the hours of the clock) are different emoji. Raises DataError for a class with too few.
    """
    common = set.intersection(*(set(pictures.codes) for pictures in world.values()))
    first = world["apple"]
    found = {}
    for number, (name, subcategories) in enumerate(GROUPS.items()):
        codes = sorted(c for c, s in zip(first.codes, first.subcategories) if s in subcategories and c in common)
        if len(codes) < 5:
            raise DataError(f"class '{name}' has {len(codes)} emoji in all styles; at least 5 are needed")
        order = np.random.default_rng([seed, 3, number]).permutation(len(codes))
        found[name] = tuple(codes[i] for i in _part(order, split))
    return found


def drawn(rgba: Pixels, side: int, turn: float, mirrored: bool) -> tuple[npt.NDArray[np.float32], Pixels]:
    """Return (colour times alpha (h, w, 3), alpha (h, w) uint8) of a picture (64, 64, 4), scaled and turned."""
    image: Any = need("PIL.Image", extra="data")
    shown = image.fromarray(rgba, "RGBA").convert("RGBa")  # premultiplied: no dark or bright rim when resampled
    shown = shown.resize((side, side), image.Resampling.BICUBIC)
    if mirrored:
        shown = shown.transpose(image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(shown)
    channels = (image.fromarray(np.ascontiguousarray(pixels[..., c])) for c in range(4))
    planes = [np.asarray(channel.rotate(turn, image.Resampling.BILINEAR, expand=True)) for channel in channels]
    return np.stack(planes[:3], axis=-1).astype(np.float32), planes[3]


def _part(order: npt.NDArray[np.int64], split: str) -> npt.NDArray[np.int64]:
    """Return the share of an order that belongs to a split."""
    ends = [0, *(round(share * len(order)) for share in itertools.accumulate(SHARES))]
    which = SPLITS.index(split)
    return order[ends[which] : ends[which + 1]]


def _window(
    centre: tuple[int, int], thing: tuple[int, ...], scene: tuple[int, ...]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return where an object lies in the scene, and which part of it does."""
    here, there = [], []
    for c, n, m in zip(centre, thing, scene):
        start = c - n // 2
        here.append(slice(max(0, start), max(0, min(m, start + n))))
        there.append(slice(max(0, -start), max(0, -start) + here[-1].stop - here[-1].start))
    return (here[0], here[1]), (there[0], there[1])
