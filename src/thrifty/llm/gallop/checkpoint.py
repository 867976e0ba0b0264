"""A tuning run on disk: the selection, masters and state, to go on from after an interrupt with the same result."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from thrifty.errors import StoreError
from thrifty.llm.gallop.optimizer import SparseAdamW
from thrifty.llm.gallop.selection import Select, Selection
from thrifty.llm.loading import Encoded

__all__ = ["Checkpoint", "fingerprint"]

SCHEMA = 1
SECONDS = 60.0  # between two writes


class Checkpoint:
    """The file of one run of `tune`, which writes it every minute and when it is interrupted.

    key: what the run depends on (settings, data, model); a file with another key is refused, naming what differs.
    """

    def __init__(self, path: str | Path, key: dict[str, Any], seconds: float = SECONDS) -> None:
        self.path, self.key, self.seconds = Path(path), json.loads(json.dumps(key)), seconds
        self._written = time.monotonic()

    def selection(self) -> Selection | None:
        """Return the selection of an earlier run, or None. Raises StoreError."""
        header, tensors = self._read()
        if header is None:
            return None
        of = header["selection"]
        indices = {name: tensors[f"index.{name}"] for name in of["shapes"]}
        shapes = {name: tuple(shape) for name, shape in of["shapes"].items()}
        return Selection(indices, shapes, Select(**of["settings"]), of["examples"])

    def load(self, optimizer: SparseAdamW) -> int:
        """Put masters and state of an earlier run into the optimiser; return how many updates it had made.

        The random state of dropout is put back too. 0 without an earlier run.
        """
        header, tensors = self._read()
        if header is None or not header["done"]:
            return 0
        prefix = "state."
        optimizer.load_state_dict({k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)})
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        return int(header["done"])

    def due(self) -> bool:
        """Return whether it is time to write."""
        return time.monotonic() - self._written >= self.seconds

    def write(
        self, selection: Selection, optimizer: SparseAdamW | None = None, done: int = 0,
        random: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Write the run as it is after `done` updates, whole or not at all. Raises StoreError.

        random: of `random_state`, as it was after the last update; now, where it is left out.
        """
        tensors = {f"index.{name}": index.contiguous() for name, index in selection.indices.items()}
        if optimizer is not None:
            tensors |= {f"state.{k}": t.detach().cpu().contiguous() for k, t in optimizer.state_dict().items()}
            tensors |= random_state() if random is None else random
        header = {
            "schema": SCHEMA, "done": done if optimizer is not None else 0, "key": self.key,
            "selection": {"shapes": selection.shapes, "settings": asdict(selection.settings),
                          "examples": selection.examples},
        }  # fmt: skip
        partial = self.path.with_name(f"{self.path.name}.partial")
        try:
            save_file(tensors, partial, metadata={"thrifty": json.dumps(header)})
            os.replace(partial, self.path)
        except (OSError, SafetensorError) as err:
            raise StoreError(f"{self.path} cannot be written: {err}") from err
        self._written = time.monotonic()

    def _read(self) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        if not self.path.exists():
            return None, {}
        try:
            with safe_open(str(self.path), framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("thrifty", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (OSError, SafetensorError, ValueError) as err:
            raise StoreError(f"{self.path} is no interrupted run: {err}; delete it, or name another file") from err
        if not isinstance(header, dict) or header.get("schema") != SCHEMA:
            raise StoreError(f"{self.path} is no interrupted run of schema {SCHEMA}; delete it, or name another file")
        differs = [k for k in self.key if header["key"].get(k) != self.key[k]]
        if differs:
            raise StoreError(
                f"{self.path} is an interrupted run with other {', '.join(differs)}; repeat that command, delete the "
                "file to begin anew, or name another file"
            )
        return header, tensors


def random_state() -> dict[str, Tensor]:
    """Return torch's random states: of the CPU, and of the GPU in use where there is one."""
    found = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["rng.cuda"] = torch.cuda.get_rng_state()
    return found


def fingerprint(model: nn.Module, encoded: Sequence[Encoded]) -> dict[str, str]:
    """Return short digests of a model's parameters and of data, for the key of a checkpoint."""
    of_model, of_data = hashlib.blake2b(digest_size=12), hashlib.blake2b(digest_size=12)
    for name, p in model.named_parameters():
        of_model.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        of_model.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    for e in encoded:
        of_data.update(f"{e.start} {e.ids}".encode())
    return {"model": of_model.hexdigest(), "data": of_data.hexdigest()}
