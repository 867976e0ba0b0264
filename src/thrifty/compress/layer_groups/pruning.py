"""From masks to a smaller model, and to and from a folder.

A pruned model stays an ordinary Hugging Face model: the same classes with smaller weights. Widths that its config can
say (intermediate_size, conv_dim, the key heads of Llama) go there, and `from_pretrained` reads it; the members that are
left of all other units are listed in config.thrifty_kept, and `load` reads it.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thrifty.compress.layer_groups import wavlm
from thrifty.compress.layer_groups.families import KINDS, Slice, Stack, Unit, count_expected, stack_of
from thrifty.compress.layer_groups.gates import Masks, counts
from thrifty.errors import DataError, NoMatch, NothingToDo, StoreError, close_to, need

FIELD = "thrifty_kept"


def scaled_weights(trunk: nn.Module, units: Sequence[Unit], masks: Masks) -> dict[str, Tensor]:
    """Return the weights that read masked members, multiplied by the masks, by path in the trunk.

    Every mask acts on the inputs of its reader, which is the same as acting on the outputs of the members: the values
    are equal, and no module has to be changed.
    """
    weights = dict(trunk.named_parameters())
    found: dict[str, Tensor] = {}
    for unit in units:
        for place in unit.scaled:
            weight = found.get(place.parameter, weights[place.parameter])
            found[place.parameter] = weight * _along(masks[unit.name].to(weight), place, weight.dim())
    return found


def mask(model: nn.Module, masks: Masks) -> nn.Module:
    """Return a copy of the model with the masks multiplied into its weights, at its full size."""
    result = copy.deepcopy(model)
    stack = stack_of(result)
    units = _named(stack, masks)
    weights = dict(stack.trunk.named_parameters())
    with torch.no_grad():
        for name, value in scaled_weights(stack.trunk, units, masks).items():
            weights[name].copy_(value)
    return result


def prune(model: nn.Module, masks: Masks) -> nn.Module:
    """Return a smaller copy of the model without the members whose mask is 0; other values are multiplied in.

    masks: by unit name (Stack.units), each (count,). Its outputs equal those of `mask(model, masks)`.
    Raises UnsupportedModel, NoMatch for names that are no unit, DataError for a mask of another length or that leaves
    nothing, NothingToDo when every mask is all ones.
    """
    original = stack_of(model)
    units = _named(original, masks)
    if all(bool((masks[u.name] == 1).all()) for u in units):
        raise NothingToDo("every mask is all ones: nothing would be removed")
    result = mask(model, masks)
    stack = stack_of(result)
    kept = {u.name: [int(i) for i in torch.nonzero(masks[u.name]).flatten()] for u in units}
    cut(stack, units, kept)
    _record(stack, units, kept)
    return result


def cut(stack: Stack, units: Sequence[Unit], kept: Mapping[str, list[int]]) -> None:
    """Remove all other members of the units, in place, and put the attributes of the modules right."""
    touched = set()
    for unit in units:
        for place in unit.cut:
            path, _, name = place.parameter.rpartition(".")
            module = stack.trunk.get_submodule(path)
            old = getattr(module, name)
            index = torch.tensor(kept[unit.name], device=old.device)
            rows = (index[:, None] * place.block + torch.arange(place.block, device=old.device)).flatten()
            new = (
                torch.empty_like(old.detach().index_select(place.dim, rows))
                if old.is_meta
                else old.detach().index_select(place.dim, rows)
            )
            setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
            touched.add(path)
    for path in touched:
        _refit(stack.trunk.get_submodule(path))
    for unit in units:
        if unit.kind == "heads":
            _refit_attention(stack, unit, kept[unit.name])


def sizes(stack: Stack, masks: Masks, scope: str = "layers") -> tuple[int, int]:
    """Return the parameters in scope before and after pruning with the masks, by formula."""
    units = _named(stack, masks)
    shapes = stack.scope(scope, tuple({u.kind for u in units}))
    return int(count_expected(shapes, (), {})), int(count_expected(shapes, units, counts(masks)))


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write a model with its own save_pretrained into a new folder, whole or not at all, and return the folder.

    Raises StoreError when the folder is not empty or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"{folder} exists and is not an empty folder")
    temporary = ""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.")
        model.save_pretrained(temporary)  # type: ignore[operator]
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
        os.chmod(folder, 0o755)
    except OSError as err:
        raise StoreError(f"cannot write {folder}: {err.strerror or err}") from err
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load(folder: str | Path) -> nn.Module:
    """Read a model that `save` or save_pretrained wrote, pruned or not, in eval mode and as its original class.

    Raises StoreError when the folder holds no model, MissingExtra without transformers.
    """
    transformers = need("transformers", extra="llm")
    folder = Path(folder)
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = getattr(transformers, values["architectures"][0])
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as err:
        raise StoreError(
            f"{folder} holds no Hugging Face model with a config.json that names its class ({err!r})"
        ) from err
    reader = _smaller(kind, values[FIELD]) if values.get(FIELD) else kind
    try:
        model: nn.Module = reader.from_pretrained(str(folder), local_files_only=True)
    except (OSError, RuntimeError, ValueError) as err:
        raise StoreError(f"cannot read {folder}: {err}") from err
    model.__class__ = kind
    return model.eval()


def _smaller(kind: Any, kept: Mapping[str, list[int]]) -> Any:
    """Return a subclass that is built at the pruned size, for from_pretrained to fill."""

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        stack = stack_of(self)
        cut(stack, _named(stack, kept), kept)

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def _named(stack: Stack, masks: Mapping[str, Any]) -> tuple[Unit, ...]:
    """Return the units that masks name, in order; refuse other names and lengths, all of them at once."""
    units = {u.name: u for u in stack.units(KINDS)}
    if unknown := [name for name in masks if name not in units]:
        raise NoMatch(f"no unit is named {', '.join(unknown)}; {close_to(unknown[0], units)}")
    bad = [
        f"{name}: the mask has shape {tuple(m.shape)} for {units[name].count} members"
        for name, m in masks.items()
        if isinstance(m, Tensor) and tuple(m.shape) != (units[name].count,)
    ]
    bad += [
        f"{name}: the mask leaves nothing" for name, m in masks.items() if isinstance(m, Tensor) and not (m > 0).any()
    ]
    bad += [f"{name}: the mask has values below 0 or not finite" for name, m in masks.items()
            if isinstance(m, Tensor) and not bool(((m >= 0) & torch.isfinite(m)).all())]  # fmt: skip
    if bad:
        raise DataError("; ".join(bad))
    return tuple(u for u in units.values() if u.name in masks)


def _along(values: Tensor, place: Slice, dims: int) -> Tensor:
    shape = [1] * dims
    shape[place.dim] = -1
    return values.repeat_interleave(place.block).view(shape)


def _refit(module: nn.Module) -> None:
    """Set the sizes that a module states to those of its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv1d):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_channels = len(module.weight)


