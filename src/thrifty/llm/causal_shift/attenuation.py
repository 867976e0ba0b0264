"""Attenuating the residual stream of a model in place: as hooks, or inside the block."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from thrifty.errors import Incompatible, KnobError, close_to
from thrifty.llm.causal_shift.gates import FixedGate, Gate, make_gate
from thrifty.llm.families import Parts, first_tensor, parts_of, with_first

PLACEMENTS = ("attn", "mlp", "block")
FORMS = ("hooks", "module")
GATE_RATE = 10.0  # how much larger the step of a gate is than that of the weights
_MARK = "_thrifty_attenuation"


class Attenuated:
    """A model with an attenuated residual stream, made by `attenuate`; `restore()` undoes it. A context manager."""

    def __init__(self, parts: Parts, gate: Gate, placement: str, form: str) -> None:
        self.parts, self.gate, self.placement, self.form = parts, gate, placement, form
        self._hooks: list[Any] = []
        self._classes: list[tuple[nn.Module, type]] = []
        touched = set(gate.fixed) if isinstance(gate, FixedGate) else set(range(len(parts.blocks)))
        touched -= {b for b, a in gate.fixed.items() if a == 1} if isinstance(gate, FixedGate) else set()
        for index in sorted(touched):
            (self._hook if form == "hooks" else self._enter)(index)
        setattr(parts.model, _MARK, self)

    @property
    def model(self) -> Any:
        """The model: the object that was given."""
        return self.parts.model

    def alphas(self) -> list[float]:
        """Return alpha of every block, as it is now."""
        return self.gate.alphas()

    def restore(self) -> Any:
        """Take the attenuation out and return the model; its weights stay as training has left them."""
        for hook in self._hooks:
            hook.remove()
        for block, kind in self._classes:
            block.__class__ = kind
            del block.__dict__["_attenuation"]
        self._hooks, self._classes = [], []
        if getattr(self.model, _MARK, None) is self:
            delattr(self.model, _MARK)
        return self.model

    def parameter_groups(self, lr: float, weight_decay: float = 0.1) -> list[dict[str, Any]]:
        """Return groups for an optimiser: decay on matrices only, none on the gate; its step is GATE_RATE times lr."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in weights if p.dim() >= 2], "lr": lr, "weight_decay": weight_decay},
            {"params": [p for p in weights if p.dim() < 2], "lr": lr, "weight_decay": 0.0},
            {"params": list(self.gate.parameters()), "lr": GATE_RATE * lr, "weight_decay": 0.0},
        ]
        return [g for g in groups if g["params"]]

    def __enter__(self) -> Attenuated:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None) -> None:
        self.restore()

    def _hook(self, index: int) -> None:
        block = self.parts.blocks[index]
        kept: list[Tensor] = []

        def take(_module: nn.Module, args: Any, kwargs: Any = None) -> None:
            kept[:] = [args[0] if args else kwargs["hidden_states"]]

        def add(_module: nn.Module, _args: Any, output: Any) -> Any:
            x = kept.pop()
            return with_first(output, first_tensor(output) + (self.gate.alpha(index, x) - 1.0) * x)

        source = self.parts.mlp_norm(block) if self.placement == "mlp" else block
        into = {"attn": self.parts.attention_added, "mlp": self.parts.mlp_added}.get(self.placement, lambda b: b)(block)
        self._hooks += [
            source.register_forward_pre_hook(take, with_kwargs=True),
            into.register_forward_hook(add),
        ]

    def _enter(self, index: int) -> None:
        block = self.parts.blocks[index]
        self._classes.append((block, type(block)))
        block.__dict__["_attenuation"] = (self, index)
        block.__class__ = _attenuated_class(type(block))

    def forward(self, block: nn.Module, index: int, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Return what a block gives with alpha inside it; the in-module form."""
        x = arguments["hidden_states"]
        if self.placement == "block":
            out = original(block, **arguments)
            return with_first(out, first_tensor(out) + (self.gate.alpha(index, x) - 1.0) * x)
        parts = self.parts
        given = {k: v for k, v in arguments.items() if k != "hidden_states" and not k.startswith("encoder_")}
        attended = first_tensor(parts.attention(block)(hidden_states=parts.attention_norm(block)(x), **given))
        if parts.attention_added(block) is not parts.attention(block):
            attended = parts.attention_added(block)(attended)
        h = (self.gate.alpha(index, x) * x if self.placement == "attn" else x) + attended
        made = parts.mlp(block)(parts.mlp_norm(block)(h))
        if parts.mlp_added(block) is not parts.mlp(block):
            made = parts.mlp_added(block)(made)
        return (self.gate.alpha(index, h) * h if self.placement == "mlp" else h) + made


def attenuate(
    model: nn.Module, gate: Gate | str | Mapping[int, float], placement: str = "attn", form: str = "hooks"
) -> Attenuated:
    """Let each block pass alpha times the residual stream, in place: x' = alpha x + F(x).

    gate: {block: alpha} for fixed cuts, or "depth", "block", "token" (or a Gate) for learned ones, whose parameters are
    `.gate.parameters()`. placement: "attn": h = alpha x + attention(x), x' = h + MLP(h); "mlp": alpha on h; "block":
    x' = block(x) - (1 - alpha) x. form: "hooks" on a pretrained model, "module" computes it inside the block (for
    training from scratch and torch.compile). alpha must not change during one generation with a KV cache. On a frozen
    model this is an ablation and expected to harm.

    Raises KnobError, Incompatible when the model is attenuated or looped already, or blocks share modules,
    UnsupportedModel.

    Source: Residual Connections and the Causal Shift (2026): x' = alpha x + F(LN x); gates and placements are our
    reading (docs/causal_shift.md).
    """
    wrong = [
        f"{name} is '{value}'; {close_to(str(value), known)}"
        for name, value, known in (("placement", placement, PLACEMENTS), ("form", form, FORMS))
        if value not in known
    ]
    if wrong:
        raise KnobError("; ".join(wrong))
    if getattr(model, _MARK, None) is not None:
        raise Incompatible("the model is attenuated already; call restore() first")
    if getattr(model, "_thrifty_inner_loop", None) is not None:
        raise Incompatible("the model is looped, and its blocks stand at several places; call unloop() first")
    parts = parts_of(model)
    _refuse_shared(parts)
    count = len(parts.blocks)
    if isinstance(gate, str):
        gate = make_gate(gate, count, parts.width)
    elif not isinstance(gate, Gate):
        gate = FixedGate(count, gate)
    if gate.blocks != count:
        raise KnobError(f"the gate is for {gate.blocks} blocks; the model has {count}")
    return Attenuated(parts, gate.to(parts.embedding.weight.device), placement, form)


def _refuse_shared(parts: Parts) -> None:
    """Refuse blocks that have an attention, an MLP or a norm in common: an attenuated one would change both."""
    seen: dict[int, int] = {}
    for index, block in enumerate(parts.blocks):
        for module in (parts.attention_added(block), parts.mlp_norm(block), parts.mlp_added(block)):
            if seen.setdefault(id(module), index) != index:
                raise Incompatible(f"blocks {seen[id(module)]} and {index} share a {type(module).__name__}; copy it")


def train(
    attenuated: Attenuated, batches: Iterable[Tensor], lr: float, *, weight_decay: float = 0.1, clip: float = 1.0,
    warm_up: int = 0, steps: int | None = None, progress: Callable[[int, float, list[float]], None] | None = None,
) -> list[list[float]]:  # fmt: skip
    """Train the model and its gate on token ids (b, t), and return alpha of every block after each step.

    AdamW with betas 0.9 and 0.95; the gate without decay and with GATE_RATE times the step size. warm_up: steps of
    linear rise; steps: where given, cosine down to lr / 10. progress: called with (step, loss, alphas).
    """
    groups = attenuated.parameter_groups(lr, weight_decay)
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    rates = [group["lr"] for group in groups]
    model, log = attenuated.model, []
    model.train()
    try:
        for step, ids in enumerate(batches):
            share = min(1.0, (step + 1) / warm_up) if warm_up else 1.0
            if steps is not None and step >= warm_up:
                done = min(1.0, (step - warm_up) / max(1, steps - warm_up))
                share = 0.1 + 0.45 * (1 + float(torch.cos(torch.tensor(torch.pi * done))))
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = share * rate
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], clip)
            optimiser.step()
            log.append(attenuated.alphas())
            if progress is not None:
                progress(step + 1, float(loss.detach()), log[-1])
    finally:
        model.eval()
    return log


_CLASSES: dict[type, type] = {}


def _attenuated_class(kind: type) -> type:
    """Return a subclass of a block's class whose forward asks the attenuation."""
    if kind not in _CLASSES:
        signature = inspect.signature(kind.forward)  # type: ignore[attr-defined]
        open_ended = [n for n, p in signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD]

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            owner, index = self.__dict__["_attenuation"]
            bound = signature.bind(self, *args, **kwargs)
            arguments = dict(bound.arguments)
            arguments.pop("self")
            for name in open_ended:
                arguments.update(arguments.pop(name, {}))
            return owner.forward(self, index, kind.forward, arguments)  # type: ignore[attr-defined]

        _CLASSES[kind] = type(f"Attenuated{kind.__name__}", (kind,), {"forward": forward})
    return _CLASSES[kind]
