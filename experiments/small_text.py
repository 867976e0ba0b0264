"""English text that is on a developer's machine anyway: WordNet's glosses and the docstrings of installed packages.

Nothing is downloaded and nothing is imported to read it: modules are parsed. `splits()` gives one paragraph per row, without
repetitions, split by document (a gloss, or all docstrings of one module) by a hash of its name. What is installed decides
what is read; the fingerprint says whether two machines read the same.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORDNET = Path("/usr/share/wordnet")
PACKAGES = ("numpy", "scipy", "sklearn", "torch")
KINDS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
SHARES = {"test": 4, "validation": 4}  # percent of the documents
PROSE = re.compile(r"[A-Z][ -~]*[.!?)]")
CODE = re.compile(r">>>|::|`{2,}.*\n|^\s*[-=~^*+#|]{3,}|\w+\(\w*=|\[\d+\]|[{}<>\\|@]|:(math|ref|func|class|attr|meth):|https?:", re.M)


@dataclass(frozen=True)
class Splits:
    """Paragraphs by split, and where they are from."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    fingerprint: str  # sha256 of all three
    sources: dict[str, dict[str, int]]  # source -> documents, paragraphs and characters in all splits

    def sizes(self) -> dict[str, Any]:
        """Return what a result records of the text."""
        counts = {s: {"paragraphs": len(t), "bytes": sum(map(len, t))} for s, t in self.by_name().items()}
        return {"fingerprint": self.fingerprint, "splits": counts, "sources": self.sources}

    def by_name(self) -> dict[str, tuple[str, ...]]:
        """Return the paragraphs of each split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def clean(text: str) -> str:
    """Return a paragraph on one line, with plain quotes and without reStructuredText's marks for code.

    >>> clean("Return  the\\n   ``mean`` of x.")
    'Return the mean of x.'
    """
    text = text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2014: "-"})
    return " ".join(text.replace("``", "").replace("`", "").split())


def is_prose(paragraph: str) -> bool:
    """Return whether a raw paragraph reads like sentences: ASCII, mostly letters, no code, no table, no heading.

    >>> is_prose("Return the mean of the values."), is_prose(">>> mean(x)"), is_prose("x : array of floats")
    (True, False, False)
    """
    if CODE.search(paragraph):
        return False
    line = clean(paragraph)
    if not 24 <= len(line) <= 2000 or not PROSE.fullmatch(line) or len(line.split()) < 5:
        return False
    letters = sum(c.isalpha() or c == " " for c in line)
    return letters >= 0.88 * len(line)


def wordnet(folder: Path = WORDNET) -> Iterator[tuple[str, list[str]]]:
    """Yield (document, paragraphs): one meaning, "word (noun): definition; "example"." each; without proper names."""
    for path in sorted(folder.glob("data.*")):
        for line in path.read_text(encoding="latin-1").splitlines():
            if line.startswith("  ") or " | " not in line:  # the licence
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            word = fields[4].split("(")[0].replace("_", " ")
            text = f"{word} ({KINDS[fields[2]]}): {clean(gloss)}"
            if text.isascii() and word == word.lower():
                yield f"wordnet/{path.suffix[1:]}/{fields[0]}", [text.rstrip(" ;:,") + "."]


def modules(folder: Path, name: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (document, paragraphs): the docstrings of each module below a folder."""
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        if {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"} & set(inside.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        texts = topics(tree) if path.stem == "topics" else docstrings(tree)
        found = [clean(p) for text in texts for p in re.split(r"\n\s*\n", text) if is_prose(p)]
        if found:
            yield f"{name}/{inside.as_posix()}", found


def docstrings(tree: ast.Module) -> list[str]:
    """Return the docstrings of a module in order, and long strings given to a call (torch's and numpy's add_docstr)."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            found.append(text)
        elif isinstance(node, ast.Call):
            given = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            found += [inspect.cleandoc(text) for text in given if text.count("\n") > 2]
    return found


def topics(tree: ast.Module) -> list[str]:
    """Return the strings of pydoc_data/topics.py: the language reference."""
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [s.replace("“", '"').replace("”", '"') for s in strings if len(s) > 80]


def part_of(document: str) -> str:
    """Return the split of a document, by a hash of its name.

    >>> part_of("wordnet/noun/00001740")
    'train'
    """
    place = int.from_bytes(hashlib.sha256(document.encode()).digest()[:4], "big") % 100
    for part, share in SHARES.items():
        if place < share:
            return part
        place -= share
    return "train"


@functools.cache
def splits(packages: tuple[str, ...] = PACKAGES) -> Splits:
    """Return all text of this machine: WordNet where it is installed, the Python library, and packages."""
    found: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    sources: dict[str, dict[str, int]] = {}
    seen: set[str] = set()
    for source, documents in _sources(packages):
        count = {"documents": 0, "paragraphs": 0, "bytes": 0}
        for name, paragraphs in documents:
            fresh = [p for p in dict.fromkeys(paragraphs) if p.lower() not in seen]
            seen.update(p.lower() for p in fresh)
            found[part_of(name)] += fresh
            count["documents"] += bool(fresh)
            count["paragraphs"] += len(fresh)
            count["bytes"] += sum(map(len, fresh))
        sources[source] = count
    hashed = hashlib.sha256("\0".join("\n".join(rows) for rows in found.values()).encode()).hexdigest()
    return Splits(*(tuple(found[s]) for s in ("train", "validation", "test")), hashed, sources)


def _sources(packages: tuple[str, ...]) -> Iterator[tuple[str, Iterator[tuple[str, list[str]]]]]:
    yield "Python library", modules(Path(sysconfig.get_paths()["stdlib"]), "python")
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            yield name, modules(Path(spec.origin).parent, name)
    yield "WordNet", wordnet()
