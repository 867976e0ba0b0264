"""A tree of classes: who is whose parent, how far apart two classes are, and which classes lie below a node."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from thrifty.errors import close_to
from thrifty.fewshot.preprocess import InputError


@dataclass(frozen=True)
class Taxonomy:
    """A tree given as child -> parent; a node that is nobody's child is a root, a node without children is a class.

    Nodes are strings of the user's choice. Raises InputError for a cycle, naming it.

    >>> tree = Taxonomy({"tiger": "cat", "lynx": "cat", "cat": "animal", "oak": "tree"})
    >>> tree.leaves_of("cat"), tree.steps("tiger", "lynx"), tree.steps("tiger", "oak")
    (('lynx', 'tiger'), 1, None)
    """

    parent: Mapping[str, str]
    ranks: tuple[str, ...] = ()  # names of the steps up from a leaf, e.g. ("genus", "family"); for reports only
    _seen: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for node in self.parent:
            self._climb(node)

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[str]], ranks: tuple[str, ...] = ()) -> Taxonomy:
        """Return the tree of paths from the root to a class, e.g. (category, subcategory, name).

        A name that stands under two parents is refused: make names distinct first.

        >>> Taxonomy.from_paths([("animals", "cats", "tiger"), ("animals", "dogs", "wolf")]).steps("tiger", "wolf")
        2
        """
        parent: dict[str, str] = {}
        wrong = []
        for path in paths:
            for above, below in itertools.pairwise(path):
                if parent.setdefault(below, above) != above:
                    wrong.append(f"'{below}' under '{parent[below]}' and '{above}'")
        if wrong:
            raise InputError(f"{len(wrong)} name(s) have two parents: {'; '.join(wrong[:10])}")
        return cls(parent, ranks)

    @cached_property
    def children(self) -> dict[str, tuple[str, ...]]:
        """The children of every inner node, sorted."""
        found: dict[str, list[str]] = {}
        for node, above in self.parent.items():
            found.setdefault(above, []).append(node)
        return {node: tuple(sorted(below)) for node, below in sorted(found.items())}

    @cached_property
    def roots(self) -> tuple[str, ...]:
        """The nodes without a parent, sorted."""
        return tuple(node for node in self.children if node not in self.parent)

    @cached_property
    def leaves(self) -> tuple[str, ...]:
        """The classes: nodes without children, sorted."""
        return tuple(sorted(node for node in self.parent if node not in self.children))

    def ancestors(self, node: str) -> tuple[str, ...]:
        """Return the nodes above, the parent first, the root last."""
        self._check(node)
        return self._climb(node)

    def leaves_of(self, node: str) -> tuple[str, ...]:
        """Return the classes below a node, sorted; of a class, itself."""
        self._check(node)
        return self._below[node]

    def common(self, first: str, second: str) -> str | None:
        """Return the lowest common ancestor, one of the two included; None when they are in different trees."""
        above = {first, *self.ancestors(first)}
        return next((node for node in (second, *self.ancestors(second)) if node in above), None)

    def steps(self, target: str, other: str) -> int | None:
        """Return how many steps up from the target the lowest common ancestor lies: 0 below it, 1 for siblings.

        None when nothing is common. In a tree with ranks, the number of steps is the rank (1: genus, 2: family, ...).
        """
        meet = self.common(target, other)
        return None if meet is None else (target, *self.ancestors(target)).index(meet)

    def by_steps(self, target: str) -> dict[int, tuple[str, ...]]:
        """Return the classes at each number of steps from the target, nearest first; its own at 0."""
        found = {0: self.leaves_of(target)}
        seen = set(found[0])
        for step, node in enumerate(self.ancestors(target), start=1):
            fresh = tuple(leaf for leaf in self._below[node] if leaf not in seen)
            seen.update(fresh)
            found[step] = fresh
        return found

    def contracted(self, leaves: Iterable[str] | None = None) -> Taxonomy:
        """Return the tree of the given classes only (default: all), without nodes that have a single child.

        Then every step up brings new classes, however deep the original tree. An inner node given as a class stays one
        only if nothing given lies below it: otherwise InputError.
        """
        keep = tuple(sorted(set(self.leaves if leaves is None else leaves)))
        for leaf in keep:
            self._check(leaf)
        inner = {above for leaf in keep for above in self.ancestors(leaf)}
        both = sorted(inner & set(keep))
        if both:
            raise InputError(f"{len(both)} class(es) lie above other classes: {', '.join(both[:10])}; leave them out")
        below: dict[str, set[str]] = {}
        for leaf in keep:
            path = (leaf, *self.ancestors(leaf))
            for node, above in itertools.pairwise(path):
                below.setdefault(above, set()).add(node)
        single = {node for node, under in below.items() if len(under) == 1}
        parent = {}
        for node in {*keep, *below} - single:
            higher = next((a for a in self.ancestors(node) if a not in single), None)
            if higher is not None:
                parent[node] = higher
        return Taxonomy(dict(sorted(parent.items())))

    def draw(self, rng: np.random.Generator, count: int, among: Sequence[str], how: str = "uniform") -> list[str]:
        """Return `count` classes drawn with replacement from `among`.

        how: "uniform" over the classes, or "hierarchical": from the root, a child uniformly at every level, among
        children with a class of `among` below them.
        """
        if how not in ("uniform", "hierarchical"):
            raise InputError(f"how is {how!r}; {close_to(how, ('uniform', 'hierarchical'))}")
        pool = sorted(set(among))
        if not pool:
            raise InputError("no classes to draw from")
        for node in pool:
            self._check(node)
        if how == "uniform":
            return [pool[i] for i in rng.integers(len(pool), size=count)]
        inside = set(pool)
        alive = inside.union(*({*self.ancestors(node)} for node in pool))
        return [self._descend(rng, inside, alive) for _ in range(count)]

    def _descend(self, rng: np.random.Generator, inside: set[str], alive: set[str]) -> str:
        level: Sequence[str] = [r for r in self.roots if r in alive]
        while True:
            node = level[int(rng.integers(len(level)))]
            if node in inside:
                return node
            level = [c for c in self.children[node] if c in alive]

    @cached_property
    def _below(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, list[str]] = {}
        for leaf in self.leaves:
            for node in (leaf, *self._climb(leaf)):
                found.setdefault(node, []).append(leaf)
        return {node: tuple(leaves) for node, leaves in found.items()}

    def _climb(self, node: str) -> tuple[str, ...]:
        if node not in self._seen:
            path = [node]
            while path[-1] in self.parent:
                above = self.parent[path[-1]]
                if above in path:
                    raise InputError(f"the taxonomy has a cycle: {' -> '.join([*path[path.index(above) :], above])}")
                path.append(above)
            self._seen[node] = tuple(path[1:])
        return self._seen[node]

    def _check(self, node: str) -> None:
        if node not in self.parent and node not in self.children:
            raise InputError(f"'{node}' is not in the taxonomy; {close_to(node, [*self.parent, *self.roots][:5000])}")
