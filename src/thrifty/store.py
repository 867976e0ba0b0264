"""Saved models: a folder with weights.safetensors and manifest.json, loaded strictly, without pickle.

The manifest says what techniques changed in the structure (layer sizes, replaced layers, parametrisations, wrappers),
so that a model of the original class can be rebuilt before the tensors are read.

Schema 1 of the manifest:

    schema            1
    thrifty, torch    versions that saved it
    source            what the user calls the original model; free
    weights           {"bytes": size of weights.safetensors, "sha256": its checksum}
    wrappers          [{"class", "spec"}], outermost first; each holds the next in its attribute `model`
    modules           path -> {"class", "arguments" (of a layer that can be rebuilt)} or {"same_as": path}
    parametrisations  path -> {tensor: [{"class", "spec"}]}
    shared            tensor name -> the name under which it is stored
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from thrifty import __version__
from thrifty.compress import PARAMETRISATIONS, WRAPPERS
from thrifty.errors import StoreError

__all__ = ["SCHEMA", "is_saved", "load", "load_weights", "read_manifest", "save"]

SCHEMA = 1
WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"
_CONV = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "bias",
    "padding_mode",
)
_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
# Layers that can be rebuilt from their arguments. All others must come from the original class.
LAYERS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "Conv1d": (nn.Conv1d, _CONV),
    "Conv2d": (nn.Conv2d, _CONV),
    "Linear": (nn.Linear, ("in_features", "out_features", "bias")),
    "BatchNorm1d": (nn.BatchNorm1d, _NORM),
    "BatchNorm2d": (nn.BatchNorm2d, _NORM),
    "Identity": (nn.Identity, ()),
    "Sequential": (nn.Sequential, ()),
}


def save(model: nn.Module, folder: str | Path, source: str = "") -> Path:
    """Write a model to a folder, whole or not at all, and return the folder.

    An earlier saved model in the folder is replaced; a folder that holds anything else is refused.
    source: a note on where the original class comes from, such as "net.py:Net".
    Raises StoreError when the model holds something that is no tensor, or the folder cannot be written.
    """
    folder = Path(folder)
    tensors, shared = _tensors(model)
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "thrifty": __version__,
        "torch": torch.__version__,
        "source": source,
        **_structure(model),
        "shared": shared,
    }
    if folder.exists() and not _replaceable(folder):
        raise StoreError(f"{folder} holds something that is no saved model; choose another folder, or empty it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as place:
            _write(Path(place) / "new", tensors, manifest)
            _swap(Path(place), folder)
    except (OSError, safetensors.SafetensorError) as err:
        raise StoreError(f"the model cannot be saved to {folder}: {getattr(err, 'strerror', None) or err}") from err
    return folder


def load(folder: str | Path, model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Return a saved model, rebuilt around a copy of the original one, in eval mode.

    model: the original model (its weights do not matter, it is not changed), or what makes it, such as its class.
    Raises StoreError that lists every missing, extra and mis-shaped tensor, or says why the folder is unreadable.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    tensors = _read_tensors(folder, manifest)
    base = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
    if not isinstance(base, nn.Module):
        raise StoreError(f"the factory made a {type(base).__name__}, not a torch.nn.Module")
    try:
        rebuilt = _rebuild(base.eval(), manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise StoreError(f"{folder / MANIFEST} is damaged: {type(err).__name__}: {err}") from err
    state = tensors | {name: tensors[first] for name, first in manifest["shared"].items() if first in tensors}
    _refuse_differences(folder, rebuilt, state)
    rebuilt.load_state_dict(state, strict=True)
    return rebuilt.eval()


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Read a file of weights into a model of the same structure, in place, and return it in eval mode.

    path: .safetensors, or .pt / .pth (read without running code; {"state_dict": ...} is unwrapped).
    Raises StoreError that lists every missing, extra and mis-shaped tensor, and every one with NaN or infinity.
    """
    path = Path(path)
    state = _read_file(path)
    _refuse_differences(path, model, state)
    bad = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise StoreError(f"{path} holds NaN or infinity in: {', '.join(bad)}")
    model.load_state_dict(dict(state), strict=True)
    return model.eval()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return the manifest of a saved model.

    Raises StoreError when there is none, it cannot be read, or its schema is unknown.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise StoreError(f"{folder} is no saved model: it has no {MANIFEST}") from err
    except (OSError, ValueError) as err:
        raise StoreError(f"{path} cannot be read: {err}") from err
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        made = f" by thrifty {manifest['thrifty']}" if isinstance(manifest, dict) and "thrifty" in manifest else ""
        raise StoreError(
            f"{path} has schema {schema!r}, written{made}; this is thrifty {__version__}, which reads schema "
            f"{SCHEMA}: use the version that wrote it, or a newer one"
        )
    keys = ("weights", "wrappers", "modules", "parametrisations", "shared")
    if missing := [key for key in keys if key not in manifest]:
        raise StoreError(f"{path} is damaged: it has no {', '.join(missing)}")
    return dict(manifest)


