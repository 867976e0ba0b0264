"""Read a module into a Graph: torch.export once, then plain data in canonical operators."""

from __future__ import annotations

import copy
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch
from torch import fx, nn

from thrifty.capture.reader import VIEWS, Reader, base_name
from thrifty.capture.rules import RULES
from thrifty.capture.simplify import simplify, take_names
from thrifty.errors import CaptureError, DataError
from thrifty.graph import Graph

__all__ = ["capture"]

_OTHERS = re.compile(r"[/\\](torch|thrifty)[/\\]|^<")  # files in which the user's mistake is not


def capture(model: nn.Module, example: torch.Tensor) -> Graph:
    """Return the network of `model` as plain data.

    model: any module that torch.export can read; it is copied, put in eval mode and never changed.
    example: float32, (n, C, H, W), (n, C, L) or (n, F); only its first entry is used.
    Operators without a canonical name keep their aten name; count, ties and lower refuse them.
    Raises CaptureError when torch.export fails, DataError for an unusable example or NaN in the model.

    >>> graph = capture(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten()), torch.zeros(1, 1, 4, 4))
    >>> [node.op for node in graph], graph["relu_1"].shape
    (['input', 'conv', 'relu', 'flatten'], (2, 2, 2))
    """
    _check_example(example)
    twin = _twin(model)
    _check_weights(twin)
    program = _export(twin, example[:1].detach().cpu())
    reader = Reader(program, twin, RULES, rounding=getattr(model, "rounding", "half_up"))
    graph = simplify(reader.read())
    reference = getattr(model, "graph", None)
    return take_names(graph, reference) if isinstance(reference, Graph) else graph


def _check_example(example: torch.Tensor) -> None:
    if not isinstance(example, torch.Tensor) or example.dtype != torch.float32:
        kind = getattr(example, "dtype", type(example).__name__)
        raise DataError(f"the example is {kind}; give a float32 tensor with a batch axis, e.g. x[:1].float()")
    if example.dim() not in (2, 3, 4) or example.shape[0] < 1:
        raise DataError(
            f"the example has shape {tuple(example.shape)}; give (n, C, H, W), (n, C, L) or (n, features)"
        )


def _twin(model: nn.Module) -> nn.Module:
    try:
        twin = copy.deepcopy(model)
    except Exception as err:
        raise CaptureError(
            f"the model cannot be copied: {_line(err)}; give it tensors without a gradient history"
        ) from err
    for module in twin.modules():
        if hasattr(module, "hard"):
            setattr(module, "hard", False)  # noqa: B010 - a quantised model is exported in its soft form
    return twin.cpu().eval()


def _check_weights(model: nn.Module) -> None:
    bad = [
        name
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        raise DataError(f"NaN or infinite values in: {', '.join(bad)}; train again or load other weights")


def _export(model: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(model, (example,), strict=False)
            return program.run_decompositions({}) if _writes_shared(program.graph) else program
    except Exception as err:
        raise CaptureError(f"torch.export cannot read the model: {_line(err)}{_place(err)}") from err


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's warnings and dumps off the terminal: what matters of them is in the exception."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _line(err: Exception) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    hint = "; forward must not branch on values" if "data-dependent" in str(err) else ""
    return (lines[0] if lines else type(err).__name__) + hint


def _place(err: Exception) -> str:
    """Return the last line of the user's own code in the traceback."""
    frames = [f for f in traceback.extract_tb(err.__traceback__) if not _OTHERS.search(f.filename)]
    return f" (at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""


def _writes_shared(graph: fx.Graph) -> bool:
    """Whether an in-place operator writes to a tensor that others read: torch must make it functional."""
    for node in graph.nodes:
        if (
            node.op == "call_function"
            and base_name(node).endswith("_")
            and not base_name(node).startswith("_")
        ):
            source = node.args[0]
            while isinstance(source, fx.Node):
                if len(source.users) > 1:
                    return True
                source = (
                    source.args[0] if source.op == "call_function" and base_name(source) in VIEWS else None
                )
    return False
