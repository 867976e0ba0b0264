"""How far the integers of a program are from the float network, layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.deploy.program import Program
from thrifty.deploy.run import dequantize, quantize_input, run, saturation

Array = npt.NDArray[Any]


def layer_fidelity(
    program: Program, reference: Program, samples: npt.ArrayLike
) -> dict[str, tuple[float | None, float]]:
    """Return per call (error_db, saturated): 10 log10(signal power / error power), and the share of clipped outputs.

    program: the integer program; reference: the float32 program of the same network; samples: (n, ...)
    reals in PyTorch's layout. error_db is inf where nothing differs, None for a call that the reference
    does not have, or with another shape. saturated counts the outputs at either end of their range, but for
    zeros that a ReLU makes.
    """
    x = np.asarray(samples, dtype=np.float32)
    mine = run(program, quantize_input(program, x), trace=True)
    exact = run(reference, quantize_input(reference, x), trace=True)
    clipped = saturation(program, mine)
    known = {call.name: call.output for call in reference.calls}
    result = {}
    for call in program.calls:
        decibels = None
        if call.name in known and exact[known[call.name]].shape == mine[call.output].shape:
            got = dequantize(program, call.output, mine[call.output])
            decibels = signal_to_error(dequantize(reference, known[call.name], exact[known[call.name]]), got)
        ends = clipped.get(call.name)
        share = (
            0.0
            if ends is None
            else (ends.high + (ends.low if _signed(program, call.output) else 0)) / max(1, ends.size)
        )
        result[call.name] = (decibels, share)
    return result


def signal_to_error(signal: Array, got: Array) -> float:
    """Return 10 log10(power of the signal / power of the error): inf when equal, -inf for a signal of zeros.

    >>> round(signal_to_error(np.array([1.0, -1.0]), np.array([1.1, -1.1])), 3)
    20.0
    """
    error = float(np.square(np.asarray(signal, np.float64) - got).sum())
    power = float(np.square(np.asarray(signal, np.float64)).sum())
    if error == 0.0:
        return float("inf")
    return float("-inf") if power == 0.0 else float(10 * np.log10(power / error))


def _signed(program: Program, buffer: str) -> bool:
    return program.buffers[buffer].dtype != "uint8"
