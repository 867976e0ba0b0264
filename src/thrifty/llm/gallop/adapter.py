"""Sparse adapters: the tuned scalars of a model in one file, merged and taken out again without a bit of error."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from thrifty import __version__
from thrifty.errors import DataError, Incompatible, StoreError
from thrifty.llm.gallop.optimizer import SparseAdamW
from thrifty.llm.gallop.selection import INT32_LIMIT, Selection, size_of

__all__ = ["FORMAT", "Adapter", "Entries", "checksum", "combine", "overlap"]

FORMAT = 1
KINDS = ("idx", "val", "base")


@dataclass(frozen=True)
class Entries:
    """The tuned scalars of one tensor."""

    index: Tensor  # (k,) ascending flat indices, int32 or int64
    value: Tensor  # (k,) float32, the new numbers
    base: Tensor  # (k,) the original numbers, in the base's dtype
    shape: tuple[int, ...]
    checksum: str  # of the whole original tensor

    def same_place(self, other: Entries) -> bool:
        """Whether both are of the same tensor of the same base."""
        return self.shape == other.shape and self.checksum == other.checksum


@dataclass(frozen=True)
class Adapter:
    """Tuned scalars by tensor name, and how they came about.

    The file is one safetensors file: `NAME.idx`, `NAME.val`, `NAME.base` for each tensor, and a header in its metadata
    (`thrifty`, JSON): format, base, per-tensor shape and checksum of the original tensor, and `info`.
    """

    entries: dict[str, Entries] = field(repr=False)
    info: dict[str, Any]

    @classmethod
    def of(cls, tuned: SparseAdamW, base: str = "", **info: Any) -> Adapter:
        """Return the adapter of what an optimiser has trained so far; base: what the user calls the original model."""
        selection, values = tuned.selection, tuned.values()
        entries = {}
        for part in tuned.parts:
            index = part.flat_index().cpu()
            original = part.weight.detach().cpu().clone()
            original.view(-1)[index.to(torch.int64)] = part.base.cpu()
            entries[part.name] = Entries(
                index, values[part.name].cpu(), part.base.cpu(), selection.shapes[part.name], checksum(original)
            )
        made = {"base": base, "selection": asdict(selection.settings), "examples": selection.examples,
                "eligible": selection.eligible, "density": selection.density, "lr": tuned.lr, "betas": tuned.betas,
                "weight_decay": tuned.weight_decay, "decay_to": tuned.decay_to, "clip": tuned.clip, **info}  # fmt: skip
        return cls(entries, json.loads(json.dumps(made)))

    @property
    def count(self) -> int:
        """How many scalars it holds."""
        return sum(len(e.index) for e in self.entries.values())

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all. Raises StoreError."""
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        for name, e in self.entries.items():
            tensors |= {f"{name}.idx": e.index, f"{name}.val": e.value, f"{name}.base": e.base}
        header = {
            "format": FORMAT,
            "thrifty": __version__,
            "tensors": {n: {"shape": e.shape, "checksum": e.checksum} for n, e in self.entries.items()},
            "info": self.info,
        }
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(tensors, partial, metadata={"thrifty": json.dumps(header)})
            os.replace(partial, path)
        except (OSError, SafetensorError) as err:
            raise StoreError(f"{path} cannot be written: {err}") from err
        return path

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """Read a file back. Raises StoreError that lists all that is wrong in it."""
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("thrifty", "null"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
        except (OSError, SafetensorError, ValueError) as err:
            raise StoreError(f"{path} is no sparse adapter: {err}") from err
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            found = header.get("format") if isinstance(header, dict) else None
            raise StoreError(f"{path} is no sparse adapter of format {FORMAT} (its format: {found})")
        bad = _file_faults(header["tensors"], tensors)
        if bad:
            raise StoreError(f"{path}: {'; '.join(bad[:5])}")
        entries = {
            name: Entries(
                tensors[f"{name}.idx"],
                tensors[f"{name}.val"],
                tensors[f"{name}.base"],
                tuple(of["shape"]),
                of["checksum"],
            )
            for name, of in header["tensors"].items()
        }
        return cls(entries, header["info"])

    @torch.no_grad()
    def merge(self, model: nn.Module) -> None:
        """Write the tuned scalars into the model, which must be the base.

        Raises Incompatible, before anything is written, with every tensor that is missing, of another shape or dtype,
        or not the base's by its checksum.
        """
        weights = self._weights(model)
        bad = [f"{n}: {why}" for n, e in self.entries.items() if (why := _not_base(weights[n], e))]
        if bad:
            raise Incompatible(f"the model is not the adapter's base: {'; '.join(bad[:5])}{_more(bad)}")
        self._write(weights, {n: e.value for n, e in self.entries.items()})

    @torch.no_grad()
    def unmerge(self, model: nn.Module) -> None:
        """Put the base's own numbers back, bit for bit.

        Raises Incompatible, before anything is written, when the model does not hold this adapter's numbers, or would
        not be the base afterwards.
        """
        weights = self._weights(model)
        bad = [f"{n}: {why}" for n, e in self.entries.items() if (why := _not_merged(weights[n], e))]
        if bad:
            raise Incompatible(f"this adapter is not what is merged: {'; '.join(bad[:5])}{_more(bad)}")
        self._write(weights, {n: e.base for n, e in self.entries.items()})

    def _write(self, weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        for name, e in self.entries.items():
            flat = weights[name].detach().view(-1)
            flat.index_copy_(0, e.index.to(flat.device, torch.int64), values[name].to(flat.device, flat.dtype))

    def _weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        by_name = dict(model.named_parameters())
        bad = []
        for name, e in self.entries.items():
            p = by_name.get(name)
            if p is None:
                bad.append(f"{name} is missing")
            elif tuple(p.shape) != e.shape or p.dtype != e.base.dtype:
                bad.append(f"{name} is {tuple(p.shape)} {p.dtype}, not {e.shape} {e.base.dtype}")
        if bad:
            raise Incompatible(f"the adapter is of another model: {'; '.join(bad[:5])}{_more(bad)}")
        return {name: by_name[name] for name in self.entries}


def checksum(tensor: Tensor) -> str:
    """Return a checksum of a tensor's dtype, shape and bytes."""
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _not_base(weight: Tensor, e: Entries) -> str:
    """Return why a weight is not the base's, or ""."""
    if checksum(weight) == e.checksum:
        return ""
    now = weight.detach().cpu().view(-1)[e.index.to(torch.int64)]
    if torch.equal(now, e.value.to(now.dtype)):
        return "this adapter is merged already"
    where = "" if torch.equal(now, e.base) else f", and {int((now != e.base).sum())} of the tuned entries differ"
    return f"wrong base checksum{where}"


def _not_merged(weight: Tensor, e: Entries) -> str:
    now = weight.detach().cpu().clone()
    index = e.index.to(torch.int64)
    if not torch.equal(now.view(-1)[index], e.value.to(now.dtype)):
        return "the tuned entries hold other numbers"
    now.view(-1)[index] = e.base
    return "" if checksum(now) == e.checksum else "other entries were changed too (wrong base checksum)"


def _more(bad: Sequence[str]) -> str:
    return f" and {len(bad) - 5} more" if len(bad) > 5 else ""


def _file_faults(table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return what is wrong in a file: missing or surplus tensors, bad counts, indices out of order or range, NaN."""
    wanted = {f"{name}.{kind}" for name in table for kind in KINDS}
    bad = [f"{key} is missing" for key in sorted(wanted - set(tensors))]
    bad += [f"{key} does not belong here" for key in sorted(set(tensors) - wanted)]
    for name, of in table.items():
        found = [tensors.get(f"{name}.{kind}") for kind in KINDS]
        if any(t is None for t in found):
            continue
        index, value, base = (t for t in found if t is not None)
        size = size_of(of["shape"])
        if not index.shape == value.shape == base.shape or index.dim() != 1:
            bad.append(
                f"{name}: {tuple(index.shape)} indices, {tuple(value.shape)} values, {tuple(base.shape)} originals"
            )
        elif index.dtype not in (torch.int32, torch.int64) or (size >= INT32_LIMIT and index.dtype == torch.int32):
            bad.append(f"{name}: indices are {index.dtype}")
        elif len(index) and (int(index[0]) < 0 or int(index[-1]) >= size or not bool((index.diff() > 0).all())):
            bad.append(f"{name}: indices are not ascending inside [0, {size})")
        elif not bool(value.isfinite().all()):
            bad.append(f"{name}: values hold NaN or infinity")
    return bad


def combine(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Adapter:
    """Return one adapter for several of the same base: float32 changes add up on the union of the indices.

    weights: a factor for each adapter's change, default 1. A single adapter with the factor 1 comes back unchanged.
    Raises DataError without adapters, Incompatible when their bases differ.
    """
    factors = [1.0] * len(adapters) if weights is None else list(weights)
    if not adapters or len(factors) != len(adapters):
        raise DataError(f"combine needs adapters, and a weight for each: {len(adapters)} and {len(factors)} given")
    names = list(dict.fromkeys(name for a in adapters for name in a.entries))
    have = {name: [a.entries[name] for a in adapters if name in a.entries] for name in names}
    bad = [name for name, of in have.items() if not all(e.same_place(of[0]) for e in of)]
    if bad:
        raise Incompatible(f"the adapters have different bases: {', '.join(bad[:5])}{_more(bad)}")
    found = {}
    for name in names:
        found[name] = _sum([(a.entries[name], f) for a, f in zip(adapters, factors) if name in a.entries])
    return Adapter(found, {"combined": [a.info for a in adapters], "weights": factors})


def _sum(have: Sequence[tuple[Entries, float]]) -> Entries:
    """Return the union of the entries of one tensor, with summed changes."""
    first = have[0][0]
    if len(have) == 1 and have[0][1] == 1.0:
        return first
    index = torch.unique(torch.cat([e.index for e, _ in have]))
    base = torch.zeros(len(index), dtype=first.base.dtype)
    change = torch.zeros(len(index), dtype=torch.float32)
    for e, factor in have:
        place = torch.searchsorted(index, e.index)
        base[place] = e.base
        change[place] += factor * (e.value - e.base.float())
    return Entries(index, base.float() + change, base, first.shape, first.checksum)


def overlap(a: Selection | Adapter, b: Selection | Adapter) -> dict[str, Any]:
    """Return how many scalars two selections or adapters have in common, JSON.

    Keys: count_a, count_b, common, share (of the smaller one), jaccard, expected_share (of two random choices of these
    sizes in each tensor that both may choose from), tensors (name -> common).
    """
    of_a, of_b = _indices(a), _indices(b)
    common, expected = {}, 0.0
    for name in of_a.keys() & of_b.keys():
        (x, size), (y, _) = of_a[name], of_b[name]
        common[name] = int(torch.isin(x.to(torch.int64), y.to(torch.int64), assume_unique=True).sum())
        expected += len(x) * len(y) / size
    n_a, n_b = (sum(len(x) for x, _ in of.values()) for of in (of_a, of_b))
    both, smaller = sum(common.values()), max(1, min(n_a, n_b))
    return {
        "count_a": n_a,
        "count_b": n_b,
        "common": both,
        "share": both / smaller,
        "jaccard": both / max(1, n_a + n_b - both),
        "expected_share": expected / smaller,
        "tensors": {name: common[name] for name in of_a if name in common},
    }


def _indices(of: Selection | Adapter) -> dict[str, tuple[Tensor, int]]:
    if isinstance(of, Selection):
        return {name: (index, size_of(of.shapes[name])) for name, index in of.indices.items()}
    return {name: (e.index, size_of(e.shape)) for name, e in of.entries.items()}
