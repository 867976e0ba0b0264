"""The inner loop keeps every equality of its specification, on tiny models of five families."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_llms import FAMILIES, tiny, tokens
from torch import nn

from thrifty.errors import DataError, Incompatible, KnobError, UnsupportedModel
from thrifty.llm.families import first_tensor, parts_of
from thrifty.llm.inner_loop import MODES, Plan, loop, read_plan

IDS = tokens(2, 11)



def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def looped_logits(model, plan, ids=IDS, **options):
    with loop(model, plan):
        return logits(model, ids, **options)


def near(a, b, tolerance=2e-5):
    assert torch.allclose(a, b, atol=tolerance * float(b.abs().max()), rtol=0), float((a - b).abs().max())


def cached(model, ids, cuts, **options):
    """Logits of the whole sequence, computed in chunks with the KV cache."""
    cache, parts = None, []
    with torch.no_grad():
        for part in torch.split(ids, cuts, dim=1):
            out = model(part, past_key_values=cache, use_cache=True, **options)
            cache = out.past_key_values
            parts.append(out.logits)
    return torch.cat(parts, dim=1), cache


def unrolled(family, model, order):
    """A model whose blocks are copies in this order: what a looped model must equal."""
    config = {"layer_types": [model.config.layer_types[i] for i in order]} if family == "gemma2" else {}
    made = tiny(family, blocks=len(order), **config)
    made.load_state_dict(
        {k: v for k, v in model.state_dict().items() if ".layers." not in k and ".h." not in k}, strict=False
    )
    old, new = parts_of(model), parts_of(made)
    for place, i in enumerate(order):
        new.blocks[place].load_state_dict(old.blocks[i].state_dict())
    return made.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_naive_twice_is_the_unrolled_model_bit_for_bit(family):
    model = tiny(family, blocks=5)
    plan = Plan(1, 4, 2, "naive")
    expected = logits(unrolled(family, model, plan.order(5)))
    assert torch.equal(looped_logits(model, plan), expected)
    assert not torch.allclose(expected, logits(model), atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_one_pass_is_the_model_and_unloop_restores_it(family, mode):
    model = tiny(family)
    base, names, settings = logits(model), list(model.state_dict()), copy.deepcopy(model.config.to_dict())
    blocks = list(parts_of(model).blocks)
    for granularity in ("block", "boundary"):
        assert torch.equal(looped_logits(model, Plan(1, 3, 1, mode, granularity)), base)
    handle = loop(model, Plan(0, 3, 3, mode))
    assert model.num_parameters() == tiny(family).num_parameters()
    assert not torch.equal(logits(model), base)
    assert handle.unloop() is model
    handle.unloop()  # a second time does nothing
    assert torch.equal(logits(model), base)
    assert list(model.state_dict()) == names
    assert model.config.to_dict() == settings
    assert all(a is b for a, b in zip(parts_of(model).blocks, blocks, strict=True))
    assert all(not b._forward_hooks for b in blocks)


def reference_loop(model, plan):
    """Logits of a loop written out plainly: every output of every pass kept, weights as the specification has them."""
    parts = parts_of(model)
    x = parts.embed(IDS)
    kwargs = {}
    seen = {}

    def see(place):
        def hook(_m, args, named):
            seen[place] = {k: v for k, v in named.items() if k not in ("past_key_values", "use_cache")}
        return hook

    handles = [b.register_forward_pre_hook(see(i), with_kwargs=True) for i, b in enumerate(parts.blocks)]
    logits(model, use_cache=False)
    for handle in handles:
        handle.remove()

    def block(i, state):
        with torch.no_grad():
            return first_tensor(parts.blocks[i](state, **seen[i], **kwargs))

    def mixed(ys):
        r = len(ys) - 1
        if plan.mode == "uniform":
            return sum(ys) / (r + 1)
        if plan.mode == "reference":
            return ys[0] if r == 0 else (1 - plan.coefficient) * ys[0] + plan.coefficient * ys[r]
        cosine = torch.stack([torch.cosine_similarity(ys[0], y, dim=-1) for y in ys])
        if plan.scope == "last":
            cosine = cosine[:, :, -1:]
        weights = torch.softmax(cosine / plan.temperature, dim=0)[..., None]
        return (weights * torch.stack(ys)).sum(dim=0)

    for i in range(plan.start):
        x = block(i, x)
    inner = list(range(plan.start, plan.end))
    if plan.mode == "damped":
        for _ in range(plan.passes):
            out = x
            for i in inner:
                out = block(i, out)
            x = x + (out - x) / plan.passes
    elif plan.granularity == "boundary":
        ends, z = [], x
        for _ in range(plan.passes):
            for i in inner:
                z = block(i, z)
            ends.append(z)
            z = mixed(ends)
        x = z
    else:
        kept = {i: [] for i in inner}
        for _ in range(plan.passes):
            for i in inner:
                kept[i].append(block(i, x))
                x = mixed(kept[i])
    for i in range(plan.end, len(parts.blocks)):
        x = block(i, x)
    with torch.no_grad():
        return parts.logits(x)


PLANS = [
    Plan(1, 3, 3, "uniform"), Plan(1, 3, 4, "uniform", "boundary"), Plan(0, 2, 3, "reference", coefficient=0.3),
    Plan(1, 3, 3, "reference", "boundary"), Plan(1, 4, 3, "alignment", temperature=0.2),
    Plan(1, 3, 3, "alignment", "boundary", scope="last"), Plan(0, 3, 4, "damped"),
]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.mode}-{p.granularity}-{p.passes}")
def test_modes_are_what_the_equations_say(family, plan):
    model = tiny(family)
    expected = reference_loop(model, plan)
    near(looped_logits(model, plan, use_cache=False), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_chunks_and_padding_change_nothing(family):
    model = tiny(family)
    modes = ("uniform", "alignment") if family != "llama" else ("naive", "uniform", "reference", "alignment", "damped")
    for mode in modes:
        for kv in ("own", "first_pass"):
            plan = Plan(1, 3, 3, mode, kv_mode=kv)
            with loop(model, plan):
                whole = logits(model, use_cache=False)
                near(cached(model, IDS, [6, 1, 1, 3])[0], whole)
                padded = torch.cat([torch.full((2, 3), 2), IDS], dim=1)
                mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(IDS)], dim=1)
                places = (mask.cumsum(1) - 1).clamp(min=0)
                near(logits(model, padded, attention_mask=mask, position_ids=places)[:, 3:], whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_the_same_with_and_without_cache(family):
    model = tiny(family, scale=2.0)
    with loop(model, Plan(1, 3, 2, "uniform")):
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
        assert torch.equal(
            model.generate(IDS, use_cache=True, **options), model.generate(IDS, use_cache=False, **options)
        )
        beams = model.generate(IDS, use_cache=True, num_beams=3, **options)
        assert torch.equal(beams, model.generate(IDS, use_cache=False, num_beams=3, **options))


def test_cache_has_one_entry_per_occurrence_or_one_per_block():
    model = tiny("llama")
    for kv, filled in (("own", 4 + 2 * 2), ("first_pass", 4)):
        with loop(model, Plan(1, 3, 3, "uniform", kv_mode=kv)) as handle:
            _, cache = cached(model, IDS, [11])
            stored = [layer for layer in cache.layers if layer.get_seq_length() > 0]
            assert len(stored) == filled
            assert handle.kv_bytes_per_token() == sum(x.keys[0, :, 0].numel() * 8 for x in stored)


def test_first_pass_keys_differ_from_own_ones_and_not_at_one_pass():
    model = tiny("llama")
    own, first = (looped_logits(model, Plan(1, 3, 2, "naive", kv_mode=k)) for k in ("own", "first_pass"))
    assert (own - first).abs().max() > 1e-3
    assert torch.equal(looped_logits(model, Plan(1, 3, 1, kv_mode="first_pass")), logits(model))


def test_uniform_and_reference_agree_at_two_passes_and_alignment_has_its_limits():
    model = tiny("qwen3")
    uniform = looped_logits(model, Plan(1, 3, 2, "uniform"))
    near(looped_logits(model, Plan(1, 3, 2, "reference")), uniform)
    for passes in (2, 4):
        uniform = looped_logits(model, Plan(1, 3, passes, "uniform"))
        near(looped_logits(model, Plan(1, 3, passes, "alignment", temperature=1e7)), uniform)
        cold = looped_logits(model, Plan(1, 3, passes, "alignment", temperature=1e-7))
        near(cold, looped_logits(model, Plan(1, 3, passes, "reference", coefficient=0.0)))


def test_one_block_has_no_boundary():
    model = tiny("qwen2")
    for mode in ("uniform", "reference", "alignment"):
        block, boundary = (looped_logits(model, Plan(2, 3, 3, mode, g)) for g in ("block", "boundary"))
        assert torch.equal(block, boundary)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_do_nothing_may_be_looped(family):
    model = tiny(family)
    parts = parts_of(model)
    with torch.no_grad():
        for block in list(parts.blocks)[1:3]:
            for module in (parts.attention_added(block), parts.mlp_added(block)):
                held = [m for m in module.modules() if getattr(m, "weight", None) is not None]
                last = [m for m in held if m.weight.dim() == (1 if family == "gemma2" else 2)][-1]
                last.weight.fill_(-1.0 if family == "gemma2" else 0.0)
                if getattr(last, "bias", None) is not None:
                    last.bias.zero_()
    base = logits(model)
    for mode in ("uniform", "naive", "noise", "damped"):
        near(looped_logits(model, Plan(1, 3, 3, mode)), base)


def test_noise_is_as_long_as_the_step_and_follows_the_seed():
    model = tiny("llama")
    states = {}
    for mode in ("uniform", "noise"):
        with loop(model, Plan(2, 3, 2, mode)), torch.no_grad():
            states[mode] = model(IDS, output_hidden_states=True).hidden_states
    with torch.no_grad():
        start = model(IDS, output_hidden_states=True).hidden_states[3]
    # hidden state 4 is what the second pass of block 2 passes on
    steps = {mode: (found[4] - start).norm(dim=-1) for mode, found in states.items()}
    near(steps["noise"], steps["uniform"], 1e-4)
    assert (states["noise"][4] - states["uniform"][4]).abs().max() > 1e-3
    again = [looped_logits(model, Plan(2, 3, 2, "noise", seed=s)) for s in (0, 0, 1)]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], again[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_the_loop_and_of_the_model_again(family):
    def states(model):
        with torch.no_grad():
            return model(IDS, output_hidden_states=True).hidden_states

    for first in (True, False):  # whether hidden states were asked for before looping
        model = tiny(family)
        base = states(tiny(family))
        if first:
            assert len(states(model)) == 5
        with loop(model, Plan(1, 3, 3)):
            for _ in range(2):
                found = states(model)
                assert len(found) == 4 + 2 * 2 + 1
                assert all(torch.equal(a, b) for a, b in zip(found[:4], base[:4], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(states(model), base, strict=True))


def test_states_are_not_kept_between_calls():
    model = tiny("llama")
    for plan in (Plan(1, 3, 3, "alignment"), Plan(1, 3, 2, "damped")):
        with loop(model, plan):
            first = logits(model)
            logits(model, tokens(5, 7, seed=3))  # another batch size
            assert torch.equal(logits(model), first)


def test_save_and_read(tmp_path):
    model = tiny("qwen2")
    base = logits(model)
    handle = loop(model, Plan(1, 3, 3, "reference", coefficient=0.25))
    expected = logits(model)
    handle.save(tmp_path / "m")
    assert torch.equal(logits(model), expected)  # still looped
    plan = read_plan(tmp_path / "m")
    assert plan == handle.plan
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    near(logits(again), base, 1e-6)
    near(looped_logits(again, plan), expected, 1e-6)
    (tmp_path / "m" / "inner_loop.json").write_text('{"schema": 2}')
    with pytest.raises(DataError, match="schema 2"):
        read_plan(tmp_path / "m")
    with pytest.raises(DataError, match=r"no inner_loop\.json"):
        read_plan(tmp_path)


def test_bad_plans_and_models_are_refused_with_all_reasons():
    with pytest.raises(KnobError, match=r"no range.*passes is 0.*mode is 'unifrom'.*coefficient is 2"):
        Plan(3, 3, 0, "unifrom", coefficient=2.0)
    with pytest.raises(KnobError, match="whole number"):
        Plan(0, 1, 2.0)
    with pytest.raises(KnobError, match=r"coefficient is 'x'.*temperature is None"):
        Plan(0, 1, 2, coefficient="x", temperature=None)
    with pytest.raises(KnobError, match=r"must be a thrifty\.llm\.inner_loop\.Plan"):
        loop(tiny("llama"), (0, 1, 2))
    model = tiny("llama")
    with pytest.raises(KnobError, match=r"blocks 2\.\.5; the model has blocks 0\.\.3"):
        loop(model, Plan(2, 6, 2))
    with loop(model, Plan(1, 2, 2)), pytest.raises(Incompatible, match="looped already"):
        loop(model, Plan(1, 2, 2))
    hook = parts_of(model).blocks[1].register_forward_hook(lambda m, a, o: o)
    with pytest.raises(Incompatible, match=r"blocks \[1\] have forward hooks"):
        loop(model, Plan(1, 2, 2))
    hook.remove()
    hook = model.model.layers[2].self_attn.register_forward_hook(lambda m, a, o: o)
    with pytest.raises(Incompatible, match=r"blocks \[2\] have forward hooks, or their attention has"):
        loop(model, Plan(1, 2, 2))
    hook.remove()
    parts_of(model).blocks[0]._hf_hook = object()
    with pytest.raises(UnsupportedModel, match="accelerate"):
        loop(model, Plan(1, 2, 2))
    with pytest.raises(UnsupportedModel, match="known families"):
        loop(nn.Linear(2, 2), Plan(0, 1, 2))
    with pytest.raises(Incompatible, match="scale_attn"):
        loop(tiny("gpt2", scale_attn_by_inverse_layer_idx=True), Plan(0, 1, 2))


def test_a_plan_survives_json():
    plan = Plan(1, 4, 3, "alignment", "boundary", "first_pass", temperature=0.5, scope="last", seed=7)
    assert Plan.from_json(plan.to_json()) == plan
    for text in ("[]", "{}", '{"schema": 1, "start": 0}', "x"):
        with pytest.raises(DataError):
            Plan.from_json(text)


