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
from typing import Any

import torch
from torch import fx, nn

from thrifty.capture.reader import Reader, base_name, module_of
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
    if not isinstance(model, nn.Module):
        raise DataError(f"the model is {type(model).__name__}; give a torch.nn.Module")
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
    wide = [n for n, p in model.named_parameters() if p.is_floating_point() and p.dtype != torch.float32]
    if wide:
        kinds = ", ".join(sorted({str(model.get_parameter(n).dtype) for n in wide}))
        raise DataError(f"weights of {kinds} in: {', '.join(wide)}; only float32 is supported, call model.float()")


def _export(model: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(model, (example,), strict=False)
            return program.run_decompositions({}) if _writes_shared(program.graph) else program
    except CaptureError:
        raise
    except Exception as err:
        raise CaptureError(f"torch.export cannot read the model: {_line(err)}{_place(err)}") from err


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's warnings, logs and dumps off the terminal: what matters of them is in the exception."""
    handlers = list(logging.getLogger("torch").handlers)
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler, level in zip(handlers, levels):
            handler.setLevel(level)


def _line(err: Exception) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    hint = "; forward must not branch on values" if "data-dependent" in str(err) else ""
    return (lines[0] if lines else type(err).__name__) + hint


def _place(err: Exception) -> str:
    """Return the last line of the user's own code in the traceback."""
    frames = [f for f in traceback.extract_tb(err.__traceback__) if not _OTHERS.search(f.filename)]
    return f" (at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""


def _writes_shared(graph: fx.Graph) -> bool:
    """Whether an operator writes to a tensor, or a part of one, that others read: torch must make it functional."""
    return any(_shared(source) for node in graph.nodes for source in _written(node))


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the arguments that an operator changes in place."""
    for place, argument in enumerate(_arguments(node)):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            if isinstance(value, fx.Node):
                yield value


def _shared(source: fx.Node) -> bool:
    """Whether a tensor, or one that it is a view of, is read more than once."""
    while len(source.users) == 1:
        aliases = any(a.alias_info is not None for a in _arguments(source)) or "dropout" in base_name(source)
        if not aliases or not isinstance(source.args[0], fx.Node):
            return False
        if len(source.args[0].users) > 1 and "dropout" in base_name(source):
            raise CaptureError(  # in eval mode they are one tensor; torch.export takes them for two
                f"'{source.name}' (module '{module_of(source)}') is changed in place, and what the dropout reads is "
                "read again; use inplace=False behind it"
            )
        source = source.args[0]
    return True


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    return () if schema is None else tuple(schema.arguments)
