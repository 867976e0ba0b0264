"""Three text tasks made here, offline: kinds of things (WordNet, four choices), arithmetic, numbers in words.

Each is a list of `Item`: a prompt, the right completion, and the completions to choose from. Source of the kinds:
WordNet 3.0 as installed by Debian's wordnet-base in /usr/share/wordnet.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

WORDNET = Path("/usr/share/wordnet")
TASKS = ("kinds", "arithmetic", "numbers")
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
    makers = {"kinds": kinds, "arithmetic": arithmetic, "numbers": numbers}
    rng, found = random.Random(f"{name} {seed}"), {}
    while len(found) < n:
        item = makers[name](rng)
        found[item.prompt] = item
    return list(found.values())


def splits(name: str, sizes: dict[str, int], seed: int) -> dict[str, list[Item]]:
    """Return disjoint splits of the given sizes; "test" is the same for every seed, the others are not."""
    test = task(name, sizes.get("test", 0), -1)
    taken = {item.prompt for item in test}
    rest = [split for split in sizes if split != "test"]
    pool = iter([i for i in task(name, 2 * sum(sizes.values()) + 50, seed) if i.prompt not in taken])
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
    """Return a sum of two numbers from 10 to 99."""
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    wrong: set[int] = set()
    while len(wrong) < 3:
        wrong.add(a + b + rng.choice((-10, -3, -2, -1, 1, 2, 3, 10)))
    return Item(f"Question: What is {a} plus {b}?\nAnswer: {a} + {b} =", f" {a + b}", shuffled(rng, a + b, wrong, str))


def shuffled(rng: random.Random, right: int, wrong: set[int], text) -> tuple[str, ...]:
    """Return the texts of all numbers, in random order."""
    order = sorted({right, *wrong})
    rng.shuffle(order)
    return tuple(f" {text(n)}" for n in order)


@cache
def kinds_of_things() -> tuple[tuple[str, str, str], ...]:
    """Return (lexicographer file, kind, word): nouns in use and what WordNet says they are a kind of.

    Single words only; each first sense's direct hypernym; kinds with at least three such words.
    """
    heads, above = {}, {}
    with (WORDNET / "data.noun").open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith(" "):
                continue
            fields = line.partition("|")[0].split()
            heads[fields[0]] = (fields[1], fields[4])
            pointers = fields[5 + 2 * int(fields[3], 16) :]
            found = [pointers[i + 1] for i in range(0, len(pointers) - 3, 4) if pointers[i] == "@"]
            above[fields[0]] = found[0] if found else ""
    first = in_use()
    groups: dict[tuple[str, str], list[str]] = {}
    for offset, (file, word) in heads.items():
        kind = heads.get(above[offset], ("", ""))[1]
        if first.get(word) == offset and kind in first and kind != word:
            groups.setdefault((file, kind), []).append(word)
    return tuple((file, kind, word) for (file, kind), words in sorted(groups.items()) if len(words) >= 3 for word in words)


@cache
def in_use() -> dict[str, str]:
    """Return nouns that WordNet's sense-tagged texts hold, with the synset of their first sense."""
    found = {}
    with (WORDNET / "index.noun").open(encoding="utf-8") as lines:
        for line in lines:
            fields = line.split()
            if not line.startswith(" ") and fields[0].isalpha() and int(fields[5 + int(fields[3])]) >= 1:
                found[fields[0]] = fields[6 + int(fields[3])]
    return found


def kinds(rng: random.Random) -> Item:
    """Return a word, what it is a kind of, and three kinds from other lexicographer files."""
    table = kinds_of_things()
    file, kind, word = rng.choice(table)
    wrong: set[str] = set()
    while len(wrong) < 3:
        other, name, _ = rng.choice(table)
        if other != file and name not in (kind, word):
            wrong.add(name)
    order = sorted({kind, *wrong})
    rng.shuffle(order)
    a = "an" if word[0] in "aeiou" else "a"
    prompt = f"Question: What kind of thing is {a} {word}?\nAnswer: {a.capitalize()} {word} is a kind of"
    return Item(prompt, f" {kind}", tuple(f" {k}" for k in order))
