"""Tied channels: which slices of which tensors must go together when a channel is removed.

Every channel of every map has a number. Operators either hand numbers on or tie two of them; channels whose
numbers are tied are one *unit*, which is removed as a whole. Every canonical operator has a rule below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from thrifty.errors import UnsupportedModel
from thrifty.graph import Graph, Node, refusals

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Member:
    """One axis of one tensor that is cut with its group.

    `units[i]` is the unit of position i along the axis, or -1 where the position is none of this group's.
    """

    tensor: str  # dotted name, "layer1.0.conv1.weight"
    axis: int
    role: str  # "out": makes the channels; "bias", "norm": go along; "in": reads them
    units: tuple[int, ...]

    @property
    def module(self) -> str:
        """Path of the module that holds the tensor."""
        return self.tensor.rpartition(".")[0]

    def kept(self, units: Sequence[int]) -> Indices:
        """Return the positions along the axis that stay when only these units of the group do."""
        marks = np.asarray(self.units)
        return np.flatnonzero((marks < 0) | np.isin(marks, np.asarray(units, dtype=np.int64)))


@dataclass(frozen=True)
class Group:
    """One set of channels and everything that must be cut with them."""

    name: str  # the module that makes the channels (the first, when several do)
    size: int  # number of units: the things that can be removed one by one
    members: tuple[Member, ...]
    frozen: str = ""  # why nothing may be removed; empty when it may

    @property
    def prunable(self) -> bool:
        """Whether units may be removed."""
        return not self.frozen

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules whose outputs are cut, in order."""
        return tuple(dict.fromkeys(m.module for m in self.members if m.role == "out"))

    @cached_property
    def cells(self) -> tuple[tuple[int, ...], ...]:
        """Units that occur in the same producers: counts rounded within each cell are rounded everywhere."""
        where: dict[int, list[int]] = {u: [] for u in range(self.size)}
        for k, member in enumerate(m for m in self.members if m.role == "out"):
            for unit in set(member.units) - {-1}:
                where[unit].append(k)
        cells: dict[tuple[int, ...], list[int]] = {}
        for unit, key in where.items():
            cells.setdefault(tuple(key), []).append(unit)
        return tuple(tuple(c) for c in cells.values())

    def width(self, unit: int) -> int:
        """Return how many channels of its first producer a unit stands for: several in grouped layers."""
        return next(n for m in self.members if m.role == "out" and (n := m.units.count(unit)))


def channel_groups(graph: Graph) -> tuple[Group, ...]:
    """Return the groups of channels of a network, in execution order.

    Groups that reach the input or an output of the network, or an operator that mixes channels, are frozen.
    Raises UnsupportedModel listing every node that has no rule, with its module path.
    """
    if refused := refusals(graph):
        raise UnsupportedModel(refused)
    ties = _Ties()
    for node in graph:
        ties.shapes[node.name] = node.shape
        ties.flows[node.name] = RULES[node.op](ties, node, [ties.flows[name] for name in node.inputs])
    for name in graph.outputs:
        ties.freeze(ties.flows[name].ids, "it reaches the output of the model")
    return ties.groups()


@dataclass(frozen=True)
class _Flow:
    """The channel numbers of a map, along one of its axes."""

    axis: int
    ids: Indices


