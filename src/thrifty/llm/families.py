"""Where a Hugging Face decoder keeps its parts: one table for all families; every other model is refused.

Families are told apart by their modules and settings, not by class names, so that a subclass is still read and a
look-alike that computes something else is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from thrifty.errors import DataError, UnsupportedModel

__all__ = ["FAMILIES", "Family", "Parts", "family_name", "first_tensor", "parts_of", "with_first"]


@dataclass(frozen=True)
class Family:
    """Module paths of one family: `trunk` and what follows from the model, the rest from a block or the trunk."""

    name: str
    trunk: str  # module that holds the embeddings, the blocks and the final norm
    blocks: str  # in the trunk: the ModuleList of blocks
    embedding: str  # in the trunk: token embeddings
    norm: str  # in the trunk: norm between the last block and the head
    attention: str  # in a block
    mlp: str  # in a block
    attention_norm: str  # in a block: what attention reads
    mlp_norm: str  # in a block: what the MLP reads
    attention_added: str  # in a block: the module whose output (or first output) is added to the residual stream
    mlp_added: str  # in a block: likewise after the MLP
    weights: tuple[str, ...]  # in a block: the layers with a 2-D weight
    children: frozenset[str]  # names of a block's children: exactly these
    qk_norm: bool = False  # norms on queries and keys
    qkv_bias: bool = False
    transposed: bool = False  # weights are stored [in, out] (GPT-2's Conv1D), not [out, in]
    positions: str = ""  # in the trunk: learned position embeddings, added to the token embeddings; "" = rotary
    norm_offset: bool = False  # norms multiply by 1 + weight
    scaled_embedding: bool = False  # the embedding module multiplies its rows by sqrt(width)


_GATED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
_LLAMA: dict[str, Any] = {
    "trunk": "model", "blocks": "layers", "embedding": "embed_tokens", "norm": "norm",
    "attention": "self_attn", "mlp": "mlp", "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm", "attention_added": "self_attn", "mlp_added": "mlp", "weights": _GATED,
    "children": frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}),
}  # fmt: skip
_GEMMA2 = {
    **_LLAMA,
    "mlp_norm": "pre_feedforward_layernorm",
    "attention_added": "post_attention_layernorm",
    "mlp_added": "post_feedforward_layernorm",
    "children": _LLAMA["children"] | {"pre_feedforward_layernorm", "post_feedforward_layernorm"},
}
_GPT2: dict[str, Any] = {
    "trunk": "transformer", "blocks": "h", "embedding": "wte", "norm": "ln_f", "positions": "wpe",
    "attention": "attn", "mlp": "mlp", "attention_norm": "ln_1", "mlp_norm": "ln_2",
    "attention_added": "attn", "mlp_added": "mlp",
    "weights": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "children": frozenset({"ln_1", "attn", "ln_2", "mlp"}),
}  # fmt: skip

# The one table. "llama" covers what is built like it: Mistral, SmolLM2.
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", **_LLAMA),
    "gemma2": Family("gemma2", **_GEMMA2, norm_offset=True, scaled_embedding=True),
    "qwen2": Family("qwen2", **_LLAMA, qkv_bias=True),
    "qwen3": Family("qwen3", **_LLAMA, qk_norm=True),
    "gpt2": Family("gpt2", **_GPT2, qkv_bias=True, transposed=True),
}
# Settings that change the residual stream of a model with familiar modules (Granite, MiniCPM and others): refused.
_RESCALED = ("residual_multiplier", "embedding_multiplier", "logits_scaling", "scale_depth", "dim_model_base")


@dataclass(frozen=True)
class Parts:
    """A model and its parts; nothing is copied. Made by `parts_of`.

    Shapes: b sequences, t positions, d width, v vocabulary.
    """

    model: Any  # the PreTrainedModel
    family: Family
    trunk: Any = field(repr=False)
    embedding: nn.Embedding = field(repr=False)  # its output, (b, t, d), has the family's factor in it
    positions: nn.Embedding | None = field(repr=False)
    norm: nn.Module = field(repr=False)
    head: nn.Linear = field(repr=False)  # (b, t, d) -> (b, t, v), before the soft cap

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, first to last, as they are now."""
        found = getattr(self.trunk, self.family.blocks)
        assert isinstance(found, nn.ModuleList)
        return found

    def replace_blocks(self, blocks: nn.ModuleList) -> None:
        """Put other blocks into the model; its configuration stays as it is."""
        setattr(self.trunk, self.family.blocks, blocks)

    def block_path(self, index: int) -> str:
        """Return the path of a block in the model, such as "model.layers.3"."""
        return f"{self.family.trunk}.{self.family.blocks}.{index}"

    def attention(self, block: int | nn.Module) -> nn.Module:
        """Return the attention module of a block; it has the attribute `layer_idx`, its place in the KV cache."""
        return self._of(block, self.family.attention)

    def mlp(self, block: int | nn.Module) -> nn.Module:
        """Return the MLP of a block."""
        return self._of(block, self.family.mlp)

    def attention_norm(self, block: int | nn.Module) -> nn.Module:
        """Return the norm whose output attention reads; its input is the residual stream."""
        return self._of(block, self.family.attention_norm)

    def mlp_norm(self, block: int | nn.Module) -> nn.Module:
        """Return the norm whose output the MLP reads; its input is the residual stream after attention."""
        return self._of(block, self.family.mlp_norm)

    def attention_added(self, block: int | nn.Module) -> nn.Module:
        """Return the module whose first output is what attention adds to the residual stream."""
        return self._of(block, self.family.attention_added)

    def mlp_added(self, block: int | nn.Module) -> nn.Module:
        """Return the module whose output is what the MLP adds to the residual stream."""
        return self._of(block, self.family.mlp_added)

    def _of(self, block: int | nn.Module, path: str) -> nn.Module:
        return (self.blocks[block] if isinstance(block, int) else block).get_submodule(path)

    def weights(self) -> dict[str, nn.Parameter]:
        """Return the 2-D weights of all blocks by their name in the model, in order of the blocks."""
        found = {}
        for i, block in enumerate(self.blocks):
            for path in self.family.weights:
                found[f"{self.block_path(i)}.{path}.weight"] = block.get_submodule(path).weight
        return found  # type: ignore[return-value]

    @property
    def width(self) -> int:
        """Width d of the residual stream."""
        return int(self.embedding.weight.shape[1])

    @property
    def tied(self) -> bool:
        """Whether the head's weight is the embedding's."""
        return self.head.weight is self.embedding.weight

    @property
    def logit_cap(self) -> float | None:
        """Gemma 2's bound c on logits, c * tanh(z / c); None: no bound."""
        cap = getattr(self.config, "final_logit_softcapping", None)
        return None if not cap else float(cap)

    @property
    def layer_types(self) -> list[str] | None:
        """What each block attends to, one of "full_attention", "sliding_attention"; None: the family has one kind."""
        types = getattr(self.config, "layer_types", None)
        return None if types is None else list(types)

    def embed(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return what enters block 0, (b, t, d), for ids (b, t); positions (b, t): GPT-2's, default 0..t-1."""
        x: Tensor = self.embedding(ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(ids.shape[1], device=ids.device) if positions is None else positions)
        return x

    def logits(self, stream: Tensor, normed: bool = False) -> Tensor:
        """Return the logits (..., v) of a residual stream (..., d): final norm, head, soft cap.

        normed: the final norm has been applied already, as in the last entry of `hidden_states`.
        """
        out: Tensor = self.head(stream if normed else self.norm(stream))
        return out if self.logit_cap is None else self.logit_cap * torch.tanh(out / self.logit_cap)

    def refuse_unknown(self, ids: Tensor) -> None:
        """Raise DataError for token ids that are no whole numbers, or that the embeddings do not have."""
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
            raise DataError(f"token ids are {getattr(ids, 'dtype', type(ids).__name__)}; they must be an int64 tensor")
        size = len(self.embedding.weight)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise DataError(
                f"token ids go from {int(ids.min())} to {int(ids.max())}; the model has 0..{size - 1}; "
                "is it another model's tokenizer?"
            )

    def kv_bytes_per_token(self) -> int:
        """Return the bytes that one token takes in the KV cache of one sequence, over all blocks."""
        config = self.config
        heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        size = int(getattr(config, "head_dim", None) or self.width // config.num_attention_heads)
        return 2 * heads * size * self.embedding.weight.element_size() * len(self.blocks)


def first_tensor(output: Any) -> Tensor:
    """Return the residual stream, (b, t, d), from what a block or attention returned: a tensor, or a tuple's first."""
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


def with_first(output: Any, tensor: Tensor) -> Any:
    """Return the output of a block or attention with its residual stream replaced."""
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


def parts_of(model: nn.Module) -> Parts:
    """Return the parts of a Hugging Face causal language model.

    Raises UnsupportedModel that lists every reason: an unknown family, accelerate's hooks or a device map, keys and
    values shared between blocks, one module as several blocks, weights that are not loaded, a tie of head and
    embeddings that is declared but broken.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModel([f"{model!r} is no torch model; give a Hugging Face causal language model"])
    family = family_name(model)
    if family is None:
        raise UnsupportedModel([_unknown(model), *_refusals(model)])
    entry = FAMILIES[family]
    trunk = getattr(model, entry.trunk)
    parts = Parts(
        model=model,
        family=entry,
        trunk=trunk,
        embedding=getattr(trunk, entry.embedding),
        positions=getattr(trunk, entry.positions) if entry.positions else None,
        norm=getattr(trunk, entry.norm),
        head=model.lm_head,  # type: ignore[arg-type]
    )
    refusals = [*_refusals(model), *_tie_refusals(parts), *_twin_refusals(parts)]
    if refusals:
        raise UnsupportedModel(refusals)
    return parts


def family_name(model: nn.Module) -> str | None:
    """Return the family of a causal language model, a key of FAMILIES, or None."""
    matches = [name for name, family in FAMILIES.items() if _matches(model, family)]
    return matches[0] if len(matches) == 1 else None


def _matches(model: nn.Module, family: Family) -> bool:
    """Whether trunk, blocks, layers, biases and settings are exactly the family's."""
    trunk = getattr(model, family.trunk, None)
    config = getattr(model, "config", None)
    if trunk is None or config is None or not isinstance(getattr(model, "lm_head", None), nn.Linear):
        return False
    blocks = getattr(trunk, family.blocks, None)
    names = [n for n in (family.embedding, family.norm, family.positions) if n]
    if not isinstance(blocks, nn.ModuleList) or not len(blocks) or any(not hasattr(trunk, n) for n in names):
        return False
    if any(getattr(config, key, None) not in (None, 1, 1.0) for key in _RESCALED):
        return False
    if hasattr(getattr(trunk, family.embedding), "embed_scale") != family.scaled_embedding:
        return False
    return all(_block_matches(block, family) for block in blocks)


def _block_matches(block: nn.Module, family: Family) -> bool:
    if {name for name, _ in block.named_children()} != family.children:
        return False
    try:
        layers = [block.get_submodule(path) for path in family.weights]
        attention = block.get_submodule(family.attention)
    except AttributeError:
        return False
    flat = all(getattr(layer, "weight", None) is not None for layer in layers)
    biased = getattr(layers[0], "bias", None) is not None
    return flat and hasattr(attention, "q_norm") == family.qk_norm and biased == family.qkv_bias


def _unknown(model: nn.Module) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    what = f"{type(model).__name__}" + (f" (model_type '{kind}')" if kind else "")
    return (
        f"{what} is none of the known families: {', '.join(FAMILIES)}. "
        "Give a causal language model of one of them (not its base model, not a PeftModel around it)"
    )


def _refusals(model: nn.Module) -> Iterator[str]:
    """Yield what no method of this package can work with."""
    hooked = [name or "the model" for name, module in model.named_modules() if hasattr(module, "_hf_hook")]
    if hooked:
        yield f"accelerate has put hooks on {_some(hooked)}; load the model without device_map and offloading"
    device_map = getattr(model, "hf_device_map", None)
    if device_map is not None and len(set(map(str, device_map.values()))) > 1:
        yield "the model is split over devices (hf_device_map); load it on one device, without device_map"
    config = getattr(model, "config", None)
    shared = [n for n, m in model.named_modules() if getattr(m, "is_kv_shared_layer", False)]
    if shared or int(getattr(config, "num_kv_shared_layers", 0) or 0) > 0:
        yield "blocks share keys and values (num_kv_shared_layers); a block cannot be treated alone there"
    meta = [name for name, p in model.named_parameters() if p.is_meta]
    if meta:
        yield f"weights are not loaded (meta device): {_some(meta)}"


def _tie_refusals(parts: Parts) -> Iterator[str]:
    """Yield where the tie of embedding and head is not what the configuration says."""
    if bool(getattr(parts.config, "tie_word_embeddings", False)) and not parts.tied:
        yield (
            "the configuration ties lm_head to the embeddings, but they are two tensors; call model.tie_weights(), "
            "or set config.tie_word_embeddings = False"
        )


def _twin_refusals(parts: Parts) -> Iterator[str]:
    """Yield the blocks that are one module at several places: what is done at one of them would be done at all."""
    places: dict[int, list[int]] = {}
    for index, block in enumerate(parts.blocks):
        places.setdefault(id(block), []).append(index)
    twins = [indices for indices in places.values() if len(indices) > 1]
    if twins:
        yield (
            f"blocks {', '.join(map(str, twins[0]))} are one module; give each place a module of its own "
            "(it may share its weights)"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
