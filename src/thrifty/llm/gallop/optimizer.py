"""AdamW for some scalars of a model: state, gradients and masters exist for those k only; the rest never changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from thrifty.errors import DataError, Incompatible, KnobError, StoreError, close_to
from thrifty.llm.families import parts_of
from thrifty.llm.gallop.masters import read_masters, rest_for, write_masters
from thrifty.llm.gallop.partial_gradient import WAYS, PartialGradient, way_of
from thrifty.llm.gallop.ranks import Ranks
from thrifty.llm.gallop.selection import Selection

__all__ = ["SparseAdamW"]

DECAY_TO = ("zero", "pretrained")


@dataclass
class _Part:
    """The chosen entries of one tensor; grad, mean and square are parts of the optimiser's vectors, (k,) each."""

    name: str
    weight: nn.Parameter
    index: Tensor | None  # flat; None: `partial` holds it in its own form
    partial: PartialGradient | None
    base: Tensor  # the original entries, in the weight's dtype
    rest: Tensor | None  # see masters.py
    grad: Tensor
    mean: Tensor
    square: Tensor
    step: Tensor

    def flat_index(self) -> Tensor:
        if self.partial is not None:
            return self.partial.flat_index()
        assert self.index is not None
        return self.index

    def masters(self) -> Tensor:
        return read_masters(self.weight, self.flat_index(), self.rest)


