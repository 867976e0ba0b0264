"""The learners once more, slow and plain: one number at a time, Python integers and dictionaries, no NumPy."""

from __future__ import annotations

import math

LOG2 = [math.floor(math.log2(1 + m / 256) * 256 + 0.5) for m in range(256)]


def ends(d, parts):
    return [(p * d // parts, (p + 1) * d // parts) for p in range(parts)]


def away(a, b, metric):
    return sum(abs(u - v) if metric == "l1" else (u - v) * (u - v) for u, v in zip(a, b))


def half_up(numerator, n):
    return math.floor((2 * numerator + n) / (2 * n)) if abs(numerator) < 2**40 else None


def random32(counter, seed):
    x = (counter * 0x9E3779B1 + seed) % 2**32
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


class GoldenAnchors:
    """seen, sums and means by class; sums and means as lists of anchors, each a list of features."""

    def __init__(self, k):
        self.k, self.draws = k, 0
        self.classes = {}

    def fresh_class(self):
        k = self.k
        return {
            "seen": 0,
            "counts": [[0] * k.anchors for _ in range(k.parts)],
            "sums": [[0] * k.features for _ in range(k.anchors)],
            "means": [[0] * k.features for _ in range(k.anchors)],
        }

    def learn(self, x, c):
        k, mine = self.k, self.classes.setdefault(c, self.fresh_class())
        t, learned = mine["seen"], 0
        for p, (first, end) in enumerate(ends(k.features, k.parts)):
            i = t % k.anchors
            if k.policy == "nearest" and t >= k.anchors:
                query = [level * 2**k.fraction for level in x[first:end]]
                gaps = [away(query, mean[first:end], k.metric) for mean in mine["means"]]
                i = gaps.index(min(gaps))
            if mine["counts"][p][i] == k.n_max:
                continue
            mine["counts"][p][i] += 1
            learned = 1
            for j in range(first, end):
                self.move(mine, i, j, x[j], mine["counts"][p][i])
        mine["seen"] += learned
        return learned

    def move(self, mine, i, j, level, n):
        k = self.k
        if k.form == "sum":
            mine["sums"][i][j] += level
            mine["means"][i][j] = half_up(mine["sums"][i][j] * 2**k.fraction, n)
        else:
            mine["means"][i][j] += self.divided(level * 2**k.fraction - mine["means"][i][j], n)

    def divided(self, gap, n):
        if self.k.rounding == "half_up":
            return half_up(gap, n)
        more = 0
        if self.k.rounding == "stochastic":
            more = random32(self.draws, self.k.seed) * n // 2**32
            self.draws += 1
        return math.floor((gap + more) / n)

    def classify(self, x):
        k = self.k
        query = [level * 2**k.fraction for level in x]
        votes, ties = {}, {}
        for first, end in ends(k.features, k.parts):
            least = {}
            for c, mine in self.classes.items():
                used = mine["means"][: min(mine["seen"], k.anchors)]
                if used:
                    least[c] = min(away(query[first:end], mean[first:end], k.metric) for mean in used)
                    ties[c] = ties.get(c, 0) + least[c]
            if least:
                winner = min(least, key=lambda c: (least[c], c))
                votes[winner] = votes.get(winner, 0) + 1
        return min(ties, key=lambda c: (-votes.get(c, 0), ties[c] if k.tie == "distance" else 0, c), default=-1)

    def new_class(self, c):
        self.classes.pop(c, None)

    def reset(self):
        self.classes, self.draws = {}, 0

    def same(self, state):
        """Whether the words of the state are these."""
        for c in range(self.k.classes):
            mine = self.classes.get(c, self.fresh_class())
            words = [state["seen"][c] == mine["seen"], state["means"][c].tolist() == mine["means"]]
            if self.k.form == "sum":
                words.append(state["sums"][c].tolist() == mine["sums"])
            if self.k.policy == "nearest":
                words.append(state["counts"][c].tolist() == mine["counts"])
            if not all(words):
                return False
        return self.k.rounding != "stochastic" or state["draws"][0] == self.draws


class GoldenCodes:
    """For each class with examples, how often each (sub-space, codeword) was seen."""

    def __init__(self, k):
        self.k, self.book = k, k.codebook.tolist()
        self.classes = {}

    def codes(self, x):
        found = []
        for first, end in ends(self.k.features, self.k.parts):
            gaps = [away(x[first:end], word[first:end], self.k.metric) for word in self.book]
            found.append(gaps.index(min(gaps)))
        return found

    def learn(self, x, c):
        mine = self.classes.setdefault(c, {"seen": 0, "cells": {}})
        mine["seen"] += 1
        for p, code in enumerate(self.codes(x)):
            mine["cells"][p, code] = min(255, mine["cells"].get((p, code), 0) + 1)
        return 1

    def classify(self, x):
        codes, scores = self.codes(x), {}
        for c, mine in self.classes.items():
            cells = [mine["cells"].get((p, code), 0) for p, code in enumerate(codes)]
            if self.k.cells == "bits":
                scores[c] = sum(cell > 0 for cell in cells)
            else:
                scores[c] = sum(self.log2(n + 1) for n in cells) - self.k.parts * self.log2(mine["seen"] + self.k.words)
        return min(scores, key=lambda c: (-scores[c], c), default=-1)

    def log2(self, v):
        e = v.bit_length() - 1
        return 256 * e + LOG2[math.floor((v / 2**e - 1) * 256)]

    def new_class(self, c):
        self.classes.pop(c, None)

    def reset(self):
        self.classes = {}

    def same(self, state):
        """Whether the words of the state are these."""
        k = self.k
        for c in range(k.classes):
            mine = self.classes.get(c, {"seen": 0, "cells": {}})
            for p in range(k.parts):
                for code in range(k.words):
                    n = mine["cells"].get((p, code), 0)
                    if k.cells == "counts":
                        word = state["cells"][c, p, code] == n
                    else:
                        bit = p * k.words + code
                        word = state["cells"][c, bit // 8] >> (bit % 8) & 1 == (n > 0)
                    if not word:
                        return False
            if k.cells == "counts" and state["seen"][c] != mine["seen"]:
                return False
            if k.cells == "bits" and state["valid"][c // 8] >> (c % 8) & 1 != (mine["seen"] > 0):
                return False
        return True
