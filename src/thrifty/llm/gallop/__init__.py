"""GaLLoP: tune the few scalars with a large gradient and a small magnitude; every other bit of the model stays.

Source: arXiv 2510.19778. `select` chooses, `tune` trains, an `Adapter` holds the result.
"""

from __future__ import annotations

from thrifty.llm.gallop.adapter import Adapter, combine, overlap
from thrifty.llm.gallop.checkpoint import Checkpoint, fingerprint
from thrifty.llm.gallop.optimizer import SparseAdamW
from thrifty.llm.gallop.scores import SCORES
from thrifty.llm.gallop.selection import Select, Selection, select
from thrifty.llm.gallop.tuning import Step, Tune, tune

__all__ = [
    "SCORES",
    "Adapter",
    "Checkpoint",
    "Select",
    "Selection",
    "SparseAdamW",
    "Step",
    "Tune",
    "combine",
    "fingerprint",
    "overlap",
    "select",
    "tune",
]
