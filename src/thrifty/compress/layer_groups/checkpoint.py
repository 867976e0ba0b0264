"""A run of distillation that was cut off goes on where it stopped, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from thrifty.errors import StoreError
from thrifty.report import write_bytes


@dataclass
class Saved:
    """What a checkpoint holds."""

    stage: str
    step: int  # steps of the stage that were made
    history: list[dict[str, Any]]
    tensors: dict[str, Tensor] = field(repr=False)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose name starts with the prefix, without it."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors file that is written anew every so many steps.

    key: says which run it belongs to; a file of another run is refused.
    """

    path: Path
    key: str
    every: int = 200

    def due(self, step: int) -> bool:
        """Return whether to write after this step."""
        return (step + 1) % self.every == 0

    def write(
        self, stage: str, step: int, history: list[dict[str, Any]], modules: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer, other: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Write weights, the state of the optimiser and other tensors, whole or not at all."""
        tensors = {f"{n}.{k}": p.detach().clone() for n, m in modules.items() for k, p in m.named_parameters()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v.clone() for k, v in state.items()}
        tensors |= {k: v.clone() for k, v in other.items()}
        words = {"key": self.key, "stage": stage, "step": step, "history": history}
        write_bytes(self.path, save(tensors, {"thrifty": json.dumps(words)}))

    def read(self) -> Saved | None:
        """Return what the file holds, or None where there is none.

        Raises StoreError for a file that is no checkpoint, or one of another run.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(str(self.path), "pt") as file:
                words = json.loads(file.metadata()["thrifty"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dictionary
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as err:
            raise StoreError(f"{self.path} is no checkpoint of layer groups ({err})") from err
        if words["key"] != self.key:
            raise StoreError(f"{self.path} is the checkpoint of another run (other model, data, plan or groups)")
        return Saved(words["stage"], words["step"], words["history"], tensors)


def restore(saved: Saved, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Put saved weights and the saved state of the optimiser back."""
    with torch.no_grad():
        for name, module in modules.items():
            values = saved.under(f"{name}.")
            for key, parameter in module.named_parameters():
                parameter.copy_(values[key])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in saved.under("optimizer.").items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
