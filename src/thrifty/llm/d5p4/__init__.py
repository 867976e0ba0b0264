"""D5P4: choosing beams that are good and differ, by a determinantal point process with one survivor per parent."""

from thrifty.llm.d5p4.denoisers import Bidirectional, Denoiser, Subs, hugging_face, load_masked_lm, masked_lm, shifted
from thrifty.llm.d5p4.kernels import FORMS, QUALITIES, SIMILARITIES, gram, kernel, normalised, quality, similarity
from thrifty.llm.d5p4.likelihood import Bound, is_greedy, log_likelihood_bound
from thrifty.llm.d5p4.processes import REMASKING, Blocks, Mdlm
from thrifty.llm.d5p4.sampling import Samples, StepLog, sample
from thrifty.llm.d5p4.selection import METHODS, Select
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
from thrifty.llm.d5p4.sharded import Ranks
from thrifty.llm.d5p4.sweep import Point, grid, pareto, sweep, trade_off

__all__ = [
    "FORMS",
    "METHODS",
    "QUALITIES",
    "REMASKING",
    "SIMILARITIES",
    "Bidirectional",
    "Blocks",
    "Bound",
    "Choice",
    "Denoiser",
    "Mdlm",
    "Point",
    "Ranks",
    "Samples",
    "Select",
    "StepLog",
    "Subs",
    "diverse_beam",
    "exhaustive",
    "gram",
    "greedy_beam",
    "greedy_map",
    "grid",
    "hugging_face",
    "independent",
    "is_greedy",
    "k_dpp",
    "kernel",
    "load_masked_lm",
    "log_det",
    "log_likelihood_bound",
    "map_set",
    "masked_lm",
    "normalised",
    "pareto",
    "quality",
    "sample",
    "shifted",
    "similarity",
    "sweep",
    "trade_off",
]
