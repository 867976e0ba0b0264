"""Encoders from local Hugging Face folders: DINOv2, SAM, CLIP, MAE, plain ViT (DINO, iBOT), SegFormer, ResNet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thrifty.errors import DataError, NoMatch, close_to, need
from thrifty.fewshot.segmentation.encoder import Encoder, tokens_to_map

QKV = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "qkv")  # names in several versions of transformers
IGNORED_HEADS = ("pooler.", "mask_token", "visual_projection")  # weights that the maps do not need


class PlainViT(Encoder):
    """A vision transformer with one resolution: the last `depths` blocks, each after the final norm.

    For Dinov2Model, Dinov2WithRegistersModel, ViTModel (DINO, iBOT), ViTMAEModel and CLIPVisionModel. Position
    embeddings are interpolated (bicubic) to the grid of the input. MAE's random masking is off. That the final norm is
    applied to every depth is what DINOv2's own code does; for the others it is our choice.
    """

    def __init__(self, model: nn.Module, depths: int = 4, input_size: int | None = None) -> None:
        super().__init__()
        config: Any = model.config
        self.model = model
        self.kind = str(config.model_type)
        self.norm_name = _norm_name(model)
        self.prefix = 1 + int(getattr(config, "num_register_tokens", 0) or 0)
        self.depths = _fitting(depths, int(config.num_hidden_layers))
        self.channels = (int(config.hidden_size),) * self.depths
        self.multiple = int(config.patch_size)
        self.strides = (self.multiple,) * self.depths
        self.input_size = input_size
        self.lora_targets = ("out_proj",) if self.kind == "clip_vision_model" else QKV
        if self.kind == "vit_mae":
            config.mask_ratio = 0.0

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps (see Encoder)."""
        rows, columns = x.shape[2] // self.multiple, x.shape[3] // self.multiple
        more: dict[str, Any] = {}
        if self.kind != "dinov2":  # which always interpolates
            more["interpolate_pos_encoding"] = True
        if self.kind == "dinov2_with_registers":
            more = {}
        if self.kind == "vit_mae":  # masking keeps everything, in order
            more["noise"] = torch.arange(rows * columns, device=x.device).expand(len(x), -1)
        states = self.model(x, output_hidden_states=True, **more).hidden_states[-self.depths :]
        norm = self.model.get_submodule(self.norm_name)
        return [tokens_to_map(norm(s), rows, columns, self.prefix) for s in states]


class Sam(Encoder):
    """The vision encoder of Segment Anything: the last blocks, then the neck.

    The absolute position embedding is interpolated (bicubic) for inputs of another size; the relative ones are by
    transformers itself. Sizes such as 1024, as trained, give the grid 64x64.
    """

    def __init__(self, model: nn.Module, depths: int = 4, input_size: int | None = None) -> None:
        super().__init__()
        self.model: Any = getattr(model, "vision_encoder", model)
        config: Any = self.model.config
        self.depths = _fitting(depths - 1, int(config.num_hidden_layers))
        self.channels = (int(config.hidden_size),) * self.depths + (int(config.output_channels),)
        self.multiple = int(config.patch_size)
        self.strides = (self.multiple,) * len(self.channels)
        self.input_size = input_size
        self.lora_targets = ("qkv",)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps (see Encoder)."""
        state = self.model.patch_embed.projection(x).permute(0, 2, 3, 1)
        places = self.model.pos_embed
        if places is not None:
            if places.shape[1:3] != state.shape[1:3]:
                places = F.interpolate(
                    places.permute(0, 3, 1, 2), state.shape[1:3], mode="bicubic", align_corners=False
                ).permute(0, 2, 3, 1)
            state = state + places
        kept = []
        for block in self.model.layers:
            state = block(state)
            state = state[0] if isinstance(state, tuple) else state
            kept.append(state.permute(0, 3, 1, 2))
        return [*kept[len(kept) - self.depths :], self.model.neck(state)]


class Stages(Encoder):
    """A pyramid: SegformerModel (four stages, strides 4 to 32) or ResNetModel (four stages, joined at stride 8)."""

    def __init__(self, model: nn.Module, input_size: int | None = None) -> None:
        super().__init__()
        config: Any = model.config
        self.model = model
        self.input_size = input_size
        self.channels = tuple(int(c) for c in config.hidden_sizes)
        if config.model_type == "segformer":
            stride, strides = 1, []
            for s in config.strides:
                stride *= int(s)
                strides.append(stride)
            self.strides, self.joined, self.lora_targets = tuple(strides), 0, QKV
        else:
            first = 8 if config.downsample_in_first_stage else 4
            self.strides = tuple(first * 2**i for i in range(len(self.channels)))
            self.joined = min(1, len(self.channels) - 1)
            ends = ("layer.0.convolution", "layer.2.convolution")  # conv1 and conv3 of a bottleneck
            self.lora_targets = ends if config.layer_type == "bottleneck" else ("layer.0.convolution",)
        self.multiple = self.strides[-1]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps (see Encoder)."""
        return list(self.model(x, output_hidden_states=True).hidden_states[-len(self.channels) :])


