"""SmolLM2-135M-Instruct as it is, frozen: the inner loop and the causal shift on a real model.

`part` of the spec says what is run; each lives in a module of its own: smollm_loops (which ranges to loop, and do they help?),
smollm_overhead (what looping costs beyond its blocks), smollm_shift (where states turn to the next token).
"""

from __future__ import annotations

import importlib
from typing import Any

PARTS = {"inner_loop_scan": "smollm_loops", "inner_loop_overhead": "smollm_overhead", "causal_shift": "smollm_shift"}


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Run one part."""
    from gallop_cost import smollm2

    from thrifty.llm.loading import load_model

    model, tokenizer = load_model(smollm2(), dtype=spec["dtype"])
    found: dict[str, Any] = importlib.import_module(PARTS[spec["part"]]).run(model, tokenizer, spec, name)
    return found
