"""Changing pictures and masks together: resize, cut, mirror, and colour and rotation by RandAugment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from thrifty.errors import KnobError, need
from thrifty.fewshot.segmentation.pictures import IGNORE, Pixels, resize_mask, resize_picture

FILL = (124, 116, 104)  # the mean colour of ImageNet: black after normalisation would be an edge
LARGEST_TURN = 30.0  # degrees, at magnitude 1
LARGEST_CHANGE = 0.9  # of an enhancement factor, at magnitude 1
COLOURS = ("Color", "Contrast", "Brightness", "Sharpness")


@dataclass(frozen=True)
class Augment:
    """What is done to a labelled picture each time it is seen.

    In this order: resize so that the short side is drawn from `short_side`; cut a window `crop` (around the item's
    centre where it has one, else at random), padded with the mean colour and IGNORE where the picture is too small;
    mirror half of them; RandAugment. The operations of RandAugment are the benchmark's; what a magnitude means is our
    choice: up to 30 degrees, up to a factor of 1 +- 0.9. Masks are resized, turned and cut with the nearest pixel only.

    Source: Bensaid et al. 2025 (arXiv:2401.11311); Cubuk et al. 2020 (arXiv:1909.13719).
    """

    flip: bool = True
    crop: tuple[int, int] | None = None  # height, width; None: whole pictures
    short_side: tuple[int, int] | None = None  # least and largest, pixels; None: as it is
    operations: int = 0  # RandAugment's N; 0 = off. The benchmark: 2
    magnitude: float = 0.2  # RandAugment's M, in [0, 1]
    views: int = 0  # 0: each time anew; V: an item has V versions, all that training ever sees (needed for a cache)

    def __post_init__(self) -> None:
        """Refuse values outside their range, all at once."""
        rules = {
            f"crop is {self.crop}; it must be two positive numbers": self.crop is None or min(self.crop) >= 1,
            f"short_side is {self.short_side}; it must be (least, largest), positive": self.short_side is None
            or 1 <= self.short_side[0] <= self.short_side[1],
            f"operations is {self.operations} and views {self.views}; neither may be negative": min(
                self.operations, self.views
            )
            >= 0,
            f"magnitude is {self.magnitude}; it must be in [0, 1]": 0 <= self.magnitude <= 1,
        }
        bad = [sentence for sentence, fine in rules.items() if not fine]
        if bad:
            raise KnobError("Augment: " + "; ".join(bad))

    def __call__(
        self, picture: Pixels, mask: Pixels, rng: np.random.Generator,
        centre: tuple[int, int] | None = None, view: int | None = None,
    ) -> tuple[Pixels, Pixels]:  # fmt: skip
        """Return a changed copy of picture (H, W, 3) and mask (H, W).

        view: the number of the version; odd ones are the mirrored ones, so that two views without a crop are both
        sides.
        """
        if self.short_side is not None:
            picture, mask, centre = self._resized(picture, mask, centre, rng)
        if self.crop is not None:
            picture, mask = self._cut(picture, mask, centre, rng)
        if self.flip and (rng.random() < 0.5 if view is None else view % 2 == 1):
            picture, mask = picture[:, ::-1], mask[:, ::-1]
        for _ in range(self.operations):
            picture, mask = self._operate(picture, mask, rng)
        return np.ascontiguousarray(picture), np.ascontiguousarray(mask)

    def _resized(
        self, picture: Pixels, mask: Pixels, centre: tuple[int, int] | None, rng: np.random.Generator
    ) -> tuple[Pixels, Pixels, tuple[int, int] | None]:
        least, largest = self.short_side or (1, 1)
        factor = int(rng.integers(least, largest + 1)) / min(mask.shape)
        height, width = (max(1, round(side * factor)) for side in mask.shape)
        moved = None if centre is None else (int(centre[0] * factor), int(centre[1] * factor))
        return resize_picture(picture, height, width), resize_mask(mask, height, width), moved

    def _cut(
        self, picture: Pixels, mask: Pixels, centre: tuple[int, int] | None, rng: np.random.Generator
    ) -> tuple[Pixels, Pixels]:
        height, width = self.crop or mask.shape
        more = [max(0, wanted - side) for wanted, side in zip((height, width), mask.shape)]
        if any(more):
            before = [m // 2 for m in more]
            around = [(b, m - b) for b, m in zip(before, more)]
            filled = np.full((mask.shape[0] + more[0], mask.shape[1] + more[1], 3), FILL, np.uint8)
            filled[before[0] : before[0] + mask.shape[0], before[1] : before[1] + mask.shape[1]] = picture
            picture, mask = filled, np.pad(mask, around, constant_values=IGNORE)
            centre = None if centre is None else (centre[0] + before[0], centre[1] + before[1])
        room = (mask.shape[0] - height, mask.shape[1] - width)
        if centre is None:
            top, left = (int(rng.integers(0, r + 1)) for r in room)
        else:  # the centre lies in the window, anywhere in its middle half
            jitter = [int(rng.integers(-(side // 4), side // 4 + 1)) for side in (height, width)]
            starts = [c - side // 2 + j for c, side, j in zip(centre, (height, width), jitter)]
            top, left = (min(max(0, s), r) for s, r in zip(starts, room))
        return picture[top : top + height, left : left + width], mask[top : top + height, left : left + width]

    def _operate(self, picture: Pixels, mask: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
        image: Any = need("PIL.Image", extra="data")
        operations: Any = need("PIL.ImageOps", extra="data")
        enhance: Any = need("PIL.ImageEnhance", extra="data")
        shown = image.fromarray(np.ascontiguousarray(picture))
        which = int(rng.integers(3 + len(COLOURS)))
        sign = 1 if rng.random() < 0.5 else -1
        if which == 0:
            shown = operations.autocontrast(shown)
        elif which == 1:
            shown = operations.equalize(shown)
        elif which == 2:
            turn = sign * self.magnitude * LARGEST_TURN
            flat = image.fromarray(np.ascontiguousarray(mask))
            turned = flat.rotate(turn, image.Resampling.NEAREST, fillcolor=IGNORE)
            mask = np.asarray(turned)
            shown = shown.rotate(turn, image.Resampling.BILINEAR, fillcolor=FILL)
        else:
            factor = 1 + sign * self.magnitude * LARGEST_CHANGE
            shown = getattr(enhance, COLOURS[which - 3])(shown).enhance(factor)
        return np.asarray(shown), mask
