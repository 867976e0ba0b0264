"""What a learner would take as a circuit: modelled memory bits, cycles and block RAMs; not a synthesis result."""

from __future__ import annotations

from dataclasses import dataclass

from thrifty.associative.anchors import Anchors
from thrifty.associative.codes import Codes
from thrifty.associative.state import ITEMS
from thrifty.errors import KnobError

RAM_DEPTH, RAM_WIDTH = 1024, 36  # of a 36-kbit block RAM


@dataclass(frozen=True)
class Hardware:
    """A modelled circuit with some parallel lanes, one addition or multiplication each per cycle."""

    memory_bits: int  # what learning changes
    codebook_bits: int  # constants
    learn_cycles: int
    classify_cycles: int  # of one view
    block_rams: int  # of 36 kbit


def hardware(memory: Anchors | Codes, lanes: int = 16) -> Hardware:
    """Return the modelled circuit of a learner.

    Anchors: a mean (and a sum) per class, anchor and feature, and a counter per class ("nearest": per anchor and
    sub-space too); classifying takes C kA d / lanes cycles and log2(lanes) of an adder tree, learning d / lanes
    ("nearest": and kA d / lanes to find the anchor). Codes: encoding K d / lanes and the
    tree; then a class per cycle, or one write per sub-space, all sub-spaces at once.

    >>> from thrifty.associative import Anchors
    >>> hardware(Anchors(features=64, classes=10), lanes=16).classify_cycles
    164
    """
    if lanes < 1:
        raise KnobError(f"lanes is {lanes}; it must be at least 1")
    d, tree = memory.features, (lanes - 1).bit_length()
    if isinstance(memory, Anchors):
        words = memory.classes * memory.anchors
        mean = memory.mean_bits
        total = 8 * ITEMS[memory.sum_type] if memory.form == "sum" else 0
        nearest = memory.policy == "nearest"
        bits = words * d * (mean + total) + 32 * memory.classes + 16 * words * memory.parts * nearest
        rows = words * -(-d // lanes)
        rams = _rams(rows, lanes * mean) + (_rams(rows, lanes * total) if total else 0) + _rams(memory.classes, 32)
        search = -(-memory.anchors * d // lanes) + tree if nearest else 0
        return Hardware(bits, 0, search + -(-d // lanes), -(-words * d // lanes) + tree, rams)
    cell = 1 if memory.cells == "bits" else 8
    counter = memory.classes * (1 if memory.cells == "bits" else 32)
    bits = memory.classes * memory.parts * memory.words * cell + counter
    encode = -(-memory.words * d // lanes) + tree
    rams = memory.parts * _rams(memory.words, memory.classes * cell)
    rams += _rams(memory.words * -(-d // lanes), lanes * memory.bits)
    return Hardware(bits, memory.words * d * memory.bits, encode + 1, encode + memory.classes, rams)


def _rams(depth: int, width: int) -> int:
    return -(-depth // RAM_DEPTH) * -(-width // RAM_WIDTH)
