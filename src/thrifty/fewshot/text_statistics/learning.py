"""Learning to predict the statistics of a class's features from its text, on base classes only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.fewshot.classifier import Labels
from thrifty.fewshot.preprocess import Array, InputError, OptionError, base_mean, check_letters, preprocess
from thrifty.fewshot.text_statistics.named_features import (
    NamedFeatures,
    Selection,
    class_statistics,
)
from thrifty.fewshot.text_statistics.regressors import Method, Progress, Ridge, TextMap, learn_map

FLOOR = 0.1  # smallest predicted standard deviation, as a share of the mean one of the base classes
MOST_FULL = 256  # dimensions; a full covariance has their square


@dataclass(frozen=True, eq=False)
class Preparation:
    """What happens to features before anything else: letters, then axes that the base features gave."""

    letters: str
    centre: Array | None  # what the letter 'M' subtracts, (d,)
    inputs: int  # d
    middle: Array | None = None  # (d,) subtracted before the projection
    axes: Array | None = None  # (d, p) orthonormal columns

    def __call__(self, x_nd: npt.NDArray[Any]) -> Array:
        """Return (n, p) float64 for features (n, d)."""
        x_nd = preprocess(np.asarray(x_nd, np.float64), self.letters, self.centre)
        return x_nd if self.middle is None or self.axes is None else (x_nd - self.middle) @ self.axes


@dataclass(frozen=True, eq=False)
class TextToStatistics:
    """What text says of a class's features: a mean and a spread, and how wrong that was on held-out classes.

    Made by `learn_statistics`. Holds no sample of any class.
    """

    prepared: Preparation  # of features; all that follows is about prepared ones, p dimensions
    means: TextMap
    spreads: TextMap  # standard deviations (p,), or flattened covariances (p * p,)
    full: bool
    within: Array  # (p,) variance within a class, pooled over the base classes
    error: Array  # (p,) squared error of the predicted means on validation classes, sampling noise taken off
    beta: float  # best weight of the predicted spread, in closed form on the validation classes
    mean_ratio: float  # held-out squared error / that of guessing the mean of the base classes
    spread_ratio: float
    base: Labels
    validation: Labels
    seen_texts: Mapping[bytes, Any]  # text embedding -> label, of base and validation classes
    log: tuple[Selection, ...]

    @property
    def dimension(self) -> int:
        """The number of prepared features p."""
        return len(self.within)

    def predict(self, text_rows: npt.ArrayLike) -> tuple[Array, Array]:
        """Return the predicted means (C, p) and spreads for text embeddings (C, d_t).

        Spreads are standard deviations (C, p), none below FLOOR of the base classes' mean, or positive definite
        covariances (C, p, p). Raises InputError for embeddings of another length.
        """
        t = np.asarray(text_rows, np.float64)
        if t.ndim != 2 or t.shape[1] != len(self.means.text_mean) or not np.isfinite(t).all():
            raise InputError(
                f"text embeddings have shape {t.shape}; they must be (C, {len(self.means.text_mean)}), finite, from "
                "the encoder that the statistics were learned with"
            )
        return self.means(t), self._positive(self.spreads(t))

    def refuse_seen(self, classes: Labels, text_rows: Array) -> None:
        """Raise InputError when a class of a task was a base or validation class, by its label or its text."""
        role = {**dict.fromkeys(self.base.tolist(), "base"), **dict.fromkeys(self.validation.tolist(), "validation")}
        found = []
        for label, row in zip(classes.tolist(), text_rows, strict=True):
            twin = self.seen_texts.get(row.tobytes())
            if label in role:
                found.append(f"{label!r} (a {role[label]} class)")
            elif twin is not None:
                found.append(f"{label!r} (has the text of the {role[twin]} class {twin!r})")
        if found:
            raise InputError(
                f"{len(found)} class(es) of the task were used to learn the text statistics, so any score would be "
                f"leaked: {', '.join(found[:20])}. Learn on other classes, or give other classes other labels"
            )

    def _positive(self, rows: Array) -> Array:
        if not self.full:
            least = FLOOR * np.maximum(self.spreads.mean, 1e-3 * self.spreads.mean.mean())
            deviations: Array = np.maximum(rows, least)
            return deviations
        d = self.dimension
        square = rows.reshape(-1, d, d)
        values, vectors = np.linalg.eigh(0.5 * (square + square.transpose(0, 2, 1)))
        least = FLOOR**2 * float(np.trace(self.spreads.mean.reshape(d, d))) / d
        found: Array = (vectors * np.maximum(values, least)[:, None, :]) @ vectors.transpose(0, 2, 1)
        return found


def learn_statistics(
    base: NamedFeatures,
    validation: NamedFeatures,
    method: Method | None = None,
    *,
    preprocess: str = "",
    components: int | None = None,
    full: bool = False,
    rng: np.random.Generator | None = None,
    progress: Progress | None = None,
) -> TextToStatistics:
    """Return predictors of class mean and spread, learned on base classes and judged on validation classes.

    base, validation: disjoint classes with features (n, d) and texts; validation classes choose the perceptron's
    epoch, and measure the error that the closed-form fusion needs. method: Ridge() (default) or Perceptron().
    preprocess: letters applied to all features first; 'M' subtracts the mean of the base features. components: then
    project on that many principal axes of the base features, where a spread per dimension says more. full: predict
    covariances, for at most MOST_FULL dimensions. rng: for the perceptron.

    Raises InputError for an overlap of classes or texts, differing dimensions, or too few classes; OptionError.
    Source: arXiv:2311.14544 and its code; the ridge map, and errors freed of sampling noise, are ours.

    >>> rng = np.random.default_rng(0)
    >>> texts = {f"c{i:02}": rng.standard_normal(3) for i in range(60)}
    >>> names = np.repeat(sorted(texts), 5)
    >>> features = np.stack([2 * texts[n] for n in names]) + rng.standard_normal((300, 3))
    >>> everything = NamedFeatures(features, names, texts)
    >>> base, validation, _ = (everything.only(np.unique(names)[part]) for part in np.split(np.arange(60), [40, 50]))
    >>> learn_statistics(base, validation).mean_ratio < 0.2
    True
    """
    _refuse(base, validation)
    prepared = _preparation(base, preprocess, components)
    if full and (components or prepared.inputs) > MOST_FULL:
        raise OptionError(f"full=True with {prepared.inputs} dimensions; give components, at most {MOST_FULL}")
    rng = np.random.default_rng(0) if rng is None else rng
    method = Ridge() if method is None else method
    of_base, of_held = (class_statistics(prepared(part.features), part.labels, full) for part in (base, validation))
    t, t_held = base.text_rows, validation.text_rows
    many, many_held = of_base.counts > 1, of_held.counts > 1
    means, mean_log = learn_map(method, t, of_base.means, t_held, of_held.means, rng, progress)
    true, true_held = _flat(of_base.spreads[many]), _flat(of_held.spreads[many_held])
    spreads, spread_log = learn_map(method, t[many], true, t_held[many_held], true_held, rng, progress)
    predicted = means(t_held)
    noise = of_base.within / of_held.counts[:, None]
    seen = {
        row.tobytes(): label
        for part in (base, validation)
        for label, row in zip(part.classes.tolist(), part.text_rows, strict=True)
    }
    found = TextToStatistics(
        prepared=prepared, means=means, spreads=spreads, full=full, within=of_base.within,
        error=((predicted - of_held.means) ** 2 - noise).mean(axis=0), beta=0.0,
        mean_ratio=_ratio(predicted, of_held.means, means.mean),
        spread_ratio=_ratio(spreads(t_held[many_held]), true_held, spreads.mean),
        base=base.classes, validation=validation.classes, seen_texts=seen, log=(),
    )  # fmt: skip
    beta = closed_beta(found.predict(t_held[many_held])[1], of_held.spreads[many_held])
    log = (
        _renamed(mean_log, "mean"),
        _renamed(spread_log, "spread"),
        Selection(
            "weight of the predicted spread, closed form; squared error / variance", f"{beta:.3f}",
            f"{int(many_held.sum())} validation classes", found.spread_ratio, 1,
        ),
    )  # fmt: skip
    return TextToStatistics(**{**found.__dict__, "beta": beta, "log": log})


def relative_spreads(spreads: Array) -> Array:
    """Return the spreads of each class divided by their geometric mean over dimensions (or eigenvalues).

    spreads: (C, d) standard deviations or (C, d, d) covariances, positive.

    >>> relative_spreads(np.array([[1.0, 4.0]]))
    array([[0.5, 2. ]])
    """
    found: Array = spreads / geometric_means(spreads)
    return found


def geometric_means(spreads: Array) -> Array:
    """Return the geometric mean of each class's spread, (C, 1) or (C, 1, 1)."""
    if spreads.ndim == 2:
        deviations: Array = np.exp(np.log(spreads).mean(axis=1, keepdims=True))
        return deviations
    variances: Array = np.exp(np.linalg.slogdet(spreads)[1] / spreads.shape[1])
    return variances[:, None, None]


