"""Make a network smaller without changing what it computes: no training, outputs equal to rounding."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from thrifty.capture import capture
from thrifty.compress.cut import cut, refuse_quantised, step_of, tensors_of, why_not
from thrifty.errors import Incompatible, KnobError, NothingToDo
from thrifty.graph import Graph, Node
from thrifty.recipe import refuse_mistyped
from thrifty.task import Task
from thrifty.ties import Group, Member, channel_groups

Array = npt.NDArray[np.float64]
RANK_TOLERANCE = 1e-6  # singular values below this share of the largest are zero
EQUAL_TOLERANCE = 1e-4  # outputs may differ by this share of the largest


# unit that goes -> the unit that takes its place in the readers, or None: its constant goes into their biases
Moves = dict[int, int | None]


@dataclass(frozen=True)
class Lossless:
    """Remove what does not matter: constant, unused and duplicate channels, and low rank.

    A channel whose value never changes moves into the biases of its readers, and everything that becomes
    constant by that goes too; a channel that nobody reads goes; of equal filters one stays and its readers'
    weights are added; a Linear or a 1x1 convolution of low rank becomes two smaller ones.
    """

    round_to: int = 1  # channel counts stay multiples of this, at the price of keeping some that could go
    low_rank: bool = True  # whether layers may be split

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        refuse_mistyped(self)
        if self.round_to < 1:
            raise KnobError(f"Lossless.round_to is {self.round_to}; it must be at least 1")

    @classmethod
    def example(cls) -> Lossless:
        """Return an instance for the contract tests; it needs a model in which something can go."""
        return cls()

    def edit(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a smaller copy of the model that computes the same.

        Raises NothingToDo when nothing can go, Incompatible for a quantised model or when rounding errors
        grow beyond 1e-4 of the output, UnsupportedModel for operators without a rule for channels.
        """
        refuse_quantised(model, "lossless")
        edited, changed = model, True
        while changed:
            edited, changed = self._once(edited, task.example)
        if edited is model:
            raise NothingToDo(
                "lossless finds no constant, unused or duplicate channel and no layer of low rank; "
                "use prune to remove channels that matter little"
            )
        _check_equal(model, edited, task.example)
        return edited

    def _once(self, model: nn.Module, example: Tensor) -> tuple[nn.Module, bool]:
        """Apply the first kind of edit that finds something."""
        graph = capture(model, example)
        shared = _shared_tensors(model)
        groups = [g for g in channel_groups(graph) if g.prunable and not why_not(model, g)]
        groups = [g for g in groups if not shared & {m.tensor for m in g.members}]
        for find in (_dead, _duplicates):
            moves = {g.name: self._round(g, find(graph, g)) for g in groups}
            moves = {name: found for name, found in moves.items() if found}
            if moves:
                return _remove(model, graph, {g.name: g for g in groups}, moves, example), True
        split = _split_low_rank(model, graph) if self.low_rank else None
        return (model, False) if split is None else (split, True)

    def _round(self, group: Group, moves: Moves) -> Moves:
        """Keep at least one unit, and a multiple of `round_to` channels, of every cell."""
        found = {}
        for cell in group.cells:
            going = [u for u in cell if u in moves]
            step = step_of(group, cell, self.round_to)
            stay = min(len(cell), step * math.ceil(max(1, len(cell) - len(going)) / step))
            found.update(
                {u: moves[u] for u in going[len(going) - (len(cell) - stay) :]} if stay < len(cell) else {}
            )
        return found


def _shared_tensors(model: nn.Module) -> set[str]:
    """Return the names of parameters that several modules hold."""
    names: dict[int, set[tuple[int, str]]] = {}
    found = set()
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                names.setdefault(id(tensor), set()).add((id(module), name))
    for path, module in model.named_modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and len(names[id(tensor)]) > 1:
                found.add(f"{path}.{name}" if path else name)
    return found


# --- what never changes ---


def constants(graph: Graph) -> dict[str, Array]:
    """Return, for each node, the value of each channel that never changes; NaN for the others.

    A vector per node, along axis 0 of its map: the same for all inputs and at all places.
    """
    known: dict[str, Array] = {}
    for node in graph:
        rule = _RULES.get(node.op)
        inputs = [known[name] for name in node.inputs]
        unknown = np.full(node.shape[0] if node.shape else 1, np.nan)
        known[node.name] = unknown if rule is None or not inputs else rule(node, inputs, graph)
    return known


