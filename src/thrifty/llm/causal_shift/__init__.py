"""The causal shift: where hidden states turn to the next token, and attenuating the residual path against it."""

from thrifty.llm.causal_shift.attenuation import FORMS, PLACEMENTS, Attenuated, attenuate, train
from thrifty.llm.causal_shift.curves import MEASURES, Curves, Transition, crossing_of, curves
from thrifty.llm.causal_shift.gates import GATES, BlockGate, DepthGate, FixedGate, Gate, TokenGate
from thrifty.llm.causal_shift.trace import Trace, trace

__all__ = [
    "FORMS",
    "GATES",
    "MEASURES",
    "PLACEMENTS",
    "Attenuated",
    "BlockGate",
    "Curves",
    "DepthGate",
    "FixedGate",
    "Gate",
    "TokenGate",
    "Trace",
    "Transition",
    "attenuate",
    "crossing_of",
    "curves",
    "trace",
    "train",
]
