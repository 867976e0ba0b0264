"""A small world with a taxonomy, to see and to test one-class rules without any encoder.

Genera of species; the text of a species is made of a root shared by all, its genus and itself; a picture is a
direction shared by all pictures (the gap between the modalities), the text with a strength that differs between
genera, and noise. Source: specs/fewshot.md 3f.5 and appendix A4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from thrifty.fewshot.one_class.evaluation import EmbeddedTask
from thrifty.fewshot.one_class.taxonomy import Taxonomy
from thrifty.fewshot.preprocess import Array, unit


@dataclass(frozen=True)
class ToyWorld:
    """Embeddings of a toy taxonomy; `of` makes it from a seed.

    >>> world = ToyWorld.of(seed=0)
    >>> world.texts.shape, len(world.tasks(range(20), "siblings"))
    ((40, 10, 128), 20)
    """

    texts: Array  # (genera, species, d) unit length
    gap: Array  # (d,) unit length
    strength: Array  # (genera,)
    noise: float
    rng: np.random.Generator

    @classmethod
    def of(cls, seed: int, genera: int = 40, species: int = 10, dimension: int = 128, noise: float = 0.045) -> ToyWorld:
        """Return a world with the sizes of the specification."""
        rng = np.random.default_rng(seed)
        root, gap = unit(rng.standard_normal((2, dimension)))
        genus = unit(rng.standard_normal((genera, 1, dimension)))
        own = unit(rng.standard_normal((genera, species, dimension)))
        strength = 0.30 + 0.10 * rng.uniform(-1, 1, genera)
        return cls(unit(0.7 * root + 0.5 * genus + 0.45 * own), gap, strength, noise, rng)

    @property
    def taxonomy(self) -> Taxonomy:
        """The tree: world, genera g0..., species g0s0..."""
        genera, species = self.texts.shape[:2]
        return Taxonomy.from_paths([("world", f"g{g}", f"g{g}s{s}") for g in range(genera) for s in range(species)])

    def pictures(self, genus: int, species: int, count: int) -> Array:
        """Return unit picture embeddings (count, d) of one species."""
        clean = 0.75 * self.gap + self.strength[genus] * self.texts[genus, species]
        return unit(clean + self.noise * self.rng.standard_normal((count, len(self.gap))))

    def tasks(
        self, genera: range, level: str, siblings: int = 6, far: int = 4, pictures: int = 40
    ) -> list[EmbeddedTask]:
        """Return one task for each genus: species 0 against its siblings, or against species of other genera of the
        range.

        level: "siblings" or "far", what the negative pictures show. siblings, far: how many of the other species of the
        genus, and of other genera, the "language model" names as negatives.
        """
        found = []
        count = self.texts.shape[1]
        for g in genera:
            others = [o for o in genera if o != g]
            named = [self.texts[g, s] for s in 1 + self.rng.permutation(count - 1)[:siblings]]
            named += [self.texts[o, self.rng.integers(count)] for o in self.rng.choice(others, far, replace=False)]
            if level == "siblings":
                shown = [(g, 1 + int(s)) for s in np.arange(pictures) % (count - 1)]
            else:
                shown = [(int(self.rng.choice(others)), int(self.rng.integers(count))) for _ in range(pictures)]
            wrong = np.concatenate([self.pictures(o, s, 1) for o, s in shown])
            images = np.concatenate([self.pictures(g, 0, pictures), wrong])
            positive = np.arange(2 * pictures) < pictures
            found.append(
                EmbeddedTask(f"g{g}s0", level, self.texts[g, 0], np.array(named), images, positive, group=f"g{g}")
            )
        return found
