"""The sampling loop keeps every equality of its specification, on tiny random denoisers."""

from __future__ import annotations

import itertools

import pytest
import torch

from thrifty.errors import DataError, KnobError
from thrifty.llm import d5p4

V, T = 11, 12
MASK = V - 1
SELECTORS = [
    d5p4.Select(), d5p4.Select(form="multiplicative", beta=5.0), d5p4.Select(quality="masked_entropy", polish=True),
    d5p4.Select(quality="self_certainty", similarity="cosine"), d5p4.Select("greedy_beam"),
    d5p4.Select("diverse_beam", alpha=2.0), d5p4.Select("independent"), d5p4.Select("exhaustive"),
    d5p4.Select("map_set"), d5p4.Select("exhaustive", temperature=0.5), d5p4.Select(precision="float64"),
]  # fmt: skip
PROCESSES = [
    d5p4.Mdlm(), d5p4.Blocks(block=4), d5p4.Blocks(block=4, remasking="random"),
    d5p4.Blocks(block=4, remasking="selection_temperature", selection_temperature=0.3),
]  # fmt: skip


def network(seed=0):
    """A function of all tokens and of the place, with random weights."""
    generator = torch.Generator().manual_seed(seed)
    embedding, places = torch.randn(V, 16, generator=generator), torch.randn(64, 16, generator=generator)
    out = torch.randn(16, V, generator=generator)

    def run(ids):
        x = embedding[ids] + places[: ids.shape[1]]
        hidden = torch.tanh(x + x.mean(1, keepdim=True))
        return hidden @ out, hidden

    return run


def subs(**options):
    return d5p4.Subs(network(), MASK, **options)


def draw(selector, k=4, w=3, steps=6, denoiser=None, start=T, seed=1, **options):
    generator = torch.Generator().manual_seed(seed)
    return d5p4.sample(denoiser or subs(), k, w, steps, selector, start=start, generator=generator, **options)


class Watched:
    """A denoiser that remembers what it was asked."""

    def __init__(self, inner):
        self.inner, self.states, self.guided = inner, [], []
        self.mask_id, self.longest, self.guidance = inner.mask_id, inner.longest, inner.guidance
        self.passes = inner.passes

    def __call__(self, ids, given=None, guided=True):
        self.states.append(ids.clone())
        self.guided.append(guided)
        return self.inner(ids, given, guided)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_one_child_each_is_independent_sampling_with_the_same_noise(selector, process):
    assert torch.equal(draw(selector, 5, 1, process=process).ids, draw(None, 5, 1, process=process).ids)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_off_the_window_it_is_independent_sampling_bit_for_bit(process):
    plain, selected = draw(None, process=process), draw(d5p4.Select(), process=process)
    assert torch.equal(draw(d5p4.Select(), window=(0, 0), process=process).ids, plain.ids)
    assert torch.equal(draw(d5p4.Select(), window=(99, None), process=process).ids, plain.ids)
    assert not torch.equal(selected.ids, plain.ids)
    a, b = Watched(subs()), Watched(subs())
    draw(d5p4.Select(), denoiser=a, window=(3, None), process=process)
    draw(None, denoiser=b, process=process)
    assert all(torch.equal(x, y) for x, y in zip(a.states[:4], b.states[:4], strict=True))
    assert not torch.equal(a.states[4], b.states[4])


def test_independent_sampling_is_ancestral_sampling_of_each_state_alone():
    """A plain loop over states and positions, written from the equations, with the same noise."""
    generator = torch.Generator().manual_seed(1)
    states = [[MASK] * T for _ in range(6)]
    times = [1 - i * (1 - 1e-5) / 4 for i in range(5)] + [0.0]
    for now, later in itertools.pairwise(times):
        noise = torch.rand(6, T, 2, dtype=torch.float64, generator=generator)
        p = subs()(torch.tensor(states))[0].double().exp()
        for i, state in enumerate(states):
            for j in range(T):
                if state[j] == MASK and float(noise[i, j, 1]) < 1 - later / now:
                    state[j] = int((p[i, j].cumsum(0) / p[i, j].sum() <= noise[i, j, 0]).sum())
    found = draw(None, 3, 2, 4)
    assert found.ids.tolist() == states
    assert len(set(map(tuple, states))) > 3


