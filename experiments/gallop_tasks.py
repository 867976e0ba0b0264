"""Three text tasks made here, offline: meanings (WordNet, four choices), arithmetic, numbers in words.

Each is a list of `Item`: a prompt, the right completion, and the completions to choose from. Source of the meanings:
WordNet 3.0 as installed by Debian's wordnet-base in /usr/share/wordnet.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

WORDNET = Path("/usr/share/wordnet")
TASKS = ("meanings", "arithmetic", "numbers")
SMALL = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


@dataclass(frozen=True)
class Item:
    """One question."""

    prompt: str
    answer: str
    choices: tuple[str, ...]  # the answer is one of them


def task(name: str, n: int, seed: int) -> list[Item]:
    """Return n questions, no two alike; other seeds give other orders of one fixed pool, see `splits`."""
    makers = {"meanings": meaning, "arithmetic": arithmetic, "numbers": numbers}
    rng, found = random.Random(f"{name} {seed}"), {}
    while len(found) < n:
        item = makers[name](rng)
        found[item.prompt] = item
    return list(found.values())


def splits(name: str, sizes: dict[str, int], seed: int) -> dict[str, list[Item]]:
    """Return disjoint splits of the given sizes; "test" is the same for every seed, the others are not."""
    test = task(name, sizes.get("test", 0), -1)
    taken = {item.prompt for item in test} | {item.answer for item in test if name == "meanings"}
    rest = [n for n in sizes if n != "test"]
    pool = iter([i for i in task(name, 2 * sum(sizes.values()) + 50, seed) if i.prompt not in taken and i.answer not in taken])
    return {"test": test, **{split: [next(pool) for _ in range(sizes[split])] for split in rest}}


def in_words(n: int) -> str:
    """Return a whole number below a million in words: 4207 -> "four thousand two hundred and seven"."""
    if n < 20:
        return SMALL[n]
    if n < 100:
        return TENS[n // 10] + (f"-{SMALL[n % 10]}" if n % 10 else "")
    if n < 1000:
        return f"{SMALL[n // 100]} hundred" + (f" and {in_words(n % 100)}" if n % 100 else "")
    rest = n % 1000
    joint = " and " if 0 < rest < 100 else " "
    return f"{in_words(n // 1000)} thousand" + (f"{joint}{in_words(rest)}" if rest else "")


def numbers(rng: random.Random) -> Item:
    """Return a number of three or four digits to be written in words."""
    n = rng.randint(100, 9999)
    wrong: set[int] = set()
    while len(wrong) < 3:  # one digit differs
        digits = list(str(n))
        place = rng.randrange(len(digits))
        digits[place] = str(rng.randint(1, 9))
        if (other := int("".join(digits))) != n:
            wrong.add(other)
    return Item(f"Write the number {n} in words.\nAnswer:", f" {in_words(n)}", shuffled(rng, n, wrong, in_words))


def arithmetic(rng: random.Random) -> Item:
    """Return a sum or difference of two numbers below 100."""
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    plus = rng.random() < 0.5
    a, b = (a, b) if plus else (max(a, b), min(a, b))
    right = a + b if plus else a - b
    wrong: set[int] = set()
    while len(wrong) < 3:
        other = right + rng.choice((-20, -10, -3, -2, -1, 1, 2, 3, 10, 20))
        if other >= 0 and other != right:
            wrong.add(other)
    return Item(f"What is {a} {'+' if plus else '-'} {b}?\nAnswer:", f" {right}", shuffled(rng, right, wrong, str))


def shuffled(rng: random.Random, right: int, wrong: set[int], text) -> tuple[str, ...]:
    """Return the texts of all numbers, in random order."""
    order = sorted({right, *wrong})
    rng.shuffle(order)
    return tuple(f" {text(n)}" for n in order)


@cache
def glosses() -> dict[str, list[tuple[str, str]]]:
    """Return (word, meaning) of nouns by WordNet's lexicographer file: single words of common size, short meanings."""
    found: dict[str, list[tuple[str, str]]] = {}
    seen = set()
    with (WORDNET / "data.noun").open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith(" "):
                continue
            head, _, gloss = line.partition("|")
            fields = head.split()
            word, meaning = fields[4], gloss.split(";")[0].strip()
            senses = int(fields[3], 16)
            plain = word.isalpha() and word.islower() and 3 <= len(word) <= 9 and word not in seen
            if plain and senses and 15 <= len(meaning) <= 70 and '"' not in meaning and word not in meaning and word in common():
                seen.add(word)
                found.setdefault(fields[1], []).append((word, meaning))
    return {kind: words for kind, words in found.items() if len(words) >= 20}


@cache
def common() -> frozenset[str]:
    """Return nouns that WordNet's sense-tagged texts hold (their index lists a tagged sense): words in use."""
    found = set()
    with (WORDNET / "index.noun").open(encoding="utf-8") as lines:
        for line in lines:
            fields = line.split()
            if line.startswith(" ") or not fields[0].isalpha():
                continue
            n_pointers = int(fields[3])
            tagged = int(fields[5 + n_pointers])
            if tagged >= 1:
                found.add(fields[0])
    return frozenset(found)


def meaning(rng: random.Random) -> Item:
    """Return a meaning and four nouns of one kind (the same lexicographer file), one of them meant."""
    kinds = sorted(glosses())
    words = glosses()[rng.choice(kinds)]
    four = rng.sample(words, 4)
    word, text = four[0]
    order = [w for w, _ in four]
    rng.shuffle(order)
    prompt = f"Which word means: {text}?\nOptions: {', '.join(order)}.\nAnswer:"
    return Item(prompt, f" {word}", tuple(f" {w}" for w in order))
