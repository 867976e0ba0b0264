"""The synthetic world of specs/fewshot.md A4 (2f.5): text decides the mean and the spread of a class, up to noise."""

import numpy as np

from thrifty.fewshot.text_statistics import NamedFeatures


class World:
    def __init__(self, seed=0, classes=1200, text=32, d=64, scale=1.0):
        rng = np.random.default_rng(seed)
        t = rng.standard_normal((classes, text))
        a, b = (rng.standard_normal((text, d)) / text**0.5 for _ in range(2))
        self.means = scale * (t @ a + 0.6 * rng.standard_normal((classes, d)))
        self.spreads = scale * np.exp(0.35 * t @ b + np.linspace(-1, 1, d))
        self.texts = dict(enumerate(t))

    def draw(self, classes, count, rng):
        noise = rng.standard_normal((len(classes), count, self.means.shape[1]))
        x = self.means[classes][:, None] + self.spreads[classes][:, None] * noise
        return x.reshape(-1, x.shape[2]), np.repeat(classes, count)

    def named(self, classes, count, rng):
        return NamedFeatures(*self.draw(classes, count, rng), self.texts)
