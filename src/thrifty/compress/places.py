"""Which operator of a quantised model's graph gives what a module of the float model would show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thrifty.errors import Incompatible
from thrifty.objectives.features import INPUT, look

if TYPE_CHECKING:
    from thrifty.compress.quantized_model import QuantizedModel

ROWS = 4  # inputs on which modules and operators are compared
CLOSE = 1e-4  # largest difference, as a share of the largest value: sums may run in another order


def nodes_at(quantized: QuantizedModel, places: Sequence[str], x: Tensor) -> dict[str, str]:
    """Return the name of the node that gives what passes each place (see objectives.features.find).

    The modules are run once on some rows of x: (n, ...), with hooks, and so is the graph, activations unrounded: the
    node is the one with equal values. So places whose operators were folded, moved or merged are found too.
    Raises Incompatible for a place whose values no operator gives.
    """
    x, modes = x[:ROWS].detach(), {m: m.training for m in quantized.model.modules()}
    quantized.model.eval()
    try:
        with torch.no_grad():
            shown = look(quantized.model, x, places).at
            values = _values(quantized, x)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return {place: _node(quantized, place, shown[place], values) for place in places}


def _values(quantized: QuantizedModel, x: Tensor) -> Mapping[str, Tensor]:
    """Return what every node gives, (n, d), with rounded weights and unrounded activations."""
    seen: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for node in quantized.graph.nodes:
        inputs = [values[name] for name in node.inputs]
        values[node.name] = x if node.op == "input" else quantized.float_step(node, inputs, seen)
    return {name: value.flatten(1) for name, value in values.items() if value.dim() > 1}


def _node(quantized: QuantizedModel, place: str, shown: Tensor, values: Mapping[str, Tensor]) -> str:
    wanted = shown.flatten(1)
    scale = CLOSE * float(wanted.abs().max())
    equal = [n for n, v in values.items() if v.shape == wanted.shape and bool(((v - wanted).abs() <= scale).all())]
    if not equal:
        raise Incompatible(
            f"no operator of the quantised graph gives what passes '{place}' (it was merged with another); "
            "name a layer beside it"
        )
    path = "" if place.endswith(INPUT) else place
    own = [n for n in equal if path and f"{quantized.graph[n].module}.".startswith(f"{path}.")]
    return (own or equal)[-1]
