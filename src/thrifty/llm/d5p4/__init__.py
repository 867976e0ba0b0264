"""D5P4: choosing beams that are good and differ, by a determinantal point process with one survivor per parent."""

from thrifty.llm.d5p4.kernels import FORMS, QUALITIES, SIMILARITIES, gram, kernel, normalised, quality, similarity
from thrifty.llm.d5p4.selectors import (
    Choice,
    diverse_beam,
    exhaustive,
    greedy_beam,
    greedy_map,
    independent,
    k_dpp,
    log_det,
    map_set,
)

__all__ = [
    "FORMS",
    "QUALITIES",
    "SIMILARITIES",
    "Choice",
    "diverse_beam",
    "exhaustive",
    "gram",
    "greedy_beam",
    "greedy_map",
    "independent",
    "k_dpp",
    "kernel",
    "log_det",
    "map_set",
    "normalised",
    "quality",
    "similarity",
]
