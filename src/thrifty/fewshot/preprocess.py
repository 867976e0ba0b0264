"""Preprocessing of features by letters, as the few-shot literature writes it: "ME" is centre, then unit length."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from thrifty.errors import DataError, KnobError, close_to

Array = npt.NDArray[np.float64]


class OptionError(KnobError, ValueError):
    """An option of an estimator is out of range; a ValueError too, as scikit-learn's callers expect."""


class InputError(DataError, ValueError):
    """Features or labels that an estimator cannot use; a ValueError too, as scikit-learn's callers expect."""


def relu(x_nd: Array) -> Array:
    """Return the features with negative values set to zero."""
    return np.maximum(x_nd, 0.0)


def square_root(x_nd: Array) -> Array:
    """Return the square roots; raise InputError where a feature is negative."""
    if (x_nd < 0).any():
        raise InputError("preprocess step 'P' (square root) met negative features; put 'R' (relu) before it: 'RP'")
    return np.sqrt(x_nd)


def unit(x_nd: Array) -> Array:
    """Return the rows at Euclidean length one; a row of zeros stays.

    >>> unit(np.array([[3.0, 4.0], [0.0, 0.0]]))
    array([[0.6, 0.8],
           [0. , 0. ]])
    """
    # Scaled by the largest value first, so that the squares neither overflow nor vanish.
    top = np.abs(x_nd).max(axis=-1, keepdims=True)
    scaled = x_nd / np.where(top > 0, top, 1.0)
    length = np.linalg.norm(scaled, axis=-1, keepdims=True)
    result: Array = scaled / np.where(length > 0, length, 1.0)
    return result


STEPS: dict[str, Callable[[Array], Array]] = {"R": relu, "P": square_root, "E": unit}


def check_letters(letters: str) -> None:
    """Raise OptionError unless every letter is known and 'M' comes at most once.

    R: relu. P: square root (power 1/2). E: unit length. M: subtract a mean.
    """
    if not isinstance(letters, str):
        raise OptionError(f"preprocess is {letters!r}; it must be a string of letters from R, P, E, M")
    bad = [f"'{c}'" for c in letters if c not in (*STEPS, "M")]
    if bad:
        raise OptionError(f"preprocess '{letters}' has {', '.join(bad)}; {close_to(bad[0], [*STEPS, 'M'])}")
    if letters.count("M") > 1:
        raise OptionError(f"preprocess '{letters}' centres twice; one 'M' is enough")


def preprocess(x_nd: Array, letters: str, mean_d: Array | None = None) -> Array:
    """Return the features after the steps named by the letters, from left to right.

    x_nd: (..., d). mean_d: (d,), what 'M' subtracts: the mean of the base features *after the letters before M*
    (`base_mean` computes it). Source: EASY, Bendou et al. 2022 (arXiv:2201.09699), the preprocessing of its code.

    >>> preprocess(np.array([[4.0, 1.0]]), "ME", np.array([1.0, 1.0]))
    array([[1., 0.]])
    """
    for letter in letters:
        if letter == "M":
            if mean_d is None:
                raise OptionError(f"preprocess '{letters}' centres, but no mean was given: pass base_mean (d,)")
            x_nd = x_nd - mean_d
        else:
            x_nd = STEPS[letter](x_nd)
    return x_nd


def base_mean(x_nd: Array, letters: str = "ME") -> Array:
    """Return the mean that 'M' subtracts: of base-class features (n, d), after the letters that come before 'M'.

    >>> base_mean(np.array([[0.0, 2.0], [2.0, 4.0]]))
    array([1., 3.])
    """
    check_letters(letters)
    before = letters.split("M", maxsplit=1)[0]
    result: Array = preprocess(np.asarray(x_nd, np.float64), before).mean(axis=0)
    return result
