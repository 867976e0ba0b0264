from __future__ import annotations

import copy

import pytest
import torch
from gallop_cases import copies, dense_gradients, rows, same, small, weights_of
from tiny_llms import FAMILIES
from torch import nn

from thrifty.errors import DataError, KnobError, NoMatch, UnsupportedModel
from thrifty.llm.gallop import SCORES, Select, overlap, select
from thrifty.llm.gallop.gradient import gradients
from thrifty.llm.gallop.selection import block_of
from thrifty.llm.loading import Encoded, collate


def chosen(model, data=None, **knobs):
    return select(model, rows() if data is None else data, Select(**{"density": 0.05, "batch": 4, **knobs}))


def flat(model, tensors):
    return torch.cat([tensors[name].flatten() for name in weights_of(model)])


def masks(model, selection):
    return flat(model, {name: selection.mask(name) for name in selection.shapes})


def weights(model):
    return flat(model, {name: w.detach() for name, w in weights_of(model).items()})


# the gradient


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_the_mean_over_examples(family):
    model = small(family)
    data, some = rows(), weights_of(model)
    expected = dense_gradients(model, data, some)
    for batch in (1, 5, 12):  # whatever the split into batches
        found = gradients(model, some, data, batch)
        for name in some:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)


def test_squared_gradient_is_the_mean_of_single_examples():
    model = small()
    some = weights_of(model)
    expected = {name: torch.zeros_like(w) for name, w in some.items()}
    for example in rows(4):
        for name, g in dense_gradients(model, [example], some).items():
            expected[name] += g.square() / 4
    found = gradients(model, some, rows(4), square=True)
    for name in some:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-9)


def test_padding_does_not_change_the_gradient(monkeypatch):
    model = small()
    some = weights_of(model)
    plain = gradients(model, some, rows(), 4)
    wide = "thrifty.llm.gallop.gradient.batches"
    monkeypatch.setattr(
        wide, lambda data, size, pad: [collate(data[i : i + size], pad, 16) for i in range(0, 12, size)]
    )
    for name, g in gradients(model, some, rows(), 4).items():
        torch.testing.assert_close(g, plain[name], rtol=1e-4, atol=1e-7)


def test_magnitude_is_taken_after_averaging():
    """Two examples with opposite gradients cancel: what matters is |mean|, not the mean of |g|."""
    model = small()
    data = rows(2)
    singles = [flat(model, dense_gradients(model, [d], weights_of(model))) for d in data]
    found = flat(model, gradients(model, weights_of(model), data, 1))
    torch.testing.assert_close(found, (singles[0] + singles[1]) / 2, rtol=1e-4, atol=1e-7)
    opposite = (singles[0].sign() == -singles[1].sign()) & (singles[0] != 0)
    assert bool(opposite.any())
    assert bool((found[opposite].abs() < (singles[0].abs() + singles[1].abs())[opposite] / 2).all())


# the selection


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["global", "block", "tensor"])
def test_count_is_exact_and_the_chosen_score_highest(family, scope):
    model = small(family)
    found = chosen(model, scope=scope)
    sizes = {name: w.numel() for name, w in weights_of(model).items()}
    total = sum(sizes.values())
    assert found.count == round(0.05 * total)
    assert found.eligible == total
    g = gradients(model, weights_of(model), rows(), 4)
    scores = {name: g[name].abs() / (w.detach().abs() + 1e-8) for name, w in weights_of(model).items()}
    groups = {"global": lambda n: "", "block": block_of, "tensor": lambda n: n}[scope]
    for group in {groups(name) for name in sizes}:
        names = [n for n in sizes if groups(n) == group]
        mask = torch.cat([found.mask(n).flatten() for n in names])
        score = torch.cat([scores[n].flatten() for n in names])
        assert abs(int(mask.sum()) - 0.05 * len(mask)) <= 1
        assert float(score[mask].min()) >= float(score[~mask].max())


@pytest.mark.parametrize("scope", ["global", "block", "tensor"])
@pytest.mark.parametrize("density", [0.001, 0.0123, 0.5, 1.0])
def test_count_is_exact_with_nothing_but_ties(scope, density):
    model = small()
    with torch.no_grad():
        for p in weights_of(model).values():
            p.zero_()  # all gradients of most tensors are zero, all scores too
    found = chosen(model, density=density, scope=scope)
    assert found.count == round(density * found.eligible)


def test_ties_are_broken_by_the_lowest_index_in_the_order_of_the_model():
    model = small()
    with torch.no_grad():
        for p in weights_of(model).values():
            p.fill_(1.0)
    found = chosen(model, score="highest", density=0.3)
    mask = masks(model, found)
    assert bool(mask[: found.count].all())
    assert not bool(mask[found.count :].any())