def closed_beta(predicted: Array, true: Array) -> float:
    """Return the weight b in [0, 1] for which 1 + b (predicted - 1) is nearest to the true relative spreads.

    predicted, true: (C, d) standard deviations or (C, d, d) covariances of the same classes. Least squares:
    b = <p - 1, r - 1> / |p - 1|^2. Both are divided by the geometric mean of the predicted spread, because that
    of a true spread from few samples is not reliable.
    """
    scale = geometric_means(predicted)
    one = np.ones(()) if predicted.ndim == 2 else np.eye(predicted.shape[1])
    p, r = predicted / scale - one, true / scale - one
    size = float((p * p).sum())
    return float(np.clip((p * r).sum() / size, 0.0, 1.0)) if size > 1e-12 * p.size else 0.0


def _preparation(base: NamedFeatures, letters: str, components: int | None) -> Preparation:
    """Return the preprocessing and the principal axes of the base features; the axes' largest entry is positive."""
    check_letters(letters)
    d = base.features.shape[1]
    centre = base_mean(base.features, letters) if "M" in letters else None
    if components is None:
        return Preparation(letters, centre, d)
    most = min(d, len(base.features) - 1)
    if not isinstance(components, (int, np.integer)) or not 1 <= components <= most:
        raise OptionError(f"components is {components!r}; it must be in 1..{most}, or None")
    x_nd = Preparation(letters, centre, d)(base.features)
    middle = x_nd.mean(axis=0)
    x_nd = x_nd - middle
    axes = np.linalg.eigh(x_nd.T @ x_nd)[1][:, ::-1][:, :components]
    largest = axes[np.abs(axes).argmax(axis=0), np.arange(components)]
    return Preparation(letters, centre, d, middle, axes * np.sign(largest))


