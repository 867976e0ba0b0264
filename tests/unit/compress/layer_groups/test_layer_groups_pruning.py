"""Physical pruning of every family: the same outputs, fewer parameters, still a Hugging Face model."""

import json

import pytest
import torch
from tiny_stacks import HEADS, INNER, TINY, WIDTH, batch_for, tiny

from thrifty.compress.layer_groups import (
    FAMILIES,
    hidden_states,
    load,
    mask,
    prune,
    save,
    short_whisper,
    sizes,
    stack_of,
)
from thrifty.errors import DataError, KnobError, NoMatch, NothingToDo, StoreError, UnsupportedModel

pytest.importorskip("transformers")
KINDS = ("heads", "units", "channels")
every = pytest.mark.parametrize("name", TINY)


def random_soft_masks(stack, kinds=KINDS, seed=0):
    """Different numbers in every layer, soft values between 0.2 and 1.2."""
    draws, masks = torch.Generator().manual_seed(seed), {}
    seen = dict.fromkeys(KINDS, 0)
    for unit in stack.units(kinds):
        seen[unit.kind] += 1
        keep = max(1, unit.count - 1 - seen[unit.kind] % 2)
        chosen = torch.randperm(unit.count, generator=draws)[:keep]
        masks[unit.name] = torch.zeros(unit.count)
        masks[unit.name][chosen] = torch.rand(keep, generator=draws) + 0.2
    return masks


def states(model, batch):
    with torch.no_grad():
        return hidden_states(stack_of(model), batch)


def largest_difference(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@every
def test_a_pruned_model_is_smaller_and_equals_the_masked_one(name):
    model, batch = tiny(name), batch_for(name)
    stack = stack_of(model)
    masks = random_soft_masks(stack)
    before = {n: p.clone() for n, p in model.named_parameters()}
    masked, small = mask(model, masks), prune(model, masks)
    assert type(small) is type(model)
    expected, found = states(masked, batch), states(small, batch)
    assert largest_difference(expected, found) < 1e-5
    assert largest_difference(states(model, batch)[1:], found[1:]) > 0.05  # the masks do something
    assert sum(p.numel() for p in stack_of(small).trunk.parameters()) == sizes(stack, masks, "trunk")[1]
    assert sizes(stack, masks, "trunk")[1] < sizes(stack, masks, "trunk")[0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())  # the caller's model


@every
def test_a_pruned_model_survives_saving(name, tmp_path):
    model, batch = tiny(name), batch_for(name)
    small = prune(model, random_soft_masks(stack_of(model)))
    again = load(save(small, tmp_path / "small"))
    assert type(again) is type(model)
    assert largest_difference(states(small, batch), states(again, batch)) == 0
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    with pytest.raises(RuntimeError, match="mismatch"):  # never garbage in silence
        type(model).from_pretrained(tmp_path / "small")


@every
def test_equal_widths_are_read_by_from_pretrained_itself(name, tmp_path):
    model, batch = tiny(name), batch_for(name)
    stack = stack_of(model)
    masks = {u.name: torch.ones(u.count) for u in stack.units(("units",))}
    for value in masks.values():
        value[::3] = 0
    small = prune(model, masks)
    assert small.config.thrifty_kept is None
    save(small, tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small").eval()
    assert largest_difference(states(small, batch), states(again, batch)) == 0


def test_conv_channels_are_read_by_from_pretrained_itself(tmp_path):
    model, batch = tiny("wav2vec2 ctc"), batch_for("wav2vec2 ctc")
    small = prune(model, random_soft_masks(stack_of(model), ("channels",)))
    assert small.config.conv_dim[0] < 8
    assert small.config.conv_dim[-1] == 8  # layer norm over channels reads the last ones
    again = type(model).from_pretrained(save(small, tmp_path / "small")).eval()
    assert largest_difference(states(small, batch), states(again, batch)) == 0


def test_key_heads_of_llama_are_read_by_from_pretrained_itself(tmp_path):
    model, batch = tiny("qwen3"), batch_for("qwen3")
    masks = {u.name: torch.tensor([1.0, 0, 1]) for u in stack_of(model).units(("heads",))}
    small = prune(model, masks)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads, small.config.head_dim) == (4, 2, 8)
    again = type(model).from_pretrained(save(small, tmp_path / "small")).eval()
    assert largest_difference(states(small, batch), states(again, batch)) == 0


def test_whole_models_work_after_pruning():
    """The heads on top of the trunk, the cache of a decoder, Whisper's own decoder."""
    llama = prune(tiny("llama"), random_soft_masks(stack_of(tiny("llama"))))
    tokens = batch_for("llama", masked=False)["input_ids"]
    whole = llama(input_ids=tokens).logits
    first = llama(input_ids=tokens[:, :5], use_cache=True)
    rest = llama(input_ids=tokens[:, 5:], past_key_values=first.past_key_values)
    assert torch.allclose(whole[:, 5:], rest.logits, atol=1e-5)
    whisper = tiny("whisper")
    masks = random_soft_masks(stack_of(whisper))
    given = {"decoder_input_ids": torch.tensor([[3, 4], [3, 5]])}
    given["input_features"] = batch_for("whisper")["input_features"]
    assert torch.allclose(mask(whisper, masks)(**given).logits, prune(whisper, masks)(**given).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["wavlm", "hubert", "llama", "bert"])
def test_pruning_twice_equals_pruning_once(name, tmp_path):
    model, batch = tiny(name), batch_for(name)
    unit = stack_of(model).units(("heads",))[1]
    once = prune(model, {unit.name: torch.tensor([0.0, 0, 1])})
    twice = prune(prune(model, {unit.name: torch.tensor([0.0, 1, 1])}), {unit.name: torch.tensor([0.0, 1])})
    assert largest_difference(states(once, batch), states(twice, batch)) < 1e-6
    assert once.config.thrifty_kept == twice.config.thrifty_kept == {unit.name: [2]}
    assert largest_difference(states(load(save(twice, tmp_path / "m")), batch), states(once, batch)) < 1e-6


def test_gradients_reach_a_pruned_wavlm():
    small = prune(tiny("wavlm"), random_soft_masks(stack_of(tiny("wavlm"))))
    hidden_states(stack_of(small), batch_for("wavlm"))[-1].square().mean().backward()
    missing = [n for n, p in small.named_parameters() if p.grad is None]
    assert missing == ["masked_spec_embed"]


def test_all_types_of_the_table_are_tried():
    import transformers

    tried = {getattr(transformers, config).model_type for config, _, _ in TINY.values()}
    assert tried == {t for f in FAMILIES for t in f.model_types}


def test_units_have_the_numbers_of_the_config():
    units = stack_of(tiny("wavlm")).units(KINDS)
    assert [u.count for u in units if u.kind == "heads"] == [HEADS] * 3
    assert [u.count for u in units if u.kind == "units"] == [INNER] * 3
    assert [u.count for u in units if u.kind == "channels"] == [8, 8]
    assert not stack_of(tiny("hubert large")).units(("channels",))  # layer norm over channels in every block
    (first,) = stack_of(tiny("whisper")).units(("channels",))
    assert first.count == WIDTH
    grouped = stack_of(tiny("mistral")).units(("heads",))[0]  # one key head for three queries
    assert grouped.count == 1
    assert {s.block for s in grouped.cut} == {8, 24}


# ---- refusals


def test_other_models_are_refused_with_all_reasons():
    import transformers

    gpt2 = transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10))
    with pytest.raises(UnsupportedModel) as refusal:
        stack_of(gpt2)
    assert len(refusal.value.refusals) == 2
    assert "gpt2" in refusal.value.refusals[0]
    assert "Conv1D" in refusal.value.refusals[1]
    with pytest.raises(UnsupportedModel, match="no Hugging Face model"):
        stack_of(torch.nn.Linear(2, 2))