def test_one_scalar():
    found = chosen(small(), count=1)
    assert found.count == 1
    assert sum(n > 0 for n in found.counts().values()) == 1  # the other tensors have empty lists


@pytest.mark.parametrize("score", ["gallop", "fisher", "random", "lowest"])
@pytest.mark.parametrize("scope", ["global", "block", "tensor"])
def test_one_block_at_a_time_gives_the_same(scope, score):
    model = small()
    assert same(
        chosen(model, scope=scope, score=score), chosen(model, scope=scope, score=score, one_block_at_a_time=True)
    )


def test_scale_of_a_tensor_scales_its_scores_inversely():
    of = SCORES["gallop"].of
    w, g = torch.randn(50) + 0.1, torch.randn(50)
    torch.testing.assert_close(of(4 * w, g, 1e-12) * 4, of(w, g, 1e-12))


def test_scale_of_the_loss_does_not_matter(monkeypatch):
    model = small()
    plain = chosen(model)
    from thrifty.llm.gallop import gradient

    losses = gradient.completion_losses
    monkeypatch.setattr(gradient, "completion_losses", lambda *a: 8.0 * losses(*a))
    assert same(chosen(model), plain)


def test_a_large_eps_gives_saft():
    model = small()
    assert not same(chosen(model), chosen(model, score="saft"))
    assert overlap(chosen(model, eps=1e6), chosen(model, score="saft"))["share"] == 1.0


def test_a_constant_gradient_gives_the_lowest_magnitudes(monkeypatch):
    model = small()
    monkeypatch.setattr(
        "thrifty.llm.gallop.selection.gradients",
        lambda m, some, *a, **k: {n: torch.ones_like(p) for n, p in some.items()},
    )
    assert same(chosen(model), chosen(model, score="lowest"))


@pytest.mark.parametrize("score", ["gallop", "saft", "snip"])
def test_order_of_the_slice_and_size_of_batches_do_not_matter(score):
    model = small()
    first = chosen(model, score=score)
    for other in (chosen(model, rows()[::-1], score=score), chosen(model, batch=1, score=score)):
        assert overlap(first, other)["share"] > 0.995  # ties in float32 aside


def test_scores_order_magnitudes_as_they_say():
    model = small()
    w = weights(model).abs()
    mean = {score: float(w[masks(model, chosen(model, score=score))].mean()) for score in SCORES}
    assert mean["gallop"] < mean["saft"] / 4  # far smaller than SAFT's
    assert mean["lowest"] == min(mean.values())
    assert mean["highest"] == max(mean.values())
    assert mean["snip"] > mean["saft"]
    assert mean["random"] == pytest.approx(float(w.mean()), rel=0.2)
    lowest = masks(model, chosen(model, score="lowest"))
    assert float(w[lowest].max()) <= float(w[~lowest].min())


def test_random_depends_on_the_seed_only():
    model = small()
    one = chosen(model, (), score="random", seed=1)
    assert same(one, chosen(model, (), score="random", seed=1))
    other = overlap(one, chosen(model, (), score="random", seed=2))
    assert other["share"] == pytest.approx(other["expected_share"], abs=0.06)


def test_sampling_estimates_the_threshold_and_reports_the_density():
    model = small(width=32)
    found = chosen(model, density=0.1, sample=4000)
    error = 3 * (0.9 / (0.1 * 4000)) ** 0.5
    assert found.density == pytest.approx(0.1, rel=error)
    assert found.density != 0.1
    assert overlap(found, chosen(model, density=0.1))["share"] > 0.99  # the sampled set is nested with the exact one


def test_a_bfloat16_model_is_scored_in_float32():
    """In bfloat16 itself, scores would tie massively."""
    model = small(width=32).bfloat16()
    g = gradients(model, weights_of(model), rows(), 4)
    assert all(t.dtype == torch.float32 for t in g.values())
    w = weights(model)
    scores = flat(model, g).abs() / (w.float().abs() + 1e-8)
    found = masks(model, chosen(model))
    assert float(scores[found].min()) >= float(scores[~found].max())
    assert len(scores.unique()) > 4 * len(scores.bfloat16().unique())
    zero = torch.zeros(3, dtype=torch.bfloat16)
    from thrifty.llm.gallop.scores import evaluate

    assert bool(evaluate(SCORES["gallop"], zero, torch.ones(3), 1e-8).isfinite().all())