@pytest.mark.parametrize("kind", d5p4.QUALITIES)
def test_the_quality_asked_for_is_that_of_the_pool(kind):
    watched = Watched(subs())
    samples = draw(d5p4.Select(quality=kind), denoiser=watched)
    state, log = watched.states[3], samples.log[3]
    raw = d5p4.quality(subs()(state)[0], kind, state == MASK)
    assert log.quality == pytest.approx(float(raw[list(log.chosen)].mean()))
    assert log.quality != pytest.approx(float(raw.mean()))


@pytest.mark.parametrize("style", [d5p4.Subs, d5p4.Bidirectional])
@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_decided_tokens_stay_no_mask_is_left_and_lineages_live(selector, process, style):
    watched = Watched(style(network(), MASK))
    start = torch.full((T,), MASK)
    start[0], start[1] = 3, 7
    samples = draw(selector, denoiser=watched, process=process, start=start)
    before = watched.states
    after = [*before[1:], samples.ids]
    for x, y, log in zip(before, after, samples.log, strict=True):
        parents = torch.tensor(log.chosen).repeat_interleave(3)
        decided = x[parents] != MASK
        assert torch.equal(y[decided], x[parents][decided])
        assert log.masks == int((y == MASK).sum())
        assert sorted(i // 3 for i in log.chosen) == [0, 1, 2, 3]
        assert log.lineages == (0, 1, 2, 3)
    assert samples.log[-1].masks == 0
    assert not bool((samples.ids == MASK).any())
    assert bool((samples.ids[:, :2] == torch.tensor([3, 7])).all())
    assert samples.lineages == (0, 1, 2, 3)
    assert samples.representatives.shape == (4, T)
    assert samples.groups.shape == (4, 3, T)


def test_without_a_partition_lineages_may_merge_and_the_log_says_where_each_comes_from():
    merged = 0
    for seed in range(10):
        watched = Watched(subs())
        samples = draw(d5p4.Select("greedy_beam", partition=False), denoiser=watched, seed=seed)
        known = (0, 1, 2, 3)
        for log in samples.log:
            known = tuple(known[c // 3] for c in log.chosen)
            assert log.lineages == known
        merged += len(set(samples.lineages)) < 4
    assert merged


def test_a_k_dpp_on_a_pool_of_equal_candidates_falls_back_and_says_so():
    samples = draw(d5p4.Select("k_dpp"))
    assert samples.log[0].flagged
    assert not samples.log[2].flagged
    assert samples.log[-1].masks == 0


@pytest.mark.parametrize("form", d5p4.FORMS)
def test_in_the_first_step_all_are_equal_and_one_of_each_group_is_chosen(form):
    first = draw(d5p4.Select(form=form)).log[0]
    assert sorted(i // 3 for i in first.chosen) == [0, 1, 2, 3]
    assert first.similarity == pytest.approx(1.0)
    assert first.quality == first.quality
    assert first.value < 0


def test_the_budget_is_what_the_network_saw():
    rows = []

    def counted(ids):
        rows.append(len(ids))
        return network()(ids)

    prompt = torch.tensor([1, 2, *[MASK] * 6])
    for guidance, guided, each in ((None, (0, None), 1), (1.0, (0, None), 1), (2.0, (0, None), 2), (0.0, (0, None), 1)):
        rows.clear()
        samples = draw(d5p4.Select(), denoiser=d5p4.Subs(counted, MASK, guidance), start=prompt, guided=guided)
        assert samples.passes == sum(rows) == each * 12 * 7 == samples.log[-1].passes
    rows.clear()
    samples = draw(d5p4.Select(), denoiser=d5p4.Subs(counted, MASK, 2.0, batch=5), start=prompt, guided=(1, 4))
    assert samples.passes == sum(rows) == 12 * (7 + 3)
    assert max(rows) == 5
    assert draw(None, denoiser=subs(), process=d5p4.Blocks(block=4)).passes == 12 * 6


def test_guidance_has_one_convention():
    ids = torch.tensor([[1, 2, MASK, MASK, 4]])
    given = torch.tensor([True, True, False, False, False])
    conditional, hidden = network()(ids)
    unconditional, _ = network()(torch.tensor([[MASK, MASK, MASK, MASK, 4]]))
    for scale in (0.0, 0.5, 1.0, 3.0):
        mixed = unconditional + scale * (conditional - unconditional)
        mixed[..., MASK] = -1e6
        log_p, _ = d5p4.Bidirectional(network(), MASK, scale)(ids, given)
        torch.testing.assert_close(log_p, torch.log_softmax(mixed, -1), rtol=1e-4, atol=1e-4)
    plain, _ = d5p4.Bidirectional(network(), MASK)(ids, given)
    one, own = d5p4.Bidirectional(network(), MASK, 1.0)(ids, given)
    off, _ = d5p4.Bidirectional(network(), MASK, 3.0)(ids, given, guided=False)
    assert torch.equal(plain, one)
    assert torch.equal(plain, off)
    assert torch.equal(own, hidden)
    with pytest.raises(KnobError, match="needs a prompt"):
        draw(d5p4.Select(), denoiser=subs(guidance=2.0))


def test_the_reverse_step_has_the_probabilities_of_mdlm():
    """A masked position stays so with s / t, else it is drawn from p; counted over 40,000 draws, 3 sigma."""
    p = torch.tensor([0.5, 0.3, 0.2, 0.0])
    stage = d5p4.Mdlm().stages(torch.full((1,), 3), 3, 4)[1]
    n = 40_000
    noise = torch.rand(n, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = d5p4.Mdlm().draw(torch.full((n, 1), 3), p.log().expand(n, 1, 4), noise, stage, 3)
    stay = stage.later / stage.now
    expected = torch.cat([p[:3] * (1 - stay), torch.tensor([stay])])
    share = torch.bincount(found.flatten(), minlength=4) / n
    assert stay == pytest.approx(2 / 3, abs=1e-4)
    assert bool(((share - expected).abs() < 3 * (expected * (1 - expected) / n).sqrt()).all())


def test_temperature_0_takes_the_most_probable_token():
    state = torch.full((2, T), MASK)
    log_p, _ = subs()(state)
    noise = torch.rand(2, T, 2, dtype=torch.float64)
    last = d5p4.Mdlm(temperature=0).stages(state[0], MASK, 4)[-1]
    assert torch.equal(d5p4.Mdlm(temperature=0).draw(state, log_p, noise, last, MASK), log_p.argmax(-1))


def test_blocks_decide_the_surest_from_left_to_right():
    process = d5p4.Blocks(block=5, temperature=0)
    start = torch.full((T,), MASK)
    start[:2] = 1
    stages = process.stages(start, MASK, 6)
    assert [(s.first, s.end) for s in stages] == [(2, 7)] * 3 + [(7, 12)] * 3
    assert [s.commit for s in stages] == [2, 2, 1, 2, 2, 1]
    log_p, _ = d5p4.Bidirectional(network(), MASK)(start[None])
    found = process.draw(start[None], log_p, torch.rand(1, T, 2, dtype=torch.float64), stages[0], MASK)[0]
    best = log_p[0, 2:7].max(-1).values.topk(2).indices + 2
    assert set((found != start).nonzero().flatten().tolist()) == set(best.tolist())
    token = int(log_p[0, best[0]].argmax())
    late = d5p4.Blocks(block=5, temperature=0, last=(token,))
    found = late.draw(start[None], log_p, torch.rand(1, T, 2, dtype=torch.float64), stages[0], MASK)[0]
    others = log_p[0, 2:7].argmax(-1) != token
    assert int(others.sum()) < 2 or token not in found[2:7].tolist()
    with pytest.raises(KnobError, match="multiple of 2"):
        process.stages(start, MASK, 5)


def test_selection_temperature_draws_c_of_the_2_c_surest():
    """The first of a draw of 1 among the 2 surest has the softmax of their probabilities; 20,000 draws, 3 sigma."""
    n, temperature = 20_000, 0.2
    process = d5p4.Blocks(block=4, temperature=0, remasking="selection_temperature", selection_temperature=temperature)
    p = torch.tensor([0.5, 0.9, 0.6, 0.7])
    log_p = torch.stack([p, 1 - p, torch.zeros(4)], -1).log().expand(n, -1, -1)
    start = torch.full((n, 4), 2)
    noise = torch.rand(n, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stage = process.stages(start[0], 2, 4)[0]
    decided = process.draw(start, log_p, noise, stage, 2) != 2
    assert bool((decided.sum(1) == 1).all())
    expected = float(torch.softmax(torch.tensor([0.9, 0.7]) / temperature, 0)[0])
    share = decided.double().mean(0)
    assert float(share[0]) == float(share[2]) == 0.0
    assert float(share[1]) == pytest.approx(expected, abs=3 * (expected * (1 - expected) / n) ** 0.5)
    sure = d5p4.Blocks(block=4, temperature=0, remasking="selection_temperature", selection_temperature=0.0)
    plain = d5p4.Blocks(block=4, temperature=0)
    stage = plain.stages(start[0], 2, 2)[0]
    assert torch.equal(sure.draw(start, log_p, noise, stage, 2), plain.draw(start, log_p, noise, stage, 2))
    four = process.draw(start, log_p, noise, plain.stages(start[0], 2, 1)[0], 2)
    assert not bool((four == 2).any())
    late = d5p4.Blocks(block=4, temperature=0, remasking="selection_temperature", last=(0,))
    mixed = torch.stack([p, 1 - p, torch.zeros(4)], -1)
    mixed[:2] = torch.tensor([0.2, 0.8, 0.0])
    found = late.draw(start, mixed.log().expand(n, -1, -1), noise, stage, 2)
    assert bool((found[:, :2] == 1).all())  # the end of text waits although it is as sure
    assert bool((found[:, 2:] == 2).all())
    with pytest.raises(KnobError, match="selection_temperature is -1"):
        d5p4.Blocks(selection_temperature=-1.0)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_scores_are_the_mean_log_probability_of_the_tokens_when_they_were_decided(process):
    watched = Watched(subs())
    start = torch.full((T,), MASK)
    start[:3] = 5
    samples = draw(d5p4.Select(), denoiser=watched, process=process, start=start)
    states = [*watched.states, samples.ids]
    expected = torch.zeros(12, dtype=torch.float64)
    for x, y, log in zip(states, states[1:], samples.log, strict=False):
        parents = torch.tensor(log.chosen).repeat_interleave(3)
        p = subs()(x)[0].double()[parents].gather(2, y[..., None])[..., 0]
        expected = expected[parents] + torch.where((x[parents] == MASK) & (y != MASK), p, 0.0).sum(1)
    torch.testing.assert_close(samples.scores, expected / (T - 3))


def test_best_of_n_takes_the_sequences_that_the_model_is_surest_of():
    plain = draw(None)
    best, of_all = draw(d5p4.Select("best_of")), draw(d5p4.Select("best_of", partition=False))
    for found in (best, of_all):
        assert torch.equal(found.ids, plain.ids)
        assert torch.equal(found.scores, plain.scores)
        assert found.passes == plain.passes
    assert torch.equal(best.representatives, plain.groups[torch.arange(4), plain.scores.reshape(4, 3).argmax(1)])
    assert sorted(of_all.picked) == sorted(plain.scores.topk(4).indices.tolist())
    assert of_all.scores[list(of_all.picked)].min() >= plain.scores.sort().values[-4]
    assert len({i // 3 for i in best.picked}) == 4
    with pytest.raises(KnobError, match="finished sequences"):
        d5p4.Select("best_of")(torch.zeros(4), torch.eye(4), 2)


def test_only_the_current_block_counts_for_selection_and_any_function_may_select():
    seen = []

    def spy(raw, cosines, k, step):
        seen.append((raw, cosines))
        return d5p4.Choice(tuple(range(0, len(raw), 3)), 0.0)

    watched = Watched(d5p4.Bidirectional(network(), MASK))
    samples = draw(spy, process=d5p4.Blocks(block=4), denoiser=watched)
    assert samples.log[0].chosen == (0, 3, 6, 9)
    for step, first in ((1, 0), (3, 4), (5, 8)):
        log_p, hidden = watched.inner(watched.states[step])
        inside = slice(first, first + 4)
        torch.testing.assert_close(seen[step][0], d5p4.quality(log_p[:, inside]))
        torch.testing.assert_close(seen[step][1], d5p4.gram(hidden[:, inside]))
        assert not torch.allclose(seen[step][0], d5p4.quality(log_p))
    with pytest.raises(DataError, match="4 different"):
        draw(lambda raw, cosines, k, step: d5p4.Choice((0, 0, 1, 2), 0.0))


def test_subs_is_a_point_mass_where_decided_and_never_a_mask():
    ids = torch.tensor([[1, MASK, 4, MASK]])
    log_p, hidden = subs()(ids)
    assert hidden.shape == (1, 4, 16)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(1, 4))
    assert log_p[0, 0, 1] == 0
    assert log_p[0, 2, 4] == 0
    assert bool((log_p[0, [0, 2]].exp().sum(-1) == 1).all())
    assert bool((log_p[..., MASK] < -1e5).all())
    raw, _ = d5p4.Bidirectional(network(), MASK)(ids)
    torch.testing.assert_close(raw[0, [1, 3]], log_p[0, [1, 3]])
    assert raw[0, 0, 1] < 0


def test_a_hugging_face_masked_language_model_decodes(tmp_path):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=20,
    )  # fmt: skip
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(35))]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    hf.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    hf.BertForMaskedLM(config).eval().save_pretrained(tmp_path)
    denoiser, tokenizer = d5p4.load_masked_lm(tmp_path)
    assert denoiser.longest == 18
    assert denoiser.mask_id == tokenizer.mask_token_id
    samples = draw(d5p4.Select(), 2, 2, 4, denoiser=denoiser, start=10)
    assert not set(samples.ids.flatten().tolist()) & set(tokenizer.all_special_ids)
    model = hf.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    ids = samples.ids[:1].clone()
    ids[0, 3] = denoiser.mask_id
    whole = torch.cat([torch.tensor([[tokenizer.cls_token_id]]), ids, torch.tensor([[tokenizer.sep_token_id]])], 1)
    logits = model(whole).logits[0, 4].detach()
    logits[tokenizer.all_special_ids] = -1e6
    torch.testing.assert_close(denoiser(ids)[0][0, 3], torch.log_softmax(logits, -1))
    with pytest.raises(KnobError, match="takes 18"):
        draw(d5p4.Select(), denoiser=denoiser, start=19)
    with pytest.raises(DataError, match=r"config\.json"):
        d5p4.load_masked_lm(tmp_path / "nowhere")


def test_logits_about_the_next_token_can_be_shifted():
    ids = torch.randint(V - 1, (2, 6), generator=torch.Generator().manual_seed(0))
    logits, hidden = network()(ids)
    moved, same = d5p4.shifted(network())(ids)
    assert torch.equal(moved[:, 1:], logits[:, :-1])
    assert torch.equal(moved[:, 0], logits[:, 0])
    assert torch.equal(same, hidden)


def test_the_longest_sequence_of_a_roberta_leaves_out_the_padding_rows():
    hf = pytest.importorskip("transformers")
    config = hf.RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=20, pad_token_id=1,
    )  # fmt: skip
    denoiser = d5p4.masked_lm(hf.RobertaForMaskedLM(config).eval(), 39, before=[0], after=[2])
    assert denoiser.longest == 20 - 2 - 2
    assert denoiser(torch.full((1, denoiser.longest), 5))[0].shape == (1, 16, 40)
    with pytest.raises((IndexError, RuntimeError)):
        denoiser(torch.full((1, denoiser.longest + 1), 5))
    with pytest.raises(KnobError, match="style"):
        d5p4.masked_lm(hf.RobertaForMaskedLM(config), 39, style="mdlm")


def test_bad_knobs_are_refused_together():
    with pytest.raises(KnobError) as caught:
        draw(None, 0, 0, 0, start=torch.tensor([1, 2]))
    for what in ("k is 0", "w is 0", "steps is 0", "no mask"):
        assert what in str(caught.value)
    with pytest.raises(KnobError) as caught:
        d5p4.Select("greedy", form="add", gamma=0.0)
    for what in ("method is", "form is", "gamma is 0.0"):
        assert what in str(caught.value)
    with pytest.raises(KnobError, match=r"precision is 'half'.*temperature is -1"):
        d5p4.Select(precision="half", temperature=-1.0)
    with pytest.raises(KnobError, match="temperature"):
        d5p4.Mdlm(temperature=-1.0)
    with pytest.raises(KnobError, match="remasking"):
        d5p4.Blocks(remasking="low")


def test_outputs_that_are_no_numbers_are_refused():
    def broken(ids):
        logits, hidden = network()(ids)
        return logits * torch.nan, hidden

    for selector in (None, d5p4.Select()):
        with pytest.raises(DataError, match="not finite"):
            draw(selector, denoiser=d5p4.Subs(broken, MASK))


def test_progress_may_interrupt():
    seen = []
    draw(None, progress=lambda done, all_: seen.append((done, all_)))
    assert seen == [(i, 7) for i in range(1, 8)]
