"""What estimators that vote share: views of an example, histograms, probabilities from votes, abstaining."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.associative import NOBODY, Ballot
from thrifty.fewshot.classifier import FewShotClassifier, Labels, softmax
from thrifty.fewshot.preprocess import Array, InputError


@dataclass(frozen=True)
class Footprint:
    """What an incremental estimator keeps and does: counted, for the classes that it knows now."""

    state_bytes: int  # all that learning changes
    constant_bytes: int  # what was fixed before: a codebook, a permutation or rotation of the features
    learn_operations: int  # additions, multiplications and divisions of learning one view
    predict_operations: int  # of judging one view


class VotingClassifier(FewShotClassifier):
    """A classifier whose sub-spaces vote, and whose examples may have several views, which vote as well.

    Everywhere, X is (n, d), or (n, R, d) with R views (augmented versions) of each example: learning takes each
    view for an example, prediction adds up the votes of the views.
    """

    n_features_in_: int

    @abstractmethod
    def _ballot(self, x_nd: Array) -> Ballot:
        """Return the votes of checked queries; columns in the order of classes_."""

    def _order(self) -> npt.NDArray[Any]:
        """Return which class wins where nothing else decides, less is better (C,)."""
        return np.arange(len(self.classes_))

    def predict(self, X: npt.ArrayLike) -> Labels:
        """Return the label of each query; X: (n, d) or (n, R, d)."""
        winner = self._judged(X).argmax(axis=1)
        labels: Labels = self.classes_[winner]
        return labels

    def decision_function(self, X: npt.ArrayLike) -> Array:
        """Return the scores (n, C); with two classes their difference (n,), positive for the second class."""
        scores = self._judged(X)
        if len(self.classes_) == 2:
            with np.errstate(invalid="ignore"):
                scores = scores[:, 1] - scores[:, 0]
        return scores

    def predict_proba(self, X: npt.ArrayLike) -> Array:
        """Return the probability (n, C) of each class of `classes_`: its share of the votes.

        Half a vote is split among all classes by rank of the distances that decide ties, so that none of the
        classes with examples has probability 0.
        """
        return softmax(self._judged(X))

    def votes(self, X: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the histogram of votes (n, C), in the order of `classes_`."""
        return self._counted(X).votes

    def margins(self, X: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return by how many votes the first class leads the second (n,)."""
        return self._counted(X).margins()

    def decide(self, X: npt.ArrayLike, margin: int, unknown: Any = None) -> npt.NDArray[np.object_]:
        """Return the label of each query, or `unknown` where the lead is less than `margin` votes."""
        ballot = self._counted(X)
        sure = np.asarray(ballot.winners(margin) != NOBODY)
        found = self.predict(X).astype(object)
        found[~sure] = unknown
        return found

    def _scores(self, x_nd: Array) -> Array:
        return self._shares(self._ballot(x_nd))

    def _judged(self, X: npt.ArrayLike) -> Array:
        return self._shares(self._counted(X))

    def _counted(self, X: npt.ArrayLike) -> Ballot:
        flat, views = flattened(X)
        return self._ballot(self._queries(flat)).over_views(views)

    def _shares(self, ballot: Ballot) -> Array:
        """Return the log of the share of the votes (n, C), up to a constant; -inf for classes without examples."""
        classes = ballot.votes.shape[1]
        order = np.broadcast_to(self._order(), ballot.votes.shape)
        by_rank = np.lexsort((order, ballot.ties), axis=1)
        rank = np.empty_like(by_rank)
        np.put_along_axis(rank, by_rank, np.broadcast_to(np.arange(classes), rank.shape), axis=1)
        half = 0.5 * (classes - rank) / (classes * (classes + 1) / 2)
        with np.errstate(divide="ignore"):
            result: Array = np.where(ballot.valid, np.log(ballot.votes + half), -np.inf)
        return result

    def _examples(self, X: npt.ArrayLike, y: npt.ArrayLike, reset: bool) -> tuple[Array, Labels]:
        """Return checked examples (n R, d) and the label of each."""
        flat, views = flattened(X)
        if views > 1:
            y = np.repeat(np.asarray(y), views)
        return self._support(flat, y, reset=reset)


def flattened(X: npt.ArrayLike) -> tuple[npt.ArrayLike, int]:
    """Return (n R, d) and R for (n, R, d); anything else as it is, and 1.

    >>> flattened(np.zeros((4, 3, 2)))[0].shape
    (12, 2)
    """
    x = X if hasattr(X, "ndim") else np.asarray(X)
    if x.ndim != 3:
        return X, 1
    x = np.asarray(x)
    if not x.shape[1]:
        raise InputError(f"X has shape {x.shape}: no views; give at least one")
    return x.reshape(-1, x.shape[2]), int(x.shape[1])


def parts_of(parts: int | None, features: int) -> int:
    """Return the number of sub-spaces: as given, or 16 but at least four features in each.

    >>> parts_of(None, 1280), parts_of(None, 12), parts_of(None, 2), parts_of(5, 10)
    (16, 3, 1, 5)
    """
    return max(1, min(16, features // 4)) if parts is None else parts


def kind_of(labels: Labels) -> str:
    """Return whether labels are "text" or "number": those of one classifier are of one kind."""
    return "text" if labels.dtype.kind in "USO" else "number"