def test_patterns_choose_what_is_eligible():
    model = small()
    found = chosen(model, patterns=["*.mlp.*.weight", "model.norm.weight"])
    assert set(found.shapes) == {n for n, _ in model.named_parameters() if ".mlp." in n} | {"model.norm.weight"}
    with pytest.raises(NoMatch, match="matches no parameter"):
        chosen(model, patterns=["*.mlp.*.wait"])


# what it leaves alone


@pytest.mark.parametrize("block_by_block", [False, True])
def test_model_and_random_state_are_as_before(block_by_block):
    model = small("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    model.train()
    model.transformer.h[1].eval()
    model.transformer.wte.weight.requires_grad_(False)
    model.transformer.ln_f.weight.grad = torch.ones(16)
    before, state = copies(model), torch.random.get_rng_state()
    modes = [m.training for m in model.modules()]
    needs = [p.requires_grad for p in model.parameters()]
    chosen(model, one_block_at_a_time=block_by_block)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == needs
    grads = {n for n, p in model.named_parameters() if p.grad is not None}
    assert grads == {"transformer.ln_f.weight"}
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_dropout_plays_no_part():
    model = small("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    expected = chosen(model)
    assert same(chosen(model.train()), expected)


# refusals


def test_bad_knobs_are_refused_together():
    with pytest.raises(KnobError) as caught:
        Select(density=0, scope="layers", eps=-1, batch=0)
    for what in ("density is 0", "scope is 'layers'", "eps is -1", "batch is 0"):
        assert what in str(caught.value)
    with pytest.raises(KnobError, match="close: gallop"):
        Select(score="galop")
    with pytest.raises(KnobError, match="cannot be chosen"):
        chosen(small(), density=1e-9)
    with pytest.raises(KnobError, match="cannot be chosen"):
        chosen(small(), count=10**9)


def test_no_number_is_refused_with_the_tensors_name():
    model = small()
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[3, 4] = torch.nan
    with pytest.raises(DataError, match=rf"{name}: its weights holds? NaN"):
        chosen(model, score="lowest")
    with pytest.raises(DataError, match="no finite number"):
        chosen(model)
    model = small()
    with torch.no_grad():
        model.get_parameter(name).zero_()
    with pytest.raises(DataError, match=rf"{name}: a score \(zero weights need eps > 0\)"):
        chosen(model, eps=0)
    with pytest.raises(DataError, match="needs examples"):
        chosen(model, ())


def test_tied_weights_are_selected_once_or_refused():
    model = small("gpt2")
    found = chosen(model, patterns=["transformer.wte.weight"])
    assert list(found.shapes) == ["transformer.wte.weight"]
    with pytest.raises(
        UnsupportedModel, match=r"lm_head\.weight is the same tensor as transformer\.wte\.weight \(tied\)"
    ):
        chosen(model, patterns=["lm_head.weight"])
    both = chosen(model, patterns=["*"])
    assert "lm_head.weight" not in both.shapes


def test_shared_quantised_and_foreign_weights_are_refused():
    model = small()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(UnsupportedModel, match="shared by several blocks"):
        chosen(model)
    with pytest.raises(UnsupportedModel, match="float16; load the model in float32 or bfloat16"):
        chosen(small().half(), score="highest")
    model = small()
    model.model.layers[0].mlp.up_proj._hf_hook = object()
    with pytest.raises(UnsupportedModel, match="accelerate"):
        chosen(model)
    with pytest.raises(UnsupportedModel, match="none of the known"):
        chosen(nn.Linear(2, 2))


def test_slice_is_a_share_of_the_data_from_the_seed():
    model = small()
    data = rows(12)
    assert chosen(model, data, examples=5).examples == 5
    assert chosen(model, data, examples=1, share=0.5).examples == 6
    assert chosen(model, data, examples=99).examples == 12
    assert chosen(model, data, score="highest").examples == 0
    assert not same(chosen(model, data, examples=2, seed=1), chosen(model, data, examples=2, seed=2))
    assert same(chosen(model, data, examples=2, seed=1), chosen(copy.deepcopy(model), data, examples=2, seed=1))


def test_rows_and_masks():
    found = chosen(small(), count=3, score="highest")
    name = next(n for n, c in found.counts().items() if c)
    mask = found.mask(name)
    assert found.rows(name).tolist() == mask.any(1).nonzero().flatten().tolist()
    assert int(mask.sum()) == len(found.indices[name])
    assert found.summary()["count"] == 3
    assert found.indices[name].dtype == torch.int32


def test_progress_counts_examples():
    seen = []
    select(
        small(), [Encoded((3, 4, 5), 1)] * 5, Select(batch=2, density=0.1), progress=lambda a, b: seen.append((a, b))
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]