def _refit_attention(stack: Stack, unit: Unit, kept: list[int]) -> None:
    attention = stack.trunk.get_submodule(f"{unit.name.partition(':')[0]}.{stack.family.attention}")
    if stack.family.name == "wavlm":
        earlier = getattr(attention, "kept_heads", None)
        wavlm.keep_heads(attention, [earlier[i] for i in kept] if earlier else kept)
        return
    for name in ("num_heads", "num_attention_heads"):
        if hasattr(attention, name):
            setattr(attention, name, len(kept))
    if hasattr(attention, "all_head_size"):
        attention.all_head_size = len(kept) * stack.head_size  # type: ignore[assignment]


def _record(stack: Stack, units: Sequence[Unit], kept: Mapping[str, list[int]]) -> None:
    """Say in the config what is left: in its own fields where they can, else in thrifty_kept."""
    earlier = getattr(stack.config, FIELD, None) or {}
    left = {**earlier, **{n: [earlier[n][i] for i in k] if n in earlier else k for n, k in kept.items()}}
    now = {u.name: u for u in stack.units(KINDS)}
    for kind in {u.kind for u in units}:
        same = [u for u in now.values() if u.kind == kind]
        if _express(stack, kind, same):
            for unit in same:
                left.pop(unit.name, None)
    setattr(stack.config, FIELD, left or None)


def _express(stack: Stack, kind: str, units: Sequence[Unit]) -> bool:
    """Put the number of members of a kind into the config and return True, or False where the config cannot say it."""
    config, family = stack.config, stack.family
    numbers = {u.count for u in units}
    if kind == "channels" and family.conv_field:
        widths = list(getattr(config, family.conv_field))
        for unit in units:
            widths[int(unit.name.partition(":")[0].rpartition(".")[2])] = unit.count
        setattr(config, family.conv_field, type(getattr(config, family.conv_field))(widths))
        return True
    if kind == "units" and len(numbers) == 1:
        setattr(config, family.width_field, numbers.pop())
        return True
    if kind == "heads" and family.grouped and len(numbers) == 1:
        number = numbers.pop()
        queries = number * (getattr(config, family.heads_field) // config.num_key_value_heads)
        if config.hidden_size % queries:
            return False  # Hugging Face refuses such a config, although head_dim is given
        config.head_dim, config.num_key_value_heads = stack.head_size, number
        setattr(config, family.heads_field, queries)
        return True
    return False
