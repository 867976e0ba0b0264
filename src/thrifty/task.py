"""A task: data, what to minimise, what to measure. Training, validation and test data never mix."""

from __future__ import annotations

import inspect
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from thrifty.errors import DataError, KnobError, NoMatch, close_to
from thrifty.splits import Split, as_split, draw, first, number_labels, read_images, read_loader, stratified
from thrifty.training import Fit, Objective, PlainLoss, Training, matched, progress_bar

Array = npt.NDArray[Any]
Metric = Callable[[Array, Array], float]

__all__ = ["Metric", "Objective", "Split", "Task", "Training", "accuracy", "negative_error", "stratified"]

SPLITS = ("train", "validation", "test")
SCORE_BATCH = 256


def accuracy(outputs: Array, labels: Array) -> float:
    """Return the share of rows whose largest output is at the label.

    outputs: (n, classes, ...), or the classes themselves, (n, ...), of a model that ends in argmax; labels:
    (n, ...). NaN when an output is NaN. Raises DataError for outputs that do not fit the labels.

    >>> accuracy(np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([1, 1]))
    0.5
    """
    if np.isnan(outputs).any():
        return math.nan
    if outputs.shape == labels.shape:
        return float((outputs == labels).mean())
    scores = matched(outputs, labels, labels=True)
    if scores.shape[1] <= labels.max(initial=0):
        raise DataError(f"the model gives {scores.shape[1]} scores, but there are labels up to {labels.max()}")
    return float((scores.argmax(axis=1) == labels).mean())


def negative_error(outputs: Array, targets: Array) -> float:
    """Return minus the mean squared error, so that higher is better.

    >>> negative_error(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
    -2.0
    """
    return -float(np.mean((matched(outputs, targets, labels=False).astype(np.float64) - targets) ** 2))


