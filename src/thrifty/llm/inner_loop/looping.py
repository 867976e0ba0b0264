"""Looping a model in place: views of its blocks with their own place in the KV cache, and hooks that mix."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from thrifty.errors import DataError, Incompatible, KnobError, StoreError
from thrifty.llm.families import Parts, first_tensor, parts_of, with_first
from thrifty.llm.inner_loop.mixing import Damper, Mixer
from thrifty.llm.inner_loop.plan import Plan

PLAN_FILE = "inner_loop.json"
_MARK = "_thrifty_inner_loop"
_CAPTURING = "_output_capturing_hooks_installed"  # transformers: blocks have got the hooks that record hidden states


class Looped:
    """A looped model; `unloop()` restores it. Also a context manager. Made by `loop`."""

    def __init__(self, parts: Parts, plan: Plan) -> None:
        self.parts, self.plan = parts, plan
        self.order = plan.order(len(parts.blocks))
        self._blocks = parts.blocks
        config = parts.config
        self._settings = {k: getattr(config, k) for k in ("num_hidden_layers", "layer_types") if _has(config, k)}
        self._captured = [(m, vars(m).get(_CAPTURING)) for m in (parts.model, parts.trunk)]
        self._gate = _Gate()
        self._install()

    @property
    def model(self) -> Any:
        """The model: the object that was given to `loop`, with the same interface as before."""
        return self.parts.model

    def unloop(self) -> Any:
        """Give the model its own blocks and configuration back, and return it; once is enough."""
        model = self.parts.model
        if getattr(model, _MARK, None) is self:
            self.parts.replace_blocks(self._blocks)
            for key, value in self._settings.items():
                setattr(self.parts.config, key, value)
            for module, flag in self._captured:
                setattr(module, _CAPTURING, bool(flag))
            delattr(model, _MARK)
        return model

    def kv_bytes_per_token(self) -> int:
        """Return the bytes that one token takes in the KV cache of one sequence."""
        base = self.parts.kv_bytes_per_token() // len(self.parts.blocks)
        kept = len(self._blocks) if self.plan.kv_mode == "first_pass" else len(self.order)
        return base * kept

    def save(self, folder: str | Path) -> None:
        """Write the model as it was before looping (save_pretrained) and the plan beside it; it stays looped."""
        folder = Path(folder)
        self.unloop()
        try:
            self.model.save_pretrained(folder)
        except OSError as err:
            raise StoreError(f"{folder} cannot be written: {err}") from err
        finally:
            self._install()
        partial = folder / f"{PLAN_FILE}.partial"
        partial.write_text(self.plan.to_json(), encoding="utf-8")
        partial.replace(folder / PLAN_FILE)

    def __enter__(self) -> Looped:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None) -> None:
        self.unloop()

    def _install(self) -> None:
        model, config = self.parts.model, self.parts.config
        views = [_view(self.parts, block, place) for place, block in enumerate(self._blocks[i] for i in self.order)]
        self._hook(views)
        self.parts.replace_blocks(nn.ModuleList(views))
        config.num_hidden_layers = len(self.order)
        if self._settings.get("layer_types") is not None:
            config.layer_types = [self._settings["layer_types"][i] for i in self.order]
        for module, _ in self._captured:  # the views get their hooks when first asked for, behind those that mix
            setattr(module, _CAPTURING, False)
        setattr(model, _MARK, self)

    def _hook(self, views: list[nn.Module]) -> None:
        plan = self.plan
        size = plan.end - plan.start
        looped = views[plan.start : plan.start + size * plan.passes]
        if plan.passes == 1:
            return
        if plan.mode == "damped":
            damper = Damper(plan.passes)
            for r in range(plan.passes):
                looped[r * size].register_forward_pre_hook(_entering(damper), with_kwargs=True)
                looped[(r + 1) * size - 1].register_forward_hook(_changing(damper.leave))
        else:
            places = range(size) if plan.granularity == "block" else (size - 1,)
            for place in places:
                mixer = Mixer(plan, place)
                for r in range(plan.passes):
                    view = looped[r * size + place]
                    view.register_forward_hook(_changing(mixer.first if r == 0 else mixer.next))
        if plan.kv_mode == "first_pass":
            for i, view in enumerate(looped):
                take = self._gate.recorder(i % size) if i < size else self._gate.reader(i % size)
                self.parts.attention(view).register_forward_pre_hook(take, with_kwargs=True)


def loop(model: nn.Module, plan: Plan) -> Looped:
    """Loop a range of blocks of a Hugging Face causal language model, in place, without new weights.

    The model keeps its interface (logits, hidden states, generate with its cache, lm-eval's HFLM); block r of the new
    order is its own entry of the KV cache, and what a block attends to (sliding or full) follows the block. States of
    earlier passes live for one forward call. modes "noise" and "alignment" with scope "last" are for scoring: what a
    position gets depends there on how the sequence was cut into calls.

    Raises KnobError for a range that the model does not have, Incompatible when it is looped already, UnsupportedModel
    for other families, accelerate's hooks and shared keys and values. Blocks must not have hooks of their own.

    Source: Inner Loop Inference (2026).
    """
    if getattr(model, _MARK, None) is not None:
        raise Incompatible(f"the model is looped already, with {getattr(model, _MARK).plan}; call unloop() first")
    if not isinstance(plan, Plan):
        raise KnobError(f"the plan is {plan!r}; it must be a thrifty.llm.inner_loop.Plan")
    parts = parts_of(model)
    plan.refuse_beyond(len(parts.blocks))
    if getattr(parts.config, "scale_attn_by_inverse_layer_idx", False):
        raise Incompatible("scale_attn_by_inverse_layer_idx ties a block to its place; a loop would change its meaning")
    hooked = [i for i, b in enumerate(parts.blocks) if _has_hooks(b) or _has_hooks(parts.attention(b))]
    if hooked:
        raise Incompatible(
            f"blocks {hooked[:5]} have forward hooks, or their attention has, which repeated blocks do not keep; "
            "remove them"
        )
    return Looped(parts, plan)


def read_plan(folder: str | Path) -> Plan:
    """Return the plan that `Looped.save` wrote beside a checkpoint: `loop(load_model(folder)[0], read_plan(folder))`.

    Raises DataError when there is none, or it is damaged.
    """
    path = Path(folder) / PLAN_FILE
    if not path.is_file():
        raise DataError(f"{folder} has no {PLAN_FILE}; Looped.save writes it")
    return Plan.from_json(path.read_text(encoding="utf-8"))


def _has_hooks(block: nn.Module) -> bool:
    """Whether a block has forward hooks other than those with which transformers records hidden states."""
    hooks = [*block._forward_hooks.values(), *block._forward_pre_hooks.values()]
    return any("output_capturing_hook" not in getattr(hook, "__qualname__", "") for hook in hooks)


def _has(config: Any, key: str) -> bool:
    return getattr(config, key, None) is not None


def _view(parts: Parts, block: nn.Module, place: int) -> nn.Module:
    """Return a block that shares everything with `block` but its hooks and its place in the KV cache."""
    path = parts.family.attention
    view = _shallow(block)
    holder = view
    *above, last = path.split(".")
    for name in above:
        copied = _shallow(holder._modules[name])  # type: ignore[arg-type]
        holder._modules[name] = copied
        holder = copied
    attention = _shallow(holder._modules[last])  # type: ignore[arg-type]
    attention.layer_idx = place  # type: ignore[assignment]
    holder._modules[last] = attention
    if hasattr(view, "layer_idx"):
        view.layer_idx = place  # type: ignore[assignment]
    return view


def _shallow(module: nn.Module) -> nn.Module:
    copied = module.__class__.__new__(module.__class__)
    copied.__dict__ = dict(module.__dict__)
    copied.__dict__["_modules"] = dict(module._modules)
    for key, value in module.__dict__.items():
        if key.endswith("_hooks") or key.endswith(("_hooks_with_kwargs", "_hooks_always_called")):
            copied.__dict__[key] = OrderedDict() if isinstance(value, dict) else value
    return copied


def _changing(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return with_first(output, change(first_tensor(output)))

    return hook


def _entering(damper: Damper) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        damper.enter(args[0] if args else kwargs["hidden_states"])

    return hook


class _Gate:
    """Keys and values of the first pass, for the later ones: the cache is written once and read by all passes."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def recorder(self, place: int) -> Callable[..., Any]:
        """Return a pre-hook of attention: what the cache returns in the first pass is kept."""
        return lambda _m, args, kwargs: (args, {**kwargs, "past_key_values": _Recording(self, place, kwargs)})

    def reader(self, place: int) -> Callable[..., Any]:
        """Return a pre-hook of attention: keys and values are those of the first pass."""
        return lambda _m, args, kwargs: (args, {**kwargs, "past_key_values": _Reading(self, place)})


class _Recording:
    def __init__(self, gate: _Gate, place: int, kwargs: Mapping[str, Any]) -> None:
        self.gate, self.place, self.cache = gate, place, kwargs.get("past_key_values")

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        found = (keys, values)
        if self.cache is not None:
            found = self.cache.update(keys, values, layer_idx, *more, **named)
        self.gate.kept[self.place] = found
        return found


class _Reading:
    def __init__(self, gate: _Gate, place: int) -> None:
        self.gate, self.place = gate, place

    def update(self, _keys: Tensor, _values: Tensor, _layer: int, *_more: Any, **_named: Any) -> tuple[Tensor, Tensor]:
        return self.gate.kept[self.place]


def run(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Return the logits (b, t, v) of a forward pass without gradients or cache."""
    with torch.inference_mode():
        out: Tensor = model(ids, use_cache=False, **options).logits
    return out
