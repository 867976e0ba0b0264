"""The representations of a stack: what enters its first layer and what leaves each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from thrifty.compress.layer_groups.families import FRAMES, SAMPLES, Stack
from thrifty.errors import DataError

Batch = Mapping[str, Tensor]
FRAME_MASK = "frame_mask"


def hidden_states(stack: Stack, batch: Batch, weights: Mapping[str, Tensor] | None = None) -> list[Tensor]:
    """Run the trunk and return its L + 1 representations, each (batch, steps, width).

    Index 0 is the input of layer 1, index l the raw output of layer l, before any final norm.
    batch: keyword arguments of the trunk; "frame_mask" is not passed on. weights: parameters of the trunk to use
    instead of its own, by path. Raises DataError when a layer does not run (layer drop in training mode).
    """
    layers = stack.layers
    found: list[Tensor | None] = [None] * (len(layers) + 1)

    def first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[0] = args[0] if args else kwargs.get("hidden_states")

    def output(index: int) -> Any:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            found[index + 1] = out[0] if isinstance(out, tuple) else out

        return hook

    given = {k: v for k, v in batch.items() if k != FRAME_MASK}
    with ExitStack() as hooks:
        hooks.enter_context(_Removing(layers[0].register_forward_pre_hook(first, with_kwargs=True)))
        for index, layer in enumerate(layers):
            hooks.enter_context(_Removing(layer.register_forward_hook(output(index))))
        if weights is None:
            stack.trunk(**given)
        else:
            torch.func.functional_call(stack.trunk, dict(weights), kwargs=given)
    if missing := [i for i, value in enumerate(found) if value is None]:
        raise DataError(f"representations {missing} were not computed; is layer drop on? use model.eval()")
    return [value for value in found if value is not None]


def valid_frames(stack: Stack, batch: Batch, steps: int) -> Tensor:
    """Return which frames are real, (batch, steps) bool: "frame_mask", or what "attention_mask" says, or all.

    Raises DataError when the mask has another shape or marks nothing.
    """
    size = next(iter(batch.values())).shape[0]
    mask = batch.get(FRAME_MASK)
    if mask is None and stack.family.mask != FRAMES and "attention_mask" in batch:
        mask = batch["attention_mask"]
        if stack.family.mask == SAMPLES:
            mask = stack.trunk._get_feature_vector_attention_mask(steps, mask)  # type: ignore[operator]
    if mask is None:
        return torch.ones(size, steps, dtype=torch.bool)
    if tuple(mask.shape) != (size, steps):
        raise DataError(f"the mask of frames has shape {tuple(mask.shape)}; the representations have {(size, steps)}")
    if not mask.any():
        raise DataError("the mask marks no frame of the batch")
    return mask.bool()


def each_batch(stack: Stack, batches: Iterable[Batch]) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield the representations, in eval mode and without gradient, and the mask of each batch.

    The mode of the model is put back. Raises DataError when there is no batch or a number is not finite.
    """
    training, none = stack.trunk.training, True
    stack.trunk.eval()
    try:
        for number, batch in enumerate(batches):
            none = False
            with torch.no_grad():
                states = hidden_states(stack, batch)
            mask = valid_frames(stack, batch, states[0].shape[1])
            refuse_not_finite(states, mask, f"batch {number}")
            yield states, mask
    finally:
        stack.trunk.train(training)
    if none:
        raise DataError("there is no batch; layer groups are found from at least one")


def refuse_not_finite(states: Sequence[Tensor], mask: Tensor, where: str) -> None:
    """Raise DataError naming every representation with a NaN or an infinity in a real frame."""
    if bad := [i for i, state in enumerate(states) if not torch.isfinite(state[mask]).all()]:
        raise DataError(f"{where}: representations {bad} hold NaN or infinity")


class _Removing:
    """A hook that goes away at the end of a with block."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