@dataclass(frozen=True)
class Task:
    """Data, objective and metric; checks everything when made and lists all problems in one DataError.

    The test split is read by `score("test")`, `outputs(..., "test")` and nothing else.

    Attributes:
        train, validation: what training and choices may see; test: None, or what is scored once at the end.
        objective: what `fit` minimises; None = cross-entropy, or mean squared error for float targets.
        metric: (outputs, targets) -> float, higher is better; None = accuracy, or minus the squared error.
        classes: the names of the labels 0, 1, ...; empty for regression.
        info: where the data come from and how they were prepared; plain values, goes into reports.
    """

    train: Split
    validation: Split
    test: Split | None = None
    name: str = "task"
    seed: int = 0
    objective: Objective | None = None
    metric: Metric | None = None
    classes: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Convert the tensors' types, name unnamed classes, and refuse unusable data."""
        for name in SPLITS:
            split = getattr(self, name)
            if split is not None:
                object.__setattr__(self, name, as_split(split.x, split.y))
        if not self.train.y.is_floating_point() and not self.classes and len(self.train):
            count = int(self.train.y.max()) + 1
            object.__setattr__(self, "classes", tuple(str(i) for i in range(max(count, 0))))
        object.__setattr__(self, "classes", tuple(str(c) for c in self.classes))
        problems = [p for n in SPLITS if getattr(self, n) is not None for p in self._problems(n)]
        if problems:
            lines = "\n".join(f"  - {p}" for p in problems)
            raise DataError(f"the data of task '{self.name}' have {len(problems)} problem(s):\n{lines}")

    def _problems(self, name: str) -> list[str]:
        split: Split = getattr(self, name)
        found = []
        if not len(split):
            return [f"{name} is empty"]
        if len(split.x) != len(split.y):
            found.append(f"{name} has {len(split.x)} inputs, but {len(split.y)} targets")
        bad = ~torch.isfinite(split.x.reshape(len(split.x), -1)).all(dim=1)
        if bad.any():
            found.append(f"{name}.x has NaN or infinity in {int(bad.sum())} row(s), first row {first(bad)}")
        if split.x.shape[1:] != self.train.x.shape[1:]:
            shapes = tuple(split.x.shape[1:]), tuple(self.train.x.shape[1:])
            found.append(f"{name}.x has rows of shape {shapes[0]}, train.x of {shapes[1]}")
        if split.y.is_floating_point() != self.train.y.is_floating_point():
            found.append(f"{name}.y is {split.y.dtype}, train.y {self.train.y.dtype}")
        elif split.y.is_floating_point():
            if not torch.isfinite(split.y).all():
                found.append(f"{name}.y has NaN or infinity")
        else:
            wrong = ((split.y < 0) | (split.y >= len(self.classes))).reshape(len(split.y), -1).any(dim=1)
            if wrong.any():
                where = first(wrong)
                found.append(
                    f"{name}.y has {int(wrong.sum())} label(s) outside 0..{len(self.classes) - 1}, "
                    f"first {split.y[where].tolist()} at row {where}"
                )
        return found

    # what techniques read

    @property
    def example(self) -> Tensor:
        """The first training input, (1, ...): what `capture` runs the model on."""
        return self.train.x[:1]

    def calibration(self, n: int = 256, seed: int = 0) -> Tensor:
        """Return n random training inputs (all of them when there are fewer); the same for equal seeds."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        return self.train.x[order[:n]]

    def limited(self, rows: int) -> Task:
        """Return the same task with at most this many rows in each split, drawn with the task's seed."""
        if rows < 1:
            raise KnobError(f"{rows} rows are none; keep at least 1")

        def fewer(split: Split | None) -> Split | None:
            if split is None or len(split) <= rows:
                return split
            kept = draw(split.y.numpy(), rows, self.seed)
            return Split(split.x[kept], split.y[kept])

        changed = {name: fewer(getattr(self, name)) for name in SPLITS}
        return replace(self, **changed)  # type: ignore[arg-type]  # train and validation are never None

    # training and judging

    def fit(
        self,
        model: nn.Module,
        epochs: int = 10,
        lr: float = 0.05,
        *,
        objective: Objective | None = None,
        progress: bool | Callable[[int, int, float], None] = False,
        checkpoint: str | Path | None = None,
        parameters: list[Any] | None = None,
        before_epoch: Callable[[int, nn.Module], None] | None = None,
        **knobs: Any,
    ) -> nn.Module:
        """Train `model` in place on the training split and return it, in eval mode.

        Equal seeds give equal weights on the same machine and thread count. The other knobs are the fields of
        `Training` (batch, optimizer, schedule, mixup, crop, seed, ...); the seed defaults to the task's.

        progress: True shows a bar on stderr; a callable gets (finished epochs, epochs, mean loss).
        checkpoint: a file written after every epoch; if it exists, training goes on from it, to the same end.
        parameters: parameter groups for the optimiser, instead of all that require gradients; a group's "lr"
            follows the same schedule.
        before_epoch: called with (epoch, model) before each epoch, for schedules of a technique's own.
        Raises KnobError for unknown options, DataError for a loss that is not finite or a foreign checkpoint.
        """
        training = Training.of({"epochs": epochs, "lr": lr, "seed": self.seed, **knobs})
        fit = Fit(
            model=model,
            x=self.train.x,
            y=self.train.y,
            classes=len(self.classes),
            objective=objective or self.objective or PlainLoss(len(self.classes)),
            training=training,
            parameters=parameters,
            before_epoch=before_epoch,
            checkpoint=None if checkpoint is None else Path(checkpoint),
        )
        with progress_bar(progress, f"fit {self.name}") as show:
            fit.run(show)
        return model

    def outputs(self, model: nn.Module, split: str = "validation") -> Array:
        """Return the model's outputs in eval mode, (n, ...) float32; its mode is put back afterwards."""
        data = self.split(split)
        modes = {m: m.training for m in model.modules()}
        tensor = next(model.parameters(), next(model.buffers(), data.x))
        model.eval()
        try:
            with torch.no_grad():
                parts = [model(x.to(tensor.device)) for x in torch.split(data.x, SCORE_BATCH)]
        finally:
            for module, mode in modes.items():
                module.training = mode
        if not isinstance(parts[0], Tensor):
            raise DataError(
                f"the model returns {type(parts[0]).__name__}; a task needs one tensor: "
                "wrap the model so that its forward returns the scores only"
            )
        result: Array = torch.cat([p.cpu() for p in parts]).float().numpy()
        return result

    def score(self, model: nn.Module, split: str = "validation") -> float:
        """Return the metric of the model on a split; higher is better. Raises DataError when it is NaN."""
        return self.score_outputs(self.outputs(model, split), split)

    def score_outputs(self, outputs: Array, split: str = "validation") -> float:
        """Return the metric of outputs (n, ...) that were computed elsewhere, in the order of the split."""
        data = self.split(split)
        if len(outputs) != len(data):
            raise DataError(f"{len(outputs)} outputs for the {len(data)} rows of {self.name}'s {split} split")
        given = self.measure(np.asarray(outputs), data.y.numpy())
        try:
            value = float(given)
        except (TypeError, ValueError, RuntimeError) as err:
            kind = type(given).__name__
            raise DataError(f"the metric of task '{self.name}' returned a {kind}; it must return one number") from err
        if math.isnan(value):
            where = "outputs contain NaN" if np.isnan(outputs).any() else "no output is NaN: see the metric"
            raise DataError(f"the metric of task '{self.name}' on {split} is NaN; {where}")
        return value

    @cached_property
    def measure(self) -> Metric:
        """The metric in use."""
        return self.metric or (accuracy if self.classes else negative_error)

    def split(self, name: str) -> Split:
        """Return the split of this name; raises NoMatch, or DataError when the task has no such split."""
        if name not in SPLITS:
            raise NoMatch(f"'{name}' is no split; {close_to(name, SPLITS)}")
        found: Split | None = getattr(self, name)
        if found is None:
            raise DataError(f"task '{self.name}' has no {name} split; give x_test and y_test")
        return found

    # making one

    @classmethod
    def from_arrays(
        cls,
        x: Any,
        y: Any,
        *,
        x_validation: Any = None,
        y_validation: Any = None,
        x_test: Any = None,
        y_test: Any = None,
        groups: Any = None,
        validation: float = 0.15,
        test: float = 0.15,
        seed: int = 0,
        **more: Any,
    ) -> Task:
        """Make a task from arrays or tensors; what is not given is carved from x, y by `stratified`.

        x: (n, ...) channels first, as the model takes it; 8-bit integers are divided by 255. y: (n,) integer
        or text labels, or float targets. groups: (n,); rows of one group (a person, a track) never part.
        validation, test: shares of the rows to carve (test=0: no test split). more: name, objective, metric,
        classes, info.

        >>> task = Task.from_arrays(np.zeros((40, 3)), np.arange(40) % 2)
        >>> len(task.train), len(task.validation), len(task.test)
        (28, 6, 6)
        """
        _refuse_unknown(more, _OPTIONS)
        x, y = np.asarray(x), np.asarray(y)
        if not len(x) or len(x) != len(y):
            raise DataError(f"x has {len(x)} rows and y {len(y)}; both need the same number, above 0")
        if y.dtype.kind in "US":
            more["classes"] = more.get("classes") or tuple(np.unique(y).tolist())
            names = list(more["classes"])
            y, y_validation, y_test = (number_labels(v, names) for v in (y, y_validation, y_test))
        rows = np.arange(len(x))
        parts: dict[str, Split | None] = {"validation": None, "test": None}
        given = {"validation": (x_validation, y_validation), "test": (x_test, y_test)}
        shares = {"validation": validation, "test": test}
        for name in ("test", "validation"):
            if given[name][0] is not None:
                parts[name] = as_split(*given[name])
                continue
            if not shares[name]:
                continue
            share = shares[name] * len(x) / len(rows)
            apart = None if groups is None else np.asarray(groups)[rows]
            kept, carved = stratified(y[rows], share, seed, apart)
            parts[name] = as_split(x[rows[carved]], y[rows[carved]])
            rows = rows[kept]
        held_out = parts["validation"]
        if held_out is None:
            raise DataError(
                "validation is 0; choices need data that training does not see: give at least 0.05"
            )
        return cls(as_split(x[rows], y[rows]), held_out, parts["test"], seed=seed, **more)

    @classmethod
    def from_npz(cls, path: str | Path, **more: Any) -> Task:
        """Make a task from an .npz file of x, y, or of x_train, y_train, [x_val, y_val], x_test, y_test.

        Optional arrays: groups (rows of one group never part) and classes (names). more: as in `from_arrays`.
        """
        path = Path(path)
        _refuse_unknown(more, _OPTIONS)
        if not path.is_file():
            raise DataError(f"there is no file {path}")
        arrays = _npz_arrays(path)
        names = {"x_val": "x_validation", "y_val": "y_validation", "x_train": "x", "y_train": "y"}
        arrays = {names.get(k, k): v for k, v in arrays.items()}
        pairs = (("x", "y"), ("x_validation", "y_validation"), ("x_test", "y_test"))
        both = [(a, b) for a, b in pairs] + [(b, a) for a, b in pairs]
        missing = [n for n, other in both if n not in arrays and other in arrays]
        missing += [n for n in ("x", "y") if n not in arrays and n not in missing]
        if missing:
            raise DataError(
                f"{path} lacks {', '.join(missing)} (it has {', '.join(sorted(arrays))}); "
                "it needs x and y, or x_train, y_train and optionally x_val, y_val, x_test, y_test"
            )
        used = {n: arrays[n] for pair in pairs for n in pair if n in arrays}
        if "classes" in arrays:
            more.setdefault("classes", tuple(str(c) for c in arrays["classes"]))
        if "groups" in arrays:
            more.setdefault("groups", arrays["groups"])
        more.setdefault("name", path.stem)
        return cls.from_arrays(**used, **more)

    @classmethod
    def from_folder(cls, path: str | Path, size: tuple[int, int] | None = None, **more: Any) -> Task:
        """Make a task from images: `path/CLASS/*.png`, or `path/{train,val,test}/CLASS/*.png`.

        Labels are folder names in sorted order. Pixels become RGB in [0, 1], less each channel's mean,
        divided by its deviation (over all training images); info["mean"] and info["std"] prepare a new image.
        size: (height, width) to resize to; needed when the images differ. more: as in `from_arrays`.
        """
        path = Path(path)
        _refuse_unknown(more, ["size", *_OPTIONS], without=["classes"])
        names = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
        found = {names[d.name]: d for d in sorted(path.glob("*")) if d.is_dir() and d.name in names}
        nested = "train" in found and any(d.is_dir() for d in found["train"].iterdir())
        folders = found if nested else {"train": path}
        classes = sorted(d.name for d in folders["train"].iterdir() if d.is_dir()) if path.is_dir() else []
        if len(classes) < 2:
            raise DataError(f"{path} has {len(classes)} class folder(s); it needs one folder a class")
        arrays: dict[str, Any] = {}
        for part, folder in folders.items():
            ending = "" if part == "train" else f"_{part}"
            arrays["x" + ending], arrays["y" + ending] = read_images(folder, classes, size)
        mean = arrays["x"].mean(axis=(0, 2, 3), dtype=np.float64)
        std = arrays["x"].std(axis=(0, 2, 3), dtype=np.float64) + 1e-6
        for key in [k for k in arrays if k.startswith("x")]:
            arrays[key] = ((arrays[key] - mean[:, None, None]) / std[:, None, None]).astype(np.float32)
        more.setdefault("name", path.name)
        info = {"source": str(path), "mean": mean.tolist(), "std": std.tolist()}
        more["info"] = {**info, **more.get("info", {})}
        return cls.from_arrays(**arrays, classes=tuple(classes), **more)

    @classmethod
    def from_loaders(
        cls, train: Iterable[Any], validation: Any = None, test: Any = None, **more: Any
    ) -> Task:
        """Make a task from DataLoaders (anything that yields (x, y) batches), read once into memory.

        validation, test: a loader, or the share to carve from `train` (None: the default share).
        Random augmentation inside a loader is frozen at one draw: use `fit`'s own options instead.
        Raises DataError beyond 4 GiB. more: as in `from_arrays`.
        """
        arrays: dict[str, Any] = {}
        for ending, loader in (("", train), ("_validation", validation), ("_test", test)):
            if isinstance(loader, (int, float)):
                more[ending[1:]] = loader
            elif loader is not None:
                arrays["x" + ending], arrays["y" + ending] = read_loader(loader)
        return cls.from_arrays(**arrays, **more)


