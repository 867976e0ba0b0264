"""What the blocks of the model itself returned, kept for a scan: before its second pass a loop runs nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from thrifty.errors import Incompatible
from thrifty.llm.families import Parts
from thrifty.llm.inner_loop.looping import Looped


@dataclass
class Call:
    """One forward call of the model itself."""

    entry: Tensor  # what entered block 0, (b, t, d)
    outputs: list[Any] = field(default_factory=list)  # what every block returned


@contextmanager
def recording(parts: Parts, calls: list[Call]) -> Iterator[None]:
    """Append every forward call that is made inside to `calls`; the model must not be looped."""

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(Call(args[0] if args else kwargs["hidden_states"]))

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        calls[-1].outputs.append(output)

    hooks = [parts.blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
    hooks += [block.register_forward_hook(leave) for block in parts.blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replaying(looped: Looped, calls: list[Call]) -> Iterator[None]:
    """Let the blocks before the second pass return what they returned in `calls`, which are made again inside.

    Results are the same bit for bit. With keys and values of the first pass, the range itself runs again in full.
    Raises Incompatible when a call is not the one that was recorded.
    """
    plan, current = looped.plan, iter(calls)
    known = plan.start if plan.kv_mode == "first_pass" else plan.end
    views = list(looped.parts.blocks)[:known]
    call: list[Call] = []

    def replayed(place: int) -> Any:
        def forward(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
            if place == 0:
                call[:] = [found] if (found := next(current, None)) is not None else []
                if not call or not torch.equal(call[0].entry, hidden_states):
                    raise Incompatible("`score` called the model in another way than before; scan with reuse = False")
            return call[0].outputs[place]

        return forward

    for place, view in enumerate(views):
        view.__dict__["forward"] = replayed(place)  # a view shares nothing of this with its block
    try:
        yield
    finally:
        for view in views:
            view.__dict__.pop("forward", None)
