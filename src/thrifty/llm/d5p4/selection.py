"""One selector for the sampling loop: the method and its kernel as a value, from quality and cosines to a choice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from thrifty.errors import DataError, KnobError, close_to
from thrifty.llm.d5p4 import kernels, selectors
from thrifty.llm.d5p4.selectors import Choice

__all__ = ["METHODS", "PRECISIONS", "Select", "Selector"]

METHODS = (
    "greedy_map", "map_set", "greedy_beam", "diverse_beam", "independent", "k_dpp", "exhaustive", "best_of",
)  # fmt: skip
PRECISIONS = ("float32", "float64")


class Selector(Protocol):
    """Raw qualities (n,), cosines (n, n), k and the step -> k candidates; `Select` is one, a function may be one."""

    def __call__(self, raw: Tensor, cosines: Tensor, k: int, step: int) -> Choice:
        """Return the choice; it must depend on nothing else, or ranks would disagree."""


@dataclass(frozen=True)
class Select:
    """How survivors are chosen. The defaults are D5P4+ with the released kernel; beta has opposite roles (`kernel`).

    "best_of" chooses once, at the end: of k w sequences decoded independently those that the model is surest of
    (`Samples.scores`), the best of each group, or without a partition the k best of all.
    """

    method: str = "greedy_map"
    form: str = "additive"  # "multiplicative" is D5P4x
    beta: float = 1.0
    alpha: float = 1.0  # of diverse_beam
    similarity: str = "rbf"
    gamma: float = 1.0
    quality: str = "entropy"  # read by the loop
    partition: bool = True  # one survivor of each group; k_dpp has none
    polish: bool = False  # greedy_map: exchange single candidates afterwards
    seed: int = 0  # of independent, k_dpp and a temperature
    temperature: float = 0.0  # exhaustive: of a draw by log-determinant; 0 takes the best
    precision: str = "float32"  # of entropies and Gram matrix, read by the loop

    def __post_init__(self) -> None:
        """Refuse values outside their range, all at once."""
        rules = {
            f"method is '{self.method}'; {close_to(str(self.method), METHODS)}": self.method in METHODS,
            f"form is '{self.form}'; {close_to(str(self.form), kernels.FORMS)}": self.form in kernels.FORMS,
            f"similarity is '{self.similarity}'; {close_to(str(self.similarity), kernels.SIMILARITIES)}": (
                self.similarity in kernels.SIMILARITIES
            ),
            f"quality is '{self.quality}'; {close_to(str(self.quality), kernels.QUALITIES)}": (
                self.quality in kernels.QUALITIES
            ),
            f"precision is '{self.precision}'; {close_to(str(self.precision), PRECISIONS)}": self.precision
            in PRECISIONS,
            f"gamma is {self.gamma}; it must be positive": self.gamma > 0,
            f"temperature is {self.temperature}; it must be at least 0": self.temperature >= 0,
        }
        if wrong := [sentence for sentence, fine in rules.items() if not fine]:
            raise KnobError("; ".join(wrong))

    def __call__(self, raw: Tensor, cosines: Tensor, k: int, step: int = 0) -> Choice:
        """Return k of n candidates with raw qualities (n,), normalised here over the whole pool, and cosines (n, n).

        The value is that of the kernel for every method. A k-DPP on a pool of too low rank (all candidates alike, as in
        the first step) falls back to chance and is flagged. Raises DataError, KnobError.
        """
        if self.method == "best_of":
            raise KnobError("'best_of' chooses among finished sequences, not in a step; give it to `sample`")
        q = kernels.normalised(raw)
        kernel = kernels.kernel(q, kernels.similarity(cosines, self.similarity, self.gamma), self.form, self.beta)
        found = self._chosen(q, cosines, kernel, k, step)
        return found if found.value == found.value else replace(found, value=selectors.log_det(kernel, found.indices))

    def _chosen(self, q: Tensor, cosines: Tensor, kernel: Tensor, k: int, step: int) -> Choice:
        if self.method == "greedy_map":
            return selectors.greedy_map(kernel, k, self.partition, polish=self.polish)
        if self.method == "map_set":
            return selectors.map_set(kernel, k, self.partition)
        if self.method == "greedy_beam":
            return selectors.greedy_beam(q, k, self.partition)
        if self.method == "diverse_beam":
            return selectors.diverse_beam(q, cosines, k, self.alpha, self.partition)
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        if self.method == "exhaustive":
            return selectors.exhaustive(kernel, k, self.partition, self.temperature, generator)
        if self.method == "k_dpp":
            try:
                return selectors.k_dpp(kernel, k, generator)
            except DataError:
                drawn = selectors.independent(len(q), k, generator, partition=False)
                return replace(drawn, value=selectors.log_det(kernel, drawn.indices), flagged=True)
        return selectors.independent(len(q), k, generator, self.partition)
