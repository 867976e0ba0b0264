"""What a network takes. Every number says how it was obtained: counted, modelled or measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from thrifty.arith import Format
from thrifty.errors import UnsupportedModel
from thrifty.graph import FORMAT_KEEPING, Graph, Node, refusals

HOW = ("counted", "modelled", "measured")


@dataclass(frozen=True)
class Cost:
    """What a network takes; None means not known. Addable: parts of a network sum to the whole.

    ram_bytes adds as a maximum, because parts do not run at the same time.
    """

    params: int | None = None  # counted: stored weights and biases
    weight_bytes: int | None = None  # counted: their bytes at their bit widths
    macs: int | None = None  # counted: multiply-accumulates of one inference
    activation_bytes: int | None = None  # counted: live-set lower bound of activation memory
    flash_bytes: int | None = None  # measured: code and constants of the linked image
    ram_bytes: int | None = None  # measured: arena, other data and stack high-water mark
    instructions: int | None = None  # measured: executed instructions of one inference
    cycles: int | None = None  # modelled from the instructions
    energy_uj: float | None = None  # modelled, microjoules of one inference

    def __add__(self, other: Cost) -> Cost:
        def both(name: str) -> Any:
            a, b = getattr(self, name), getattr(other, name)
            if a is None or b is None:
                return a if b is None else b
            return max(a, b) if name in ("ram_bytes", "activation_bytes") else a + b

        return Cost(**{f.name: both(f.name) for f in fields(Cost)})

    def to_dict(self) -> dict[str, Any]:
        """Return the known numbers."""
        return {k: v for k, v in asdict(self).items() if v is not None}


UNITS = {
    "params": "", "weight_bytes": "B", "macs": "", "activation_bytes": "B",
    "flash_bytes": "B", "ram_bytes": "B", "instructions": "", "cycles": "", "energy_uj": "uJ",
}  # fmt: skip
PROVENANCE = {
    "params": "counted", "weight_bytes": "counted", "macs": "counted", "activation_bytes": "counted",
    "flash_bytes": "measured", "ram_bytes": "measured", "instructions": "measured",
    "cycles": "modelled", "energy_uj": "modelled",
}  # fmt: skip


def count(graph: Graph) -> Cost:
    """Return the counted cost of a network: parameters, weight bytes, multiply-accumulates, activation bytes.

    Raises UnsupportedModel listing every node without a canonical operator.
    """
    return sum((cost for _, _, cost in count_nodes(graph)), Cost(0, 0, 0, 0))


def count_nodes(graph: Graph) -> list[tuple[str, str, Cost]]:
    """Return (node name, module path, counted cost) of each node; the costs add up to `count`.

    A tensor that several nodes share is counted at the first. `activation_bytes` is what is alive while the
    node runs; a node that is computed inside its producer (folded batch norm, fused activation) has none.
    `weight_bytes` of an integer network: the weights at their width, and per output 4 bytes for the bias and,
    unless all scales are powers of two, 4 for the multiplier; of a float network 4 bytes per number, batch
    norms folded where they can be.
    """
    if refused := refusals(graph):
        raise UnsupportedModel(refused)
    alive = _alive_bytes(graph)
    seen: set[str] = set()
    rows = []
    for node in graph:
        weight_bytes, params = _stored(node, graph, seen)
        cost = Cost(params, weight_bytes, _macs(node, graph), alive.get(node.name))
        rows.append((node.name, node.module, cost))
    return rows


def _macs(node: Node, graph: Graph) -> int:
    """Multiply-accumulates: one per output and weight that it meets; border taps count too."""
    if node.op == "conv":
        return node.size * math.prod(node.constants["weight"].shape[1:])
    if node.op == "linear":
        return int(node.constants["weight"].size)
    return node.size if node.op == "batchnorm" and not folded_into(node, graph) else 0


def folded_into(node: Node, graph: Graph) -> str | None:
    """Return the conv or linear node that a batch norm folds into, or None."""
    if node.op != "batchnorm":
        return None
    source = graph[node.inputs[0]]
    alone = (
        len(graph.consumers[source.name]) == 1 and source.name not in graph.outputs and source.format is None
    )
    return source.name if alone and source.op in ("conv", "linear") else None


def _stored(node: Node, graph: Graph, seen: set[str]) -> tuple[int, int]:
    """Return (weight bytes, parameters) that this node adds to what `seen` already holds."""
    if node.op == "batchnorm":
        params = sum(
            _new(node, key, seen) * node.constants["scale"].size
            for key in ("weight", "bias")
            if key in node.params
        )
        stored = (
            0 if (host := folded_into(node, graph)) and "bias" in graph[host].constants else 1 if host else 2
        )
        return 4 * stored * node.constants["scale"].size, params
    if node.op not in ("conv", "linear"):
        return 0, 0
    weight, bias = node.constants["weight"], node.constants.get("bias")
    new_weight = _new(node, "weight", seen)
    new_bias = bias is not None and _new(node, "bias", seen)
    params = new_weight * weight.size + (bias.size if bias is not None and new_bias else 0)
    if node.weight_format is None:
        return 4 * params, params
    stored = new_weight * ((weight.size * node.weight_format.bits + 7) // 8)
    per_output = 4 if _shifts(node, graph) else 8
    return stored + per_output * weight.shape[0], params


def _new(node: Node, key: str, seen: set[str]) -> bool:
    name = node.params.get(key, f"{node.name}:{key}")
    fresh = name not in seen
    seen.add(name)
    return fresh


def _shifts(node: Node, graph: Graph) -> bool:
    """Whether the layer is requantised by shifts alone, without multipliers."""
    formats = (format_of(graph, node.inputs[0]), node.weight_format, format_of(graph, node.name))
    return all(f is None or f.power_of_two for f in formats)


def format_of(graph: Graph, name: str) -> Format | None:
    """Return the format in which the output of a node is stored; None for float32."""
    node = graph[name]
    if node.format is not None:
        return node.format
    if (fused := graph.fused_into(name)) is not None:
        return graph[fused].format
    if node.op in FORMAT_KEEPING and graph.fused_into(node.inputs[0]) != name:
        return format_of(graph, node.inputs[0])
    return None


def _output_bytes(graph: Graph, node: Node) -> int:
    if node.op == "argmax":
        return 4 * node.size
    fmt = format_of(graph, node.name)
    return node.size * (4 if fmt is None else 1 if fmt.bits <= 8 else 2)


_IN_PLACE = frozenset({"add", "relu", "relu6", "hardswish", "maxpool", "avgpool"})  # as in deploy/ops
_ALIASES = frozenset({"flatten", "identity"})  # the same memory, seen differently


def _in_place(node: Node) -> bool:
    """Whether the output may be written over an input that nobody else needs any more."""
    padding = node.attrs.get("padding", ()) if node.op.endswith("pool") else ()
    return node.op in _IN_PLACE and not any(before for before, _ in padding)


def _alive_bytes(graph: Graph) -> dict[str, int]:
    """Return, for each node that runs on its own, the bytes of all maps alive while it runs.

    No memory plan of this order of nodes can do with less than the largest.
    """
    holder = _holders(graph)
    steps = [n for n in graph if holder[n.name] == n.name]
    made = {n.name: 0 if n.op == "input" else i for i, n in enumerate(steps)}
    index = {n.name: i for i, n in enumerate(steps)}
    size = {n.name: _output_bytes(graph, n) for n in steps}
    last = dict(index)
    for node in graph:
        for name in node.inputs:
            last[holder[name]] = max(last[holder[name]], index[holder[node.name]])
    last.update({holder[name]: len(steps) for name in graph.outputs})
    found = {}
    for i, node in enumerate(steps):
        total = sum(size[n] for n in size if made[n] <= i <= last[n])
        dying = [size[holder[k]] for k in node.inputs if last[holder[k]] == i]
        reused = _in_place(node) and any(d >= size[node.name] for d in dying)
        found[node.name] = total - (size[node.name] if reused else 0)
    return found


def _holders(graph: Graph) -> dict[str, str]:
    """Return for each node the one whose buffer holds its output: itself, or the one it is part of."""
    holder: dict[str, str] = {}
    for node in graph:
        source = node.inputs[0] if node.inputs else ""
        inner = source and (graph.fused_into(source) == node.name or folded_into(node, graph))
        holder[node.name] = holder[source] if inner or node.op in _ALIASES else node.name
    return holder