MakeEncoder = Callable[..., Encoder]
FAMILIES: dict[str, tuple[str, MakeEncoder]] = {  # model_type of config.json -> class of transformers, encoder
    "dinov2": ("Dinov2Model", PlainViT),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", PlainViT),
    "vit": ("ViTModel", PlainViT),
    "vit_mae": ("ViTMAEModel", PlainViT),
    "clip": ("CLIPVisionModel", PlainViT),
    "clip_vision_model": ("CLIPVisionModel", PlainViT),
    "sam": ("SamModel", Sam),
    "sam_vision_model": ("SamVisionModel", Sam),
    "segformer": ("SegformerModel", Stages),
    "resnet": ("ResNetModel", Stages),
}


def from_folder(folder: str | Path, **knobs: Any) -> Encoder:
    """Return the encoder of a checkpoint in a local folder with config.json and weights; nothing is downloaded.

    knobs: of the encoder: depths=4 (how many of the last blocks "multilayer" joins; not for pyramids), input_size=None.
    iBOT and DINO checkpoints must have been converted to transformers' ViTModel. Raises DataError for a folder that is
    none or lacks weights, NoMatch for an architecture that is not in FAMILIES, MissingExtra.
    """
    path = Path(folder) / "config.json"
    try:
        kind = str(json.loads(path.read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise DataError(f"{path}: no Hugging Face checkpoint ({err!r}); give the folder of config.json") from err
    if kind not in FAMILIES:
        raise NoMatch(f"{folder} is a '{kind}'; {close_to(kind, FAMILIES)}. For another one, subclass Encoder")
    class_name, make = FAMILIES[kind]
    library: Any = need("transformers", extra="encoders")
    cls = getattr(library, class_name)
    options = {"add_pooling_layer": False} if kind == "vit" else {}
    try:
        model, info = cls.from_pretrained(str(folder), local_files_only=True, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as err:
        raise DataError(f"{folder} cannot be loaded as {class_name}: {err}") from err
    lacking = sorted(k for k in info["missing_keys"] if not any(part in k for part in IGNORED_HEADS))
    if lacking:
        raise DataError(
            f"{folder} lacks {len(lacking)} weights of {class_name}, such as {lacking[0]}; they would be random"
        )
    return make(model, **knobs).eval()


def wrap(model: nn.Module, **knobs: Any) -> Encoder:
    """Return the encoder around a transformers model that is already in memory (see from_folder)."""
    kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    if kind not in FAMILIES:
        raise NoMatch(f"the model is a '{kind}'; {close_to(kind, FAMILIES)}. For another one, subclass Encoder")
    return FAMILIES[kind][1](model, **knobs)


def _fitting(depths: int, layers: int) -> int:
    return max(1, min(depths, layers))


def _norm_name(model: nn.Module) -> str:
    """Return the path of the final norm."""
    names = {name for name, _ in model.named_modules()}
    for name in ("layernorm", "post_layernorm", "vision_model.post_layernorm", "norm"):
        if name in names:
            return name
    raise DataError(f"{type(model).__name__} has no final layer norm with a known name; subclass Encoder instead")
