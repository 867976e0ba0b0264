"""One-class tasks from any taxonomy and labelled pictures: negatives at a chosen distance, splits that share no class.

Source: the granularity-controlled tasks of arXiv:2404.00675 (negative pictures at a fixed distance in the taxonomy,
from the same data set as the positive ones), built as specs/fewshot.md 3d says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thrifty.errors import close_to
from thrifty.fewshot.one_class.evaluation import EmbeddedTask
from thrifty.fewshot.one_class.taxonomy import Taxonomy
from thrifty.fewshot.preprocess import InputError, OptionError


@dataclass(frozen=True)
class Question:
    """A one-class task before embedding: rows of a picture table, as many positive as negative."""

    target: str  # a node of the taxonomy
    level: str
    positives: tuple[int, ...]
    negatives: tuple[int, ...]


@dataclass(frozen=True)
class Benchmark:
    """The questions that could be asked, and how many (target, level) pairs could not, by level."""

    questions: tuple[Question, ...]
    skipped: dict[str, int]

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets with a question, sorted."""
        return tuple(sorted({q.target for q in self.questions}))

    def complete(self, levels: Iterable[str] | None = None) -> Benchmark:
        """Return the questions of targets that have one at every level: then levels compare the same targets."""
        wanted = set(levels or {q.level for q in self.questions} | set(self.skipped))
        found: dict[str, set[str]] = {}
        for q in self.questions:
            found.setdefault(q.target, set()).add(q.level)
        kept = tuple(q for q in self.questions if q.level in wanted and wanted <= found[q.target])
        return Benchmark(kept, self.skipped)


def build(
    taxonomy: Taxonomy, labels: Sequence[str], targets: Iterable[str], rng: np.random.Generator, *,
    levels: Mapping[str, Sequence[int]] | None = None, pictures: int = 10, least: int = 1,
    classes: Iterable[str] | None = None,
) -> Benchmark:  # fmt: skip
    """Return one question for each target and level.

    labels: (n,) the class (a leaf) of every picture. targets: any nodes; pictures of the classes below one are
    positive. levels: name -> steps up from the target to the lowest common ancestor with the negatives' classes;
    default one level for each step, named by the taxonomy's ranks. pictures: of each kind; fewer where there are
    fewer, and always as many positive as negative; below `least` the pair is skipped and counted. classes: leave out
    pictures of other classes. Pictures are spread over as many classes as possible.

    >>> tree = Taxonomy.from_paths([("a", "cats", "lynx"), ("a", "cats", "lion"), ("a", "dogs", "wolf")])
    >>> found = build(tree, ["lynx", "lion", "wolf"], ["lynx"], np.random.default_rng(0))
    >>> [(q.level, q.positives, q.negatives) for q in found.questions]
    [('1', (0,), (1,)), ('2', (0,), (2,))]
    """
    if least < 1 or pictures < least:
        raise OptionError(f"pictures is {pictures} and least {least}; 1 <= least <= pictures is needed")
    rows = _rows(taxonomy, labels, classes)
    questions, skipped = [], {name: 0 for name in levels or {}}
    for target in targets:
        steps = taxonomy.by_steps(target)
        asked = levels or {_rank(taxonomy, s): (s,) for s in steps if s > 0}
        own = {leaf: rows[leaf] for leaf in steps[0] if leaf in rows}
        for level, chosen in asked.items():
            others = {leaf: rows[leaf] for s in chosen for leaf in steps.get(s, ()) if leaf in rows}
            count = min(pictures, sum(map(len, own.values())), sum(map(len, others.values())))
            if 0 in chosen:
                raise OptionError(f"level '{level}' has step 0, which is the target itself; steps start at 1")
            if count < least:
                skipped[level] = skipped.get(level, 0) + 1
                continue
            questions.append(Question(target, level, spread(own, count, rng), spread(others, count, rng)))
    return Benchmark(tuple(questions), skipped)


