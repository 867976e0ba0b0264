"""Cutting channels out of a module: real shapes, in a copy, with a check that the result still runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from thrifty.errors import Incompatible, KnobError, NoMatch, close_to
from thrifty.graph import Graph
from thrifty.ties import Group, Indices, channel_groups

EDITABLE = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)


def cut(model: nn.Module, graph: Graph, kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """Return a copy of the model in which only some units of the named groups are left.

    graph: of this model (capture); kept: group name -> units that stay (see ties.Group), at least one each.
    Raises NoMatch for a name that is no group, Incompatible for a group that cannot be cut or a model that
    does not run afterwards.
    """
    groups = {g.name: g for g in channel_groups(graph)}
    _check(model, groups, kept)
    edited = copy.deepcopy(model)
    stays: dict[str, dict[int, Indices]] = {}
    for name, units in kept.items():
        for member in groups[name].members:
            axes = stays.setdefault(member.tensor, {})
            mine = member.kept(units)
            axes[member.axis] = mine if member.axis not in axes else _both(axes[member.axis], mine)
    for tensor, axes in stays.items():
        _slice(edited, tensor, axes)
    check_runs(edited, graph)
    return edited


def _both(a: Indices, b: Indices) -> Indices:
    return a[[i in set(b.tolist()) for i in a.tolist()]]


def _check(model: nn.Module, groups: Mapping[str, Group], kept: Mapping[str, Sequence[int]]) -> None:
    for name in kept:
        if name not in groups:
            raise NoMatch(f"'{name}' is no group of channels; {close_to(name, groups)}")
    bad = [f"'{n}': {why}" for n in kept if (why := groups[n].frozen or why_not(model, groups[n]))]
    if bad:
        raise Incompatible("these channels cannot be cut: " + "; ".join(bad))
    for name, units in kept.items():
        last = groups[name].size - 1
        if not len(units) or min(units) < 0 or max(units) > last:
            raise KnobError(f"'{name}' has units 0..{last}; keep at least one of them, not {list(units)}")
        empty = [m.module for m in groups[name].members if m.role == "out" and not len(m.kept(units))]
        if empty:
            raise KnobError(f"'{name}' would leave no channel in {', '.join(empty)}; keep a unit of each cell")


def why_not(model: nn.Module, group: Group) -> str:
    """Return why the tensors of a group cannot be edited; empty when they can."""
    for member in group.members:
        module = model.get_submodule(member.module)
        attribute = member.tensor.rpartition(".")[2]
        if parametrize.is_parametrized(module):
            return f"the weights of '{member.module}' are parametrised (quantised?); cut before that"
        if not isinstance(module, EDITABLE):
            kinds = ", ".join(k.__name__ for k in EDITABLE)
            return f"'{member.tensor}' belongs to a {type(module).__name__}; only {kinds} can be cut"
        if attribute not in {**module._parameters, **module._buffers}:
            return f"'{member.tensor}' is computed by a hook; remove it (e.g. weight norm) first"
    return ""


def refuse_quantised(model: nn.Module, what: str) -> None:
    """Raise Incompatible when a part of the model is quantised or its weights are parametrised."""
    bad = [n or type(m).__name__ for n, m in model.named_modules() if getattr(m, "quantized", False) is True]
    if not bad:
        bad = [n for n, m in model.named_modules() if isinstance(m, EDITABLE) and parametrize.is_parametrized(m)]
    if bad:
        where = ", ".join(bad)
        raise Incompatible(f"{what} edits plain weights; quantised or parametrised: {where}; put {what} first")


def _slice(model: nn.Module, tensor: str, axes: Mapping[int, Indices]) -> None:
    path, _, attribute = tensor.rpartition(".")
    old: Tensor = getattr(model.get_submodule(path), attribute)
    data = old.detach()
    for axis, positions in axes.items():
        data = data.index_select(axis, torch.as_tensor(positions, device=data.device))
    replace_tensor(model, tensor, data)


def replace_tensor(model: nn.Module, tensor: str, data: Tensor) -> None:
    """Put new data in the place of a parameter or buffer, in every module that holds it; sizes follow."""
    path, _, attribute = tensor.rpartition(".")
    old: Tensor = getattr(model.get_submodule(path), attribute)
    new = data.clone()
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if value is not None and value is old:
                    store[name] = new  # type: ignore[assignment]
                    _resize(module, old)


def _resize(module: nn.Module, old: Tensor) -> None:
    """Make the declared sizes of a layer those of its tensors."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and old.dim() > 1:
        outputs, per_group = module.weight.shape[:2]
        if module.groups > 1 and old.shape[1] == 1:  # depthwise
            module.groups = outputs // (old.shape[0] // module.groups)
        module.out_channels, module.in_channels = outputs, per_group * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        sized = module.running_mean if module.weight is None else module.weight
        module.num_features = sized.shape[0]


def check_runs(model: nn.Module, graph: Graph) -> None:
    """Run the model once and compare the shapes of its outputs with those of the graph."""
    modes = {m: m.training for m in model.modules()}
    device = next(model.parameters(), torch.zeros(0)).device
    try:
        with torch.no_grad():
            out = model.eval()(*[torch.zeros(1, *graph[n].shape, device=device) for n in graph.inputs])
    except Exception as err:
        line = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise Incompatible(
            f"after the cut the model does not run: {line}; keep the module whose code depends on it"
        ) from err
    finally:
        for module, mode in modes.items():
            module.training = mode
    found = sorted(tuple(t.shape[1:]) for t in tensors_of(out))
    if found != sorted(tuple(graph[n].shape) for n in graph.outputs):
        raise Incompatible(f"after the cut the outputs have shapes {found}; keep the module that makes them")


def tensors_of(tree: object) -> list[Tensor]:
    """Return the tensors of nested tuples, lists and dicts, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    items: Iterable[object] = ()
    if isinstance(tree, (dict, tuple, list)):
        items = tree.values() if isinstance(tree, dict) else tree
    return [t for item in items for t in tensors_of(item)]


def rounded(want: float, size: int, step: int, least: int) -> int:
    """Return how many of `size` units stay: the multiple of `step` nearest to `want`, or all of them.

    Never fewer than `least`, where there are so many; of two equally near counts the larger.

    >>> rounded(6.1, 16, 4, 4), rounded(1.0, 16, 4, 4), rounded(10.8, 12, 8, 4)
    (8, 4, 12)
    """
    counts: list[int] = [n for n in (*range(step, size, step), size) if n >= min(least, size)]
    return sorted(counts, key=lambda n: (abs(n - want), -n))[0]


def step_of(group: Group, cell: Sequence[int], round_to: int) -> int:
    """Return how many units make a multiple of `round_to` channels."""
    return round_to // math.gcd(round_to, group.width(cell[0]))
