"""Encoder pairs: a tiny random CLIP in a folder, a learned map, stored vectors."""

import json

import numpy as np
import pytest

from thrifty.errors import DataError, StoreError
from thrifty.fewshot import one_class as oc
from thrifty.fewshot.one_class import ClipFolder, OneClass, TextMap
from thrifty.fewshot.one_class.encoders import Pixels, average_templates, prompts
from thrifty.fewshot.preprocess import InputError, OptionError, unit

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    torch = pytest.importorskip("torch")
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("clip")
    words = {w: i for i, w in enumerate(["<pad>", "<end>", "a", "photo", "of", "cat", "dog", ".", "red"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 9, "max_position_embeddings": 12, "eos_token_id": 1, "pad_token_id": 0},
        vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=8,
    )  # fmt: skip
    transformers.CLIPModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": MEAN, "image_std": STD, "do_center_crop": True})
    )
    return folder


def pictures(count=3, height=20, width=30):
    return list(np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8))


def test_a_clip_folder_gives_unit_arrays_of_one_space(clip):
    pair = ClipFolder(clip, batch=2)
    texts, images = pair.texts(["cat", "dog", "red cat"]), pair.images(pictures())
    assert texts.shape == images.shape == (3, 8)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([texts, images]), axis=1), 1)
    assert np.linalg.matrix_rank(texts) == 3
    np.testing.assert_allclose(ClipFolder(clip, batch=3).images(pictures()), images, atol=1e-6)
    assert OneClass.of(texts[0], texts[1:]).predict(images).shape == (3,)


def test_the_arrays_are_what_transformers_computes(clip):
    import torch
    import transformers

    model = transformers.CLIPModel.from_pretrained(clip).eval()
    pixels = torch.from_numpy(np.stack([Pixels.read(clip, 16).prepare(p) for p in pictures()]))
    with torch.no_grad():
        tower = model.vision_model(pixel_values=pixels)
        expected = model.visual_projection(tower.pooler_output).numpy()
    np.testing.assert_allclose(ClipFolder(clip).images(pictures()), unit(expected.astype(np.float64)), atol=1e-5)


def test_templates_are_averaged(clip):
    two = ("a photo of a {label}.", "red {label}")
    alone = [ClipFolder(clip, (t,)).texts(["cat"])[0] for t in two]
    np.testing.assert_allclose(ClipFolder(clip, two).texts(["cat"])[0], unit(alone[0] + alone[1]), atol=1e-6)
    assert prompts(["great_white_shark"]) == ["a photo of a great white shark."]
    with pytest.raises(OptionError, match="lack the place"):
        prompts(["a"], ["a photo"])
    with pytest.raises(OptionError, match="no template"):
        prompts(["a"], [])
    with pytest.raises(InputError):
        average_templates(np.ones((3, 2)), 2)


def test_pictures_are_resized_cropped_and_normalised(clip):
    how = Pixels.read(clip, 16)
    flat = np.full((40, 60, 3), 255, np.uint8)
    flat[:, :6] = 0  # beyond the crop, which takes the columns from 10 to 50, and its filter
    expected = ((1 - np.array(MEAN)) / np.array(STD))[:, None, None]
    np.testing.assert_allclose(how.prepare(flat), np.broadcast_to(expected, (3, 16, 16)), rtol=1e-5)
    squeezed = Pixels(16, 16, crop=False).prepare(flat)
    assert squeezed[0, 0, 0] < 0 < squeezed[0, 0, -1]  # the dark edge stays without crop
    assert how.prepare(pictures(1, 5, 200)[0]).shape == (3, 16, 16)
    with pytest.raises(InputError, match="uint8"):
        how.prepare(np.zeros((4, 4)))


def test_a_folder_that_is_no_clip_is_refused(clip, tmp_path):
    with pytest.raises(DataError, match=r"config\.json"):
        ClipFolder(tmp_path).texts(["a"])
    with pytest.raises(DataError, match="image_mean"):
        Pixels.read(tmp_path, 16)
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(DataError, match="transformers can load"):
        ClipFolder(tmp_path).texts(["a"])


def test_a_model_without_two_towers_is_refused(clip, tmp_path):
    import shutil

    import transformers

    shutil.copytree(clip, tmp_path / "bert")
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    transformers.BertModel(transformers.BertConfig(**small)).save_pretrained(tmp_path / "bert")
    with pytest.raises(DataError, match="no text and picture towers"):
        ClipFolder(tmp_path / "bert").texts(["a"])


# ---- the learned map


def test_the_map_is_the_closed_form_of_ridge_regression():
    rng = np.random.default_rng(0)
    t, f, rows = rng.standard_normal((6, 3)), rng.standard_normal((20, 5)), rng.integers(6, size=20)
    pair = TextMap(alpha=2.0).fit(t, f, rows)
    goal = unit(f - f.mean(axis=0))
    x = t[rows] - t[rows].mean(axis=0)
    weights = np.linalg.solve(x.T @ x + 2.0 * np.eye(3), x.T @ (goal - goal.mean(axis=0)))
    expected = (t - t[rows].mean(axis=0)) @ weights + goal.mean(axis=0)
    np.testing.assert_allclose(pair.texts(t), unit(expected), atol=1e-10)
    np.testing.assert_allclose(pair.images(f), goal, atol=1e-12)


def test_the_map_finds_classes_it_never_saw():
    rng = np.random.default_rng(1)
    t = unit(rng.standard_normal((300, 10)))
    f = 3.0 + t @ rng.standard_normal((10, 40)) + 0.3 * rng.standard_normal((300, 40))
    pair = TextMap(0.1).fit(t[:200], f[:200])
    found = (pair.images(f[200:]) @ pair.texts(t[200:]).T).argmax(axis=1)
    assert (found == np.arange(100)).mean() > 0.9


def test_what_does_not_fit_the_map_is_refused():
    for t, f, rows in ((np.ones((2, 3)), np.ones((2, 4)), [0, 2]), (np.ones(3), np.ones((3, 2)), None),
                       (np.ones((2, 3)), np.full((2, 4), np.nan), None)):  # fmt: skip
        with pytest.raises(InputError):
            TextMap().fit(t, f, rows)


# ---- stored vectors


def test_vectors_are_stored_and_read_back(tmp_path):
    texts = {"cat": [1.0, 2.0], "großer Hund": [3.0, 4.0]}
    oc.write_texts(tmp_path / "t.npz", texts)
    found = oc.read_texts(tmp_path / "t.npz")
    assert {k: v.tolist() for k, v in found.items()} == texts
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]
    np.savez(tmp_path / "bad.npz", names=np.array(["a"]), vectors=np.array([[np.nan]]))
    np.savez(tmp_path / "other.npz", x=1)
    (tmp_path / "text.npz").write_text("no")
    for name in ("bad", "other", "text", "absent"):
        with pytest.raises(StoreError):
            oc.read_texts(tmp_path / f"{name}.npz")
