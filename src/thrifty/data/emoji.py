"""Pictures of emoji in four drawing styles, 64x64 with transparency, with names and categories: a world of thousands of
classes with text, from the npm packages emoji-datasource-STYLE.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.data.source import FOLDER_VARIABLE, Source, cached, checksum
from thrifty.errors import DataError, NoMatch, close_to, need

Array = npt.NDArray[Any]
EMOJI_VARIABLE = "THRIFTY_EMOJI"
SIZE = 64
STYLES = ("apple", "google", "twitter", "facebook")
SOURCE = Source(
    title="Emoji pictures and names",
    origin="npm packages emoji-datasource-apple, -google, -twitter, -facebook (Cal Henderson)",
    licence="data and tools MIT; the pictures belong to their makers (Apple, Google, Twitter, Facebook)",
    shapes="about 1,900 pictures of 64x64 RGBA for each style, with name, category and subcategory",
    get="npm install emoji-datasource-apple emoji-datasource-google emoji-datasource-twitter emoji-datasource-facebook",
)


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures of one drawing style, in the order of their codes; all tuples have n entries."""

    style: str
    rgba: Array  # (n, 64, 64, 4) uint8, alpha last
    codes: tuple[str, ...]  # Unicode code points, such as "1f600": the same in every style
    names: tuple[str, ...]  # in lower case, such as "grinning face"
    categories: tuple[str, ...]  # such as "Smileys & Emotion"
    subcategories: tuple[str, ...]  # such as "face-smiling"

    def __len__(self) -> int:
        return len(self.codes)

    def only(self, codes: Sequence[str]) -> Pictures:
        """Return the pictures with these codes, in this order; raises NoMatch for a code that is not there."""
        at = {code: i for i, code in enumerate(self.codes)}
        missing = [code for code in codes if code not in at]
        if missing:
            raise NoMatch(f"the style '{self.style}' has no emoji {', '.join(missing[:5])}; {close_to(missing[0], at)}")
        rows = [at[code] for code in codes]
        texts = ([column[i] for i in rows] for column in (self.codes, self.names, self.categories, self.subcategories))
        return Pictures(self.style, self.rgba[rows], *(tuple(t) for t in texts))


def load(style: str = "apple") -> Pictures:
    """Return all pictures of one style: "apple", "google", "twitter" or "facebook".

    The package is looked for in the folders THRIFTY_EMOJI, THRIFTY_DATA/node_modules and ./node_modules. Skin-tone
    variants and what the style does not draw are left out. Raises NoMatch for another style, DataError when the
    package is not there (it says how to get it) or damaged.
    """
    if style not in STYLES:
        raise NoMatch(f"no drawing style '{style}'; {close_to(style, STYLES)}")
    folder = _package(style)
    table = folder / "emoji.json"
    try:
        entries = json.loads(table.read_text(encoding="utf-8"))
        drawn = sorted((e for e in entries if e[f"has_img_{style}"]), key=lambda e: str(e["image"]))
        files = [folder / "img" / style / str(SIZE) / e["image"] for e in drawn]
        columns = [tuple(str(e[key]) for e in drawn) for key in ("name", "category", "subcategory")]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise DataError(f"{table} is not the table of emoji-datasource-{style}: {err!r}; install it again") from err
    absent = [f.name for f in files if not f.is_file()]
    if absent:
        raise DataError(f"{folder} lacks {len(absent)} pictures, such as {absent[0]}; install emoji-datasource-{style}")
    key = f"emoji_{style}_{len(files)}_{checksum(table)[:16]}"
    names, categories, subcategories = columns
    codes = tuple(f.stem for f in files)
    lower = tuple(name.lower() for name in names)
    return Pictures(style, cached(key, lambda: _decode(files)), codes, lower, categories, subcategories)


def on_background(rgba: Array, colour: tuple[int, int, int] = (255, 255, 255)) -> Array:
    """Return (..., 3) uint8: pictures (..., 4) uint8 laid over one colour, rounded half up.

    >>> on_background(np.array([[[200, 0, 0, 255], [9, 9, 9, 0]]], np.uint8)).tolist()
    [[[200, 0, 0], [255, 255, 255]]]
    """
    alpha = rgba[..., 3:].astype(np.uint32)
    mixed = rgba[..., :3] * alpha + np.array(colour, np.uint32) * (255 - alpha)
    return ((2 * mixed + 255) // 510).astype(np.uint8)


def _package(style: str) -> Path:
    name = f"emoji-datasource-{style}"
    given, data = os.environ.get(EMOJI_VARIABLE), os.environ.get(FOLDER_VARIABLE)
    places = [Path(given)] if given else []
    places += [Path(data) / "node_modules"] if data else []
    places += [Path("node_modules")]
    for place in places:
        if (place / name / "emoji.json").is_file():
            return place / name
    looked = ", ".join(str(place) for place in places)
    raise DataError(
        f"{SOURCE.title}: no package {name} in {looked}. {SOURCE.get} Then: export {EMOJI_VARIABLE}=.../node_modules"
    )


def _decode(files: Sequence[Path]) -> Array:
    image = need("PIL.Image", extra="data")
    pixels = np.empty((len(files), SIZE, SIZE, 4), np.uint8)
    for i, file in enumerate(files):
        try:
            picture = image.open(file).convert("RGBA")
        except OSError as err:
            raise DataError(f"{file} cannot be decoded: {err}") from err
        if picture.size != (SIZE, SIZE):
            picture = picture.resize((SIZE, SIZE), image.Resampling.BOX)
        pixels[i] = np.asarray(picture)
    return pixels
