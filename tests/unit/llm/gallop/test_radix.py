from __future__ import annotations

import pytest
import torch

from thrifty.llm.gallop.radix import ordered_bits, threshold, top_k


def stream(scores, size=7):
    """Return scores as a stream of two names, in small chunks."""
    half = len(scores) // 2
    parts = {"a": scores[:half], "b": scores[half:]}

    def run():
        for name, part in parts.items():
            for start in range(0, len(part), size):
                yield name, start, part[start : start + size]

    return run


def mask(found, n):
    half = n // 2
    flat = torch.zeros(n, dtype=torch.bool)
    for name, index in found.items():
        assert bool((index.diff() > 0).all())
        flat[index + (half if name == "b" else 0)] = True
    return flat


@pytest.mark.parametrize("k", [1, 2, 10, 49, 99, 100])
@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "tiny", "wide"])
def test_is_a_stable_sort(k, kind):
    scores = torch.randn(100, generator=torch.Generator().manual_seed(1))
    scores = {
        "normal": scores,
        "ties": scores.round(),
        "constant": torch.zeros(100),
        "tiny": scores * 1e-41,  # subnormal
        "wide": scores.sign() * 10 ** (30 * scores.abs().clamp(max=1.2)),
    }[kind]
    expected = torch.zeros(100, dtype=torch.bool)
    expected[scores.sort(descending=True, stable=True).indices[:k]] = True
    assert torch.equal(mask(top_k(stream(scores), k), 100), expected)


def test_threshold_is_exactly_the_kth():
    scores = torch.tensor([3.0, -1.0, 3.0, 3.0, 5.0, 0.0])
    bits = ordered_bits(scores)
    assert threshold(stream(scores, 2), 3) == (int(bits[0]), 2)
    assert threshold(stream(scores, 2), 6) == (int(bits[1]), 1)


def test_none_of_none():
    assert top_k(stream(torch.ones(4)), 0) == {}


def test_order_of_bits_is_the_order_of_numbers():
    numbers = torch.tensor([-torch.inf, -3e38, -1.0, -1e-40, -0.0, 0.0, 1e-45, 1.0, 3e38, torch.inf])
    bits = ordered_bits(numbers)
    assert bits.tolist() == sorted(bits.tolist())
    assert len(set(bits.tolist())) == 9
    assert int(bits.min()) >= 0
    assert int(bits.max()) < 2**32