def _flat(spreads: Array) -> Array:
    return spreads.reshape(len(spreads), -1)


def _ratio(predicted: Array, true: Array, constant: Array) -> float:
    return float(((predicted - true) ** 2).mean() / max(((constant - true) ** 2).mean(), 1e-300))


def _renamed(line: Selection, target: str) -> Selection:
    return Selection(f"{target}: {line.what}", line.chosen, line.on, line.score, line.tried)


def _refuse(base: NamedFeatures, validation: NamedFeatures) -> None:
    """Raise InputError with everything that is wrong with the two sets of classes."""
    faults = []
    d = base.features.shape[1]
    if validation.features.shape[1] != d:
        faults.append(f"base features have {d} dimensions, validation features {validation.features.shape[1]}")
    both = np.intersect1d(base.classes.astype(str), validation.classes.astype(str)).tolist()
    if both:
        faults.append(f"{len(both)} class(es) are both base and validation: {', '.join(both[:20])}")
    base_texts = {row.tobytes(): c for c, row in zip(base.classes.tolist(), base.text_rows, strict=True)}
    if base.text_rows.shape[1] != validation.text_rows.shape[1]:
        faults.append("text embeddings of base and validation classes differ in length")
    else:
        twins = [
            f"{c!r} = {base_texts[row.tobytes()]!r}"
            for c, row in zip(validation.classes.tolist(), validation.text_rows, strict=True)
            if row.tobytes() in base_texts and str(c) not in both
        ]
        if twins:
            faults.append(f"validation classes with the text of a base class: {', '.join(twins[:20])}")
    for name, part, least in (("base", base, 3), ("validation", validation, 1)):
        many = int((np.unique(part.labels, return_counts=True)[1] > 1).sum())
        if many < least:
            faults.append(f"{many} {name} class(es) have two samples or more; spreads need at least {least}")
    if faults:
        raise InputError("; ".join(faults))
