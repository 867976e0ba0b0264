"""Saving estimators: one safetensors file with a versioned description, read back strictly or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.errors import StoreError, need

Array = npt.NDArray[Any]

KEY = "thrifty"


def write(path: str | Path, kind: str, version: int, content: Mapping[str, Any], arrays: Mapping[str, Array]) -> Path:
    """Write arrays and a JSON description to a temporary file, then rename it to `path`; return the path.

    Raises StoreError when it cannot be written.
    """
    path = Path(path)
    header = {KEY: json.dumps({"kind": kind, "version": version, **content}, sort_keys=True)}
    plain = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    data = need("safetensors.numpy", extra="fewshot").save(plain, metadata=header)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as stream:
            stream.write(data)
        os.replace(stream.name, path)
    except OSError as err:
        raise StoreError(f"{kind} cannot be written to {path}: {err.strerror or err}") from err
    return path


def read(path: str | Path, kind: str, version: int, names: frozenset[str]) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return the description and the arrays of a file that `write` made.

    names: the arrays that it must have, no more and no fewer. Raises StoreError when the file is missing, no such
    file, of another kind or version, or has other arrays.
    """
    path = Path(path)
    if not path.is_file():
        raise StoreError(f"there is no file {path}")
    try:
        with need("safetensors", extra="fewshot").safe_open(str(path), framework="np") as stored:
            content = json.loads((stored.metadata() or {})[KEY])
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except Exception as err:  # safetensors has its own exception, made in Rust
        raise StoreError(f"{path} is no file that thrifty's estimators wrote: {err}") from err
    if not isinstance(content, dict) or content.pop("kind", None) != kind:
        raise StoreError(f"{path} holds another thing than a {kind}")
    if (found := content.pop("version", None)) != version:
        raise StoreError(f"{path} has version {found} of {kind}; this thrifty reads version {version}")
    if set(arrays) != names:
        raise StoreError(f"{path} has the arrays {sorted(arrays)}; a {kind} has {sorted(names)}")
    return content, arrays


def labels_out(labels: Array) -> dict[str, Any]:
    """Return labels as JSON. Raises StoreError for labels that are neither text, numbers nor truth values."""
    values = labels.tolist()
    if not all(isinstance(v, (str, int, float, bool)) for v in values):
        raise StoreError(f"labels of the types {sorted({type(v).__name__ for v in values})} cannot be saved")
    return {"dtype": labels.dtype.str if labels.dtype.kind != "O" else "O", "values": values}


def labels_in(content: Mapping[str, Any]) -> Array:
    """Return labels from JSON."""
    return np.array(content["values"], dtype=np.dtype(content["dtype"]))
