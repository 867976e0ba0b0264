"""What looping costs beyond the blocks that it runs: a looped model beside one that has as many blocks of its own.

Every mode and the unrolled copy take the same input in turn, many rounds, in an order that changes; time is the process's CPU time on one
thread, a ratio is taken within a round, and the median over rounds is reported with a bootstrap interval. Beside it stands the time
inside the mixing alone, as a share of the same call: a ratio of two measurements that other work on the machine slows alike.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from thrifty.llm.families import parts_of
from thrifty.llm.inner_loop import Plan, loop
from thrifty.llm.inner_loop.mixing import Damper, Mixer


def unrolled(model: Any, order: list[int]) -> Any:
    """Return a model that has a copy of its own of every block in the order."""
    made = copy.deepcopy(model)
    parts = parts_of(made)
    blocks = [copy.deepcopy(parts.blocks[i]) for i in order]
    for place, block in enumerate(blocks):
        parts.attention(block).layer_idx = place
    parts.replace_blocks(nn.ModuleList(blocks))
    made.config.num_hidden_layers = len(order)
    return made.eval()


def prefill(model: Any, spec: dict[str, Any]) -> Any:
    """Return the logits of the last position, and the cache, of a prompt."""
    ids = torch.arange(spec["prompt"])[None] % 20_000 + 1000
    return model(ids, use_cache=True, logits_to_keep=1)


def decode(model: Any, spec: dict[str, Any], start: Any) -> Any:
    """Return the last output of single tokens behind a prompt."""
    cache, token = copy.deepcopy(start.past_key_values), torch.tensor([[4000]])
    for _ in range(spec["steps"]):
        out = model(token, past_key_values=cache, use_cache=True)
    return out


def timed(work: Callable[[], Any]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def run(model: Any, tokenizer: Any, spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Time prefill and decoding of all modes and of the unrolled copy."""
    del tokenizer, name
    first = Plan(*spec["range"], spec["passes"])
    model = copy.deepcopy(model)  # in memory of its own, as the unrolled copy: pages that map a file are slower
    physical = unrolled(model, first.order(len(parts_of(model).blocks)))
    with torch.inference_mode():
        same = bool(torch.equal(prefill(physical, spec).logits, with_loop(model, "naive", spec, prefill)))
        return {
            "blocks": len(parts_of(physical).blocks), "naive equals the copy": same,
            "prefill": rounds(model, physical, spec, decoding=False), "decode": rounds(model, physical, spec, decoding=True),
            "mixing": {part: {m: mixing_share(model, m, spec, part == "decode") for m in spec["modes"]} for part in ("prefill", "decode")},
        }  # fmt: skip


def with_loop(model: Any, mode: str, spec: dict[str, Any], work: Any) -> Any:
    with loop(model, Plan(*spec["range"], spec["passes"], mode)):
        return work(model, spec).logits


def rounds(model: Any, physical: Any, spec: dict[str, Any], decoding: bool) -> dict[str, Any]:
    """Return the seconds of the copy, and for each mode its median ratio to the copy with an interval."""
    names, order, found = ["copy", *spec["modes"]], random.Random(0), []
    for number in range(spec["rounds"] + 1):
        order.shuffle(names)
        seconds = {mode: one(model, physical, mode, spec, decoding) for mode in names}
        if number:  # the first warms up
            found.append(seconds)
    base = np.array([s["copy"] for s in found])
    made: dict[str, Any] = {"copy seconds": float(np.median(base))}
    rng = np.random.default_rng(0)
    for mode in spec["modes"]:
        ratios = np.array([s[mode] for s in found]) / base
        drawn = np.median(ratios[rng.integers(0, len(ratios), (2000, len(ratios)))], axis=1)
        made[mode] = [float(np.median(ratios)), *(float(q) for q in np.quantile(drawn, [0.025, 0.975]))]
    return made


def one(model: Any, physical: Any, mode: str, spec: dict[str, Any], decoding: bool) -> float:
    """Return the seconds of one mode."""
    if mode == "copy":
        return work_of(physical, spec, decoding)
    with loop(model, Plan(*spec["range"], spec["passes"], mode)):
        return work_of(model, spec, decoding)


def mixing_share(model: Any, mode: str, spec: dict[str, Any], decoding: bool) -> float:
    """Return the median share of a call that is spent in the mixing."""
    spent = [0.0]

    def timing(inner: Callable[..., Any]) -> Callable[..., Any]:
        def outer(*args: Any) -> Any:
            begun = time.process_time()
            try:
                return inner(*args)
            finally:
                spent[0] += time.process_time() - begun

        return outer

    places = [(Mixer, "first"), (Mixer, "next"), (Damper, "enter"), (Damper, "leave")]
    kept, shares = [getattr(*place) for place in places], []
    for (owner, name), inner in zip(places, kept):
        setattr(owner, name, timing(inner))
    try:
        with loop(model, Plan(*spec["range"], spec["passes"], mode)):
            for _ in range(1 + spec["rounds"] // 3):
                whole = work_of(model, spec, decoding, lambda: spent.__setitem__(0, 0.0))
                shares.append(spent[0] / whole)
    finally:
        for (owner, name), inner in zip(places, kept):
            setattr(owner, name, inner)
    return float(np.median(shares[1:]))


def work_of(model: Any, spec: dict[str, Any], decoding: bool, before: Callable[[], None] = lambda: None) -> float:
    if not decoding:
        before()
        return timed(lambda: prefill(model, spec))
    start = prefill(model, {**spec, "prompt": spec["context"]})
    before()
    return timed(lambda: decode(model, spec, start))
