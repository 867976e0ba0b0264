"""Attenuation: nothing at alpha = 1, the stated equation otherwise, in both forms, for five families."""

from __future__ import annotations

import inspect

import pytest
import torch
from tiny_llms import FAMILIES, tiny, tokens
from torch import nn

from thrifty.errors import Incompatible, KnobError, UnsupportedModel
from thrifty.llm.causal_shift import BlockGate, DepthGate, TokenGate, attenuate, train
from thrifty.llm.families import first_tensor, parts_of
from thrifty.llm.inner_loop import Plan, loop

IDS = tokens(2, 9)


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def near(a, b, tolerance=2e-5):
    assert torch.allclose(a, b, atol=tolerance * float(b.abs().max()), rtol=0), float((a - b).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_alpha_one_and_the_gate_at_its_start_are_the_model(family):
    model = tiny(family)
    base = logits(model)
    for form in ("hooks", "module"):
        for placement in ("attn", "mlp", "block"):
            with attenuate(model, {0: 1.0, 2: 1.0}, placement, form):
                assert torch.equal(logits(model), base)
            with attenuate(model, "block", placement, form) as handle:
                assert handle.alphas() == [1.0] * 4
                near(logits(model), base, 1e-6)
    assert torch.equal(logits(model), base)
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in parts_of(model).blocks)


def plainly(model, alphas, placement):
    """Logits of the equations of the specification, written out."""
    parts, seen = parts_of(model), {}

    def see(i):
        def hook(module, args, kwargs):
            found = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
            seen[i] = {k: v for k, v in found.items() if k not in ("self", "hidden_states", "kwargs")}
            seen[i].update(found.get("kwargs", {}))
        return hook

    hooks = [b.register_forward_pre_hook(see(i), with_kwargs=True) for i, b in enumerate(parts.blocks)]
    logits(model, use_cache=False)
    for hook in hooks:
        hook.remove()
    x = parts.embed(IDS)
    for i, block in enumerate(parts.blocks):
        left_out = ("past_key_values", "encoder_hidden_states", "encoder_attention_mask")
        alpha, kwargs = alphas.get(i, 1.0), {k: v for k, v in seen[i].items() if k not in left_out}
        if placement == "block":
            x = first_tensor(block(x, **kwargs)) - (1 - alpha) * x
            continue
        attended = first_tensor(parts.attention(i)(hidden_states=parts.attention_norm(i)(x), **kwargs))
        if parts.family.name == "gemma2":
            attended = block.post_attention_layernorm(attended)
        h = (alpha if placement == "attn" else 1.0) * x + attended
        made = parts.mlp(i)(parts.mlp_norm(i)(h))
        if parts.family.name == "gemma2":
            made = block.post_feedforward_layernorm(made)
        x = (alpha if placement == "mlp" else 1.0) * h + made
    return parts.logits(x).detach()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", ["attn", "mlp", "block"])
def test_both_forms_are_the_equation(family, placement):
    model, alphas = tiny(family), {0: 0.0, 2: 0.5, 3: 1.3}
    expected = plainly(model, alphas, placement)
    assert (expected - logits(model)).abs().max() > 1e-2
    for form in ("hooks", "module"):
        with attenuate(model, alphas, placement, form):
            near(logits(model, use_cache=False), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["hooks", "module"])
def test_the_cache_changes_nothing(family, form):
    model = tiny(family)
    with attenuate(model, {1: 0.3, 3: 0.0}, "attn", form):
        whole, cache, parts = logits(model, use_cache=False), None, []
        with torch.no_grad():
            for part in torch.split(IDS, [5, 1, 3], dim=1):
                out = model(part, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
        near(torch.cat(parts, dim=1), whole)
        with torch.no_grad():
            assert len(model(IDS, output_hidden_states=True).hidden_states) == 5


@pytest.mark.parametrize("form", ["hooks", "module"])
@pytest.mark.parametrize("make", [DepthGate, BlockGate, lambda n: TokenGate(n, 32)])
def test_gradient_of_the_gate_is_the_finite_difference(form, make):
    model = tiny("llama").double()
    gate = make(4).double()
    with torch.no_grad():
        for p in gate.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype))
    with attenuate(model, gate, "attn", form):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        for p in gate.parameters():
            assert torch.isfinite(p.grad).all()
            flat, grad = p.data.view(-1), p.grad.view(-1)
            index = int(grad.abs().argmax())
            ends = []
            for step in (1e-2, -1e-2):  # norms compute in float32, so the step must not be small
                flat[index] += step
                ends.append(model(IDS, labels=IDS).loss.item())
                flat[index] -= step
            assert grad[index].item() == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=2e-2)


