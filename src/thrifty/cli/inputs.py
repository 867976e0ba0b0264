"""Models, weights and data from what is written on the command line."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from thrifty.cli.parser import pair
from thrifty.cli.show import remark
from thrifty.data import DATASETS, load_task
from thrifty.errors import DataError, KnobError, NoMatch, ThriftyError, close_to
from thrifty.store import is_saved, load, load_weights, read_manifest
from thrifty.task import Task
from thrifty.zoo import ZOO, create


def read_task(args: argparse.Namespace) -> Task:
    """Return the data of the command line as a task.

    Raises NoMatch when it is neither a path nor a named data set.
    """
    options = dict(args.data_args)
    path = Path(args.data)
    if args.data in DATASETS and path.exists():
        remark(f"--data {args.data} is what lies here under this name, not the data set")
    elif args.data in DATASETS:
        return load_task(args.data, seed=args.seed, limit=args.limit, **options)
    if not path.exists():
        raise NoMatch(f"--data {args.data} is no file, no folder and no data set; {close_to(args.data, DATASETS)}")
    read = Task.from_folder if path.is_dir() else Task.from_npz
    try:
        task = read(path, seed=args.seed, **options)
    except TypeError as err:
        raise KnobError(f"--data-args: {err}") from err
    return task if args.limit is None else task.limited(args.limit)


def read_model(args: argparse.Namespace, task: Task | None) -> tuple[nn.Module, str]:
    """Return the model of the command line with its weights, in eval mode, and how its original is called.

    task: fills in the input shape and the classes of an architecture of the zoo.
    """
    name, arguments = args.model, dict(args.model_args)
    folder = _saved(name)
    if folder.is_dir():
        if not is_saved(folder):
            raise NoMatch(f"{folder} is no model saved by thrifty: it has no manifest.json and weights.safetensors")
        make, source = _original(args, folder, arguments, task)
        return load(folder, make), source
    make, source = model_factory(name, arguments, task)
    if args.weights is None:
        if args.verb in ("optimize", "compress", "deploy"):
            remark("no --weights: the model is used as its factory makes it")
        return _made(make, source).eval(), source
    if Path(args.weights).is_dir():
        return load(_saved(args.weights), lambda: _made(make, source)), source
    return load_weights(_made(make, source), args.weights), source


def read_example(args: argparse.Namespace, model: nn.Module | None, task: Task | None) -> Tensor:
    """Return one input, (1, ...): from the data, --input-shape, or the model's own `input_shape`."""
    if task is not None:
        return task.example
    shape = args.input_shape or getattr(model, "input_shape", None)
    if shape is None:
        raise KnobError("the shape of the input is not known: give --data or --input-shape C,H,W")
    return torch.zeros(1, *shape)


def refuse_shapes(model: nn.Module, example: Tensor) -> None:
    """Raise DataError, with torch's own line, when the model does not run on one input."""
    try:
        with torch.no_grad():
            model.eval()(example[:1])
    except Exception as err:
        line = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise DataError(f"the model does not run on an input of shape {tuple(example.shape[1:])}: {line}") from err


def model_factory(name: str, arguments: Mapping[str, Any], task: Task | None) -> tuple[Callable[[], nn.Module], str]:
    """Return what makes the model called `name`, and its name with arguments as one text."""
    options = dict(arguments)
    if name.startswith("zoo:"):
        architecture = _zoo_name(name.removeprefix("zoo:"))
        known = inspect.signature(ZOO[architecture]).parameters
        if task is not None and "input_shape" in known:
            options.setdefault("input_shape", tuple(task.example.shape[1:]))
        if task is not None and task.classes and "classes" in known:
            options.setdefault("classes", len(task.classes))
        return lambda: create(architecture, **options), _source(f"zoo:{architecture}", options)
    where, colon, attribute = name.rpartition(":")
    if not colon or not where or not attribute:
        raise KnobError(f"'{name}' is no model; write file.py:Name, package.module:Name, zoo:NAME or a saved folder")
    module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    if not hasattr(module, attribute):
        names = [n for n in vars(module) if not n.startswith("_")]
        raise NoMatch(f"{where} has no '{attribute}'; {close_to(attribute, names)}")
    found = getattr(module, attribute)
    if isinstance(found, nn.Module):
        raise KnobError(f"'{name}' is a model; give the class, or a function that makes it")
    if not callable(found):
        raise KnobError(f"'{name}' is a {type(found).__name__}; give a class, or a function that makes a model")
    return lambda: found(**options), _source(name, options)


def _saved(name: str) -> Path:
    """Return the folder of a saved model: `name`, or the folder `model` in it, as compress and optimize write it."""
    folder = Path(name)
    return folder / "model" if not is_saved(folder) and is_saved(folder / "model") else folder


def _original(
    args: argparse.Namespace, folder: Path, arguments: dict[str, Any], task: Task | None
) -> tuple[Callable[[], nn.Module], str]:
    """Return what makes the original of a saved model: --factory, or the zoo when the manifest names it."""
    if args.weights is not None:
        raise KnobError(f"{folder} holds its weights; leave --weights out, or give the class as MODEL")
    words = shlex.split(str(read_manifest(folder).get("source", "")))
    saved = dict(pair(word) for word in words[1:])
    if args.factory:
        same = bool(words) and words[0] == args.factory
        make, source = model_factory(args.factory, {**(saved if same else {}), **arguments}, task)
    elif words and words[0].startswith("zoo:"):
        make, source = model_factory(words[0], {**saved, **arguments}, task)
    else:
        name = words[0] if words else "file.py:Name"
        raise KnobError(f"{folder} holds no code; say where its original class is: add --factory {name}")
    return lambda: _made(make, source), source


def _made(make: Callable[[], nn.Module], source: str) -> nn.Module:
    name, *options = shlex.split(source)
    what = f"{name} ({', '.join(options)})" if options else name
    with _user_code(what):
        model = make()
    if not isinstance(model, nn.Module):
        raise KnobError(f"{what} made a {type(model).__name__}, not a torch.nn.Module")
    return model


def _source(name: str, options: Mapping[str, Any]) -> str:
    return shlex.join([name, *(f"{key}={value!r}" for key, value in options.items())])


def _zoo_name(name: str) -> str:
    plain = {n.replace("-", ""): n for n in ZOO}
    found = plain.get(name.lower().replace("-", "").replace("_", ""))
    if found is None:
        raise NoMatch(f"no architecture '{name}' in the zoo; {close_to(name, ZOO)}")
    return found


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise NoMatch(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"thrifty_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise NoMatch(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with _import_path(path.resolve().parent), _user_code(str(path)):
        spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> ModuleType:
    with _import_path(Path.cwd()), _user_code(name):
        return importlib.import_module(name)


@contextmanager
def _import_path(folder: Path) -> Iterator[None]:
    """Let the user's code import what lies beside it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


@contextmanager
def _user_code(what: str) -> Iterator[None]:
    """Turn what the user's own code raises into one sentence with its file and line."""
    try:
        yield
    except (ThriftyError, KeyboardInterrupt):
        raise
    except (Exception, SystemExit) as err:
        frames = [f for f in traceback.extract_tb(err.__traceback__) if _is_users(f.filename)]
        place = f" in {Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else ""
        raise DataError(f"{what} failed{place}: {type(err).__name__}: {err}") from err


def _is_users(file: str) -> bool:
    return file not in (__file__, importlib.__file__) and not file.startswith("<frozen")
