"""Which recipes a model can be given (its space), and the recipe that a point stands for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase

from thrifty.compress.lossless import Lossless
from thrifty.compress.prune import Prune
from thrifty.compress.quantize import Quantize
from thrifty.compress.train import Train
from thrifty.cost import count_nodes
from thrifty.errors import NoMatch, UnsupportedModel, close_to
from thrifty.graph import Graph
from thrifty.recipe import Recipe, Technique
from thrifty.search.explore import TRAIN
from thrifty.search.space import Point, Space, Value
from thrifty.ties import channel_groups

PRECISION, LOSSLESS, PRUNE, BITS = "precision", "lossless", "prune:", "bits:"
PRECISIONS = ("int16", "int8", "int8-shift")  # from the mildest to the cheapest
RATIOS = (0.25, 0.5, 0.75)
SMALLEST_SHARE = 0.01  # a layer with less of the weights, and of the MACs, is not worth trials of its own


def recipe_of(point: Point, epochs: int) -> Recipe:
    """Return the recipe that a point stands for; with the axis "train", `epochs` of training after each loss."""
    epochs = epochs if point.get(TRAIN) else 0
    steps: list[Technique] = []
    if point.get(LOSSLESS):
        steps.append(Lossless())
    ratios = {group: float(value) for group, value in _with_prefix(point, PRUNE).items()}
    if ratios:
        steps.append(Prune(ratio=0.0, ratios=ratios, recover_epochs=epochs))
    precision = point.get(PRECISION)
    if precision == "int16":
        steps.append(Quantize(bits=16, epochs=epochs))
    elif precision is not None:
        bits = {module: int(value) for module, value in _with_prefix(point, BITS).items()}
        whole = Quantize(bits=8, per_layer=bits, epochs=epochs)
        shift = replace(whole, scales="power_of_two", granularity="layer")
        steps.append(shift if precision == "int8-shift" else whole)
    elif epochs and not ratios:
        steps.append(Train(epochs=epochs))
    return Recipe(tuple(steps))


def name_of(point: Point) -> str:
    """Return a short name for tables and pictures.

    >>> name_of(Point().moved("precision", "int8").moved("prune:a", 0.5).moved("prune:b", 0.25))
    'prune a 0.5 + prune b 0.25 + int8'
    """
    parts = ["lossless"] if point.get(LOSSLESS) else []
    pruned, lowered = _with_prefix(point, PRUNE), _with_prefix(point, BITS)
    if 0 < len(pruned) <= 2:
        parts += [f"prune {group} {ratio}" for group, ratio in pruned.items()]
    elif pruned:
        mean = sum(float(r) for r in pruned.values()) / len(pruned)
        parts.append(f"prune {len(pruned)} groups (mean {mean:.2g})")
    parts.append(str(point.get(PRECISION, "float32")))
    if lowered:
        parts.append(f"int4 in {len(lowered)} layer{'s' if len(lowered) > 1 else ''}")
    if point.get(TRAIN):
        parts.append("trained")
    return " + ".join(parts)


def _with_prefix(point: Point, prefix: str) -> dict[str, Value]:
    return {axis.removeprefix(prefix): value for axis, value in point.settings if axis.startswith(prefix)}


def space_of(graph: Graph, keep: Iterable[str] = (), lossless: bool = True) -> Space:
    """Return where to look for recipes of a model.

    keep: patterns of modules that are neither pruned nor given fewer bits; lossless: whether there is
    anything to remove exactly. Raises NoMatch for a pattern that fits no layer.
    """
    heavy = heavy_modules(graph)
    kept = _matched(keep, [n.module for n in graph if "weight" in n.params])
    axes: dict[str, tuple[Value, ...]] = {PRECISION: PRECISIONS}
    try:
        groups = channel_groups(graph)
    except UnsupportedModel:  # no channel rule for some operator: then nothing is pruned
        groups = ()
    for group in groups:
        touched = {m.module for m in group.members}
        if group.prunable and group.size >= 8 and touched & heavy and not touched & kept:
            axes[PRUNE + group.name] = RATIOS
    for module in (n.module for n in graph if n.op in ("conv", "linear")):
        if module in heavy and module not in kept:
            axes[BITS + module] = (4,)
    exact = Point().moved(LOSSLESS, lossless)
    bases = dict.fromkeys([Point(), exact, *(exact.moved(PRECISION, p) for p in PRECISIONS)])
    needs = {a: (PRECISION, ("int8", "int8-shift")) for a in axes if a.startswith(BITS)}
    return Space(tuple(bases), exact.moved(PRECISION, "int8"), axes, dict(needs))


def heavy_modules(graph: Graph) -> set[str]:
    """Return the paths of the layers that hold at least SMALLEST_SHARE of the weights or of the MACs."""
    rows = [(module, cost) for _, module, cost in count_nodes(graph) if cost.macs or cost.weight_bytes]
    weights = sum(c.weight_bytes or 0 for _, c in rows) or 1
    macs = sum(c.macs or 0 for _, c in rows) or 1
    return {m for m, c in rows if max((c.weight_bytes or 0) / weights, (c.macs or 0) / macs) >= SMALLEST_SHARE}


def _matched(patterns: Iterable[str], modules: list[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        hits = {m for m in modules if fnmatchcase(m, pattern)}
        if not hits:
            raise NoMatch(f"keep: '{pattern}' matches no layer; {close_to(pattern, modules)}")
        found |= hits
    return found
