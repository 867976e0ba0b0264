"""From class names and descriptions to one text embedding per class, with any sentence encoder."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from thrifty.fewshot.preprocess import Array, InputError, OptionError

Encode = Callable[[list[str]], npt.ArrayLike]  # texts -> (n, d_t)
TEMPLATES = ("a photo of a {}",)


def embed_names(names: Sequence[str], encode: Encode, templates: Sequence[str] = TEMPLATES) -> dict[str, Array]:
    """Return name -> embedding (d_t,), the mean over the templates; "{}" in a template is the name.

    Raises OptionError for a template without "{}".

    >>> embed_names(["cat"], lambda texts: [[float(len(t))] for t in texts], ["{}", "a {}"])
    {'cat': array([4.])}
    """
    bad = [t for t in templates if "{}" not in t]
    if bad or not templates:
        raise OptionError(f"templates {bad or '()'}: each must hold '{{}}', where the name goes")
    rows = [_rows(encode, [t.replace("{}", name) for t in templates]) for name in names]
    return {name: row.mean(axis=0) for name, row in zip(names, rows, strict=True)}


def embed_descriptions(
    descriptions: dict[str, str], encode: Encode, tokens: Callable[[str], int], limit: int = 77
) -> dict[str, Array]:
    """Return name -> embedding (d_t,) of a description that may be longer than the encoder reads.

    It is cut at sentences into chunks of at most `limit` tokens (`tokens` counts them), a sentence that is too long
    at words; the embeddings of the chunks are averaged. Source: the text features of arXiv:2311.14544, its code.

    >>> count = lambda text: len(text.split())
    >>> embed_descriptions({"cat": "Small. Furry and soft."}, lambda texts: [[count(t)] for t in texts], count, 3)
    {'cat': array([2.])}
    """
    empty = [name for name, text in descriptions.items() if not text.strip()]
    if empty:
        raise InputError(f"{len(empty)} description(s) are empty: {', '.join(map(repr, empty[:20]))}")
    return {name: _rows(encode, chunks(text, tokens, limit)).mean(axis=0) for name, text in descriptions.items()}


def chunks(text: str, tokens: Callable[[str], int], limit: int) -> list[str]:
    """Return pieces of `text` of at most `limit` tokens, cut at sentences, else at words.

    >>> chunks("One two. Three four five. Six.", lambda text: len(text.split()), 3)
    ['One two.', 'Three four five.', 'Six.']
    """
    found: list[str] = []
    for sentence in re.split(r"(?<=[.!?;])\s+", text.strip()):
        whole = f"{found[-1]} {sentence}" if found else sentence
        if found and tokens(whole) <= limit:
            found[-1] = whole
        elif tokens(sentence) <= limit:
            found.append(sentence)
        else:
            found += _cut_at_words(sentence, tokens, limit)
    return found


def _cut_at_words(sentence: str, tokens: Callable[[str], int], limit: int) -> list[str]:
    found = [""]
    for word in sentence.split():
        longer = f"{found[-1]} {word}".strip()
        if tokens(longer) <= limit:
            found[-1] = longer
        elif tokens(word) <= limit:
            found.append(word)
        else:
            raise InputError(f"the word {word!r} alone is longer than {limit} tokens")
    return [piece for piece in found if piece]


def _rows(encode: Encode, texts: list[str]) -> Array:
    rows = np.asarray(encode(texts), np.float64)
    if rows.ndim != 2 or len(rows) != len(texts) or not np.isfinite(rows).all():
        raise InputError(f"the encoder returned shape {rows.shape} for {len(texts)} texts; it must be finite (n, d_t)")
    return rows
