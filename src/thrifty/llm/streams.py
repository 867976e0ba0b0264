"""The residual stream of a model, behind every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from thrifty.llm.families import Parts, first_tensor


def stream_states(parts: Parts, inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return the raw residual stream behind every block, what enters block 0 first, (b, t, d) each, and the logits.

    inputs: keyword arguments of the model's forward. Transformers' own `hidden_states` has its last entry normed; this
    one has not. Raises DataError for ids that the model does not have.
    """
    parts.refuse_unknown(inputs["input_ids"])
    states: list[Tensor] = []

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        states.append((args[0] if args else kwargs["hidden_states"]).detach())

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        states.append(first_tensor(output).detach())

    blocks = parts.blocks
    hooks = [blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    try:
        with torch.inference_mode():
            logits: Tensor = parts.model(**inputs, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return states, logits
