"""Metrics against hand-computed values and, where installed, sacrebleu."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from thrifty.errors import DataError, KnobError
from thrifty.llm import d5p4
from thrifty.llm.d5p4 import metrics
from thrifty.report.charts import chart


def test_distinct_counts_n_grams_of_all_texts():
    texts = [list("abab"), list("ab")]
    assert metrics.distinct(texts, 1) == 2 / 6
    assert metrics.distinct(texts, 2) == 2 / 4
    assert metrics.distinct(texts, 5) == 0.0
    with pytest.raises(KnobError):
        metrics.distinct(texts, 0)


def test_ead_of_uniform_draws_is_1():
    draws = torch.randint(50, (200, 40), generator=torch.Generator().manual_seed(0)).tolist()
    found = [metrics.expectation_adjusted_distinct([d], 50) for d in draws]
    assert sum(found) / 200 == pytest.approx(1.0, abs=0.02)
    assert metrics.expectation_adjusted_distinct([[1, 1]], 2) == pytest.approx(1 / (2 * 0.75))
    assert metrics.expectation_adjusted_distinct([[]], 5) == 0.0


def test_bleu_by_hand():
    assert metrics.bleu(list("abcde"), [list("abcde")]) == pytest.approx(100.0)
    assert metrics.bleu(list("xy"), [list("ab")]) == 0.0
    assert metrics.bleu(list("aa"), [list("ab")]) == pytest.approx(100 * math.sqrt(0.5 * 0.5))  # 1 of 2, then 1/2 of 1
    assert metrics.bleu(list("ab"), [list("abcd")]) == pytest.approx(100 * math.exp(1 - 4 / 2))


def test_bleu_is_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        size = torch.randint(1, 12, (4,), generator=generator).tolist()
        texts = [[f"w{int(i)}" for i in torch.randint(5, (n,), generator=generator)] for n in size]
        joined = [" ".join(t) for t in texts]
        theirs = sacrebleu.sentence_bleu(joined[0], joined[1:], tokenize="none", use_effective_order=True).score
        assert metrics.bleu(texts[0], texts[1:]) == pytest.approx(theirs, abs=1e-6)


def test_self_bleu_is_high_where_texts_repeat():
    assert metrics.self_bleu([list("abcde")] * 3) == pytest.approx(100.0)
    assert metrics.self_bleu([list("abcde"), list("fghij")]) == 0.0
    with pytest.raises(DataError, match="at least 2"):
        metrics.self_bleu([list("a")])


def test_mean_cosine_and_vendi():
    eye = torch.eye(4)
    assert metrics.mean_cosine(eye) == pytest.approx(0.0)
    assert metrics.mean_cosine(torch.ones(3, 5)) == pytest.approx(1.0)
    assert metrics.mean_cosine(torch.tensor([[1.0, 0], [0, 1], [1, 1]])) == pytest.approx(2 / 3 * math.sqrt(0.5))
    assert metrics.vendi(eye) == pytest.approx(4.0)
    assert metrics.vendi(torch.ones(4, 4)) == pytest.approx(1.0)
    assert metrics.vendi(torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))) == pytest.approx(2.0)
    with pytest.raises(DataError):
        metrics.vendi(torch.ones(2, 3))


def test_f1_and_token_entropy():
    assert metrics.f1(list("aab"), [list("abb"), list("x")]) == pytest.approx(2 * 2 / 6)
    assert metrics.f1(list("ab"), [list("cd")]) == 0.0
    assert metrics.f1([], [[]]) == 0.0
    assert metrics.token_entropy(list("abcd")) == pytest.approx(math.log(4))
    assert metrics.token_entropy(list("aaaa")) == 0.0
    assert metrics.token_entropy([]) == 0.0
    assert metrics.token_entropy(list("aab")) == pytest.approx(-2 / 3 * math.log(2 / 3) - 1 / 3 * math.log(1 / 3))


def test_wasserstein_is_that_of_the_sorted_numbers_in_one_dimension():
    generator = torch.Generator().manual_seed(0)
    for n, m in ((5, 5), (4, 6), (1, 7)):
        first, second = torch.randn(n, 1, generator=generator), 2 + 3 * torch.randn(m, 1, generator=generator)
        size = math.lcm(n, m)
        sorted_apart = [x.repeat_interleave(size // len(x), 0).flatten().sort().values for x in (first, second)]
        expected = float((sorted_apart[0] - sorted_apart[1]).abs().mean())
        assert metrics.wasserstein(first, second) == pytest.approx(expected, rel=1e-5)
    plane = torch.randn(6, 3, generator=generator)
    assert metrics.wasserstein(plane, plane[torch.tensor([3, 1, 0, 2, 5, 4])]) == pytest.approx(0.0, abs=1e-6)
    assert metrics.wasserstein(plane, plane + torch.tensor([3.0, 4.0, 0.0])) == pytest.approx(5.0, rel=1e-5)
    with pytest.raises(DataError, match="shapes"):
        metrics.wasserstein(plane, torch.zeros(2, 4))
    with pytest.raises(KnobError, match="repeat to"):
        metrics.wasserstein(torch.zeros(997, 1), torch.zeros(991, 1))


def test_pass_at_k_is_the_share_of_subsets_with_a_success():
    for n, correct, k in ((6, 2, 3), (5, 0, 2), (5, 5, 1), (4, 1, 4)):
        subsets = list(combinations([i < correct for i in range(n)], k))
        assert metrics.pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(KnobError):
        metrics.pass_at_k(3, 4, 1)


def test_perplexity_is_of_the_mean_over_texts_and_tokens_are_capped():
    scores = {"a": [1.0, 3.0], "b": [4.0], "c": [100.0]}
    found = metrics.perplexity(["a", "b"], lambda t: torch.tensor(scores[t]))
    assert found.value == pytest.approx(math.exp(3.0))
    assert found.texts == 2
    assert math.log(found.high) - 3.0 == pytest.approx(12.7062 * 1.0, rel=1e-4)  # Student, 1 degree of freedom
    assert metrics.perplexity(["c"], lambda t: torch.tensor(scores[t])).value == pytest.approx(math.exp(15.0))
    with pytest.raises(DataError, match="text 0"):
        metrics.perplexity(["a"], lambda t: torch.tensor([]))
    with pytest.raises(DataError, match="no texts"):
        metrics.perplexity([], lambda t: torch.tensor([]))


def point(a, b):
    return d5p4.Point(None, {"a": a, "b": b}, (), 1)


def test_the_pareto_set():
    found = d5p4.pareto([point(1, 3), point(2, 2), point(2, 3), point(3, 1), point(1, 3)], ("a", "b"))
    assert [p.pareto for p in found] == [True, True, False, True, True]
    with pytest.raises(DataError, match="no number for c"):
        d5p4.pareto([point(1, 2)], ("a", "c"))


def test_a_sweep_compares_selectors_at_equal_forward_passes():
    generator = torch.Generator().manual_seed(0)
    embedding, out = torch.randn(9, 8, generator=generator), torch.randn(8, 9, generator=generator)

    def network(ids):
        hidden = torch.tanh(embedding[ids] + embedding[ids].mean(1, keepdim=True))
        return hidden @ out, hidden

    denoiser = d5p4.Subs(network, 8)

    def measure(samples):
        return {
            "cosine": metrics.mean_cosine(embedding[samples.representatives].flatten(1)),
            "repetition": 1 - metrics.distinct(samples.representatives.tolist(), 2),
        }

    points = d5p4.sweep(
        denoiser, 3, 3, 5, d5p4.grid(betas=[0.5, 8.0], multiplicative=[5.0], alphas=[2.0]), measure, seeds=(0, 1),
        minimise=("cosine", "repetition"), start=10,
    )  # fmt: skip
    assert len(points) == 7
    assert any(p.pareto for p in points)
    assert {p.passes for p in points} == {9 * 6}
    assert points[0].selector is None
    assert all(len(p.runs) == 2 for p in points)
    assert points[3].metrics["cosine"] == pytest.approx(sum(r["cosine"] for r in points[3].runs) / 2)
    picture = d5p4.trade_off(points, "cosine", "repetition")
    names = ["independent", "best of N", "greedy beam", "D5P4+", "D5P4×", "diverse beam", "Pareto set"]
    assert [line.name for line in picture.lines] == names
    assert list(picture.lines[3].x) == [p.metrics["cosine"] for p in points[3:5]]
    assert len(picture.lines[-1].x) == sum(p.pareto for p in points)
    assert picture.note == "54 forward passes each"
    assert chart(picture).startswith("<svg")
    with pytest.raises(KnobError, match="at least one"):
        d5p4.sweep(denoiser, 3, 3, 5, [], measure, start=10)
