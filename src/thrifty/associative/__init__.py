"""Learners on integers: what an example changes, how classes are voted for, and the bytes that are kept.

The one meaning of on-chip learning: fewshot/on_chip.py wraps it for arrays, deploy/ writes it as C and compares byte
for byte. `Anchors` keeps quantised means, `Codes` keeps bits or counts per codeword; both have fields, fresh, learn,
new_class, vote, valid and operations. NumPy integers only.
"""

from thrifty.associative.anchors import Anchors
from thrifty.associative.codes import Codes
from thrifty.associative.hardware import Hardware, hardware
from thrifty.associative.levels import Feed, Range
from thrifty.associative.state import Field, State
from thrifty.associative.vote import NOBODY, Ballot, bounds

Memory = Anchors | Codes

__all__ = [
    "NOBODY",
    "Anchors",
    "Ballot",
    "Codes",
    "Feed",
    "Field",
    "Hardware",
    "Memory",
    "Range",
    "State",
    "bounds",
    "hardware",
]
