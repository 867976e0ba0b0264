"""The transformer families that layer groups know: where a layer keeps its heads, feed-forward units and channels.

Everything is found by module paths and weight shapes in one table, FAMILIES; nothing else in the package knows the name
of a module of Hugging Face, except wavlm.py.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from thrifty.errors import KnobError, UnsupportedModel, close_to

KINDS = ("heads", "units", "channels")
SAMPLES, TOKENS, FRAMES = "samples", "tokens", "frames"


@dataclass(frozen=True)
class Slice:
    """A dimension of a parameter that belongs to a unit: `block` consecutive entries for each of its members."""

    parameter: str  # dotted path in the trunk
    dim: int
    block: int = 1


@dataclass(frozen=True)
class Unit:
    """Members that can be removed one by one: the heads of a layer, its units, the channels of a convolution."""

    name: str  # "encoder.layers.3:heads"
    kind: str  # one of KINDS
    count: int
    scaled: tuple[Slice, ...]  # multiplied by the soft mask: the inputs of whoever reads the members
    cut: tuple[Slice, ...]  # lose the members that are removed; includes `scaled`


@dataclass(frozen=True)
class Family:
    """One row of the table: paths are relative to a layer, `layers` to the trunk, `trunks` to the model."""

    name: str
    model_types: tuple[str, ...]  # config.model_type
    trunks: tuple[str, ...]  # where the module that runs the layers may be, "" is the model itself
    layers: str
    attention: str
    queries: str
    keys: str
    values: str
    out: str
    inner: tuple[str, ...]  # linear layers whose outputs are the feed-forward units
    outer: str  # the linear layer that reads them
    heads_field: str  # of the config: how many heads were built
    width_field: str  # of the config: how many feed-forward units a layer has
    mask: str  # what attention_mask counts: SAMPLES, TOKENS, or FRAMES (there is none; give frame_mask)
    channels: Callable[[nn.Module], Iterator[Unit]] | None = None
    conv_field: str = ""  # of the config: the widths of the convolutions, where it has them
    grouped: bool = False  # queries share keys and values; a member is a key head with all its queries


def _wav2vec_channels(trunk: nn.Module) -> Iterator[Unit]:
    """Yield the channels between two convolutions with nothing in between that mixes channels.

    Layer norm over channels mixes them: its statistics change when a channel goes, so that no smaller model equals
    the masked one. The large models have it in every block, all of them have it behind the last block.
    """
    blocks = list(_at(trunk, "feature_extractor.conv_layers"))
    for i, (block, follower) in enumerate(itertools.pairwise(blocks)):
        norm = getattr(block, "layer_norm", None)
        depthwise = isinstance(norm, nn.GroupNorm) and norm.num_groups == norm.num_channels
        if norm is not None and not depthwise:
            continue
        here, there = (f"feature_extractor.conv_layers.{k}" for k in (i, i + 1))
        own = [f"{here}.conv.weight"] + ([f"{here}.conv.bias"] if block.conv.bias is not None else [])
        own += [f"{here}.layer_norm.weight", f"{here}.layer_norm.bias"] if depthwise else []
        read = Slice(f"{there}.conv.weight", 1)
        yield Unit(f"{here}:channels", "channels", follower.conv.weight.shape[1], (read,),
                   (*(Slice(name, 0) for name in own), read))  # fmt: skip


def _whisper_channels(trunk: nn.Module) -> Iterator[Unit]:
    """Yield the channels between the two convolutions in front of the layers."""
    read = Slice("conv2.weight", 1)
    cut = (Slice("conv1.weight", 0), Slice("conv1.bias", 0), read)
    yield Unit("conv1:channels", "channels", _at(trunk, "conv2").weight.shape[1], (read,), cut)


def _wav2vec(name: str) -> Family:
    return Family(
        name, (name,), ("", name), "encoder.layers", "attention",
        "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj",
        ("feed_forward.intermediate_dense",), "feed_forward.output_dense",
        "num_attention_heads", "intermediate_size", SAMPLES, _wav2vec_channels, "conv_dim",
    )  # fmt: skip


FAMILIES: tuple[Family, ...] = (
    _wav2vec("wavlm"),
    _wav2vec("hubert"),
    _wav2vec("wav2vec2"),
    Family(
        "whisper encoder", ("whisper",), ("model.encoder", "encoder", ""), "layers", "self_attn",
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
        ("fc1",), "fc2", "encoder_attention_heads", "encoder_ffn_dim", FRAMES, _whisper_channels,
    ),
    Family(
        "BERT-like", ("bert", "roberta", "xlm-roberta"), ("", "bert", "roberta"), "encoder.layer", "attention.self",
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        ("intermediate.dense",), "output.dense", "num_attention_heads", "intermediate_size", TOKENS,
    ),
    Family(
        "Llama-like", ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), ("", "model"), "layers", "self_attn",
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj",
        "num_attention_heads", "intermediate_size", TOKENS, grouped=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Stack:
    """A model whose family is known: the trunk runs the layers and is what batches are given to."""

    model: nn.Module
    trunk: nn.Module
    family: Family
    head_size: int

    @property
    def layers(self) -> list[nn.Module]:
        """The layers, in order."""
        return list(_at(self.trunk, self.family.layers))

    @property
    def config(self) -> Any:
        """The Hugging Face config, shared with the model."""
        return self.trunk.config

    def units(self, kinds: tuple[str, ...] = ("heads", "units")) -> tuple[Unit, ...]:
        """Return what can be removed, in the order of the forward pass. Families without channels give none."""
        found: list[Unit] = []
        if "channels" in kinds and self.family.channels is not None:
            found += self.family.channels(self.trunk)
        for index in range(len(self.layers)):
            found += [u for u in self._units_of(index) if u.kind in kinds]
        return tuple(found)

    def scope(self, name: str, kinds: tuple[str, ...] = ("heads", "units")) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parameters that a sparsity counts, by path in the trunk.

        name: "layers" (all of the transformer layers, and the convolutions where channels are removed), or "trunk"
        (everything that runs, embeddings included).
        """
        shapes = {n: tuple(p.shape) for n, p in self.trunk.named_parameters()}
        if name == "trunk":
            return shapes
        inside = tuple({f"{self.family.layers}.", *(s.parameter for u in self.units(kinds) for s in u.cut)})
        return {n: s for n, s in shapes.items() if n.startswith(inside)}

    def _units_of(self, index: int) -> tuple[Unit, Unit]:
        family, layer = self.family, self.layers[index]
        path = f"{family.layers}.{index}"
        count = _at(layer, family.values).weight.shape[0] // self.head_size
        parts = [family.queries, family.keys, family.values]
        cut = [
            Slice(f"{path}.{part}.{name}", 0, value.shape[0] // count)
            for part in parts
            for name, value in _at(layer, part).named_parameters()
        ]
        rows = _at(layer, family.out).weight.shape[1]
        read = Slice(f"{path}.{family.out}.weight", 1, rows // count)
        if family.name == "wavlm":
            cut.append(Slice(f"{path}.{family.attention}.gru_rel_pos_const", 1))
        heads = Unit(f"{path}:heads", "heads", count, (read,), (*cut, read))
        width = _at(layer, family.outer).weight.shape[1]
        cut = [
            Slice(f"{path}.{part}.{name}", 0)
            for part in family.inner
            for name, _ in _at(layer, part).named_parameters()
        ]
        read = Slice(f"{path}.{family.outer}.weight", 1)
        return heads, Unit(f"{path}:units", "units", width, (read,), (*cut, read))


def stack_of(model: nn.Module) -> Stack:
    """Find the family, the trunk and the layers of a Hugging Face model.

    Raises UnsupportedModel with every reason why the model cannot be used.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    known = {t: f for f in FAMILIES for t in f.model_types}
    if kind not in known:
        raise UnsupportedModel(_unknown(model, kind, tuple(known)))
    family = known[kind]
    trunk = next((t for p in family.trunks if (t := _find(model, p)) is not None and _find(t, family.layers)), None)
    if trunk is None:
        tried = ", ".join(f"{path or 'the model itself'}" for path in family.trunks)
        raise UnsupportedModel([f"{type(model).__name__} has no {family.layers} (looked in: {tried})"])
    config: Any = trunk.config
    heads = getattr(config, family.heads_field)
    size = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) or config.d_model) // heads
    stack = Stack(model, trunk, family, int(size))
    if reasons := _reasons(stack):
        raise UnsupportedModel(reasons)
    return stack


def _unknown(model: nn.Module, kind: str | None, known: tuple[str, ...]) -> list[str]:
    name = type(model).__name__
    if kind is None:
        return [f"{name} is no Hugging Face model: it has no config.model_type; known families: {', '.join(known)}"]
    reasons = [f"{name}: model type '{kind}' is not in the table of families; {close_to(kind, known)}"]
    if getattr(model.config, "is_encoder_decoder", False):
        reasons.append("it is an encoder with a decoder; of those only Whisper's encoder is known")
    if not any(isinstance(m, nn.ModuleList) for m in model.modules()):
        reasons.append("it has no list of layers")
    if not any(isinstance(m, nn.Linear) for m in model.modules()):
        reasons.append("it has no nn.Linear (GPT-2's Conv1D, quantised and fused layers are not read)")
    return reasons


def _reasons(stack: Stack) -> list[str]:
    """Return what is wrong with the layers of a known family, one sentence per fault, equal faults together."""
    faults: dict[str, list[int]] = {}
    family, owners = stack.family, {}  # type: ignore[var-annotated]
    parts = (family.queries, family.keys, family.values, family.out, *family.inner, family.outer)
    for index, layer in enumerate(stack.layers):
        for part in parts:
            for fault in _faults(layer, part, family.values, stack.head_size):
                faults.setdefault(fault, []).append(index)
        for name, value in layer.named_parameters():
            if owners.setdefault(id(value), index) != index:
                faults.setdefault(f"{name} is shared with layer {owners[id(value)]}", []).append(index)
    return [f"{family.layers}.{{{','.join(map(str, where))}}}: {fault}" for fault, where in faults.items()]


def _faults(layer: nn.Module, part: str, values: str, head_size: int) -> Iterator[str]:
    module = _find(layer, part)
    if not isinstance(module, nn.Linear):
        found = "absent" if module is None else f"a {type(module).__name__}"
        yield f"{part} is {found}, not an nn.Linear"
        return
    if hasattr(module, "parametrizations"):
        yield f"{part} has a parametrised weight; merge it first"
    if not module.weight.is_floating_point():
        yield f"{part} holds {module.weight.dtype} numbers; load the model in float32"
    if part == values and (module.weight.shape[0] % head_size or not module.weight.shape[0]):
        yield f"{part} has {module.weight.shape[0]} rows, not a multiple of the head size {head_size}"


def _find(module: nn.Module, path: str) -> nn.Module | None:
    try:
        found: nn.Module = _at(module, path)
        return found
    except AttributeError:
        return None


def _at(module: nn.Module, path: str) -> Any:
    return module.get_submodule(path) if path else module


def count_expected(shapes: Mapping[str, tuple[int, ...]], units: tuple[Unit, ...], kept: Mapping[str, Any]) -> Any:
    """Return the number of parameters when `kept[unit.name]` members of each unit are left (0-d tensors or numbers).

    Differentiable in `kept`; every dimension that a unit owns is replaced, so that a weight between two units counts
    with the product of both. Units that `kept` does not name stay whole.
    """
    sizes: dict[str, list[Any]] = {name: list(shape) for name, shape in shapes.items()}
    for unit in units:
        for place in unit.cut:
            if place.parameter in sizes and unit.name in kept:
                sizes[place.parameter][place.dim] = kept[unit.name] * place.block
    total: Any = 0
    for dims in sizes.values():
        product: Any = 1
        for size in dims:
            product = product * size
        total = total + product
    return total


def short_whisper(model: nn.Module, positions: int) -> nn.Module:
    """Return a copy of a Whisper model (or of its encoder) that hears only the first `positions` x 20 ms of a clip.

    Keeps the first rows of the position table. Whisper itself pads every clip to 30 s; so, a clip of one second costs a
    thirtieth. The model must then be given 2 x positions frames of log-mel. Raises UnsupportedModel
    when the model is no Whisper, KnobError when it has fewer positions.
    """
    result = copy.deepcopy(model)
    stack = stack_of(result)
    table = getattr(stack.trunk, "embed_positions", None)
    if not isinstance(table, nn.Embedding) or stack.family.mask != FRAMES:
        raise UnsupportedModel([f"{type(model).__name__} is no Whisper: it has no table of positions to shorten"])
    if not 1 <= positions <= table.num_embeddings:
        raise KnobError(f"positions is {positions}; it must be 1..{table.num_embeddings}")
    table.weight = nn.Parameter(table.weight.detach()[:positions].clone(), requires_grad=table.weight.requires_grad)
    table.num_embeddings = positions
    stack.config.max_source_positions = positions
    stack.trunk.max_source_positions = positions  # type: ignore[assignment]
    return result