def _reads(node: Node, value: Array) -> tuple[npt.NDArray[np.bool_], Array]:
    """Return which inputs of a conv or linear node can go, and what each adds to each output.

    value: (Ci,) constants of its input. Returns (Ci / groups,) booleans and (Co, Ci / groups).
    """
    weight = node.constants["weight"].astype(np.float64)
    weight = weight.reshape(*weight.shape[:2], -1)
    groups = node.attrs.get("groups", 1)
    value = np.repeat(value.reshape(groups, -1), weight.shape[0] // groups, axis=0)
    fixed = ~np.isnan(value) & ((value == 0) | (not _padded(node)))
    used = (weight != 0).any(axis=2)
    amount = np.where(fixed & used, np.where(fixed, value, 0.0) * weight.sum(axis=2), 0.0)
    return (fixed | ~used).all(axis=0), amount


def _padded(node: Node) -> bool:
    return any(p for pair in node.attrs.get("padding", ()) for p in pair)


def _weighted(node: Node, inputs: list[Array], graph: Graph) -> Array:
    weight = node.constants["weight"].reshape(*node.constants["weight"].shape[:2], -1)
    groups = node.attrs.get("groups", 1)
    value = np.repeat(inputs[0].reshape(groups, -1), weight.shape[0] // groups, axis=0)
    fixed = ~np.isnan(value) & ((value == 0) | (not _padded(node)))
    depends = ((weight != 0).any(axis=2) & ~fixed).any(axis=1)
    bias = node.constants.get("bias", np.zeros(weight.shape[0])).astype(np.float64)
    return np.where(depends, np.nan, bias + _reads(node, inputs[0])[1].sum(axis=1))


def _scaled(node: Node, inputs: list[Array], graph: Graph) -> Array:
    scale, shift = (node.constants[k].astype(np.float64) for k in ("scale", "shift"))
    return np.where(scale == 0, shift, inputs[0] * scale + shift)


def _pooled(node: Node, inputs: list[Array], graph: Graph) -> Array:
    """An average over zero padding mixes the constant with zeros."""
    mixes = node.op == "avgpool" and node.attrs["count_include_pad"] and _padded(node)
    return np.where(inputs[0] == 0, 0.0, np.nan) if mixes else inputs[0]


def _flattened(node: Node, inputs: list[Array], graph: Graph) -> Array:
    return np.repeat(inputs[0], node.shape[0] // len(inputs[0]))


def _joined(node: Node, inputs: list[Array], graph: Graph) -> Array:
    if node.attrs["axis"] == 0:
        return np.concatenate(inputs)
    return np.where(np.all([i == inputs[0] for i in inputs], axis=0), inputs[0], np.nan)


def _permuted(node: Node, inputs: list[Array], graph: Graph) -> Array:
    return inputs[0] if node.attrs["axes"][0] == 0 else np.full(node.shape[0], np.nan)


_RULES: dict[str, Callable[[Node, list[Array], Graph], Array]] = {
    "conv": _weighted,
    "linear": _weighted,
    "batchnorm": _scaled,
    "add": lambda node, inputs, graph: inputs[0] + inputs[1],
    "concat": _joined,
    "relu": lambda node, inputs, graph: np.maximum(inputs[0], 0.0),
    "relu6": lambda node, inputs, graph: np.clip(inputs[0], 0.0, 6.0),
    "hardswish": lambda node, inputs, graph: inputs[0] * np.clip(inputs[0] + 3.0, 0.0, 6.0) / 6.0,
    "identity": lambda node, inputs, graph: inputs[0],
    "maxpool": lambda node, inputs, graph: inputs[0],
    "avgpool": _pooled,
    "pad": lambda node, inputs, graph: np.where(inputs[0] == 0, 0.0, np.nan),
    "flatten": _flattened,
    "permute": _permuted,
}  # softmax, argmax: never


# --- what can go: (graph, group) -> moves ---


def _readers(graph: Graph, member: Member) -> list[Node]:
    return [n for n in graph if n.params.get("weight") == member.tensor and n.op in ("conv", "linear")]


def _dead(graph: Graph, group: Group) -> Moves:
    """Units that are constant, or unused, for every reader."""
    known = constants(graph)
    alive: set[int] = set()
    readers = [m for m in group.members if m.role == "in"]
    for member in readers:
        units = np.asarray(member.units)
        seen = [_reads(node, known[node.inputs[0]]) for node in _readers(graph, member)]
        free = np.all([can & (amount == seen[0][1]).all(axis=0) for can, amount in seen], axis=0)
        alive.update(units[(units >= 0) & ~free].tolist())
    return {u: None for u in range(group.size) if u not in alive} if readers else {}


def _duplicates(graph: Graph, group: Group) -> Moves:
    """Units that are computed by the same numbers as an earlier one, bit for bit."""
    arrays = _arrays(graph)
    makers: dict[int, list[bytes]] = {u: [] for u in range(group.size)}
    for member in group.members:
        if member.role != "in":
            rows = arrays[member.tensor] + 0.0  # no minus zero
            for position, unit in enumerate(member.units):
                if unit >= 0:
                    makers[unit].append(f"{member.tensor}:".encode() + rows[position].tobytes())
    first: dict[tuple[bytes, ...], int] = {}
    moves: Moves = {}
    for unit, maker in makers.items():
        same = first.setdefault(tuple(maker), unit)
        if same != unit:
            moves[unit] = same
    return moves


def _arrays(graph: Graph) -> dict[str, npt.NDArray[np.float32]]:
    """Return the values of the tensors by name; those of a batch norm as (scale, shift) per channel."""
    found = {}
    for node in graph:
        for key, name in node.params.items():
            if node.op == "batchnorm":
                found[name] = np.stack([node.constants["scale"], node.constants["shift"]], axis=1)
            else:
                found[name] = node.constants[key]
    return found


# --- edits ---


def _remove(
    model: nn.Module, graph: Graph, groups: Mapping[str, Group], moves: Mapping[str, Moves], example: Tensor
) -> nn.Module:
    """Return a copy without the units of `moves`, their readers corrected for it."""
    edited = copy.deepcopy(model)
    known = constants(graph)
    for name, found in moves.items():
        for member in groups[name].members:
            if member.role == "in":
                _fold(edited, graph, known, member, [u for u, target in found.items() if target is None])
                _merge(edited, member, {u: t for u, t in found.items() if t is not None})
    kept = {name: [u for u in range(groups[name].size) if u not in found] for name, found in moves.items()}
    return cut(edited, capture(edited, example), kept)


def _fold(
    model: nn.Module, graph: Graph, known: Mapping[str, Array], member: Member, units: Sequence[int]
) -> None:
    """Add what constant inputs contribute to the bias of their reader."""
    node = _readers(graph, member)[0]
    amount = _reads(node, known[node.inputs[0]])[1][:, np.isin(member.units, units)].sum(axis=1)
    module: Any = model.get_submodule(member.module)
    if not amount.any():
        return
    more = torch.as_tensor(amount, device=module.weight.device)
    if module.bias is None:
        module.bias = nn.Parameter(more.float(), requires_grad=module.weight.requires_grad)
    else:
        module.bias.data = (module.bias.data.double() + more).float()


def _merge(model: nn.Module, member: Member, moves: Mapping[int, int]) -> None:
    """Add the weights that read a duplicate to those that read its original."""
    layer: Any = model.get_submodule(member.module)
    units = np.asarray(member.units)
    for unit, target in moves.items():
        from_places, to_places = np.flatnonzero(units == unit), np.flatnonzero(units == target)
        layer.weight.data[:, to_places] += layer.weight.data[:, from_places]


def _split_low_rank(model: nn.Module, graph: Graph) -> nn.Module | None:
    """Return a copy in which layers of low rank are two smaller ones; None when there are none."""
    found = {}
    shared = _shared_tensors(model)
    for node in graph:
        module = dict(model.named_modules()).get(node.module)
        if type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d) and node.params.get("weight") not in shared:
            weight = node.constants["weight"]
            plain = node.attrs.get("groups", 1) == 1 and math.prod(weight.shape[2:]) == 1
            factors = _factors(weight.reshape(weight.shape[:2])) if plain else None
            if factors is not None:
                found[node.module] = factors
    if not found:
        return None
    edited = copy.deepcopy(model)
    for path, (inner, outer) in found.items():
        old = edited.get_submodule(path)
        new = _two_layers(old, inner, outer)
        if old is edited:
            return new
        for parent in list(edited.modules()):
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = new
    return edited


def _factors(weight: npt.NDArray[np.float32]) -> tuple[Array, Array] | None:
    """Return (r, Ci) and (Co, r) whose product is the weight matrix (Co, Ci), if they are smaller than it."""
    matrix = weight.astype(np.float64)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    rank = max(1, int((s > RANK_TOLERANCE * s[0]).sum()))
    if rank * sum(matrix.shape) >= matrix.size:
        return None
    half = np.sqrt(s[:rank])
    return half[:, None] * v[:rank], u[:, :rank] * half


def _two_layers(old: Any, inner: Array, outer: Array) -> nn.Sequential:
    """Return the layer as one of `rank` outputs without bias, then one of kernel 1 with the bias."""
    rank, biased = len(inner), old.bias is not None
    first: Any
    second: Any
    if isinstance(old, nn.Linear):
        first = nn.Linear(old.in_features, rank, bias=False)
        second = nn.Linear(rank, old.out_features, bias=biased)
    else:
        kind = nn.Conv1d if isinstance(old, nn.Conv1d) else nn.Conv2d
        first = kind(old.in_channels, rank, 1, stride=old.stride, padding=old.padding, bias=False)
        second = kind(rank, old.out_channels, 1, bias=biased)
    first.weight.data = torch.as_tensor(inner).reshape(first.weight.shape).to(old.weight)
    second.weight.data = torch.as_tensor(outer).reshape(second.weight.shape).to(old.weight)
    if biased:
        second.bias.data = old.bias.data.clone()
    for p in (*first.parameters(), *second.parameters()):
        p.requires_grad_(old.weight.requires_grad)
    return nn.Sequential(first, second).train(old.training)


def _check_equal(before: nn.Module, after: nn.Module, example: Tensor) -> None:
    """Compare outputs for the example and seeded noise."""
    noise = torch.randn(7, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    x = torch.cat([example[:1].cpu(), noise]).to(next(before.parameters()).device)
    with torch.no_grad():
        a, b = (tensors_of(copy.deepcopy(m).eval()(x)) for m in (before, after))
    error = max(float((p - q).abs().max()) / max(1.0, float(p.abs().max())) for p, q in zip(a, b))
    if not error <= EQUAL_TOLERANCE:
        raise Incompatible(
            f"the outputs differ by {error:.1e} of the largest after lossless edits; "
            "the network amplifies rounding, or draws random numbers in eval mode"
        )
