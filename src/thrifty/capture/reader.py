"""From exported operators to canonical nodes: constants, references, names."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.export.graph_signature import OutputKind

from thrifty.arith import Format
from thrifty.errors import CaptureError
from thrifty.graph import Array, Graph, Node

# (reader, fx node, arguments in schema order) -> Ref, Const or a tuple of them; None for "no such form"
Rule = Callable[..., Any]

VIEWS = ("view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze", "unflatten", "view_copy")
_C_WORDS = frozenset(
    [
        *("auto", "break", "case", "char", "const", "continue", "default", "do", "double", "else", "enum"),
        *("extern", "float", "for", "goto", "if", "inline", "int", "long", "main", "register", "restrict"),
        *("return", "short", "signed", "sizeof", "static", "struct", "switch", "typedef", "union"),
        *("unsigned", "void", "volatile", "while"),
    ]
)


def base_name(node: fx.Node) -> str:
    """Return the operator's name without namespace and overload ("conv2d")."""
    return target_name(node).split(".")[1] if target_name(node).count(".") else target_name(node)


def target_name(node: fx.Node) -> str:
    """Return the full name of an operator ("aten.conv2d.default", "thrifty.fake_quantize.default")."""
    target = node.target
    return "getitem" if target is operator.getitem else str(target)


@dataclass(frozen=True)
class Const:
    """A tensor that does not depend on the input; `name` is the parameter that it comes from."""

    value: torch.Tensor
    name: str = ""
    turned: bool = False  # the transpose of that parameter
    format: Format | None = None


@dataclass(frozen=True)
class Ref:
    """The output of a node of the graph."""

    name: str
    shape: tuple[int, ...]  # without the batch axis