def test_alpha_zero_in_the_first_block_leaves_attention_to_itself_only():
    model = tiny("llama")
    parts = parts_of(model)
    with torch.no_grad():
        for name in ("v_proj", "o_proj"):
            getattr(parts.attention(0), name).weight.zero_()  # attention brings nothing: only the residual path is left
    other = IDS.clone()
    other[:, 0] = (other[:, 0] + 1) % 90 + 3
    with attenuate(model, {0: 0.0}):
        assert torch.equal(logits(model)[:, 0], logits(model, other)[:, 0])  # the token's own identity is gone
    assert (logits(model)[:, 0] - logits(model, other)[:, 0]).abs().max() > 1e-3


def test_gates_start_as_stated():
    depth = DepthGate(6)
    assert sum(1 - a for a in depth.alphas()) == pytest.approx(0.1, abs=1e-6)
    assert BlockGate(3).alphas() == [1.0] * 3
    assert TokenGate(2, 8).alphas() == pytest.approx([torch.sigmoid(torch.tensor(4.0)).item()] * 2)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    assert TokenGate(2, 8).alpha(1, x).shape == (2, 5, 1)


def test_training_moves_gate_and_weights_without_decay_on_the_gate():
    model = tiny("qwen2", scale=2.0)
    with attenuate(model, "block", form="module") as handle:
        groups = handle.parameter_groups(1e-3)
        assert [g["weight_decay"] for g in groups] == [0.1, 0.0, 0.0]
        assert groups[2]["lr"] == pytest.approx(1e-2)
        counted = sum(p.numel() for g in groups for p in g["params"])
        assert counted == model.num_parameters() + 4
        seen = []
        data = [tokens(8, 16, seed=0)] * 25
        log = train(handle, data, 3e-3, warm_up=3, steps=25, progress=lambda s, loss, a: seen.append(loss))
        assert len(log) == 25
        assert log[-1] != [1.0] * 4
        assert seen[-1] < seen[0] - 0.5
        assert not model.training


def test_bad_requests():
    model = tiny("llama")
    with pytest.raises(KnobError, match=r"placement is 'atn'.*form is 'hook'"):
        attenuate(model, {0: 0.5}, "atn", "hook")
    with pytest.raises(KnobError, match=r"block 4, alpha -1.* of block 1"):
        attenuate(model, {4: 0.5, 1: -1.0})
    with pytest.raises(KnobError, match="gate is 'deep'"):
        attenuate(model, "deep")
    with pytest.raises(KnobError, match="for 3 blocks"):
        attenuate(model, BlockGate(3))
    with pytest.raises(KnobError, match=r"block '1', alpha 'x' of block 2"):
        attenuate(model, {"1": 0.5, 2: "x"})
    for gate in (0.5, None):
        with pytest.raises(KnobError, match=r"give \{block: alpha\}"):
            attenuate(model, gate)
    with loop(model, Plan(1, 2, 2)), pytest.raises(Incompatible, match=r"looped.*call unloop"):
        attenuate(model, {1: 0.5})
    with attenuate(model, {0: 0.5}), pytest.raises(Incompatible, match="already"):
        attenuate(model, {0: 0.5})
    shared = tiny("llama")
    shared.model.layers[2].mlp = shared.model.layers[1].mlp
    with pytest.raises(Incompatible, match="blocks 1 and 2 share a LlamaMLP"):
        attenuate(shared, {1: 0.5}, "mlp")
    with pytest.raises(UnsupportedModel):
        attenuate(nn.Linear(2, 2), {0: 0.5})
