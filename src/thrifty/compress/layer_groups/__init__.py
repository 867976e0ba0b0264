"""Layer groups (SKILL): find groups of similar layers of a transformer, distil their means, prune what is not needed.

Not a technique of TECHNIQUES: a technique edits any nn.Module under a labelled Task, and its result is exported and
lowered to C. Layer groups need a Hugging Face transformer and unlabelled batches of keyword arguments, hence functions:

    groups = group(model, batches, count=4)
    small = distill_and_prune(model, batches, Matching.of(groups), Plan(sparsity=0.5)).model
    save(small, "small/"); again = load("small/")
"""

from thrifty.compress.layer_groups.cka import LinearCKA, MinibatchCKA, Similarity, similarities
from thrifty.compress.layer_groups.distill import Compressed, distance, distill_and_prune
from thrifty.compress.layer_groups.families import (
    FAMILIES,
    Family,
    Stack,
    Unit,
    count_expected,
    short_whisper,
    stack_of,
)
from thrifty.compress.layer_groups.gates import Gates, Lagrangian, random_masks
from thrifty.compress.layer_groups.grouping import Groups, Merge, cluster, group
from thrifty.compress.layer_groups.hidden import hidden_states
from thrifty.compress.layer_groups.loss import group_loss, group_means
from thrifty.compress.layer_groups.plan import Matching, Plan
from thrifty.compress.layer_groups.pruning import load, mask, prune, save, sizes

__all__ = [
    "FAMILIES", "Compressed", "Family", "Gates", "Groups", "Lagrangian", "LinearCKA", "Matching", "Merge",
    "MinibatchCKA", "Plan", "Similarity", "Stack", "Unit", "cluster", "count_expected", "distance", "distill_and_prune",
    "group", "group_loss", "group_means", "hidden_states", "load", "mask", "prune", "random_masks", "save",
    "short_whisper", "similarities", "sizes", "stack_of",
]  # fmt: skip
