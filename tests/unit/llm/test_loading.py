from __future__ import annotations

import json

import pytest
import torch
from tiny_llms import tiny, tokens

from thrifty.errors import DataError, KnobError, UnsupportedModel
from thrifty.llm.loading import (
    Encoded,
    Example,
    batches,
    collate,
    completion_losses,
    encode,
    load_model,
    load_tokenizer,
    read_jsonl,
)

WORDS = ["<s>", "</s>", "<pad>", "the", "cat", "sat", "on", "a", "mat", "dog", "ran"]


@pytest.fixture(scope="module")
def tokenizer():
    import tokenizers
    import transformers as hf

    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>")
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def lines(path, *content):
    path.write_text("\n".join(c if isinstance(c, str) else json.dumps(c) for c in content) + "\n")
    return path


# data


def test_jsonl_of_both_kinds(tmp_path):
    file = lines(tmp_path / "d.jsonl", {"prompt": "the cat", "completion": "sat"}, "", {"text": "a mat", "id": 3})
    assert read_jsonl(file) == [Example("sat", "the cat"), Example("a mat")]


def test_jsonl_refuses_all_bad_lines_at_once(tmp_path):
    file = lines(tmp_path / "d.jsonl", {"text": "x"}, "{", {"prompt": "a"}, [1], {"prompt": "a", "completion": " "})
    with pytest.raises(DataError) as caught:
        read_jsonl(file)
    for what in ("line 2", "line 3: completion must be text", "line 4: no JSON object", "line 5: completion is empty"):
        assert what in str(caught.value)
    with pytest.raises(DataError, match="no examples"):
        read_jsonl(lines(tmp_path / "e.jsonl", ""))
    with pytest.raises(DataError, match="no file"):
        read_jsonl(tmp_path / "missing.jsonl")


def test_encode_marks_the_completion(tokenizer):
    first, second = encode([Example("sat on", "the cat"), Example("a dog ran")], tokenizer, max_tokens=8)
    assert first == Encoded((3, 4, 5, 6, 1), start=2)
    assert first.learned == 3
    assert second == Encoded((7, 9, 10, 1), start=0)
    assert second.learned == 3


def test_encode_cuts_prompts_from_the_left_and_refuses_long_completions(tokenizer):
    assert encode([Example("sat", "the cat the dog")], tokenizer, 4)[0] == Encoded((3, 9, 5, 1), start=2)
    with pytest.raises(DataError, match="example 0: the completion has 4 tokens"):
        encode([Example("sat on a", "the cat")], tokenizer, 3)
    assert encode([Example("sat on a mat")], tokenizer, 3)[0].ids == (5, 6, 7)  # plain text is cut at its end
    with pytest.raises(DataError, match="nothing to predict"):
        encode([Example("sat")], tokenizer, 3, end=False)


def test_chat_needs_a_template(tokenizer):
    with pytest.raises(KnobError, match="no chat template"):
        encode([Example("sat", "the cat")], tokenizer, 8, chat=True)


def test_batches_pad_and_shuffle():
    data = [Encoded(tuple(range(3, 3 + n)), 1) for n in (2, 5, 3)]
    [one, two] = batches(data, 2, pad=9)
    assert one.ids.tolist() == [[3, 4, 9, 9, 9], [3, 4, 5, 6, 7]]
    assert one.attention.sum().item() == 7
    assert one.labels.tolist()[0] == [-100, 4, -100, -100, -100]
    assert len(two) == 1
    order = [len(b.ids[0]) for b in batches(data, 1, generator=torch.Generator().manual_seed(1))]
    assert sorted(order) == [2, 3, 5]
    with pytest.raises(DataError, match="no examples"):
        list(batches([], 2))
    with pytest.raises(KnobError, match="batch size is 0"):
        list(batches(data, 0))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_losses_are_the_models_own_and_blind_to_padding(family):
    model = tiny(family)
    rows = [Encoded(tuple(r), 3) for r in tokens(3, 9).tolist()]
    batch = collate(rows)
    with torch.no_grad():
        ours = completion_losses(model, batch)
        theirs = model(**batch.inputs(), labels=batch.labels).loss
        padded = completion_losses(model, collate(rows, pad=2, length=14))
    torch.testing.assert_close(ours.mean(), theirs)
    torch.testing.assert_close(ours, padded)


# checkpoints


def test_a_folder_comes_back_whole(tmp_path, tokenizer):
    model = tiny("llama", vocabulary=11)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, words = load_model(tmp_path)
    ids = tokens(2, 6, vocabulary=11)
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert not again.training
    assert words("the cat")["input_ids"] == load_tokenizer(tmp_path)("the cat")["input_ids"] == [3, 4]
    assert load_model(tmp_path, dtype="bfloat16")[0].dtype == torch.bfloat16


def test_what_is_no_checkpoint_is_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="does not exist"):
        load_model(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"no")
    with pytest.raises(DataError, match=r"did you mean .*m\.gguf"):
        load_model(tmp_path)
    with pytest.raises(DataError, match="cannot be loaded"):
        load_model(tmp_path / "m.gguf")
    (tmp_path / "m.txt").write_text("x")
    with pytest.raises(DataError, match=r"no \.gguf file"):
        load_model(tmp_path / "m.txt")
    with pytest.raises(KnobError, match="float32"):
        load_model(tmp_path, dtype="float23")


def test_a_checkpoint_of_an_unknown_family_is_refused(tmp_path, tokenizer):
    import transformers as hf

    shape = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.OPTConfig(vocab_size=11, word_embed_proj_dim=16, **shape)
    hf.OPTForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="'opt'"):
        load_model(tmp_path)
