from __future__ import annotations

import pytest
import torch
from tiny_llms import FAMILIES, tiny, tokens
from torch import nn

from thrifty.errors import DataError, UnsupportedModel
from thrifty.llm import families
from thrifty.llm.families import first_tensor, parts_of, with_first


def hidden(model, ids):
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    return out.logits, out.hidden_states


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_read_as_itself(family):
    parts = parts_of(tiny(family))
    assert parts.family.name == family
    assert len(parts.blocks) == 4
    assert parts.width == 32
    assert len(parts.weights()) == 4 * (4 if family == "gpt2" else 7)
    assert all(w.dim() == 2 for w in parts.weights().values())
    named = dict(parts.model.named_parameters())
    assert all(named[name] is w for name, w in parts.weights().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_embed_and_logits_are_the_models_own(family):
    model = tiny(family)
    parts = parts_of(model)
    logits, states = hidden(model, tokens())
    with torch.no_grad():
        assert torch.equal(parts.embed(tokens()), states[0])
        assert torch.equal(parts.logits(states[-1], normed=True), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_is_what_the_parts_add_up_to(family):
    """What attention and MLP are said to add, and what their norms are said to read, rebuilds the stream."""
    model = tiny(family)
    parts = parts_of(model)
    added, read, streams = [], [], []
    for block in parts.blocks:
        for module in (parts.attention_added(block), parts.mlp_added(block)):
            module.register_forward_hook(lambda m, args, out: added.append(first_tensor(out)))
        for module in (parts.attention_norm(block), parts.mlp_norm(block)):
            module.register_forward_pre_hook(lambda m, args: read.append(args[0]))
        block.register_forward_hook(lambda m, args, out: streams.append(first_tensor(out)))
    logits, states = hidden(model, tokens())
    x = states[0]
    for i in range(4):
        torch.testing.assert_close(read[2 * i], x)
        torch.testing.assert_close(read[2 * i + 1], x + added[2 * i])
        x = x + added[2 * i] + added[2 * i + 1]
        torch.testing.assert_close(streams[i], x)
    with torch.no_grad():
        torch.testing.assert_close(parts.logits(x), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_cache_facts(family):
    model = tiny(family)
    parts = parts_of(model)
    assert [parts.attention(i).layer_idx for i in range(4)] == [0, 1, 2, 3]
    cache = model(tokens(1, 6), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 6 * parts.kv_bytes_per_token()
    assert parts.layer_types is None or len(parts.layer_types) == 4


def test_ties_and_caps():
    assert parts_of(tiny("gpt2")).tied
    assert not parts_of(tiny("qwen2")).tied
    assert parts_of(tiny("gemma2")).logit_cap == 30.0
    assert parts_of(tiny("llama")).logit_cap is None


def test_blocks_can_be_replaced():
    model = tiny("llama")
    parts = parts_of(model)
    parts.replace_blocks(nn.ModuleList(parts.blocks[:2]))
    assert len(model.model.layers) == len(parts.blocks) == 2


def test_first_tensor_of_both_forms():
    t = torch.ones(2)
    assert first_tensor(t) is first_tensor((t, None)) is t
    assert with_first((t, 3), t * 2)[1] == 3
    assert with_first(t, t * 2)[0] == 2


# refusals


def test_unknown_families_are_refused():
    import transformers as hf

    small = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1}
    granite = hf.GraniteForCausalLM(hf.GraniteConfig(**small, residual_multiplier=0.5))
    for model in (hf.GemmaForCausalLM(hf.GemmaConfig(**small)), granite):  # one scales embeddings, one the residual
        with pytest.raises(UnsupportedModel, match=r"none of the known families: llama, gemma2"):
            parts_of(model)
    with pytest.raises(UnsupportedModel, match="Linear is none"):
        parts_of(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModel, match="LlamaModel"):
        parts_of(tiny("llama").model)


def test_a_replaced_part_makes_a_family_unknown():
    model = tiny("llama")
    model.model.layers[1].mlp.down_proj = nn.Identity()
    with pytest.raises(UnsupportedModel, match="none of the known"):
        parts_of(model)


def test_hooks_maps_shared_keys_and_missing_weights_are_refused_together():
    model = tiny("llama")
    model.model.layers[1]._hf_hook = object()
    model.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model.config.num_kv_shared_layers = 2
    with torch.device("meta"):
        model.model.layers[2].mlp.up_proj = nn.Linear(32, 64, bias=False)
    with pytest.raises(UnsupportedModel) as caught:
        parts_of(model)
    text = str(caught.value)
    assert len(caught.value.refusals) == 4
    assert "accelerate has put hooks on model.layers.1" in text
    assert "hf_device_map" in text
    assert "num_kv_shared_layers" in text
    assert "model.layers.2.mlp.up_proj.weight" in text


def test_a_declared_tie_that_is_broken_is_refused():
    model = tiny("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(UnsupportedModel, match="two tensors"):
        parts_of(model)


def test_one_module_as_two_blocks_is_refused_and_shared_weights_are_not():
    model = tiny("llama")
    blocks = model.model.layers
    blocks[2].mlp.up_proj.weight = blocks[1].mlp.up_proj.weight
    assert parts_of(model).family.name == "llama"
    blocks[2] = blocks[1]
    with pytest.raises(UnsupportedModel, match="blocks 1, 2 are one module"):
        parts_of(model)
    with pytest.raises(UnsupportedModel, match="None is no torch model"):
        parts_of(None)


def test_unknown_token_ids_are_refused():
    parts = parts_of(tiny("qwen2"))
    parts.refuse_unknown(torch.tensor([[0, 96]]))
    for ids, words in ((torch.tensor([[-1]]), "from -1 to -1"), (torch.tensor([97]), r"0\.\.96"), ([1, 2], "are list")):
        with pytest.raises(DataError, match=words):
            parts.refuse_unknown(ids)


def test_table_is_complete():
    assert tuple(families.FAMILIES) == FAMILIES
