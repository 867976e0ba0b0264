"""Emoji pictures as few-shot worlds with text: features of every style and view, and episodes across drawing styles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import real_features

from thrifty.data import emoji as emoji_data
from thrifty.data.source import cache_folder
from thrifty.fewshot import Episodes
from thrifty.fewshot.features import encoder, extract
from thrifty.fewshot.text_statistics import NamedFeatures

STYLES = emoji_data.STYLES
VIEWS = 2  # of a drawing: plain, and turned, shrunk and shifted a little


@dataclass(frozen=True, eq=False)
class World:
    """Emoji that all styles draw, in the order of their names."""

    features: np.ndarray  # (n, styles, views, 1280)
    names: np.ndarray  # (n,)
    groups: np.ndarray  # (n,) subcategories
    texts: np.ndarray  # (n, 384) of the names

    def rows(self, classes: np.ndarray) -> np.ndarray:
        """Return the sorted rows of classes."""
        return np.flatnonzero(np.isin(self.names, classes))

    def named(
        self, classes: np.ndarray, styles: Sequence[int], views: int = 1, texts: Mapping[str, np.ndarray] | None = None
    ) -> NamedFeatures:
        """Return the pictures of classes in some styles, ordered by class, style, view; the plain view comes first."""
        rows = self.rows(classes)
        x = self.features[rows][:, list(styles), :views].reshape(-1, self.features.shape[-1])
        if texts is None:
            texts = dict(zip(self.names[rows].tolist(), self.texts[rows], strict=True))
        return NamedFeatures(x, np.repeat(self.names[rows], len(styles) * views), texts)


@cache
def world() -> World:
    """Return the emoji that all four styles draw, one per name."""
    parts = [real_features.emoji(style) for style in STYLES]
    codes = sorted(set.intersection(*(set(p.codes) for _, p in parts)))
    first = parts[0][1].only(codes)
    keep = list({name: i for i, name in reversed(list(enumerate(first.names)))}.values())
    keep.sort(key=lambda i: first.names[i])
    at = [{code: i for i, code in enumerate(p.codes)} for _, p in parts]
    rows = [[where[codes[i]] for i in keep] for where in at]
    plain = np.stack([f[r] for (f, _), r in zip(parts, rows, strict=True)], axis=1)
    turned = np.stack([second_views(s)[r] for s, r in zip(STYLES, rows, strict=True)], axis=1)
    names = np.array([first.names[i] for i in keep])
    groups = np.array([first.subcategories[i] for i in keep])
    return World(np.stack([plain, turned], axis=2), names, groups, real_features.sentences(names.tolist()).astype(np.float64))


@cache
def second_views(style: str) -> np.ndarray:
    """Return features (n, 1280) of every picture of a style turned by up to 15 degrees, shrunk and shifted a little."""
    from PIL import Image

    rgb = emoji_data.on_background(emoji_data.load(style).rgba)
    rng = np.random.default_rng([7, STYLES.index(style)])
    angle, scale = np.deg2rad(rng.uniform(-15, 15, len(rgb))), rng.uniform(0.85, 1.0, len(rgb))
    shift = rng.uniform(-4, 4, (len(rgb), 2))
    turned = np.empty_like(rgb)
    for i, picture in enumerate(rgb):
        a, b = np.cos(angle[i]) / scale[i], np.sin(angle[i]) / scale[i]
        x, y = 31.5 + shift[i]
        matrix = (a, b, 31.5 - a * x - b * y, -b, a, 31.5 + b * x - a * y)
        image = Image.fromarray(picture).transform(
            (64, 64), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255)
        )
        turned[i] = np.asarray(image)
    return extract(encoder("efficientnet-lite0"), turned, cache=cache_folder() / "features")


def style_episodes(
    classes: int, ways: int, shots: int, count: int, rng: np.random.Generator,
    styles: Sequence[int], query: int | None = None, support: int | None = None,
) -> Episodes:  # fmt: skip
    """Return episodes in which no shot of a class has the drawing style of its query.

    Rows are those of `World.named(..., all styles, VIEWS)`. styles: where shots, and queries without `query`, come
    from: each class then has a query style of its own. query: the style of all queries. Shots: plain pictures in
    random order of style, then turned ones; with `support`, the two views of that style. One plain query per class.
    """
    chosen = np.stack([rng.choice(classes, ways, replace=False) for _ in range(count)])
    order = rng.permuted(np.broadcast_to(np.array(styles), (count, ways, len(styles))), axis=2)
    if query is not None:
        order = np.concatenate([np.full((count, ways, 1), query), order[order != query].reshape(count, ways, -1)], axis=2)
    if support is not None:
        order = np.stack([order[:, :, 0], np.full((count, ways), support)], axis=2)
    plain = (chosen[:, :, None] * len(STYLES) + order) * VIEWS
    pool = np.concatenate([plain[:, :, 1:], plain[:, :, 1:] + 1], axis=2)
    return Episodes(chosen, pool[:, :, : max(shots, 1)], plain[:, :, :1])
