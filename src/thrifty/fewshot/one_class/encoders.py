"""Encoder pairs as arrays, texts and pictures in one space: CLIP-like folders, a learned map, stored vectors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.errors import DataError, StoreError, need
from thrifty.fewshot.preprocess import Array, InputError, OptionError, unit

TEMPLATES = ("a photo of a {label}.",)


def prompts(labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[str]:
    """Return every label in every template, label by label.

    >>> prompts(["cat"], ["a {label}", "one {label}"])
    ['a cat', 'one cat']
    """
    bad = [t for t in templates if "{label}" not in t]
    if bad or not templates:
        raise OptionError(f"template(s) {bad} lack the place '{{label}}'" if bad else "no template was given")
    return [t.format(label=label.replace("_", " ")) for label in labels for t in templates]


def average_templates(texts: npt.ArrayLike, templates: int) -> Array:
    """Return (m, d) unit vectors from (m * templates, d), template by template within a label: unit, mean, unit."""
    table = np.asarray(texts, np.float64)
    if table.ndim != 2 or len(table) % templates:
        raise InputError(f"texts have shape {table.shape}; they must be (labels * {templates}, d)")
    return unit(unit(table).reshape(-1, templates, table.shape[1]).mean(axis=1))


@dataclass
class TextMap:
    """A text encoder and a picture encoder that never met, joined by ridge regression from texts to features.

    Not CLIP: what it knows of the correspondence is what the classes it was fitted on show. Fit it on classes that are
    neither calibrated nor tested on. Pictures are centred on the mean of the fitted ones and scaled to unit length;
    texts are mapped to that space.

    >>> rng = np.random.default_rng(0); texts = rng.standard_normal((50, 3)); way = rng.standard_normal((3, 8))
    >>> pair = TextMap(alpha=1e-6).fit(texts[:40], texts[:40] @ way)
    >>> bool((np.einsum("nd,nd->n", pair.texts(texts[40:]), pair.images(texts[40:] @ way)) > 0.9).all())
    True
    """

    alpha: float = 1.0  # of the ridge; texts are used as given (unit length for a sentence encoder)

    def fit(self, texts: npt.ArrayLike, features: npt.ArrayLike, rows: npt.ArrayLike | None = None) -> TextMap:
        """Learn from texts (m, e) and features (n, d); rows (n,): which text each picture has (default: its own)."""
        t, f = np.asarray(texts, np.float64), np.asarray(features, np.float64)
        which = np.arange(len(f)) if rows is None else np.asarray(rows)
        if t.ndim != 2 or f.ndim != 2 or which.shape != f.shape[:1] or not len(f) or which.max() >= len(t):
            raise InputError(
                f"texts {t.shape}, features {f.shape}, rows {which.shape}; they must be (m, e), (n, d), (n,) below m"
            )
        if not (np.isfinite(t).all() and np.isfinite(f).all()):
            raise InputError("texts or features hold NaN or infinity")
        self.mean_ = f.mean(axis=0)
        self.ridge_ = need("sklearn.linear_model", extra="fewshot").Ridge(alpha=self.alpha)
        self.ridge_.fit(t[which], self.images(f))
        return self

    def images(self, features: npt.ArrayLike) -> Array:
        """Return unit picture embeddings (n, d) of features (n, d)."""
        return unit(np.asarray(features, np.float64) - self.mean_)

    def texts(self, texts: npt.ArrayLike) -> Array:
        """Return unit text embeddings (m, d) of sentence vectors (m, e)."""
        return unit(np.asarray(self.ridge_.predict(np.asarray(texts, np.float64)), np.float64))


@dataclass
class ClipFolder:
    """A CLIP-like model (CLIP, SigLIP, ...) in a local Hugging Face folder, on the CPU, without network.

    Raises MissingExtra without transformers, DataError for a folder that holds no such model.
    """

    folder: str | Path
    templates: Sequence[str] = TEMPLATES
    batch: int = 16
    _loaded: dict[str, Any] = field(default_factory=dict, repr=False)

    def texts(self, labels: Sequence[str]) -> Array:
        """Return unit text embeddings (m, d) of labels, averaged over the templates."""
        tokenizer, model = self._load("tokenizer"), self._load("model")
        length = getattr(model.config.text_config, "max_position_embeddings", 77)
        found = []
        for part in _parts(prompts(labels, self.templates), self.batch):
            tokens = tokenizer(part, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            found.append(_array(model.get_text_features(**tokens)))
        return average_templates(np.concatenate(found), len(self.templates))

    def images(self, pictures: Sequence[Any]) -> Array:
        """Return unit picture embeddings (n, d) of Pillow images, or arrays (h, w, 3) of uint8."""
        model, how = self._load("model"), self._load("pixels")
        feature = need("transformers", extra="llm").BatchFeature
        found = []
        for part in _parts(pictures, self.batch):
            pixels = np.stack([how.prepare(picture) for picture in part])
            batch = feature({"pixel_values": pixels}).convert_to_tensors("pt")
            found.append(_array(model.get_image_features(**batch)))
        return unit(np.concatenate(found))

    def _load(self, part: str) -> Any:
        if not self._loaded:
            folder = Path(self.folder)
            if not (folder / "config.json").is_file():
                raise DataError(f"{folder} holds no config.json; give the local folder of a CLIP-like model")
            transformers = need("transformers", extra="llm")
            try:
                model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            except (OSError, ValueError, KeyError) as err:
                raise DataError(f"{folder} holds no model that transformers can load: {err}") from err
            if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
                raise DataError(f"{folder} holds a {type(model).__name__}, which has no text and picture towers")
            self._loaded.update(model=model.eval().float().requires_grad_(False), tokenizer=tokenizer)
            self._loaded["pixels"] = Pixels.read(folder, model.config.vision_config.image_size)
        return self._loaded[part]


@dataclass(frozen=True)
class Pixels:
    """How a picture becomes numbers: resized (bicubic), cropped at the centre, scaled to [0, 1], normalised."""

    height: int
    width: int
    crop: bool = True  # resize the shorter edge and crop; else resize both edges
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def read(cls, folder: Path, size: int) -> Pixels:
        """Return what preprocessor_config.json says; raise DataError without one: mean and std cannot be guessed."""
        path = folder / "preprocessor_config.json"
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            mean, std = tuple(map(float, told["image_mean"])), tuple(map(float, told["image_std"]))
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise DataError(f"{path} does not say image_mean and image_std: {err!r}; copy it from the model") from err
        return cls(size, size, bool(told.get("do_center_crop", False)), mean, std)

    def prepare(self, picture: Any) -> npt.NDArray[np.float32]:
        """Return (3, height, width) float32."""
        image = need("PIL.Image", extra="data")
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise InputError(f"a picture is {picture.dtype} {picture.shape}; it must be uint8 (h, w, 3)")
            picture = image.fromarray(picture)
        picture = picture.convert("RGB")
        if self.crop:
            factor = max(self.height / picture.height, self.width / picture.width)
            size = (max(self.width, round(picture.width * factor)), max(self.height, round(picture.height * factor)))
            picture = picture.resize(size, image.Resampling.BICUBIC)
            left, top = (size[0] - self.width) // 2, (size[1] - self.height) // 2
            picture = picture.crop((left, top, left + self.width, top + self.height))
        else:
            picture = picture.resize((self.width, self.height), image.Resampling.BICUBIC)
        scaled = (np.asarray(picture, np.float32) / np.float32(255.0) - np.array(self.mean)) / np.array(self.std)
        return np.ascontiguousarray(scaled.transpose(2, 0, 1), dtype=np.float32)


def write_texts(path: str | Path, texts: Mapping[str, npt.ArrayLike]) -> None:
    """Store text embeddings, name -> (d,), as .npz with `names` and `vectors`; written aside, then renamed."""
    target = Path(path)
    partial = target.with_name(target.name + ".partial.npz")
    np.savez_compressed(partial, names=np.array(list(texts)), vectors=np.array([np.asarray(v) for v in texts.values()]))
    os.replace(partial, target)


def read_texts(path: str | Path) -> dict[str, Array]:
    """Return stored text embeddings, name -> (d,) float64; raise StoreError for another file."""
    try:
        with np.load(path, allow_pickle=False) as found:
            names, vectors = found["names"], np.asarray(found["vectors"], np.float64)
    except (OSError, ValueError, KeyError) as err:
        raise StoreError(f"{path} is no file of text embeddings (.npz with names and vectors): {err}") from err
    if vectors.ndim != 2 or names.shape != vectors.shape[:1] or not np.isfinite(vectors).all():
        raise StoreError(f"{path}: {names.shape} names and {vectors.shape} vectors do not fit, or hold NaN")
    return {str(name): vector for name, vector in zip(names, vectors, strict=True)}


def _parts(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _array(found: Any) -> Array:
    """Return a tensor, or the pooled output of a tower, as float64."""
    pooled = getattr(found, "pooler_output", None)
    return np.asarray((found if pooled is None else pooled).detach().cpu().numpy(), np.float64)
