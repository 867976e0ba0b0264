"""Models, data and small reckonings for the tests of GaLLoP."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tiny_llms import tiny, tokens
from torch import Tensor

from thrifty.llm.families import parts_of
from thrifty.llm.gallop import Select, Selection, select
from thrifty.llm.loading import Encoded, collate, completion_losses


def rows(n: int = 12, length: int = 9, start: int = 3, seed: int = 0) -> list[Encoded]:
    """Return random examples of different lengths."""
    return [Encoded(tuple(r[: length - i % 3]), start) for i, r in enumerate(tokens(n, length, seed).tolist())]


def small(family: str = "llama", **more: Any) -> Any:
    """Return a model of two blocks."""
    return tiny(family, **{"blocks": 2, "width": 16, **more})


def all_of(model: Any, **knobs: Any) -> Selection:
    """Return the selection of every eligible scalar."""
    return select(model, (), Select(density=1.0, score="highest", **knobs))


def copies(model: Any) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers."""
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def changed(model: Any, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return where tensors differ from copies: names with any difference -> flat indices."""
    now = model.state_dict()
    found = {name: (now[name] != t).flatten().nonzero().flatten() for name, t in before.items()}
    return {name: at for name, at in found.items() if len(at)}


def dense_gradients(model: Any, encoded: list[Encoded], names: Any) -> dict[str, Tensor]:
    """Return the gradients of the mean loss, by plain autograd in one batch."""
    twin = copy.deepcopy(model)
    completion_losses(twin, collate(encoded)).mean().backward()
    by_name = dict(twin.named_parameters())
    return {name: by_name[name].grad for name in names}


def weights_of(model: Any) -> dict[str, Any]:
    """Return the default eligible weights."""
    return parts_of(model).weights()


def same(a: Selection, b: Selection) -> bool:
    """Whether two selections hold the same scalars."""
    return a.indices.keys() == b.indices.keys() and all(torch.equal(a.indices[n], b.indices[n]) for n in a.indices)
