"""WordNet's nouns, read from the files of Debian's wordnet-base: senses, synonyms, what is above, below and beside.

File format: wndb(5WN) of WordNet 3.0. ImageNet's ids are "n" and the eight digits of an offset.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from thrifty.errors import MissingExtra, close_to
from thrifty.fewshot.one_class.taxonomy import Taxonomy
from thrifty.fewshot.preprocess import InputError

USUAL = Path("/usr/share/wordnet")
_KINDS = {"@": "above", "@i": "above", "~": "below", "~i": "below", "%p": "parts", "%m": "parts", "%s": "parts"}


@dataclass(frozen=True)
class Synset:
    """One meaning: its words, its gloss, and the offsets of other meanings around it."""

    offset: int
    words: tuple[str, ...]
    above: tuple[int, ...] = ()  # hypernyms
    below: tuple[int, ...] = ()  # hyponyms
    parts: tuple[int, ...] = ()  # meronyms
    gloss: str = ""

    @property
    def id(self) -> str:
        """The id that ImageNet uses, e.g. n02084071."""
        return f"n{self.offset:08d}"


class WordNet:
    """The nouns of WordNet, found in `folder`, in the environment's THRIFTY_WORDNET, or in /usr/share/wordnet.

    Raises MissingExtra where the files are not, and InputError for an unknown id.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder or os.environ.get("THRIFTY_WORDNET") or USUAL)
        missing = [name for name in ("data.noun", "index.noun") if not (self.folder / name).is_file()]
        if missing:
            raise MissingExtra(
                f"{' and '.join(missing)} not in {self.folder}; run: apt-get install wordnet-base, "
                "or set THRIFTY_WORDNET to a folder with WordNet's dict files"
            )

    def synset(self, name: int | str) -> Synset:
        """Return a meaning by offset (int) or id ("n02084071")."""
        offset = name if isinstance(name, int) else _offset(name)
        if offset not in self._cache:
            self._cache[offset] = self._read(offset)
        return self._cache[offset]

    def senses(self, label: str) -> tuple[Synset, ...]:
        """Return the meanings of a label, the commonest first; plurals are tried too; empty when unknown."""
        for form in (_key(label), *self._singular(_key(label))):
            if form in self._index:
                return tuple(self.synset(offset) for offset in self._index[form])
        return ()

    def ancestors(self, name: int | str) -> tuple[Synset, ...]:
        """Return the path to the root by first hypernyms, the nearest first."""
        path: list[Synset] = []
        here = self.synset(name)
        while here.above:
            here = self.synset(here.above[0])
            path.append(here)
        return tuple(path)

    def siblings(self, name: int | str, climb: int = 1) -> tuple[Synset, ...]:
        """Return the meanings that share a hypernym, in the file's order; climb 2 adds the cousins, and so on.

        Nearest first; the meaning itself, and what lies above and below it, are not among them.
        """
        start = self.synset(name)
        avoid = {start.offset, *self._reach(start, "above"), *self._reach(start, "below")}
        found: dict[int, Synset] = {}
        level, depth = [start], 0
        while level and depth < climb:
            level = [self.synset(o) for s in level for o in s.above]
            depth += 1
            for above in level:
                for offset in self._descend(above, depth):
                    if offset not in avoid:
                        found.setdefault(offset, self.synset(offset))
        return tuple(found.values())

    def words_around(self, label: str, senses: int = 3) -> set[str]:
        """Return what is no negative of a label: synonyms, hypernyms, hyponyms and parts of its first senses."""
        found: set[str] = set()
        for sense in self.senses(label)[:senses]:
            near = {sense.offset, *self._reach(sense, "above"), *self._reach(sense, "below"), *sense.parts}
            for offset in near:
                found.update(readable(word) for word in self.synset(offset).words)
        return found

    def nouns(self) -> tuple[str, ...]:
        """Return every noun, readable, in alphabetical order."""
        return tuple(readable(word) for word in self._index)

    def taxonomy(self, ids: Iterable[str]) -> Taxonomy:
        """Return the contracted tree of some ids (by first hypernyms); an id above another is refused."""
        parent: dict[str, str] = {}
        wanted = list(ids)
        for name in wanted:
            path = [self.synset(name), *self.ancestors(name)]
            parent.update({low.id: high.id for low, high in itertools.pairwise(path)})
        return Taxonomy(parent).contracted(wanted)

    @cached_property
    def _cache(self) -> dict[int, Synset]:
        return {}

    @cached_property
    def _data(self) -> bytes:
        return (self.folder / "data.noun").read_bytes()

    @cached_property
    def _index(self) -> dict[str, tuple[int, ...]]:
        found = {}
        for line in (self.folder / "index.noun").read_text(encoding="latin-1").splitlines():
            if not line or line[0] == " ":  # the licence
                continue
            fields = line.split()
            found[fields[0]] = tuple(int(o) for o in fields[-int(fields[2]) :])
        return found

    @cached_property
    def _exceptions(self) -> dict[str, tuple[str, ...]]:
        path = self.folder / "noun.exc"
        lines = path.read_text(encoding="latin-1").splitlines() if path.is_file() else []
        return {words[0]: tuple(words[1:]) for words in map(str.split, lines) if len(words) > 1}

    def _singular(self, form: str) -> tuple[str, ...]:
        endings = (("ies", "y"), ("ves", "f"), ("men", "man"), ("es", ""), ("s", ""))
        regular = tuple(form[: -len(old)] + new for old, new in endings if form.endswith(old))
        return (*self._exceptions.get(form, ()), *regular)

    def _read(self, offset: int) -> Synset:
        if not 0 <= offset < len(self._data) or self._data[offset : offset + 9] != b"%08d " % offset:
            raise InputError(f"WordNet in {self.folder} has no noun at offset {offset}; ids are those of WordNet 3.0")
        line = self._data[offset : self._data.index(b"\n", offset)].decode("latin-1")
        record, _, gloss = line.partition(" | ")
        f = record.split()
        count = int(f[3], 16)
        words, rest = f[4 : 4 + 2 * count : 2], f[4 + 2 * count :]
        around: dict[str, list[int]] = {"above": [], "below": [], "parts": []}
        for i in range(int(rest[0])):
            symbol, other, kind, _ = rest[1 + 4 * i : 5 + 4 * i]
            if kind == "n" and symbol in _KINDS:
                around[_KINDS[symbol]].append(int(other))
        kept = {name: tuple(offsets) for name, offsets in around.items()}
        return Synset(offset, tuple(words), kept["above"], kept["below"], kept["parts"], gloss.strip())

    def _reach(self, start: Synset, way: str) -> set[int]:
        found: set[int] = set()
        ahead = list(getattr(start, way))
        while ahead:
            offset = ahead.pop()
            if offset not in found:
                found.add(offset)
                ahead.extend(getattr(self.synset(offset), way))
        return found

    def _descend(self, above: Synset, depth: int) -> list[int]:
        level = [above.offset]
        for _ in range(depth):
            level = [o for offset in level for o in self.synset(offset).below]
        return level


def readable(word: str) -> str:
    """Return a word of WordNet as one writes it.

    >>> readable("great_white_shark")
    'great white shark'
    """
    return word.replace("_", " ").split("(")[0].strip()


def _key(label: str) -> str:
    return "_".join(label.casefold().split())


def _offset(name: str) -> int:
    if len(name) != 9 or name[0] != "n" or not name[1:].isdigit():
        raise InputError(f"'{name}' is no id of a noun; ids look like n02084071; {close_to(name, ['n02084071'])}")
    return int(name[1:])
