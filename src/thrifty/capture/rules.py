"""One rule per aten operator: what it is in canonical operators, or None when it has no such form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx

from thrifty.capture.reader import (
    VIEWS,
    Const,
    Reader,
    Ref,
    Rule,
    base_name,
    module_of,
    owner,
    shape_of,
    to_numpy,
)
from thrifty.graph import Array

# aten operators that hand on what they get (in eval mode)
_SAME = (
    *("clone", "contiguous", "alias", "detach", "detach_", "lift_fresh_copy", "lift_fresh", "_to_copy", "to"),
    *("dropout", "dropout_", "feature_dropout", "alpha_dropout", "expand_as"),
)


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    items = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return tuple(items * n) if len(items) == 1 else tuple(items)


def _conv(
    r: Reader, node: fx.Node, x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> Any:
    if not isinstance(x, Ref) or not isinstance(w, Const) or isinstance(b, Ref):
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


def _convolution(
    r: Reader,
    node: fx.Node,
    x: Any,
    w: Any,
    b: Any,
    s: Any,
    p: Any,
    d: Any,
    transposed: bool,
    _o: Any,
    g: int,
) -> Any:
    return None if transposed else _conv(r, node, x, w, b, s, p, d, g)


def _linear(r: Reader, node: fx.Node, x: Any, w: Any, b: Any) -> Any:
    if (
        not isinstance(x, Ref)
        or not isinstance(w, Const)
        or isinstance(b, Ref)
        or len(x.shape) != 1
        or w.value.dim() != 2
    ):
        return None
    return r.emit("linear", [x], node, weights={"weight": w, "bias": b})


def _matmul(r: Reader, node: fx.Node, x: Any, w: Any) -> Any:
    if not isinstance(w, Const) or w.value.dim() != 2:
        return None
    return _linear(r, node, x, _turn(w), None)


def _addmm(r: Reader, node: fx.Node, b: Any, x: Any, w: Any, beta: Any, alpha: Any) -> Any:
    if not isinstance(w, Const) or beta != 1 or alpha != 1 or not isinstance(b, Const) or b.value.dim() != 1:
        return None
    return _linear(r, node, x, _turn(w), b)


def _turn(w: Const) -> Const:
    """Return the transpose; a matrix that is not stored as (outputs, inputs) loses its name."""
    return Const(w.value.t(), w.name if w.turned else "", format=w.format if w.turned else None)


def _batch_norm(
    r: Reader,
    node: fx.Node,
    x: Any,
    w: Any,
    b: Any,
    mean: Any,
    var: Any,
    training: bool,
    _m: Any,
    eps: float,
    *_: Any,
) -> Any:
    if training or not isinstance(x, Ref) or not isinstance(mean, Const) or not isinstance(var, Const):
        return None
    scale = 1.0 / np.sqrt(to_numpy(var.value).astype(np.float64) + eps)
    scale = scale * to_numpy(w.value) if w is not None else scale
    shift = (to_numpy(b.value) if b is not None else 0.0) - to_numpy(mean.value) * scale
    ref = r.emit(
        "batchnorm", [x], node, shape=x.shape, constants={"scale": _f32(scale), "shift": _f32(shift)}
    )
    names = {"weight": w, "bias": b, "running_mean": mean, "running_var": var}
    params = r.stored({k: c for k, c in names.items() if c is not None})
    made = r.nodes[ref.name]
    r.nodes[ref.name] = replace(
        made, params=params, module=owner(params.get("running_mean", "")) or made.module
    )
    return ref


def _native_batch_norm(
    r: Reader, node: fx.Node, x: Any, w: Any, b: Any, mean: Any, var: Any, m: Any, eps: float
) -> Any:
    return (_batch_norm(r, node, x, w, b, mean, var, False, m, eps) or r._unknown(node), None, None)


def _f32(value: Any) -> Array:
    return np.asarray(value, dtype=np.float32)


def _add(r: Reader, node: fx.Node, a: Any, b: Any, alpha: Any) -> Any:
    if isinstance(a, Ref) and isinstance(b, Ref):
        return r.emit("add", [a, b], node) if alpha == 1 and a.shape == b.shape else None
    if isinstance(a, Ref):
        return _affine(r, node, a, 1.0, b, alpha)
    return _affine(r, node, b, alpha, a, 1.0)


def _sub(r: Reader, node: fx.Node, a: Any, b: Any, alpha: Any) -> Any:
    if isinstance(a, Ref) and isinstance(b, Ref):
        return None
    return _affine(r, node, a, 1.0, b, -alpha) if isinstance(a, Ref) else _affine(r, node, b, -alpha, a, 1.0)


def _rsub(r: Reader, node: fx.Node, a: Any, b: Any, alpha: Any) -> Any:
    return _sub(r, node, b, a, alpha)


def _mul(r: Reader, node: fx.Node, a: Any, b: Any) -> Any:
    if isinstance(a, Ref) and isinstance(b, Ref):
        return None
    return _affine(r, node, a, b, 0.0, 1.0) if isinstance(a, Ref) else _affine(r, node, b, a, 0.0, 1.0)


def _div(r: Reader, node: fx.Node, a: Any, b: Any, *mode: Any) -> Any:
    if not isinstance(a, Ref) or isinstance(b, Ref) or (mode and mode[0] is not None):
        return None
    inverse = Const(1.0 / b.value) if isinstance(b, Const) else 1.0 / b
    return _affine(r, node, a, inverse, 0.0, 1.0)


def _affine(r: Reader, node: fx.Node, x: Ref, scale: Any, shift: Any, factor: Any) -> Any:
    """Emit x * scale + shift * factor as a batch norm, when both constants run along the channels."""
    scale_c, shift_c = _per_channel(scale, x.shape), _per_channel(shift, x.shape)
    if scale_c is None or shift_c is None or not x.shape or shape_of(node.meta.get("val")) != x.shape:
        return None
    constants = {
        "scale": _f32(scale_c * np.ones(x.shape[0])),
        "shift": _f32(shift_c * factor * np.ones(x.shape[0])),
    }
    return r.emit("batchnorm", [x], node, constants=constants)


def _per_channel(value: Any, shape: tuple[int, ...]) -> Array | None:
    if not isinstance(value, Const):
        return np.float64(value)  # type: ignore[return-value]
    array = to_numpy(value.value).astype(np.float64)
    if array.size == 1:
        return array.reshape(())
    array = array.reshape((1,) * (len(shape) + 1 - array.ndim) + array.shape)
    return array.reshape(-1) if array.shape == (1, shape[0], *(1,) * (len(shape) - 1)) else None


def _cat(r: Reader, node: fx.Node, tensors: Sequence[Any], dim: int) -> Any:
    if not all(isinstance(t, Ref) for t in tensors):
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
    return lambda r, node, x, *rest: r.emit(op, [x], node) if isinstance(x, Ref) else None


def _clamp(r: Reader, node: fx.Node, x: Any, low: Any, high: Any = None) -> Any:
    if isinstance(low, (int, float)) and low == 0:
        if high is None or high == float("inf"):
            return r.emit("relu", [x], node)
        if isinstance(high, (int, float)) and high == 6:
            return r.emit("relu6", [x], node)
    return None


def _threshold(r: Reader, node: fx.Node, x: Any, threshold: Any, value: Any) -> Any:
    return r.emit("relu", [x], node) if threshold == 0 and value == 0 else None


def _same(r: Reader, node: fx.Node, x: Any, *rest: Any) -> Any:
    value = node.meta["val"]
    kept = (
        isinstance(x, Ref) and shape_of(value) == x.shape and str(value.dtype).endswith(r.nodes[x.name].dtype)
    )
    trains = base_name(node).endswith(("dropout", "dropout_")) and rest[1]
    return x if kept and not trains else None


def _view(r: Reader, node: fx.Node, x: Any, *rest: Any) -> Any:
    value = node.meta["val"]
    shape = tuple(int(s) for s in value.shape)
    if shape[:1] != (1,):
        return None
    return _viewed(r, node, x, shape[1:])


def _viewed(r: Reader, node: fx.Node, x: Ref, shape: tuple[int, ...]) -> Ref:
    producer = r.nodes[x.name]
    if producer.op == "view" and producer.format is None:
        before = producer.inputs[0]
        x = Ref(before, r.nodes[before].shape)
    if x.shape == shape:
        return x
    short = r._name("flatten" if len(shape) == 1 else "view", module_of(node))
    return r.emit("view", [x], node, shape=shape, name=short)


def _permute(r: Reader, node: fx.Node, x: Any, dims: Sequence[int]) -> Any:
    rank = len(x.shape) + 1
    order = [d % rank for d in dims]
    if order[0] != 0:
        return None
    axes = tuple(d - 1 for d in order[1:])
    return x if axes == tuple(range(rank - 1)) else r.emit("permute", [x], node, {"axes": axes})


def _transpose(r: Reader, node: fx.Node, x: Any, a: int, b: int) -> Any:
    order = list(range(len(x.shape) + 1))
    order[a], order[b] = order[b], order[a]
    return _permute(r, node, x, order)


def _movedim(r: Reader, node: fx.Node, x: Any, source: Any, target: Any) -> Any:
    rank = len(x.shape) + 1
    from_axes, to_axes = [s % rank for s in _tuple(source, 1)], [t % rank for t in _tuple(target, 1)]
    order = [axis for axis in range(rank) if axis not in from_axes]
    for to_axis, from_axis in sorted(zip(to_axes, from_axes)):
        order.insert(to_axis, from_axis)
    return _permute(r, node, x, order)


def _pad(
    r: Reader, node: fx.Node, x: Any, pads: Sequence[int], mode: Any = "constant", value: Any = None
) -> Any:
    spatial = len(x.shape) - 1
    amounts = [int(p) for p in pads] + [0] * (2 * spatial - len(pads))  # last axis first
    if (
        mode != "constant"
        or value not in (None, 0)
        or min(amounts, default=0) < 0
        or any(amounts[2 * spatial :])
    ):
        return None
    padding = tuple((amounts[2 * k], amounts[2 * k + 1]) for k in reversed(range(spatial)))
    return r.emit("pad", [x], node, {"padding": padding}) if any(amounts) else x


def _constant_pad(r: Reader, node: fx.Node, x: Any, pads: Sequence[int], value: Any = 0) -> Any:
    return _pad(r, node, x, pads, "constant", value)


def _max_pool(
    r: Reader, node: fx.Node, x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool
) -> Any:
    n = len(x.shape) - 1
    if any(d != 1 for d in _tuple(dilation, n)):
        return None
    return _pool(r, node, "maxpool", x, kernel, stride, padding, ceil, {})


def _max_pool_pair(r: Reader, node: fx.Node, *args: Any) -> Any:
    found = _max_pool(r, node, *args)
    return None if found is None else (found, None)


def _avg_pool(
    r: Reader,
    node: fx.Node,
    x: Any,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil: bool,
    include: bool,
    divisor: Any = None,
) -> Any:
    return (
        None
        if divisor is not None
        else _pool(r, node, "avgpool", x, kernel, stride, padding, ceil, {"include": include})
    )


def _pool(
    r: Reader,
    node: fx.Node,
    op: str,
    x: Any,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil: bool,
    extra: Mapping[str, Any],
) -> Any:
    n = len(x.shape) - 1
    if n not in (1, 2):
        return None
    kernel = _tuple(kernel, n)
    stride = _tuple(stride, n) if stride else kernel
    pads = tuple((p, p) for p in _tuple(padding, n))
    value = node.meta["val"]
    shape = shape_of(value[0] if isinstance(value, (tuple, list)) else value)
    floor = tuple((s + a + b - k) // t + 1 for s, (a, b), k, t in zip(x.shape[1:], pads, kernel, stride))
    return _emit_pool(
        r,
        node,
        op,
        x,
        shape,
        kernel,
        stride,
        pads,
        bool(ceil) and floor != shape[1:],
        bool(extra.get("include", True)),
    )


def _emit_pool(
    r: Reader,
    node: fx.Node,
    op: str,
    x: Ref,
    shape: tuple[int, ...],
    kernel: Any,
    stride: Any,
    pads: Any = None,
    ceil: bool = False,
    include: bool = True,
) -> Ref:
    pads = pads or tuple((0, 0) for _ in kernel)
    attrs = {"kernel": tuple(kernel), "stride": tuple(stride), "padding": pads, "ceil": ceil}
    if op == "avgpool":
        attrs["count_include_pad"] = include or not any(p for pair in pads for p in pair)
    if all(k == 1 for k in kernel) and all(s == 1 for s in stride):
        return x
    return r.emit(op, [x], node, attrs, shape=shape)


def _adaptive(op: str, pair: bool = False) -> Rule:
    def rule(r: Reader, node: fx.Node, x: Any, size: Any) -> Any:
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

    def rule(r: Reader, node: fx.Node, x: Any, dims: Any, keepdim: bool = False, *rest: Any) -> Any:
        if (
            not isinstance(x, Ref)
            or dims is None
            or len(x.shape) not in (2, 3)
            or (rest and rest[0] is not None)
        ):
            return None
        axes = {_axis(d, x.shape) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
        if not axes or None in axes or 0 in axes:
            return None
        kernel = tuple(s if i + 1 in axes else 1 for i, s in enumerate(x.shape[1:]))
        kept = (x.shape[0], *(1 if i + 1 in axes else s for i, s in enumerate(x.shape[1:])))
        pooled = _emit_pool(r, node, op, x, kept, kernel, kernel)
        return (
            pooled
            if keepdim
            else _viewed(r, node, pooled, tuple(s for i, s in enumerate(kept) if i not in axes))
        )

    return rule


def _max_dim(r: Reader, node: fx.Node, x: Any, *rest: Any) -> Any:
    if any(u for u in node.users if u.args[1] != 0 and u.users) or len(rest) < 2:
        return None
    found = _reduce("maxpool")(r, node, x, rest[0], rest[1])
    return None if found is None else (found, None)


def _softmax(r: Reader, node: fx.Node, x: Any, dim: int, *rest: Any) -> Any:
    axis = _axis(dim, x.shape)
    return None if axis is None else r.emit("softmax", [x], node, {"axis": axis})


def _argmax(r: Reader, node: fx.Node, x: Any, dim: Any, keepdim: bool = False) -> Any:
    if dim is None and len(x.shape) != 1:
        return None
    axis = 0 if dim is None else _axis(dim, x.shape)
    return (
        None
        if axis is None or dim is None
        else r.emit("argmax", [x], node, {"axis": axis, "keepdim": bool(keepdim)})
    )


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
    "adaptive_max_pool1d": _adaptive("maxpool", pair=True),
    "adaptive_max_pool2d": _adaptive("maxpool", pair=True),
    "mean": _reduce("avgpool"), "amax": _reduce("maxpool"), "max": _max_dim,
    "permute": _permute, "transpose": _transpose, "swapaxes": _transpose, "movedim": _movedim,
    "pad": _pad, "constant_pad_nd": _constant_pad,
    **{name: _same for name in _SAME}, **{name: _view for name in VIEWS},
}  # fmt: skip
