"""Refusing knobs: every wrong one at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from thrifty.errors import close_to


def refusals(
    owner: object, limits: Iterable[tuple[str, int, int]], words: Iterable[tuple[str, Sequence[str]]]
) -> list[str]:
    """Return a sentence for each attribute that is no integer within low..high, or none of its words.

    >>> refusals(3j, [("real", 1, 9)], [])
    ['real is 0.0; it must be an integer 1..9']
    """
    found = []
    for name, low, high in limits:
        value = getattr(owner, name)
        if isinstance(value, bool) or not hasattr(value, "__index__") or not low <= value <= high:
            found.append(f"{name} is {value!r}; it must be an integer {low}..{high}")
    for name, known in words:
        value = getattr(owner, name)
        if value not in known:
            found.append(f"{name} is {value!r}; {close_to(str(value), known)}")
    return found