def spread(rows: Mapping[str, Sequence[int]], count: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Return `count` rows drawn without replacement, from as many classes as possible; sorted.

    >>> spread({"a": [0, 1], "b": [2], "c": [3]}, 4, np.random.default_rng(0))
    (0, 1, 2, 3)
    """
    shuffled = {name: rng.permutation(np.asarray(rows[name])) for name in sorted(rows)}
    order = [name for name in rng.permutation(sorted(rows)).tolist() if len(shuffled[name])]
    depth = max((len(r) for r in shuffled.values()), default=0)
    turns = [int(shuffled[name][i]) for i in range(depth) for name in order if i < len(shuffled[name])]
    if len(turns) < count:
        raise InputError(f"{count} pictures asked for, {len(turns)} there")
    return tuple(sorted(turns[:count]))


def units_above(taxonomy: Taxonomy, climb: int) -> dict[str, str]:
    """Return for each class the node `climb` steps above it (the root if there are fewer): what stays together."""
    path = {leaf: (leaf, *taxonomy.ancestors(leaf)) for leaf in taxonomy.leaves}
    return {leaf: nodes[min(climb, len(nodes) - 1)] for leaf, nodes in path.items()}


def units_of_size(taxonomy: Taxonomy, largest: int) -> dict[str, str]:
    """Return for each class the highest node above it with at most `largest` classes below: branches that stay
    together.

    >>> tree = Taxonomy({"a1": "a", "a2": "a", "a": "r", "b1": "r"})
    >>> units_of_size(tree, 2)
    {'a1': 'a', 'a2': 'a', 'b1': 'b1'}
    """
    found = {}
    for leaf in taxonomy.leaves:
        small = [n for n in (leaf, *taxonomy.ancestors(leaf)) if len(taxonomy.leaves_of(n)) <= max(largest, 1)]
        found[leaf] = small[-1]
    return found


def split(units: Mapping[str, str], shares: Mapping[str, float], rng: np.random.Generator) -> dict[str, frozenset[str]]:
    """Return disjoint parts of the classes; classes of one unit land in the same part.

    units: class -> unit. shares: part -> share of the classes, adding up to at most 1. Units in random order go to the
    part that lacks most; raises InputError when a part stays empty.

    >>> parts = split({"a": "x", "b": "x", "c": "y"}, {"fit": 0.7, "test": 0.3}, np.random.default_rng(0))
    >>> sorted(parts["fit"] | parts["test"])
    ['a', 'b', 'c']
    """
    if not shares or min(shares.values()) <= 0 or sum(shares.values()) > 1 + 1e-9:
        raise OptionError(f"shares are {dict(shares)}; they must be positive and add up to at most 1")
    members: dict[str, list[str]] = {}
    for name in sorted(units):
        members.setdefault(units[name], []).append(name)
    lacking = {part: share * len(units) for part, share in shares.items()}
    rest = len(units) - sum(lacking.values())
    parts: dict[str, set[str]] = {part: set() for part in shares}
    for unit in rng.permutation(sorted(members)).tolist():
        part = max(lacking, key=lambda p: lacking[p])
        if rest > lacking[part]:
            rest -= len(members[unit])
            continue
        parts[part].update(members[unit])
        lacking[part] -= len(members[unit])
    empty = [part for part, names in parts.items() if not names]
    if empty:
        raise InputError(f"parts {', '.join(empty)} got no class: {len(members)} unit(s) are too few or too large")
    return {part: frozenset(names) for part, names in parts.items()}


def embed(
    questions: Iterable[Question], labels: Sequence[str], images: npt.ArrayLike, texts: Mapping[str, npt.ArrayLike],
    negatives: Mapping[str, Sequence[str]], *, names: Mapping[str, str] | None = None,
    groups: Mapping[str, str] | None = None,
) -> list[EmbeddedTask]:  # fmt: skip
    """Return the questions as arrays.

    labels: (n,) the class of every picture. images: (n, d). texts: name -> (d,). negatives: target -> names, the same
    for every method. names: node -> the name whose text stands for it; default the node itself. groups: target ->
    group of tasks that are not independent. Raises InputError listing every missing text and every target without a
    list.
    """
    table = np.asarray(images, np.float64)
    called = names or {}
    kept = list(questions)
    unlisted = sorted({q.target for q in kept if q.target not in negatives})
    wanted = {called.get(q.target, q.target) for q in kept}.union(*(negatives.get(q.target, ()) for q in kept))
    missing = sorted(wanted - set(texts))
    if unlisted or missing:
        words = [f"no negatives for {', '.join(unlisted[:10])} ({len(unlisted)})"] if unlisted else []
        words += [f"no text embedding for {', '.join(missing[:10])} ({len(missing)})"] if missing else []
        raise InputError("; ".join(words))
    vectors = {name: np.asarray(texts[name], np.float64) for name in wanted}
    tasks = []
    for q in kept:
        rows = np.array([*q.positives, *q.negatives])
        against = [vectors[name] for name in negatives[q.target]]
        target = vectors[called.get(q.target, q.target)]
        tasks.append(
            EmbeddedTask(
                q.target, q.level, target, np.array(against).reshape(len(against), len(target)), table[rows],
                np.arange(len(rows)) < len(q.positives), (groups or {}).get(q.target, q.target),
                frozenset(labels[r] for r in rows),
            )
        )  # fmt: skip
    return tasks


def _rows(taxonomy: Taxonomy, labels: Sequence[str], classes: Iterable[str] | None) -> dict[str, list[int]]:
    allowed = None if classes is None else set(classes)
    found: dict[str, list[int]] = {}
    known = set(taxonomy.leaves)
    wrong = sorted(set(labels) - known)
    if wrong:
        raise InputError(
            f"{len(wrong)} label(s) are no class of the taxonomy, such as '{wrong[0]}'; {close_to(wrong[0], known)}"
        )
    for row, label in enumerate(labels):
        if allowed is None or label in allowed:
            found.setdefault(str(label), []).append(row)
    return found


def _rank(taxonomy: Taxonomy, step: int) -> str:
    return taxonomy.ranks[step - 1] if step <= len(taxonomy.ranks) else str(step)