class _Ties:
    """Channel numbers, what is tied to what, and the tensors they run along."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.why_frozen: dict[int, str] = {}
        self.flows: dict[str, _Flow] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.tensors: dict[tuple[str, int], tuple[str, Indices]] = {}  # (name, axis) -> (role, numbers)

    def new(self, n: int) -> Indices:
        """Return n fresh numbers."""
        start = len(self.parent)
        self.parent.extend(range(start, start + n))
        return np.arange(start, start + n)

    def root(self, i: int) -> int:
        """Return the number that stands for everything tied to i."""
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def tie(self, a: Indices, b: Indices) -> None:
        """Tie numbers pairwise."""
        for i, j in zip(a.tolist(), b.tolist()):
            first, second = sorted((self.root(i), self.root(j)))
            self.parent[second] = first

    def freeze(self, ids: Indices, reason: str) -> None:
        """Forbid the removal of these numbers."""
        for i in ids.tolist():
            self.why_frozen.setdefault(i, reason)

    def fixed(self, n: int, reason: str) -> Indices:
        """Return n fresh numbers that cannot be removed."""
        ids = self.new(n)
        self.freeze(ids, reason)
        return ids

    def bind(self, tensor: str | None, axis: int, role: str, ids: Indices, node: Node) -> None:
        """Let numbers run along an axis of a tensor; a tensor that is used twice ties both uses."""
        if tensor is None:
            self.freeze(ids, f"a weight of '{node.module or node.name}' is computed, not stored")
        elif (known := self.tensors.get((tensor, axis))) is not None:
            self.tie(known[1], ids)
        else:
            self.tensors[(tensor, axis)] = (role, ids)

    def groups(self) -> tuple[Group, ...]:
        """Return the groups: units that a common producer makes."""
        roots = {
            key: np.array([self.root(i) for i in ids.tolist()]) for key, (_, ids) in self.tensors.items()
        }
        join = _Ties()
        join.parent = list(range(len(self.parent)))
        for key, (role, _) in self.tensors.items():
            if role == "out" and len(roots[key]):
                join.tie(np.repeat(roots[key][:1], len(roots[key])), roots[key])
        frozen = {join.root(self.root(i)): why for i, why in reversed(self.why_frozen.items())}
        made = dict.fromkeys(
            join.root(int(r)) for k, (role, _) in self.tensors.items() if role == "out" for r in roots[k]
        )
        return tuple(self._group(which, join, roots, frozen.get(which, "")) for which in made)

    def _group(self, which: int, join: _Ties, roots: dict[tuple[str, int], Indices], frozen: str) -> Group:
        units: dict[int, int] = {}
        members = []
        for key, (role, _) in self.tensors.items():
            mine = [int(r) if join.root(int(r)) == which else -1 for r in roots[key]]
            if any(r >= 0 for r in mine):
                places = tuple(-1 if r < 0 else units.setdefault(r, len(units)) for r in mine)
                members.append(Member(key[0], key[1], role, places))
        first = next(m for m in members if m.role == "out")
        return Group(first.module or first.tensor, len(units), tuple(members), frozen)


# --- one rule per canonical operator: (ties, node, flows of the inputs) -> flow of the output ---


def _input(ties: _Ties, node: Node, flows: Sequence[_Flow]) -> _Flow:
    return _Flow(0, ties.fixed(node.shape[0], "it is the input of the model"))


def _channels_first(ties: _Ties, node: Node, flow: _Flow, channels: int) -> Indices:
    """Return the numbers along axis 0; channels that a permute moved elsewhere are frozen."""
    if flow.axis == 0:
        return flow.ids
    reason = f"'{node.module or node.name}' reads the channels along another axis"
    ties.freeze(flow.ids, reason)
    return ties.fixed(channels, reason)


def _conv(ties: _Ties, node: Node, flows: Sequence[_Flow]) -> _Flow:
    weight, groups = node.constants["weight"], node.attrs["groups"]
    outputs, per_group = weight.shape[0], weight.shape[1]
    ids = _channels_first(ties, node, flows[0], per_group * groups)
    if per_group == 1 and groups > 1:  # depthwise: channel c makes the outputs of group c
        out = np.repeat(ids, outputs // groups)
    else:
        rows = ids.reshape(groups, per_group)  # the same input of every group goes together
        for row in rows[1:]:
            ties.tie(rows[0], row)
        ties.bind(node.params.get("weight"), 1, "in", rows[0], node)
        out = np.tile(ties.new(outputs // groups), groups)
    return _made(ties, node, out)


def _linear(ties: _Ties, node: Node, flows: Sequence[_Flow]) -> _Flow:
    ties.bind(node.params.get("weight"), 1, "in", flows[0].ids, node)
    return _made(ties, node, ties.new(node.shape[0]))


def _made(ties: _Ties, node: Node, out: Indices) -> _Flow:
    ties.bind(node.params.get("weight"), 0, "out", out, node)
    if "bias" in node.constants:
        ties.bind(node.params.get("bias"), 0, "bias", out, node)
    return _Flow(0, out)


def _batchnorm(ties: _Ties, node: Node, flows: Sequence[_Flow]) -> _Flow:
    ids = _channels_first(ties, node, flows[0], node.shape[0])
    for key in ("weight", "bias", "running_mean", "running_var"):
        if key in node.params:
            ties.bind(node.params[key], 0, "norm", ids, node)
    scale, shift = node.constants["scale"], node.constants["shift"]
    if not node.params and (bool((scale != scale[0]).any()) or bool(shift.any())):
        ties.freeze(ids, f"'{node.module or node.name}' has constants per channel in its code")
    return _Flow(0, ids)


def _add(ties: _Ties, node: Node, flows: Sequence[_Flow]) -> _Flow:
    a, b = flows
    if a.axis == b.axis:
        ties.tie(a.ids, b.ids)
        return a
    reason = f"'{node.module or node.name}' adds channels along different axes"
    ties.freeze(a.ids, reason)
    ties.freeze(b.ids, reason)
    return _Flow(0, ties.fixed(node.shape[0], reason))


def _concat(ties: _Ties, node: Node, flows: Sequence[_Flow]) -> _Flow:
    axis = flows[0].axis
    if any(f.axis != axis for f in flows):
        reason = f"'{node.module or node.name}' joins channels along different axes"
        for flow in flows:
            ties.freeze(flow.ids, reason)
        return _Flow(0, ties.fixed(node.shape[0], reason))
    if node.attrs["axis"] == axis:
        return _Flow(axis, np.concatenate([f.ids for f in flows]))
    for flow in flows[1:]:
        ties.tie(flows[0].ids, flow.ids)
    return flows[0]


def _same(ties: _Ties, node: Node, flows: Sequence[_Flow]) -> _Flow:
    return flows[0]


def _window(ties: _Ties, node: Node, flows: Sequence[_Flow]) -> _Flow:
    return _Flow(0, _channels_first(ties, node, flows[0], node.shape[0]))


def _flatten(ties: _Ties, node: Node, flows: Sequence[_Flow]) -> _Flow:
    shape = ties.shapes[node.inputs[0]]
    along = [1] * len(shape)
    along[flows[0].axis] = -1
    return _Flow(0, np.broadcast_to(flows[0].ids.reshape(along), shape).reshape(-1))


def _permute(ties: _Ties, node: Node, flows: Sequence[_Flow]) -> _Flow:
    return _Flow(node.attrs["axes"].index(flows[0].axis), flows[0].ids)


def _mixing(ties: _Ties, node: Node, flows: Sequence[_Flow]) -> _Flow:
    ties.freeze(flows[0].ids, f"'{node.module or node.name}' ({node.op}) compares channels")
    return flows[0]


RULES: dict[str, Callable[[_Ties, Node, Sequence[_Flow]], _Flow]] = {
    "input": _input,
    "conv": _conv,
    "linear": _linear,
    "batchnorm": _batchnorm,
    "add": _add,
    "concat": _concat,
    "flatten": _flatten,
    "permute": _permute,
    "softmax": _mixing,
    "argmax": _mixing,
    "maxpool": _window,
    "avgpool": _window,
    "pad": _window,
    **{op: _same for op in ("relu", "relu6", "hardswish", "identity")},
}
