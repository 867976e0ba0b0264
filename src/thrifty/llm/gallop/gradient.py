"""Gradients of the loss on a slice of the data, one tensor at a time, added up in float32 outside the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from thrifty.errors import DataError
from thrifty.llm.gallop.ranks import Ranks
from thrifty.llm.loading import Encoded, batches, completion_losses

__all__ = ["Progress", "gradients"]

Progress = Callable[[int, int], None]  # (done, all)


def gradients(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    encoded: Sequence[Encoded],
    batch: int = 8,
    square: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Return the mean gradient of the examples' losses (each the mean over its learned tokens), float32, on `device`.

    square: the mean of the squared gradients of single examples instead (one backward pass each). The model is in eval
    mode meanwhile, so dropout plays no part; modes, gradients and what requires them are as before afterwards, and no
    random number is drawn. A dense gradient is dropped as soon as it is added. With torch.distributed, each rank takes
    its share of the examples. Raises DataError for a loss that is no finite number.
    """
    found = {name: torch.zeros(p.shape, dtype=torch.float32, device=device) for name, p in weights.items()}
    ranks = Ranks.current()
    mine = ranks.share(encoded)
    place = next(iter(weights.values())).device
    with _only(model, weights, lambda name, g: _add(found[name], g, square)):
        done = 0
        for part in batches(mine, 1 if square else batch, _pad(model)) if mine else ():
            losses = completion_losses(model, part.to(place))
            if not bool(losses.isfinite().all()):
                raise DataError(
                    f"the loss of examples {done} to {done + len(part) - 1} of the slice is no finite number"
                )
            losses.sum().backward()  # type: ignore[no-untyped-call]
            done += len(part)
            if progress is not None:
                progress(done, len(mine))
    for total in found.values():
        ranks.add(total)
        total /= len(encoded)
    return found


def _add(total: Tensor, gradient: Tensor, square: bool) -> None:
    g = gradient.detach().to(total.device, torch.float32)
    if square:
        total.addcmul_(g, g)
    else:
        total.add_(g)


def _pad(model: Any) -> int:
    pad = getattr(model.config, "pad_token_id", None)
    return int(pad) if isinstance(pad, int) else 0


@contextmanager
def _only(model: nn.Module, weights: Mapping[str, nn.Parameter], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within: eval mode, only `weights` require gradients, and each is handed to `take` and dropped."""
    modes = {module: module.training for module in model.modules()}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def hook(name: str) -> Callable[[Tensor], None]:
        def run(p: Tensor) -> None:
            assert p.grad is not None
            take(name, p.grad)
            p.grad = None

        return run

    handles = []
    try:
        model.eval()
        for p, _, _ in before:
            p.requires_grad_(False)
            p.grad = None
        for name, p in weights.items():
            p.requires_grad_(True)
            handles.append(p.register_post_accumulate_grad_hook(hook(name)))  # type: ignore[no-untyped-call]
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for p, needs, grad in before:
            p.requires_grad_(needs)
            p.grad = grad
        for module, training in modes.items():
            module.training = training
