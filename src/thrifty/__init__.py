"""Neural networks that cost less: state a budget, get proven C for a microcontroller.

The public names are loaded when they are first used: `import thrifty` is quick and does not import torch.
The verbs that share their name with their package are imported from there: thrifty.capture.capture,
thrifty.compress.compress, thrifty.deploy.deploy.

>>> import thrifty
>>> thrifty.Budget(ram_bytes=16 * 1024).ram_bytes
16384
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from thrifty.budget import Budget as Budget
    from thrifty.compress import Lossless as Lossless
    from thrifty.compress import Prune as Prune
    from thrifty.compress import Quantize as Quantize
    from thrifty.compress import Train as Train
    from thrifty.cost import Cost as Cost
    from thrifty.cost import count as count
    from thrifty.data import load_task as load_task
    from thrifty.errors import ThriftyError as ThriftyError
    from thrifty.recipe import Recipe as Recipe
    from thrifty.report import Report as Report
    from thrifty.search import optimize as optimize
    from thrifty.store import load as load
    from thrifty.store import save as save
    from thrifty.task import Task as Task

_FROM = {
    "Budget": "budget",
    "Cost": "cost",
    "Lossless": "compress.lossless",
    "Prune": "compress.prune",
    "Quantize": "compress.quantize",
    "Recipe": "recipe",
    "Report": "report",
    "Task": "task",
    "ThriftyError": "errors",
    "Train": "compress.train",
    "count": "cost",
    "load": "store",
    "load_task": "data",
    "optimize": "search",
    "save": "store",
}
__all__ = [
    "Budget",
    "Cost",
    "Lossless",
    "Prune",
    "Quantize",
    "Recipe",
    "Report",
    "Task",
    "ThriftyError",
    "Train",
    "count",
    "load",
    "load_task",
    "optimize",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module 'thrifty' has no attribute '{name}'")
    return getattr(importlib.import_module(f"thrifty.{_FROM[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
