"""Names of what a label may be confused with: read from answers of a language model, from WordNet, or drawn at
random."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from thrifty.fewshot.one_class.wordnet import Synset, WordNet, readable
from thrifty.fewshot.preprocess import Array, InputError, unit

MOST_WORDS = 5  # a longer item is a sentence, not a name
SAME_TEXT = 0.99  # cosine above which two labels are the same to the encoder
_MARK = re.compile(r"^\s*(?:\(?\d{1,3}[.):]|[-*•–])\s+")
_TAIL = re.compile(r"\s*(?:[:(—–].*|\s-\s.*)$")
_ARTICLE = re.compile(r"^(?:an?|the|some)\s+", re.IGNORECASE)


@dataclass(frozen=True)
class Negatives:
    """The names kept for one target, and those left out with the reason."""

    target: str
    kept: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...]  # (name, why)
    source: str = ""


def parse_answer(text: str) -> list[str]:
    """Return the names in an answer: a numbered or bulleted list, a JSON list, or names between commas.

    Explanations after a colon, dash or bracket, articles, quotes and sentences are left out; case is kept.

    >>> parse_answer("Sure!\\n1. A wolf: grey and wild\\n2. **Jackal** (Africa)\\n3. Foxes")
    ['wolf', 'Jackal', 'Foxes']
    >>> parse_answer("wolf, jackal, and fox.")
    ['wolf', 'jackal', 'fox']
    """
    lines = [line for line in text.splitlines() if line.strip()]
    items = [_MARK.sub("", line) for line in lines if _MARK.match(line)]
    if not items:
        items = _json_list(text) or [part for line in lines for part in re.split(r"[,;]", line)]
    named = (_name(item) for item in items)
    return [name for name in named if name and len(name.split()) <= MOST_WORDS]


def clean(
    target: str, candidates: Iterable[str], count: int = 10, *, wordnet: WordNet | None = None,
    also: Iterable[str] = (), source: str = "",
) -> Negatives:  # fmt: skip
    """Return at most `count` names that are not the target by another word.

    Left out, with the reason: the target (whatever case or number), a kind of it ("siamese cat" of "cat"), repetitions,
    the names in `also`, and with a WordNet every synonym, hypernym, hyponym and part of the target's first three
    senses. They would reject true positives.

    >>> clean("cat", ["Cats", "siamese cat", "lynx", "Lynx", "dog"], 2).kept
    ('lynx', 'dog')
    """
    if count < 1:
        raise InputError(f"count is {count}; at least one negative is needed")
    plain = singular(target)
    related = {singular(w) for w in also} | {singular(w) for w in (wordnet.words_around(target) if wordnet else ())}
    kept: dict[str, str] = {}
    dropped = []
    for name in candidates:
        key = singular(name)
        if key == plain:
            why = "the target"
        elif key.endswith(f" {plain}"):
            why = "a kind of the target"
        elif key in related:
            why = "a word for, above, below or a part of the target"
        elif key in kept:
            why = "repeated"
        elif len(kept) >= count:
            why = f"more than {count}"
        else:
            kept[key] = name.strip()
            continue
        dropped.append((name, why))
    return Negatives(target, tuple(kept.values()), tuple(dropped), source)


def drop_same(target_d: Array, negatives_kd: Array, limit: float = SAME_TEXT) -> np.typing.NDArray[np.bool_]:
    """Return which negatives (K,) to keep: those whose cosine with the target is at most `limit`.

    >>> drop_same(np.array([1.0, 0.0]), np.array([[2.0, 0.0], [0.0, 1.0]]))
    array([False,  True])
    """
    keep: np.typing.NDArray[np.bool_] = unit(negatives_kd) @ unit(target_d) <= limit
    return keep


def random_names(target: str, names: Sequence[str], count: int, rng: np.random.Generator) -> Negatives:
    """Return `count` names drawn without replacement: negatives that know nothing of the target."""
    order = rng.permutation(len(names))
    return clean(target, (names[int(i)] for i in order[: 3 * count]), count, source="random")


def wordnet_negatives(
    wordnet: WordNet, target: str, count: int = 10, *, sense: int | str | None = None, under: Sequence[str] = (),
    climb: int = 4, rng: np.random.Generator | None = None,
) -> Negatives:  # fmt: skip
    """Return WordNet's siblings of a label, then cousins (up to `climb` steps), until there are `count`.

    sense: offset or id of the meaning; default the first sense of the label that lies below one of the ids `under`
    (default: the first). rng: shuffles names of the same distance; without it they come in WordNet's order. A label
    that WordNet does not know gives no names.
    """
    meaning = wordnet.synset(sense) if sense is not None else first_sense(wordnet, target, under)
    if meaning is None:
        return Negatives(target, (), (), "wordnet")
    candidates: list[str] = []
    for steps in range(1, climb + 1):
        fresh = [readable(s.words[0]) for s in wordnet.siblings(meaning.offset, steps)][len(candidates) :]
        candidates += fresh if rng is None else [fresh[i] for i in rng.permutation(len(fresh))]
        if len(candidates) >= 3 * count:
            break
    words = [readable(w) for w in meaning.words]
    return clean(target, candidates, count, wordnet=wordnet, also=words, source="wordnet")


def first_sense(wordnet: WordNet, label: str, under: Sequence[str] = ()) -> Synset | None:
    """Return the first meaning of a label below one of the ids, or None."""
    wanted = {wordnet.synset(i).offset for i in under}
    for sense in wordnet.senses(label):
        above = {sense.offset, *(s.offset for s in wordnet.ancestors(sense.offset))}
        if not wanted or above & wanted:
            return sense
    return None


def singular(name: str) -> str:
    """Return a name in lower case, single spaces, without article and plural ending: for comparing, not for showing.

    >>> singular("The  Wild Berries"), singular("glasses"), singular("bus")
    ('wild berry', 'glass', 'bus')
    """
    words = _ARTICLE.sub("", " ".join(name.casefold().replace("_", " ").split())).split()
    if not words:
        return ""
    last = words[-1]
    if last.endswith("ies") and len(last) > 4:
        last = last[:-3] + "y"
    elif last.endswith(("ches", "shes", "sses", "xes", "zes")):
        last = last[:-2]
    elif last.endswith("s") and not last.endswith(("ss", "us", "is")) and len(last) > 3:
        last = last[:-1]
    return " ".join([*words[:-1], last])


def _json_list(text: str) -> list[str]:
    start, end = text.find("["), text.rfind("]")
    if not 0 <= start < end:
        return []
    try:
        found = json.loads(text[start : end + 1])
    except ValueError:
        return []
    return [item for item in found if isinstance(item, str)]


def _name(item: str) -> str:
    bare = item.replace("*", "").replace("`", "").strip().strip("\"'“”‘’")
    bare = re.sub(r"^(?:and|or)\s+", "", _TAIL.sub("", bare), flags=re.IGNORECASE)
    return _ARTICLE.sub("", bare.strip().strip("\"'“”‘’.,;!").strip())
