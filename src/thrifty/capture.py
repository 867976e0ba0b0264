"""Read a module into a Graph: torch.export once, then plain data in canonical operators."""

from __future__ import annotations

import copy
import operator
import re
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from thrifty.arith import Format
from thrifty.errors import CaptureError, DataError
from thrifty.graph import FUSABLE, Array, Graph, Node

# aten operators that hand on what they get (in eval mode)
_SAME = frozenset(
    "clone contiguous alias detach detach_ lift_fresh_copy lift_fresh identity dropout dropout_ feature_dropout "
    "alpha_dropout _to_copy to expand_as".split()
)
_VIEWS = frozenset("view reshape _unsafe_view flatten squeeze unsqueeze unflatten view_copy".split())
_C_WORDS = frozenset(
    "auto break case char const continue default do double else enum extern float for goto if inline int long main "
    "register restrict return short signed sizeof static struct switch typedef union unsigned void volatile while".split()
)


def capture(model: nn.Module, example: torch.Tensor) -> Graph:
    """Return the network of `model` as plain data.

    model: any module that torch.export can read; it is copied, put in eval mode and never changed.
    example: float32, (n, C, H, W), (n, C, L) or (n, F); only its first entry is used.
    Operators without a canonical name keep their aten name; count, ties and lower refuse them.
    Raises CaptureError when torch.export fails, DataError when a tensor of the model or the example is not usable.

    >>> graph = capture(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten()), torch.zeros(1, 1, 4, 4))
    >>> [node.op for node in graph], graph["relu_1"].shape
    (['input', 'conv', 'relu', 'flatten'], (2, 2, 2))
    """
    _check_example(example)
    twin = _twin(model)
    _check_weights(twin)
    program = _export(twin, example[:1].detach().cpu())
    reader = _Reader(program, twin, rounding=getattr(model, "rounding", "half_up"))
    graph = _simplify(reader.read())
    reference = getattr(model, "graph", None)
    return _take_names(graph, reference) if isinstance(reference, Graph) else graph


# --- before torch.export ----------------------------------------------------------------------------------------


def _check_example(example: torch.Tensor) -> None:
    if not isinstance(example, torch.Tensor) or example.dtype != torch.float32:
        kind = getattr(example, "dtype", type(example).__name__)
        raise DataError(f"the example is {kind}; give a float32 tensor with a batch axis, e.g. x[:1].float()")
    if example.dim() not in (2, 3, 4) or example.shape[0] < 1:
        raise DataError(f"the example has shape {tuple(example.shape)}; give (n, C, H, W), (n, C, L) or (n, features)")


def _twin(model: nn.Module) -> nn.Module:
    try:
        twin = copy.deepcopy(model)
    except Exception as err:
        raise CaptureError(f"the model cannot be copied: {_line(err)}; give it tensors without a gradient history") from err
    for module in twin.modules():
        if hasattr(module, "hard"):
            module.hard = False  # a quantised model is exported in its soft form
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
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (example,), strict=False)
            return program.run_decompositions({}) if _writes_shared(program.graph) else program
    except Exception as err:
        raise CaptureError(f"torch.export cannot read the model: {_line(err)}{_place(err)}") from err


def _line(err: Exception) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return lines[0] if lines else type(err).__name__


def _place(err: Exception) -> str:
    """Return the last line of the user's own code in the traceback."""
    frames = [f for f in traceback.extract_tb(err.__traceback__) if not re.search(r"[/\\]torch[/\\]|capture\.py$", f.filename)]
    found = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', str(err))
    if frames:
        return f" (at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})"
    return f" (at {found[-1][0]}:{found[-1][1]})" if found else ""


def _writes_shared(graph: fx.Graph) -> bool:
    """Whether an in-place operator writes to a tensor that others read, so that torch must make it functional."""
    for node in graph.nodes:
        if node.op == "call_function" and _base(node).endswith("_") and not _base(node).startswith("_"):
            source = node.args[0]
            while isinstance(source, fx.Node):
                if len(source.users) > 1:
                    return True
                source = source.args[0] if source.op == "call_function" and _base(source) in _VIEWS else None
    return False


def _base(node: fx.Node) -> str:
    """Return the operator's name without namespace and overload ("conv2d")."""
    return _target(node).split(".")[1] if _target(node).count(".") else _target(node)


def _target(node: fx.Node) -> str:
    """Return the full name of an operator ("aten.conv2d.default", "thrifty.fake_quantize.default")."""
    target = node.target
    return "getitem" if target is operator.getitem else str(target)