class SparseAdamW:
    """Trains the chosen scalars of a model in place; every other scalar stays as it is, bit for bit.

    `loss.backward()` leaves the gradients of the chosen scalars in `grad`, (k,) float32, and no dense gradient: either
    a weight's own gradient is gathered and dropped as soon as it is there, or only the chosen entries are computed
    (see `partial_gradient`). Several backward passes add up. `step()` is torch's AdamW on float32 masters. With
    torch.distributed, `step()` sums the k gradients, nothing else, over the processes: divide the loss accordingly.
    Bytes beside the model: 20 for each scalar (float32 or bfloat16 weights), see `bytes_kept`.

    gradient: a way of `partial_gradient.WAYS`. decay_to: what weight decay pulls to, "zero" (AdamW) or "pretrained".
    Use as a context, or call `close()`: it takes the hooks away; `restore()` also undoes the training, bit for bit.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decay_to: str = "zero",
        clip: float = 0.0,
        gradient: str = "auto",
    ) -> None:
        self.lr, self.betas, self.eps = lr, betas, eps
        self.weight_decay, self.decay_to, self.clip = weight_decay, decay_to, clip
        self._check(gradient)
        self.model, self.selection = model, selection
        weights = _match(model, selection)
        self._before = [(p, p.requires_grad) for p in model.parameters()]
        device = next(iter(weights.values())).device
        self.grad = torch.zeros(selection.count, dtype=torch.float32, device=device)
        self._mean, self._square = torch.zeros_like(self.grad), torch.zeros_like(self.grad)
        for p, _ in self._before:
            p.requires_grad_(False)
            p.grad = None
        self._handles: list[Any] = []
        self._open = True
        self.parts = self._make_parts(weights, gradient)

    def _check(self, gradient: str) -> None:
        rules = {
            f"lr is {self.lr}; it must be positive": self.lr > 0,
            f"betas are {self.betas}; both must be in [0, 1)": all(0 <= b < 1 for b in self.betas),
            f"eps is {self.eps}; it must be positive": self.eps > 0,
            f"weight_decay is {self.weight_decay}; it must be at least 0": self.weight_decay >= 0,
            f"decay_to is '{self.decay_to}'; {close_to(str(self.decay_to), DECAY_TO)}": self.decay_to in DECAY_TO,
            f"clip is {self.clip}; it must be at least 0 (0 = no clipping)": self.clip >= 0,
            f"gradient is '{gradient}'; {close_to(str(gradient), WAYS)}": gradient in WAYS,
        }
        bad = [text for text, good in rules.items() if not good]
        if bad:
            raise KnobError("SparseAdamW: " + "; ".join(bad))

    def _make_parts(self, weights: dict[str, nn.Parameter], gradient: str) -> list[_Part]:
        linear = _linear_layers(self.model)
        parts, start = [], 0
        for name, weight in weights.items():
            index = self.selection.indices[name].to(weight.device)
            if not len(index):
                continue
            mine = slice(start, start + len(index))
            start = mine.stop
            base, rest = weight.detach().view(-1).index_select(0, index), rest_for(weight, len(index))
            part = _Part(
                name, weight, index, None, base, rest,
                self.grad[mine], self._mean[mine], self._square[mine], torch.tensor(0.0),
            )  # fmt: skip
            way = self._way(name, weight, gradient) if name in linear else "dense"
            if way == "dense":
                weight.requires_grad_(True)
                hook = weight.register_post_accumulate_grad_hook(_gather(part))  # type: ignore[no-untyped-call]
                self._handles.append(hook)
            else:
                layer, transposed = linear[name]
                part.partial = PartialGradient(layer, transposed, index, part.grad, way)
                part.index = None
            parts.append(part)
        return parts

    def _way(self, name: str, weight: Tensor, gradient: str) -> str:
        if gradient != "auto":
            return gradient
        chosen, rows = len(self.selection.indices[name]), len(self.selection.rows(name))
        return way_of(weight.device, weight.dtype, chosen / weight.numel(), rows / len(weight))

    def zero_grad(self) -> None:
        """Set the gradients to zero."""
        self.grad.zero_()

    @torch.no_grad()
    def step(self) -> float:
        """Sum the gradients over the processes, clip them, update the scalars, zero the gradients; return the norm.

        Raises DataError, before anything is changed, when a gradient is no finite number.
        """
        self._must_be_open()
        Ranks.current().add(self.grad)
        norms = torch.stack([torch.linalg.vector_norm(part.grad) for part in self.parts])
        total = torch.linalg.vector_norm(norms)
        if not bool(total.isfinite()):
            names = [part.name for part, norm in zip(self.parts, norms) if not bool(norm.isfinite())]
            raise DataError(f"the gradient of {', '.join(names[:3]) or 'all tensors'} is no finite number; lower lr")
        if self.clip:
            self.grad.mul_((self.clip / (total + 1e-6)).clamp(max=1.0))
        for part in self.parts:
            self._update(part)
        self.zero_grad()
        return float(total)

    def _update(self, part: _Part) -> None:
        index = part.flat_index()
        values = read_masters(part.weight, index, part.rest)
        decay = self.weight_decay
        if decay and self.decay_to == "pretrained":
            values -= self.lr * decay * (values - part.base.float())
            decay = 0.0
        adamw(
            [values], [part.grad], [part.mean], [part.square], [], [part.step],
            foreach=False, capturable=False, differentiable=False, fused=False,
            amsgrad=False, beta1=self.betas[0], beta2=self.betas[1], lr=self.lr, weight_decay=decay, eps=self.eps,
            maximize=False,
        )  # fmt: skip
        write_masters(part.weight, index, part.rest, values)

    def values(self) -> dict[str, Tensor]:
        """Return the masters of the chosen scalars by tensor, float32, in the order of the selection's indices."""
        return {part.name: part.masters() for part in self.parts}

    def base(self) -> dict[str, Tensor]:
        """Return the original numbers of the chosen scalars by tensor, in the weights' dtype."""
        return {part.name: part.base for part in self.parts}

    def ways(self) -> dict[str, str]:
        """Return how the gradient of each tensor with chosen scalars is made."""
        return {part.name: "dense" if part.partial is None else part.partial.way for part in self.parts}

    @property
    def bytes_kept(self) -> int:
        """Bytes held beside the model, gradients included."""
        kept = self.grad.nbytes + self._mean.nbytes + self._square.nbytes
        for part in self.parts:
            kept += part.base.nbytes + (0 if part.rest is None else part.rest.nbytes) + part.step.nbytes
            kept += part.partial.bytes_kept if part.partial is not None else part.flat_index().nbytes
        return kept

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of masters and state, to go on later from the same base and selection."""
        found = {"mean": self._mean.clone(), "square": self._square.clone()}
        for part in self.parts:
            found[f"{part.name}.value"], found[f"{part.name}.step"] = part.masters(), part.step.clone()
        return found

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state_dict()`. Raises StoreError when it is of another selection."""
        wanted = {"mean": (self.selection.count,), "square": (self.selection.count,)}
        for part in self.parts:
            wanted |= {f"{part.name}.value": (len(part.base),), f"{part.name}.step": ()}  # type: ignore[dict-item]
        if {name: tuple(t.shape) for name, t in state.items()} != wanted:
            raise StoreError("the state is of another selection: tensor names or counts differ")
        self._mean.copy_(state["mean"])
        self._square.copy_(state["square"])
        for part in self.parts:
            part.step.copy_(state[f"{part.name}.step"])
            values = state[f"{part.name}.value"].to(part.weight.device)
            write_masters(part.weight, part.flat_index(), part.rest, values)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the original numbers back, bit for bit, and close."""
        for part in self.parts:
            part.weight.detach().view(-1).index_copy_(0, part.flat_index().to(torch.int64), part.base)
        self.close()

    def close(self) -> None:
        """Take the hooks away; the model keeps the trained scalars, and requires gradients where it did before."""
        if not self._open:
            return
        self._open = False
        for handle in self._handles:
            handle.remove()
        for part in self.parts:
            if part.partial is not None:
                part.partial.remove()
        for p, needs in self._before:
            p.requires_grad_(needs)
            p.grad = None

    def _must_be_open(self) -> None:
        if not self._open:
            raise Incompatible("this SparseAdamW is closed; make a new one")

    def __enter__(self) -> SparseAdamW:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _gather(part: _Part) -> Callable[[Tensor], None]:
    def hook(p: Tensor) -> None:
        assert p.grad is not None
        part.grad += p.grad.reshape(-1).index_select(0, part.flat_index())
        p.grad = None

    return hook


def _match(model: nn.Module, selection: Selection) -> dict[str, nn.Parameter]:
    """Return the weights of a selection. Raises Incompatible that lists what is missing or has another shape."""
    by_name = dict(model.named_parameters())
    bad = []
    for name, shape in selection.shapes.items():
        if name not in by_name:
            bad.append(f"{name} is missing")
        elif tuple(by_name[name].shape) != shape:
            bad.append(f"{name} is {tuple(by_name[name].shape)}, not {shape}")
    if bad:
        raise Incompatible(f"the selection is of another model: {'; '.join(bad[:5])}")
    return {name: by_name[name] for name in selection.shapes}


def _linear_layers(model: nn.Module) -> dict[str, tuple[nn.Module, bool]]:
    """Return the plain linear layers of the blocks by the name of their weight, and whether they are transposed.

    Layers that something else has changed, with a forward of their own, are left out.
    """
    parts = parts_of(model)
    found = {}
    for i, block in enumerate(parts.blocks):
        for path in parts.family.weights:
            layer = block.get_submodule(path)
            plain = type(layer) is nn.Linear or type(layer).__name__ == "Conv1D"
            if plain and "forward" not in vars(layer):
                found[f"{parts.block_path(i)}.{path}.weight"] = (layer, parts.family.transposed)
    return found
