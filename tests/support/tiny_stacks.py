"""Tiny randomly initialised Hugging Face models of every family that layer groups know, with a batch for each."""

from __future__ import annotations

import functools
from typing import Any

import torch

WIDTH, HEADS, INNER, LAYERS = 24, 3, 20, 3
LARGE = {"feat_extract_norm": "layer", "conv_bias": True}


def _speech(**extra: Any) -> dict[str, Any]:
    return dict(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=INNER,
        conv_dim=(8, 8, 8), conv_kernel=(10, 3, 3), conv_stride=(5, 2, 2), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, vocab_size=12, codevector_dim=16, num_codevectors_per_group=4, **extra,
    )  # fmt: skip


def _wavlm(**extra: Any) -> dict[str, Any]:
    return _speech(num_buckets=16, max_bucket_distance=32, **extra)


def _text(**extra: Any) -> dict[str, Any]:
    return dict(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=INNER, vocab_size=40,
        max_position_embeddings=40, **extra,
    )  # fmt: skip


def _llama(**extra: Any) -> dict[str, Any]:
    return _text(head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, **extra)


TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "wavlm": ("WavLMConfig", "WavLMModel", _wavlm()),
    "wavlm stable": ("WavLMConfig", "WavLMModel", _wavlm(do_stable_layer_norm=True)),
    "wavlm ctc": ("WavLMConfig", "WavLMForCTC", _wavlm()),
    "hubert": ("HubertConfig", "HubertModel", _speech()),
    "hubert large": ("HubertConfig", "HubertModel", _speech(do_stable_layer_norm=True, **LARGE)),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2Model", _speech()),
    "wav2vec2 ctc": ("Wav2Vec2Config", "Wav2Vec2ForCTC", _speech(conv_bias=True)),
    "whisper": (
        "WhisperConfig", "WhisperForConditionalGeneration",
        dict(d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=1, encoder_attention_heads=HEADS,
             decoder_attention_heads=HEADS, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER, num_mel_bins=6,
             max_source_positions=10, vocab_size=30, pad_token_id=0, bos_token_id=1, eos_token_id=2,
             decoder_start_token_id=3),
    ),
    "bert": ("BertConfig", "BertModel", _text()),
    "bert mlm": ("BertConfig", "BertForMaskedLM", _text()),
    "roberta": ("RobertaConfig", "RobertaModel", _text(pad_token_id=0)),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel", _text(pad_token_id=0)),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _llama(num_key_value_heads=3)),
    "mistral": ("MistralConfig", "MistralModel", _llama(num_key_value_heads=1)),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _llama(num_key_value_heads=3, tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", "Qwen3Model", {**_llama(num_key_value_heads=3), "num_attention_heads": 6}),
    "gemma": ("GemmaConfig", "GemmaModel", _llama(num_key_value_heads=3)),
    "gemma2": ("Gemma2Config", "Gemma2Model", _llama(num_key_value_heads=3)),
}  # fmt: skip


@functools.cache
def _built(name: str) -> Any:
    import transformers

    config, model, values = TINY[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**values)).eval()
    with torch.no_grad():
        for value in made.parameters():  # biases and norms start as zeros and ones, where a fault would hide
            if value.requires_grad:
                value.add_(torch.randn(value.shape) * 0.1)
    return made


def tiny(name: str) -> Any:
    """Return a fresh copy of a tiny model."""
    import copy

    return copy.deepcopy(_built(name))


def batch_for(name: str, size: int = 2, seed: int = 1, masked: bool = True) -> dict[str, torch.Tensor]:
    """Return keyword arguments of the trunk; the last item is padded where the family has a mask."""
    draws = torch.Generator().manual_seed(seed)
    if "whisper" in name:
        mask = torch.ones(size, 10, dtype=torch.bool)
        mask[-1, 6:] = not masked
        return {"input_features": torch.randn(size, 6, 20, generator=draws), "frame_mask": mask}
    if any(n in name for n in ("wavlm", "hubert", "wav2vec2")):
        mask = torch.ones(size, 400, dtype=torch.long)
        mask[-1, 250:] = int(not masked)
        return {"input_values": torch.randn(size, 400, generator=draws), "attention_mask": mask}
    mask = torch.ones(size, 9, dtype=torch.long)
    mask[-1, 6:] = int(not masked)
    return {"input_ids": torch.randint(3, 40, (size, 9), generator=draws), "attention_mask": mask}