# --- from fx nodes to canonical nodes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Const:
    """A tensor that does not depend on the input; `name` is the parameter that it comes from."""

    value: torch.Tensor
    name: str = ""
    turned: bool = False  # the transpose of that parameter
    format: Format | None = None


@dataclass(frozen=True)
class _Ref:
    """The output of a node of the graph."""

    name: str
    shape: tuple[int, ...]  # without the batch axis


class _Reader:
    """Walks the exported operators in order and appends canonical nodes."""

    def __init__(self, program: torch.export.ExportedProgram, model: nn.Module, rounding: str) -> None:
        self.program = program
        self.rounding = rounding
        self.leaves = {name for name, m in model.named_modules() if not dict(m.named_children()) or hasattr(m, "parametrizations")}
        self.nodes: dict[str, Node] = {}
        self.env: dict[fx.Node, Any] = {}

    def read(self) -> Graph:
        """Return the graph, not yet simplified."""
        self._bind_placeholders()
        outputs: list[str] = []
        for node in self.program.graph.nodes:
            if node.op == "get_attr":
                self.env[node] = _Const(_attribute(self.program.graph_module, str(node.target)))
            elif node.op == "call_function":
                self.env[node] = self._call(node)
            elif node.op == "output":
                outputs = [self._output(v) for v in fx.node.map_arg(node.args[0], lambda n: self.env[n]) if v is not None]
        return Graph(tuple(self.nodes.values()), tuple(outputs))

    def _bind_placeholders(self) -> None:
        signature = self.program.graph_signature
        tensors = {**self.program.state_dict, **self.program.constants}
        sources = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in sources:
                    name = sources[node.name]
                    self.env[node] = _Const(tensors[name].detach(), _public_name(name))
                else:
                    self.env[node] = self.emit("input", (), node, name="input")

    def _output(self, value: Any) -> str:
        if isinstance(value, _Ref):
            return value.name
        raise CaptureError("an output of the model does not depend on its input; return only what the network computes")

    def _call(self, node: fx.Node) -> Any:
        args = fx.node.map_arg(node.args, lambda n: self.env[n])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: self.env[n])
        target, base = _target(node), _base(node)
        if target == "getitem":
            return args[0][args[1]] if isinstance(args[0], tuple) else self._unknown(node)
        if target.startswith("thrifty.fake_quantize"):
            return self._fake_quantize(node, *_bound(node, args, kwargs))
        if not _refs((args, kwargs)):
            return self._constant(node, args, kwargs)
        rule = RULES.get(base)
        if rule is None or not target.startswith("aten."):
            return self._unknown(node)
        found = rule(self, node, *_bound(node, args, kwargs))
        return self._unknown(node) if found is None else found

    def _unknown(self, node: fx.Node) -> _Ref:
        """Keep an operator without a rule under its aten name."""
        values = [self.env[n] for n in node.all_input_nodes]
        refs = _refs(values)
        consts = {f"arg{i}": _numpy(c.value) for i, c in enumerate(v for v in values if isinstance(v, _Const))}
        return self.emit(_target(node), refs, node, constants=consts)

    def _constant(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Evaluate what depends on parameters only."""
        origins = [c for c in _leaves((args, kwargs)) if isinstance(c, _Const)]
        with torch.no_grad():
            out = node.target(*_unwrap(args), **_unwrap(kwargs))  # type: ignore[operator]
        if isinstance(out, torch.Tensor) and _base(node) in ("t", "transpose", "permute", "numpy_T") and out.dim() == 2:
            return replace(origins[0], value=out, turned=origins[0].turned ^ (out.shape != () and _turns(node)))
        if isinstance(out, torch.Tensor):
            return _Const(out, _origin(origins, out))
        return tuple(_Const(o, _origin(origins, o)) if isinstance(o, torch.Tensor) else o for o in out) if isinstance(out, tuple) else out

    def _fake_quantize(self, node: fx.Node, x: Any, scale: Any, bits: int, signed: bool, axis: int) -> Any:
        if not isinstance(scale, _Const):
            raise CaptureError(f"the scale of '{node.name}' depends on the input; scales must be constant")
        fmt = Format(int(bits), bool(signed), tuple(float(s) for s in scale.value.detach().reshape(-1).float()))
        if isinstance(x, _Const):
            with torch.no_grad():
                value = node.target(x.value, scale.value, bits, signed, axis)  # type: ignore[operator]
            return _Const(value, x.name, fmt)
        producer = self.nodes[x.name]
        if producer.format not in (None, fmt):
            raise CaptureError(f"'{x.name}' (module '{producer.module}') is quantised twice, with different formats")
        source = node.args[0]
        if isinstance(source, fx.Node) and any(not _target(u).startswith("thrifty.fake_quantize") for u in source.users):
            raise CaptureError(f"'{x.name}' (module '{producer.module}') is read both before and after its quantisation")
        self.nodes[x.name] = replace(producer, format=fmt)
        return x

    def emit(
        self,
        op: str,
        inputs: Sequence[_Ref],
        node: fx.Node,
        attrs: Mapping[str, Any] | None = None,
        weights: Mapping[str, _Const | None] | None = None,
        constants: Mapping[str, Array] | None = None,
        shape: tuple[int, ...] | None = None,
        name: str = "",
    ) -> _Ref:
        """Append a node and return a reference to its output; `weights` become constants and params."""
        value = node.meta.get("val")
        value = value[0] if isinstance(value, (tuple, list)) else value
        held = {k: c for k, c in (weights or {}).items() if c is not None}
        module = _module_of(node) if "weight" not in held else _owner(held["weight"].name) or _module_of(node)
        known = dict(attrs or {})
        if op in ("conv", "linear", "avgpool"):
            known["rounding"] = self.rounding
        made = Node(
            name=self._unique(name or self._name(op, module)),
            op=op,
            inputs=tuple(r.name for r in inputs),
            attrs=known,
            shape=_shape(value) if shape is None else shape,
            dtype=str(getattr(value, "dtype", torch.float32)).removeprefix("torch."),
            module=module,
            constants={**{k: _numpy(c.value) for k, c in held.items()}, **(constants or {})},
            params={k: c.name for k, c in held.items() if c.name},
            weight_format=held["weight"].format if "weight" in held else None,
        )
        self.nodes[made.name] = made
        return _Ref(made.name, made.shape)

    def _name(self, op: str, module: str) -> str:
        path = re.sub(r"\W", "_", module, flags=re.ASCII)
        short = op.split(".")[1] if "." in op else op
        if module in self.leaves and path and not path[0].isdigit():
            return path
        return re.sub(r"\W", "_", f"{short}_{path}" if path[:1].isdigit() else f"{path}_{short}".lstrip("_"), flags=re.ASCII)

    def _unique(self, name: str) -> str:
        name = name + "_" if name in _C_WORDS else name
        found, k = name, 1
        while found in self.nodes:
            k += 1
            found = f"{name}_{k}"
        return found


def _attribute(module: nn.Module, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _public_name(name: str) -> str:
    """Return "layer.weight" for "layer.parametrizations.weight.original"."""
    return re.sub(r"(^|\.)parametrizations\.(\w+)\.original\d*$", r"\1\2", name)


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _turns(node: fx.Node) -> bool:
    """Whether a transposition of a matrix really exchanges its axes."""
    dims = [d for arg in node.args[1:] for d in (arg if isinstance(arg, (list, tuple)) else [arg])]
    if _base(node) == "permute":
        return [int(d) % 2 for d in dims if isinstance(d, int)] == [1, 0]
    return _base(node) != "transpose" or len({int(d) % 2 for d in dims if isinstance(d, int)}) == 2


def _origin(origins: Sequence[_Const], out: torch.Tensor) -> str:
    """Return the name of the parameter that a computed constant stands for."""
    same = [c.name for c in origins if c.name and not c.turned and c.value.shape == out.shape]
    return same[0] if same else ""


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, (tuple, list)):
        return [leaf for item in tree for leaf in _leaves(item)]
    if isinstance(tree, dict):
        return [leaf for item in tree.values() for leaf in _leaves(item)]
    return [tree]


def _refs(tree: Any) -> list[_Ref]:
    return [leaf for leaf in _leaves(tree) if isinstance(leaf, _Ref)]


def _unwrap(tree: Any) -> Any:
    if isinstance(tree, (tuple, list)):
        return type(tree)(_unwrap(item) for item in tree) if type(tree) in (tuple, list) else [_unwrap(i) for i in tree]
    if isinstance(tree, dict):
        return {k: _unwrap(v) for k, v in tree.items()}
    return tree.value if isinstance(tree, _Const) else tree


def _bound(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return every argument of an operator in order, defaults filled in from its schema."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    filled = list(args)
    for argument in schema[len(filled) :]:
        filled.append(kwargs.get(argument.name, argument.default_value if argument.has_default_value() else None))
    return filled


def _shape(value: Any) -> tuple[int, ...]:
    shape = tuple(int(s) for s in getattr(value, "shape", ()))
    return shape[1:] if shape[:1] == (1,) else shape


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return re.sub(r"@\d+", "", path).removeprefix("L['self'].").removeprefix("L__self___")


def _numpy(value: torch.Tensor) -> Array:
    value = value.detach()
    return np.array((value.float() if value.is_floating_point() else value).cpu().numpy())


# --- one rule per aten operator: (reader, fx node, arguments in schema order) -> value, or None for "no such form" ----

Rule = Callable[..., Any]


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    items = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return tuple(items * n) if len(items) == 1 else tuple(items)


def _conv(r: _Reader, node: fx.Node, x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Any:
    if not isinstance(x, _Ref) or not isinstance(w, _Const) or isinstance(b, _Ref):
        return None
    n = w.value.dim() - 2
    if n not in (1, 2) or len(x.shape) != n + 1:
        return None
    dilation = _tuple(dilation, n)
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, w.value.shape[2:])]
        pads = tuple((t // 2, t - t // 2) for t in total)
    else:
        pads = tuple((p, p) for p in _tuple(padding, n))
    attrs = {"stride": _tuple(stride, n), "padding": pads, "dilation": dilation, "groups": int(groups)}
    return r.emit("conv", [x], node, attrs, {"weight": w, "bias": b})


def _convolution(r: _Reader, node: fx.Node, x: Any, w: Any, b: Any, s: Any, p: Any, d: Any, transposed: bool, _o: Any, g: int) -> Any:
    return None if transposed else _conv(r, node, x, w, b, s, p, d, g)


def _linear(r: _Reader, node: fx.Node, x: Any, w: Any, b: Any) -> Any:
    if not isinstance(x, _Ref) or not isinstance(w, _Const) or isinstance(b, _Ref) or len(x.shape) != 1 or w.value.dim() != 2:
        return None
    return r.emit("linear", [x], node, weights={"weight": w, "bias": b})


def _matmul(r: _Reader, node: fx.Node, x: Any, w: Any) -> Any:
    if not isinstance(w, _Const) or w.value.dim() != 2:
        return None
    return _linear(r, node, x, _turn(w), None)


def _addmm(r: _Reader, node: fx.Node, b: Any, x: Any, w: Any, beta: Any, alpha: Any) -> Any:
    if not isinstance(w, _Const) or beta != 1 or alpha != 1 or not isinstance(b, _Const) or b.value.dim() != 1:
        return None
    return _linear(r, node, x, _turn(w), b)


def _turn(w: _Const) -> _Const:
    """Return the transpose; a matrix that is not stored as (outputs, inputs) loses its name."""
    return _Const(w.value.t(), w.name if w.turned else "", format=w.format if w.turned else None)


def _batch_norm(
    r: _Reader, node: fx.Node, x: Any, w: Any, b: Any, mean: Any, var: Any, training: bool, _m: Any, eps: float, *_: Any
) -> Any:
    if training or not isinstance(x, _Ref) or not isinstance(mean, _Const) or not isinstance(var, _Const):
        return None
    scale = 1.0 / np.sqrt(_numpy(var.value).astype(np.float64) + eps)
    scale = scale * _numpy(w.value) if w is not None else scale
    shift = (_numpy(b.value) if b is not None else 0.0) - _numpy(mean.value) * scale
    ref = r.emit("batchnorm", [x], node, shape=x.shape, constants={"scale": _f32(scale), "shift": _f32(shift)})
    names = {"weight": w, "bias": b, "running_mean": mean, "running_var": var}
    params = {k: c.name for k, c in names.items() if c is not None and c.name}
    made = r.nodes[ref.name]
    r.nodes[ref.name] = replace(made, params=params, module=_owner(params.get("running_mean", "")) or made.module)
    return ref


def _native_batch_norm(r: _Reader, node: fx.Node, x: Any, w: Any, b: Any, mean: Any, var: Any, m: Any, eps: float) -> Any:
    return (_batch_norm(r, node, x, w, b, mean, var, False, m, eps) or r._unknown(node), None, None)


def _f32(value: Any) -> Array:
    return np.asarray(value, dtype=np.float32)


def _add(r: _Reader, node: fx.Node, a: Any, b: Any, alpha: Any) -> Any:
    if isinstance(a, _Ref) and isinstance(b, _Ref):
        return r.emit("add", [a, b], node) if alpha == 1 and a.shape == b.shape else None
    if isinstance(a, _Ref):
        return _affine(r, node, a, 1.0, b, alpha)
    return _affine(r, node, b, alpha, a, 1.0)


def _sub(r: _Reader, node: fx.Node, a: Any, b: Any, alpha: Any) -> Any:
    if isinstance(a, _Ref) and isinstance(b, _Ref):
        return None
    return _affine(r, node, a, 1.0, b, -alpha) if isinstance(a, _Ref) else _affine(r, node, b, -alpha, a, 1.0)


def _rsub(r: _Reader, node: fx.Node, a: Any, b: Any, alpha: Any) -> Any:
    return _sub(r, node, b, a, alpha)


def _mul(r: _Reader, node: fx.Node, a: Any, b: Any) -> Any:
    if isinstance(a, _Ref) and isinstance(b, _Ref):
        return None
    return _affine(r, node, a, b, 0.0, 1.0) if isinstance(a, _Ref) else _affine(r, node, b, a, 0.0, 1.0)


def _div(r: _Reader, node: fx.Node, a: Any, b: Any, *mode: Any) -> Any:
    if not isinstance(a, _Ref) or isinstance(b, _Ref) or (mode and mode[0] is not None):
        return None
    inverse = _Const(1.0 / b.value) if isinstance(b, _Const) else 1.0 / b
    return _affine(r, node, a, inverse, 0.0, 1.0)


def _affine(r: _Reader, node: fx.Node, x: _Ref, scale: Any, shift: Any, factor: Any) -> Any:
    """Emit x * scale + shift * factor as a batch norm, when both constants run along the channels."""
    scale_c, shift_c = _per_channel(scale, x.shape), _per_channel(shift, x.shape)
    if scale_c is None or shift_c is None or not x.shape or _shape(node.meta.get("val")) != x.shape:
        return None
    constants = {"scale": _f32(scale_c * np.ones(x.shape[0])), "shift": _f32(shift_c * factor * np.ones(x.shape[0]))}
    return r.emit("batchnorm", [x], node, constants=constants)


def _per_channel(value: Any, shape: tuple[int, ...]) -> Array | None:
    if not isinstance(value, _Const):
        return np.float64(value)  # type: ignore[return-value]
    array = _numpy(value.value).astype(np.float64)
    if array.size == 1:
        return array.reshape(())
    array = array.reshape((1,) * (len(shape) + 1 - array.ndim) + array.shape)
    return array.reshape(-1) if array.shape == (1, shape[0], *(1,) * (len(shape) - 1)) else None


def _cat(r: _Reader, node: fx.Node, tensors: Sequence[Any], dim: int) -> Any:
    if not all(isinstance(t, _Ref) for t in tensors):
        return None
    if len(tensors) == 1:
        return tensors[0]
    axis = _axis(dim, tensors[0].shape)
    return None if axis is None else r.emit("concat", list(tensors), node, {"axis": axis})


def _axis(dim: int, shape: tuple[int, ...]) -> int | None:
    """Return the axis without the batch, or None when it is the batch axis."""
    axis = dim - 1 if dim >= 0 else dim + len(shape)
    return axis if axis >= 0 else None


def _unary(op: str) -> Rule:
    return lambda r, node, x, *rest: r.emit(op, [x], node) if isinstance(x, _Ref) else None


def _clamp(r: _Reader, node: fx.Node, x: Any, low: Any, high: Any = None) -> Any:
    if isinstance(low, (int, float)) and low == 0:
        if high is None or high == float("inf"):
            return r.emit("relu", [x], node)
        if isinstance(high, (int, float)) and high == 6:
            return r.emit("relu6", [x], node)
    return None


def _threshold(r: _Reader, node: fx.Node, x: Any, threshold: Any, value: Any) -> Any:
    return r.emit("relu", [x], node) if threshold == 0 and value == 0 else None


def _same(r: _Reader, node: fx.Node, x: Any, *rest: Any) -> Any:
    value = node.meta["val"]
    kept = isinstance(x, _Ref) and _shape(value) == x.shape and str(value.dtype).endswith(r.nodes[x.name].dtype)
    trains = _base(node).endswith(("dropout", "dropout_")) and rest[1]
    return x if kept and not trains else None


def _view(r: _Reader, node: fx.Node, x: Any, *rest: Any) -> Any:
    value = node.meta["val"]
    shape = tuple(int(s) for s in value.shape)
    if shape[:1] != (1,):
        return None
    return _viewed(r, node, x, shape[1:])


def _viewed(r: _Reader, node: fx.Node, x: _Ref, shape: tuple[int, ...]) -> _Ref:
    producer = r.nodes[x.name]
    if producer.op == "view" and producer.format is None:
        before = producer.inputs[0]
        x = _Ref(before, r.nodes[before].shape)
    if x.shape == shape:
        return x
    short = r._name("flatten" if len(shape) == 1 else "view", _module_of(node))
    return r.emit("view", [x], node, shape=shape, name=short)


def _permute(r: _Reader, node: fx.Node, x: Any, dims: Sequence[int]) -> Any:
    rank = len(x.shape) + 1
    order = [d % rank for d in dims]
    if order[0] != 0:
        return None
    axes = tuple(d - 1 for d in order[1:])
    return x if axes == tuple(range(rank - 1)) else r.emit("permute", [x], node, {"axes": axes})


def _transpose(r: _Reader, node: fx.Node, x: Any, a: int, b: int) -> Any:
    order = list(range(len(x.shape) + 1))
    order[a], order[b] = order[b], order[a]
    return _permute(r, node, x, order)


def _movedim(r: _Reader, node: fx.Node, x: Any, source: Any, target: Any) -> Any:
    rank = len(x.shape) + 1
    from_axes, to_axes = [s % rank for s in _tuple(source, 1)], [t % rank for t in _tuple(target, 1)]
    order = [axis for axis in range(rank) if axis not in from_axes]
    for to_axis, from_axis in sorted(zip(to_axes, from_axes)):
        order.insert(to_axis, from_axis)
    return _permute(r, node, x, order)


def _pad(r: _Reader, node: fx.Node, x: Any, pads: Sequence[int], mode: Any = "constant", value: Any = None) -> Any:
    spatial = len(x.shape) - 1
    amounts = [int(p) for p in pads] + [0] * (2 * spatial - len(pads))  # last axis first
    if mode != "constant" or value not in (None, 0) or min(amounts, default=0) < 0 or any(amounts[2 * spatial :]):
        return None
    padding = tuple((amounts[2 * k], amounts[2 * k + 1]) for k in reversed(range(spatial)))
    return r.emit("pad", [x], node, {"padding": padding}) if any(amounts) else x


def _constant_pad(r: _Reader, node: fx.Node, x: Any, pads: Sequence[int], value: Any = 0) -> Any:
    return _pad(r, node, x, pads, "constant", value)


def _max_pool(r: _Reader, node: fx.Node, x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> Any:
    n = len(x.shape) - 1
    if any(d != 1 for d in _tuple(dilation, n)):
        return None
    return _pool(r, node, "maxpool", x, kernel, stride, padding, ceil, {})


def _max_pool_pair(r: _Reader, node: fx.Node, *args: Any) -> Any:
    found = _max_pool(r, node, *args)
    return None if found is None else (found, None)


def _avg_pool(
    r: _Reader, node: fx.Node, x: Any, kernel: Any, stride: Any, padding: Any, ceil: bool, include: bool, divisor: Any = None
) -> Any:
    return None if divisor is not None else _pool(r, node, "avgpool", x, kernel, stride, padding, ceil, {"include": include})


def _pool(
    r: _Reader, node: fx.Node, op: str, x: Any, kernel: Any, stride: Any, padding: Any, ceil: bool, extra: Mapping[str, Any]
) -> Any:
    n = len(x.shape) - 1
    if n not in (1, 2):
        return None
    kernel = _tuple(kernel, n)
    stride = _tuple(stride, n) if stride else kernel
    pads = tuple((p, p) for p in _tuple(padding, n))
    value = node.meta["val"]
    shape = _shape(value[0] if isinstance(value, (tuple, list)) else value)
    floor = tuple((s + a + b - k) // t + 1 for s, (a, b), k, t in zip(x.shape[1:], pads, kernel, stride))
    return _emit_pool(r, node, op, x, shape, kernel, stride, pads, bool(ceil) and floor != shape[1:], bool(extra.get("include", True)))


def _emit_pool(
    r: _Reader, node: fx.Node, op: str, x: _Ref, shape: tuple[int, ...], kernel: Any, stride: Any, pads: Any = None,
    ceil: bool = False, include: bool = True,
) -> _Ref:  # fmt: skip
    pads = pads or tuple((0, 0) for _ in kernel)
    attrs = {"kernel": tuple(kernel), "stride": tuple(stride), "padding": pads, "ceil": ceil}
    if op == "avgpool":
        attrs["count_include_pad"] = include or not any(p for pair in pads for p in pair)
    if all(k == 1 for k in kernel) and all(s == 1 for s in stride):
        return x
    return r.emit(op, [x], node, attrs, shape=shape)


def _adaptive(op: str, pair: bool = False) -> Rule:
    def rule(r: _Reader, node: fx.Node, x: Any, size: Any) -> Any:
        spatial = x.shape[1:]
        out = tuple(s if o is None else int(o) for o, s in zip(_tuple(size, len(spatial)), spatial))
        if len(spatial) not in (1, 2) or any(s % o for s, o in zip(spatial, out)):
            return None
        kernel = tuple(s // o for s, o in zip(spatial, out))
        found = _emit_pool(r, node, op, x, (x.shape[0], *out), kernel, kernel)
        return (found, None) if pair else found

    return rule


def _reduce(op: str) -> Rule:
    """Mean or maximum over spatial axes: a pool over the whole extent of these axes."""

    def rule(r: _Reader, node: fx.Node, x: Any, dims: Any, keepdim: bool = False, *rest: Any) -> Any:
        if not isinstance(x, _Ref) or dims is None or len(x.shape) not in (2, 3) or (rest and rest[0] is not None):
            return None
        axes = {_axis(d, x.shape) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
        if not axes or None in axes or 0 in axes:
            return None
        kernel = tuple(s if i + 1 in axes else 1 for i, s in enumerate(x.shape[1:]))
        kept = (x.shape[0], *(1 if i + 1 in axes else s for i, s in enumerate(x.shape[1:])))
        pooled = _emit_pool(r, node, op, x, kept, kernel, kernel)
        return pooled if keepdim else _viewed(r, node, pooled, tuple(s for i, s in enumerate(kept) if i not in axes))

    return rule


def _max_dim(r: _Reader, node: fx.Node, x: Any, *rest: Any) -> Any:
    if any(u for u in node.users if u.args[1] != 0 and u.users) or len(rest) < 2:
        return None
    found = _reduce("maxpool")(r, node, x, rest[0], rest[1])
    return None if found is None else (found, None)


def _softmax(r: _Reader, node: fx.Node, x: Any, dim: int, *rest: Any) -> Any:
    axis = _axis(dim, x.shape)
    return None if axis is None else r.emit("softmax", [x], node, {"axis": axis})


def _argmax(r: _Reader, node: fx.Node, x: Any, dim: Any, keepdim: bool = False) -> Any:
    if dim is None and len(x.shape) != 1:
        return None
    axis = 0 if dim is None else _axis(dim, x.shape)
    return None if axis is None or dim is None else r.emit("argmax", [x], node, {"axis": axis, "keepdim": bool(keepdim)})


RULES: dict[str, Rule] = {
    "conv1d": _conv, "conv2d": _conv, "convolution": _convolution,
    "linear": _linear, "matmul": _matmul, "mm": _matmul, "addmm": _addmm,
    "batch_norm": _batch_norm, "_native_batch_norm_legit_no_training": _native_batch_norm,
    "add": _add, "add_": _add, "sub": _sub, "sub_": _sub, "rsub": _rsub,
    "mul": _mul, "mul_": _mul, "div": _div, "div_": _div,
    "cat": _cat, "concat": _cat, "concatenate": _cat,
    "relu": _unary("relu"), "relu_": _unary("relu"), "relu6": _unary("relu6"), "relu6_": _unary("relu6"),
    "hardswish": _unary("hardswish"), "hardswish_": _unary("hardswish"),
    "hardtanh": _clamp, "hardtanh_": _clamp, "clamp": _clamp, "clamp_": _clamp,
    "clamp_min": _clamp, "clamp_min_": _clamp, "threshold": _threshold, "threshold_": _threshold,
    "softmax": _softmax, "_softmax": _softmax, "argmax": _argmax,
    "max_pool1d": _max_pool, "max_pool2d": _max_pool, "max_pool2d_with_indices": _max_pool_pair,
    "avg_pool1d": _avg_pool, "avg_pool2d": _avg_pool,
    "adaptive_avg_pool1d": _adaptive("avgpool"), "adaptive_avg_pool2d": _adaptive("avgpool"),
    "_adaptive_avg_pool2d": _adaptive("avgpool"),
    "adaptive_max_pool1d": _adaptive("maxpool", pair=True), "adaptive_max_pool2d": _adaptive("maxpool", pair=True),
    "mean": _reduce("avgpool"), "amax": _reduce("maxpool"), "max": _max_dim,
    "permute": _permute, "transpose": _transpose, "swapaxes": _transpose, "movedim": _movedim,
    "pad": _pad, "constant_pad_nd": _constant_pad,
    **{name: _same for name in _SAME}, **{name: _view for name in _VIEWS},
}  # fmt: skip


# --- graph to graph -------------------------------------------------------------------------------------------------


def _simplify(graph: Graph) -> Graph:
    """Apply the exact rewrites until nothing changes, and drop what nobody reads."""
    graph = _name_views(graph)
    for rewrite in (_fold_pads, _merge_affine, _raise_relu):
        while (changed := rewrite(graph)) is not None:
            graph = changed
    return _alive(graph)


def _name_views(graph: Graph) -> Graph:
    """A reshape to a vector is a flatten; any other keeps an aten name, to be refused where it matters."""
    named = {n.name: replace(n, op="flatten" if len(n.shape) == 1 else "aten.view.default") for n in graph if n.op == "view"}
    return graph.with_nodes(named)


def _fold_pads(graph: Graph) -> Graph | None:
    for node in graph:
        pad = graph[node.inputs[0]] if node.op == "conv" else None
        if pad is not None and pad.op == "pad" and pad.format is None:
            both = tuple((a + c, b + d) for (a, b), (c, d) in zip(pad.attrs["padding"], node.attrs["padding"]))
            return graph.with_nodes({node.name: replace(node, inputs=pad.inputs, attrs={**node.attrs, "padding": both})})
    return None


def _merge_affine(graph: Graph) -> Graph | None:
    """Merge two batch norms without parameters (constants in the code of the model) into one."""
    for node in graph:
        first = graph[node.inputs[0]] if node.op == "batchnorm" and not node.params else None
        if first is None or first.op != "batchnorm" or first.params or first.format or len(graph.consumers[first.name]) > 1:
            continue
        if first.name in graph.outputs:
            continue
        a, b = first.constants, node.constants
        merged = {"scale": a["scale"] * b["scale"], "shift": a["shift"] * b["scale"] + b["shift"]}
        return _alive(graph.with_nodes({node.name: replace(node, inputs=first.inputs, constants=merged)}))
    return None


def _raise_relu(graph: Graph) -> Graph | None:
    """Move an activation in front of a pool, flatten or permute, so that it fuses with the producer of the values."""
    for node in graph:
        if node.op not in ("relu", "relu6"):
            continue
        mover = graph[node.inputs[0]]
        if mover.op not in ("maxpool", "flatten", "permute") or mover.format or mover.name in graph.outputs:
            continue
        if len(graph.consumers[mover.name]) > 1:
            continue
        return _swap(graph, graph[mover.inputs[0]], mover, node)
    return None


def _swap(graph: Graph, source: Node, mover: Node, relu: Node) -> Graph | None:
    if not _would_fuse(graph, source, mover):
        return None
    before = replace(relu, inputs=(source.name,), shape=source.shape, format=None)
    after = replace(mover, inputs=(relu.name,), format=relu.format)
    order: list[Node] = []
    for node in graph:
        if node.name == mover.name:
            order += [before, after]
        elif node.name != relu.name:
            inputs = tuple(mover.name if i == relu.name else i for i in node.inputs)
            order.append(replace(node, inputs=inputs))
    return Graph(tuple(order), tuple(mover.name if o == relu.name else o for o in graph.outputs))


def _would_fuse(graph: Graph, source: Node, mover: Node) -> bool:
    alone = len(graph.consumers[source.name]) == 1 and source.name not in graph.outputs and source.format is None
    return alone and (source.op in FUSABLE or source.op in ("maxpool", "flatten", "permute"))


def _alive(graph: Graph) -> Graph:
    wanted = set(graph.outputs)
    for node in reversed(graph.nodes):
        if node.name in wanted:
            wanted.update(node.inputs)
    return replace(graph, nodes=tuple(n for n in graph if n.name in wanted or n.op == "input"))


def _take_names(graph: Graph, reference: Graph) -> Graph:
    """Give nodes the names and modules they have in `reference`, when it is the same network."""
    if len(graph.nodes) != len(reference.nodes):
        return graph
    names = {a.name: b.name for a, b in zip(graph, reference)}
    renamed = [replace(n, name=names[n.name], inputs=tuple(names[i] for i in n.inputs)) for n in graph]
    if any((a.op, a.inputs, a.shape) != (b.op, b.inputs, b.shape) for a, b in zip(renamed, reference)):
        return graph
    nodes = tuple(replace(a, module=b.module) for a, b in zip(renamed, reference))
    return Graph(nodes, tuple(names[o] for o in graph.outputs))