def test_all_faults_of_the_layers_are_listed():
    model = tiny("bert")
    layers = model.encoder.layer
    layers[0].intermediate.dense = torch.nn.Identity()
    del layers[1].attention.self.query
    torch.nn.utils.parametrizations.weight_norm(layers[2].output.dense)
    with pytest.raises(UnsupportedModel) as refusal:
        stack_of(model)
    text = "\n".join(refusal.value.refusals)
    assert len(refusal.value.refusals) == 3
    assert "{0}: intermediate.dense is a Identity" in text
    assert "{1}: attention.self.query is absent" in text
    assert "{2}: output.dense has a parametrised weight" in text


def test_layers_that_share_weights_are_refused():
    model = tiny("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(UnsupportedModel, match="shared with layer 0"):
        stack_of(model)


def test_masks_that_do_not_fit_are_refused():
    model = tiny("bert")
    heads, units = stack_of(model).units()[:2]
    with pytest.raises(NoMatch, match="close: encoder"):
        prune(model, {"encoder.layer.0:head": torch.ones(3)})
    with pytest.raises(DataError, match=r"shape \(2,\) for 3 members.*leaves nothing"):
        prune(model, {heads.name: torch.ones(2), units.name: torch.zeros(INNER)})
    with pytest.raises(DataError, match="below 0 or not finite"):
        prune(model, {heads.name: torch.tensor([float("nan"), 1.0, 1.0])})
    with pytest.raises(NothingToDo):
        prune(model, {heads.name: torch.ones(3)})


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    with pytest.raises(StoreError, match="not an empty folder"):
        save(tiny("bert"), tmp_path / "full")
    with pytest.raises(StoreError, match="names its class"):
        load(tmp_path / "full")
    with pytest.raises(StoreError, match="names its class"):
        load(tmp_path / "absent")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_a_shortened_whisper_hears_the_beginning():
    model, batch = tiny("whisper"), batch_for("whisper")
    short = short_whisper(model, 4)
    found = states(short, {"input_features": batch["input_features"][..., :8]})
    assert found[0].shape == (2, 4, WIDTH)
    # the convolutions look one frame ahead: the last position differs
    assert torch.equal(found[0][:, :3], states(model, batch)[0][:, :3])
    assert model.config.max_source_positions == 10
    with pytest.raises(KnobError, match=r"1\.\.10"):
        short_whisper(model, 11)
    with pytest.raises(UnsupportedModel, match="no Whisper"):
        short_whisper(tiny("bert"), 4)