_OPTIONS = ("groups", "validation", "test", "seed")  # of from_arrays, which are no fields


def _refuse_unknown(given: Mapping[str, Any], more: Iterable[str], without: Iterable[str] = ()) -> None:
    """Raise KnobError for options that neither a task has, nor what makes one (`more`)."""
    fields = [n for n in inspect.signature(Task).parameters if n not in (*SPLITS, "seed", *without)]
    known = [*more, *fields]
    strange = [f"'{o}' ({close_to(o, known)})" for o in given if o not in known]
    if strange:
        raise KnobError(f"a task has no option {', '.join(strange)}")


def _npz_arrays(path: Path) -> dict[str, Any]:
    """Return the arrays of an .npz file; nothing in it is executed."""
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is no .npz file; write one with numpy.savez(path, x=x, y=y)")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {k: file[k] for k in file.files}
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as err:
        raise DataError(f"{path} is damaged: {err}") from err
    except ValueError as err:
        raise DataError(
            f"{path} holds Python objects or a damaged array; give plain arrays, all rows of one length"
        ) from err
    wrong = [k for k, v in found.items() if not isinstance(v, np.ndarray)]
    if wrong:
        raise DataError(f"{path} holds {', '.join(wrong)}, which are no arrays; write it with numpy.savez")
    return found