class Reader:
    """Walks the exported operators in order and appends canonical nodes."""

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        model: nn.Module,
        rules: Mapping[str, Rule],
        rounding: str,
    ) -> None:
        self.program = program
        self.model = model
        self.rules = rules
        self.rounding = rounding
        self.leaves = {
            name
            for name, m in model.named_modules()
            if not dict(m.named_children()) or hasattr(m, "parametrizations")
        }
        self.nodes: dict[str, Node] = {}
        self.env: dict[fx.Node, Any] = {}

    def read(self) -> Graph:
        """Return the graph, not yet simplified."""
        self._bind_placeholders()
        outputs: list[str] = []
        for node in self.program.graph.nodes:
            if node.op == "get_attr":
                self.env[node] = Const(_attribute(self.program.graph_module, str(node.target)))
            elif node.op == "call_function":
                self.env[node] = self._call(node)
            elif node.op == "output":
                values = fx.node.map_arg(node.args[0], lambda n: self.env[n])
                kinds = [spec.kind for spec in self.program.graph_signature.output_specs]
                outputs = [
                    self._output(v)
                    for v, kind in zip(values, kinds, strict=True)
                    if v is not None and kind == OutputKind.USER_OUTPUT  # others: new values of buffers
                ]
        return Graph(tuple(self.nodes.values()), tuple(outputs))

    def _bind_placeholders(self) -> None:
        signature = self.program.graph_signature
        tensors = {**self.program.state_dict, **self.program.constants}
        sources = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in sources:
                    name = sources[node.name]
                    self.env[node] = Const(tensors[name].detach(), _public_name(name))
                else:
                    self.env[node] = self.emit("input", (), node, name="input")

    def _output(self, value: Any) -> str:
        if isinstance(value, Ref):
            return value.name
        raise CaptureError(
            "an output of the model does not depend on its input; return only what the network computes"
        )

    def _call(self, node: fx.Node) -> Any:
        args: Any = fx.node.map_arg(node.args, lambda n: self.env[n])
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: self.env[n])
        target, base = target_name(node), base_name(node)
        if target == "getitem":
            return args[0][int(args[1])] if isinstance(args[0], tuple) else self._unknown(node)
        if target.startswith("thrifty.fake_quantize"):
            return self._fake_quantize(node, *_bound(node, args, kwargs))
        if not _refs((args, kwargs)):
            return self._constant(node, args, kwargs)
        rule = self.rules.get(base)
        if rule is None or not target.startswith("aten."):
            return self._unknown(node)
        found = rule(self, node, *_bound(node, args, kwargs))
        return self._unknown(node) if found is None else found

    def _unknown(self, node: fx.Node) -> Ref:
        """Keep an operator without a rule under its aten name."""
        values = [self.env[n] for n in node.all_input_nodes]
        refs = _refs(values)
        consts = {
            f"arg{i}": to_numpy(c.value) for i, c in enumerate(v for v in values if isinstance(v, Const))
        }
        return self.emit(target_name(node), refs, node, constants=consts)

    def _constant(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Evaluate what depends on parameters only."""
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not _idle_dropout(node):
            raise CaptureError(
                f"{target_name(node)} (module '{module_of(node)}') draws random numbers in eval mode; "
                "draw them in training only"
            )
        origins = [c for c in _leaves((args, kwargs)) if isinstance(c, Const)]
        with torch.no_grad():
            out = node.target(*_unwrap(args), **_unwrap(kwargs))  # type: ignore[operator]
        if (
            isinstance(out, torch.Tensor)
            and base_name(node) in ("t", "transpose", "permute", "numpy_T")
            and out.dim() == 2
        ):
            return replace(
                origins[0], value=out, turned=origins[0].turned ^ (out.shape != () and _turns(node))
            )
        if isinstance(out, torch.Tensor):
            return Const(out, _origin(origins, out))
        if isinstance(out, tuple):
            return tuple(Const(o, _origin(origins, o)) if isinstance(o, torch.Tensor) else o for o in out)
        return out

    def _fake_quantize(self, node: fx.Node, x: Any, scale: Any, bits: int, signed: bool, axis: int) -> Any:
        if not isinstance(scale, Const):
            raise CaptureError(f"the scale of '{node.name}' depends on the input; scales must be constant")
        fmt = Format(
            int(bits), bool(signed), tuple(float(s) for s in scale.value.detach().reshape(-1).float())
        )
        if isinstance(x, Const):
            with torch.no_grad():
                value = node.target(x.value, scale.value, bits, signed, axis)  # type: ignore[operator]
            rounded = replace(x, value=value, format=fmt)
            return rounded if self._is_stored(x) or self._is_stored(rounded) else replace(rounded, name="")
        producer = self.nodes[x.name]
        if producer.format not in (None, fmt):
            raise CaptureError(
                f"'{x.name}' (module '{producer.module}') is quantised twice, with different formats"
            )
        source = node.args[0]
        if isinstance(source, fx.Node) and any(
            not target_name(u).startswith("thrifty.fake_quantize") for u in source.users
        ):
            raise CaptureError(
                f"'{x.name}' (module '{producer.module}') is read both before and after its quantisation"
            )
        self.nodes[x.name] = replace(producer, format=fmt)
        return x

    def emit(
        self,
        op: str,
        inputs: Sequence[Ref],
        node: fx.Node,
        attrs: Mapping[str, Any] | None = None,
        weights: Mapping[str, Const | None] | None = None,
        constants: Mapping[str, Array] | None = None,
        shape: tuple[int, ...] | None = None,
        name: str = "",
    ) -> Ref:
        """Append a node and return a reference to its output; `weights` become constants and params."""
        value = node.meta.get("val")
        value = value[0] if isinstance(value, (tuple, list)) else value
        held = {k: c for k, c in (weights or {}).items() if c is not None}
        module = module_of(node) if "weight" not in held else owner(held["weight"].name) or module_of(node)
        known = dict(attrs or {})
        if op in ("conv", "linear", "avgpool"):
            known["rounding"] = self.rounding
        made = Node(
            name=self._unique(name or self._name(op, module)),
            op=op,
            inputs=tuple(r.name for r in inputs),
            attrs=known,
            shape=shape_of(value) if shape is None else shape,
            dtype=str(getattr(value, "dtype", torch.float32)).removeprefix("torch."),
            module=module,
            constants={**{k: to_numpy(c.value) for k, c in held.items()}, **(constants or {})},
            params=self.stored(held),
            weight_format=held["weight"].format if "weight" in held else None,
        )
        self.nodes[made.name] = made
        return Ref(made.name, made.shape)

    def stored(self, weights: Mapping[str, Const]) -> dict[str, str]:
        """Return the names of those constants that are what the model stores (or that rounded), not computed."""
        return {k: c.name for k, c in weights.items() if c.name and (c.format or self._is_stored(c))}

    def _is_stored(self, const: Const) -> bool:
        value = self.model
        try:
            with torch.no_grad():
                for part in const.name.split("."):
                    value = getattr(value, part)
        except AttributeError:
            return False
        return isinstance(value, torch.Tensor) and torch.equal(value.detach(), const.value.to(value.dtype))

    def _name(self, op: str, module: str) -> str:
        path = re.sub(r"\W", "_", module, flags=re.ASCII)
        short = op.split(".")[1] if "." in op else op
        if module in self.leaves and path and not path[0].isdigit():
            return path
        return re.sub(
            r"\W",
            "_",
            f"{short}_{path}" if path[:1].isdigit() else f"{path}_{short}".lstrip("_"),
            flags=re.ASCII,
        )

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


def owner(tensor: str) -> str:
    """Return the path of the module that holds a tensor."""
    return tensor.rpartition(".")[0]


def _turns(node: fx.Node) -> bool:
    """Whether a transposition of a matrix really exchanges its axes."""
    dims = [d for arg in node.args[1:] for d in (arg if isinstance(arg, (list, tuple)) else [arg])]
    if base_name(node) == "permute":
        return [int(d) % 2 for d in dims if isinstance(d, int)] == [1, 0]
    return base_name(node) != "transpose" or len({int(d) % 2 for d in dims if isinstance(d, int)}) == 2


def _origin(origins: Sequence[Const], out: torch.Tensor) -> str:
    """Return the name of the parameter that a computed constant stands for."""
    same = [c.name for c in origins if c.name and not c.turned and c.value.shape == out.shape]
    return same[0] if same else ""


def _idle_dropout(node: fx.Node) -> bool:
    """Whether it is a dropout that hands on what it gets."""
    return "dropout" in base_name(node) and len(node.args) > 2 and node.args[2] is False


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, (tuple, list)):
        return [leaf for item in tree for leaf in _leaves(item)]
    if isinstance(tree, dict):
        return [leaf for item in tree.values() for leaf in _leaves(item)]
    return [tree]


def _refs(tree: Any) -> list[Ref]:
    return [leaf for leaf in _leaves(tree) if isinstance(leaf, Ref)]


def _unwrap(tree: Any) -> Any:
    if isinstance(tree, (tuple, list)):
        return (
            type(tree)(_unwrap(item) for item in tree)
            if type(tree) in (tuple, list)
            else [_unwrap(i) for i in tree]
        )
    if isinstance(tree, dict):
        return {k: _unwrap(v) for k, v in tree.items()}
    return tree.value if isinstance(tree, Const) else tree


def _bound(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return every argument of an operator in order, defaults filled in from its schema."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    filled = list(args)
    for argument in schema[len(filled) :]:
        filled.append(
            kwargs.get(argument.name, argument.default_value if argument.has_default_value() else None)
        )
    return filled


def shape_of(value: Any) -> tuple[int, ...]:
    """Return the shape without the batch axis of one."""
    shape = tuple(int(s) for s in getattr(value, "shape", ()))
    return shape[1:] if shape[:1] == (1,) else shape


def module_of(node: fx.Node) -> str:
    """Return the path of the innermost module that an operator was called in."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return re.sub(r"@\d+", "", path).removeprefix("L['self'].").removeprefix("L__self___")


def to_numpy(value: torch.Tensor) -> Array:
    """Return a copy, floating point as float32."""
    value = value.detach()
    return np.array((value.float() if value.is_floating_point() else value).cpu().numpy())
