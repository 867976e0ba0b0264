"""Which weights may be tuned: patterns of parameter names, and what is refused."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from thrifty.errors import NoMatch, UnsupportedModel, close_to
from thrifty.llm.families import parts_of

__all__ = ["eligible_weights"]

DTYPES = (torch.float32, torch.bfloat16)


def eligible_weights(model: nn.Module, patterns: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Return the weights that may be tuned, by name, in the order of the model.

    patterns: of parameter names, such as "*.mlp.*.weight"; none: the 2-D weights of all blocks.
    Raises NoMatch for a pattern that matches nothing; UnsupportedModel for tied, quantised or non-float weights, and
    for what `parts_of` refuses.
    """
    parts = parts_of(model)
    by_name = dict(model.named_parameters())
    if patterns:
        aliases = _aliases(model, by_name)
        wanted = _matches(patterns, by_name, aliases)
        chosen = {name: p for name, p in by_name.items() if name in wanted}
    else:
        chosen = parts.weights()
    refusals = [*_refused(model, chosen)]
    if refusals:
        raise UnsupportedModel(refusals)
    return chosen


def _aliases(model: nn.Module, by_name: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Return the further names of tied tensors, with the name under which they are listed."""
    first = {id(p): name for name, p in by_name.items()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in every if name != first[id(p)]}


def _matches(patterns: Sequence[str], by_name: Mapping[str, Any], aliases: Mapping[str, str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        hits = set(fnmatch.filter(by_name, pattern))
        tied = fnmatch.filter(aliases, pattern)
        lost = [name for name in tied if aliases[name] not in hits]
        if lost:
            raise UnsupportedModel(
                [
                    f"{name} is the same tensor as {aliases[name]} (tied); select it as '{aliases[name]}'"
                    for name in lost
                ]
            )
        if not hits:
            raise NoMatch(f"'{pattern}' matches no parameter; {close_to(pattern, by_name)}")
        found |= hits
    return found


def _refused(model: nn.Module, chosen: Mapping[str, Any]) -> list[str]:
    refusals = []
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(name)
    for name, p in chosen.items():
        if not isinstance(p, nn.Parameter):
            refusals.append(f"{name} is no parameter ({type(p).__name__}); adapters must be merged or removed first")
        elif p.dtype not in DTYPES:
            kinds = " or ".join(str(d).removeprefix("torch.") for d in DTYPES)
            refusals.append(f"{name} is stored as {str(p.dtype).removeprefix('torch.')}; load the model in {kinds}")
        elif len(owners.get(id(p), [])) > 1 and _shared_by_blocks(owners[id(p)]):
            refusals.append(f"{name} is shared by several blocks (a looped model?); undo the sharing first")
        elif not p.is_contiguous():
            refusals.append(f"{name} is not contiguous in memory; call model.to(memory_format=torch.contiguous_format)")
    return refusals


def _shared_by_blocks(names: Sequence[str]) -> bool:
    """Whether a tensor belongs to more than one block; a head tied to embeddings does not."""
    return sum(".layers." in name or ".h." in name for name in names) > 1