def is_saved(folder: str | Path) -> bool:
    """Whether a folder holds a saved model."""
    return (Path(folder) / MANIFEST).is_file() and (Path(folder) / WEIGHTS).is_file()


# --- describing ------------------------------------------------------------------------------------------------


def _structure(model: nn.Module) -> dict[str, Any]:
    """Return wrappers, modules and parametrisations of a model as JSON."""
    wrappers = []
    while (name := type(model).__name__) in WRAPPERS and type(model) is WRAPPERS[name]:
        wrappers.append({"class": name, "spec": model.spec()})  # type: ignore[operator]
        model = model.model  # type: ignore[assignment]
    modules: dict[str, Any] = {}
    parametrised: dict[str, Any] = {}
    seen: dict[int, str] = {}
    for path, module in _modules(model):
        if id(module) in seen:
            modules[path] = {"same_as": seen[id(module)]}
            continue
        seen[id(module)] = path
        modules[path] = _describe(path, module)
        if parametrize.is_parametrized(module):
            parametrised[path] = _parametrisations(path, module)
    return {"wrappers": wrappers, "modules": modules, "parametrisations": parametrised}


def _modules(model: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """Return (path, module), parents first, repeated ones too, without what parametrize adds."""
    found = [(path, model)]
    for name, child in model._modules.items():
        if child is not None and not (name == "parametrizations" and parametrize.is_parametrized(model)):
            found += _modules(child, f"{path}.{name}" if path else name)
    return found


def _describe(path: str, module: nn.Module) -> dict[str, Any]:
    kind = parametrize.type_before_parametrizations(module)
    name = kind.__name__
    if name in WRAPPERS and kind is WRAPPERS[name]:
        raise StoreError(f"'{path}' is a {name} inside another model; only a whole model can be wrapped and saved")
    known = LAYERS.get(name)
    if known is None or known[0] is not kind:
        return {"class": name}
    arguments = {key: getattr(module, key) for key in known[1]}
    if "bias" in arguments:
        arguments["bias"] = arguments["bias"] is not None
    return {"class": name, "arguments": arguments}


def _parametrisations(path: str, module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for tensor, steps in module.parametrizations.items():  # type: ignore[operator, union-attr]
        found[tensor] = []
        for step in steps:
            name = type(step).__name__
            if PARAMETRISATIONS.get(name) is not type(step):
                known = ", ".join(sorted(PARAMETRISATIONS))
                raise StoreError(
                    f"'{path}.{tensor}' has the parametrisation {name}, which cannot be saved (known: {known}); "
                    "remove it with torch.nn.utils.parametrize.remove_parametrizations"
                )
            found[tensor].append({"class": name, "spec": step.spec()})
    return found


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to store, each once, and the other names of those that are shared."""
    kept: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    strange = []
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            strange.append(name)
            continue
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and key in first:
            shared[name] = first[key]
            continue
        first[key] = name
        kept[name] = value.detach().cpu().contiguous().clone()
    if strange:
        raise StoreError(f"these parts of the state are no tensors and cannot be saved: {', '.join(strange)}")
    return kept, shared


# --- writing ---------------------------------------------------------------------------------------------------


def _write(place: Path, tensors: Mapping[str, Tensor], manifest: dict[str, Any]) -> None:
    place.mkdir()
    save_file(dict(tensors), place / WEIGHTS, metadata={"format": "pt"})
    manifest["weights"] = {"bytes": (place / WEIGHTS).stat().st_size, "sha256": _checksum(place / WEIGHTS)}
    (place / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (place / WEIGHTS).chmod((place / MANIFEST).stat().st_mode)  # save_file lets nobody else read
    for name in (WEIGHTS, MANIFEST):
        with open(place / name, "rb") as file:
            os.fsync(file.fileno())


def _swap(place: Path, folder: Path) -> None:
    """Put place/new where `folder` is; an earlier folder moves to place/old, and back if that fails."""
    if folder.exists():
        os.rename(folder, place / "old")
    try:
        os.rename(place / "new", folder)
    except OSError:
        if (place / "old").exists():
            os.rename(place / "old", folder)
        raise
    shutil.rmtree(place / "old", ignore_errors=True)


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and {entry.name for entry in folder.iterdir()} <= {WEIGHTS, MANIFEST}


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading ---------------------------------------------------------------------------------------------------


def _read_tensors(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        if _checksum(path) != manifest["weights"]["sha256"]:
            raise StoreError(f"{path} is damaged: its checksum is not the one in {MANIFEST}")
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as err:
        raise StoreError(f"{folder} is not complete: it has no {WEIGHTS}") from err
    except (OSError, safetensors.SafetensorError, KeyError, TypeError) as err:
        raise StoreError(f"{path} cannot be read: {err}") from err
    return tensors


def _read_file(path: Path) -> Mapping[str, Tensor]:
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise StoreError(f"{path} has an unknown ending; weights are .safetensors, .pt or .pth files")
    if not path.is_file():
        raise StoreError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError) as err:
        if isinstance(err, pickle.UnpicklingError) and "Weights only load failed" in str(err):
            why = "it holds more than tensors, and reading it would run its code"
        else:
            why = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise StoreError(f"{path} cannot be read as weights: {why}; save model.state_dict(), not the model") from err
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise StoreError(f"{path} is no state dict: a mapping of names to tensors")
    return state


def _rebuild(base: nn.Module, manifest: Mapping[str, Any]) -> nn.Module:
    """Give the original model the structure of the saved one."""
    problems: list[str] = []
    base = _set_modules(base, manifest["modules"], problems)
    if problems:
        listed = "\n".join(f"  - {p}" for p in problems)
        raise StoreError(f"the given model is not of the class that was saved:\n{listed}")
    for path, entry in manifest["parametrisations"].items():
        layer = base.get_submodule(path)
        for tensor, steps in entry.items():
            for step in steps:
                made = _known(PARAMETRISATIONS, step["class"], "parametrisation").from_spec(layer, step["spec"])
                parametrize.register_parametrization(layer, tensor, made, unsafe=True)
    for wrapper in reversed(manifest["wrappers"]):
        base = _known(WRAPPERS, wrapper["class"], "wrapper").from_spec(base, wrapper["spec"])
    _share(base, manifest["shared"])
    return base


def _known(table: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise StoreError(f"the model was saved with the {what} {name}, which thrifty {__version__} does not have")
    return table[name]


def _set_modules(base: nn.Module, entries: Mapping[str, Any], problems: list[str]) -> nn.Module:
    """Replace the layers whose arguments differ from the saved ones; parents come before children."""
    for path, entry in entries.items():
        if "same_as" in entry:
            _put(base, path, base.get_submodule(entry["same_as"]))
            continue
        try:
            old: nn.Module | None = base.get_submodule(path)
        except AttributeError:
            old = None
        if "arguments" not in entry:
            if old is None or type(old).__name__ != entry["class"]:
                found = "nothing there" if old is None else f"class {type(old).__name__}"
                where = f"'{path}'" if path else "the model itself"
                problems.append(f"{where} was a {entry['class']}; the given one has {found}")
            continue
        if old is not None and _describe(path, old) == _plain(entry):
            continue
        made = _layer(entry).to(_dtype(old, base))
        if not path:
            base = made
        elif _parent(base, path) is None:
            problems.append(f"'{path}' was a {entry['class']}; the given model has nothing to hold it")
        else:
            _put(base, path, made)
    return base


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry as `_describe` makes it: lists of JSON become tuples."""
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in entry["arguments"].items()}
    return {"class": entry["class"], "arguments": arguments}


def _layer(entry: Mapping[str, Any]) -> nn.Module:
    kind, names = LAYERS.get(entry["class"], (None, ()))
    arguments = _plain(entry)["arguments"]
    if kind is None or set(arguments) != set(names):
        raise StoreError(
            f"the model was saved with a layer {entry['class']}, which thrifty {__version__} cannot rebuild"
        )
    return kind(**arguments)


def _dtype(old: nn.Module | None, base: nn.Module) -> torch.dtype:
    candidates = [*(old.parameters() if old is not None else ()), *base.parameters()]
    return next((p.dtype for p in candidates if p.is_floating_point()), torch.float32)


def _parent(base: nn.Module, path: str) -> nn.Module | None:
    try:
        return base.get_submodule(path.rpartition(".")[0])
    except AttributeError:
        return None


def _put(base: nn.Module, path: str, module: nn.Module) -> None:
    parent = _parent(base, path)
    if parent is None:
        raise StoreError(f"the given model has nothing to hold '{path}'")
    parent.add_module(path.rpartition(".")[2], module)


def _share(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Make tensors one that were one when they were saved."""
    for name, first in shared.items():
        try:
            (path, _, tensor), (first_path, _, first_tensor) = name.rpartition("."), first.rpartition(".")
            owner, source = model.get_submodule(path), model.get_submodule(first_path)
        except AttributeError:
            continue  # listed as missing by the comparison of names
        for table in ("_parameters", "_buffers"):
            if tensor in getattr(owner, table) and first_tensor in getattr(source, table):
                getattr(owner, table)[tensor] = getattr(source, table)[first_tensor]


def _refuse_differences(folder: Path, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    have = model.state_dict()
    lines = [f"missing in the file: {name}" for name in have if name not in state]
    lines += [f"not in the model: {name}" for name in state if name not in have]
    for name, value in state.items():
        mine = have.get(name)
        if mine is not None and (mine.shape != value.shape or mine.dtype != value.dtype):
            saved, wanted = _shape(value), _shape(mine)
            lines.append(f"{name}: saved as {saved}, the model has {wanted}")
    if lines:
        listed = "\n".join(f"  - {text}" for text in lines)
        raise StoreError(f"{folder} does not fit the given model:\n{listed}")


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
