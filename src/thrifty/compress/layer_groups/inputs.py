"""Batches from files: a folder of wav or flac clips for speech encoders, a file of texts for language models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thrifty.compress.layer_groups.families import FRAMES, TOKENS, Stack
from thrifty.errors import DataError, KnobError, MissingExtra, need

RATE = 16000  # samples per second that all of these encoders hear
HOP = 320  # samples per position of Whisper's encoder
LONGEST = 30.0  # seconds
Clip = NDArray[np.float32]


def read_batches(
    stack: Stack, data: str | Path, folder: str | Path, limit: int = 200, seconds: float = 10.0, batch: int = 8
) -> list[dict[str, Tensor]]:
    """Return the first `limit` clips or texts, in order of name or line, as batches for the trunk.

    data: a folder of .wav and .flac (speech), or a .txt with a text per line or a .jsonl with {"text": ...} per line.
    folder: of the model, for its tokenizer and the normalisation of its audio. seconds: longer clips are cut. A
    Whisper encoder must have been shortened (`short_whisper`) to `positions_of(clips)`; see cli/groups.py.
    Raises DataError naming every file that cannot be read, KnobError, MissingExtra.
    """
    refuse_options(limit, seconds, batch)
    if stack.family.mask == TOKENS:
        return _texts(read_texts(data, limit), folder, batch)
    clips = read_clips(data, limit, seconds)
    return whisper_batches(stack, clips, batch) if stack.family.mask == FRAMES else _waves(clips, folder, batch)


def read_clips(data: str | Path, limit: int, seconds: float = LONGEST) -> list[Clip]:
    """Return clips at 16 kHz, mono, float32 within -1..1."""
    data = Path(data)
    if not data.is_dir():
        raise DataError(f"{data} is no folder; a speech encoder needs a folder of .wav or .flac clips")
    paths = sorted(p for p in data.rglob("*") if p.suffix.lower() in (".wav", ".flac"))[:limit]
    if not paths:
        raise DataError(f"{data} holds no .wav and no .flac file")
    clips, bad = [], []
    for path in paths:
        try:
            clips.append(_read_clip(path)[: int(seconds * RATE)])
        except (OSError, ValueError, EOFError, RuntimeError) as err:
            bad.append(f"{path}: {err}")
    bad += [f"{p}: shorter than 25 ms" for p, c in zip(paths, clips, strict=False) if not bad and len(c) < RATE // 40]
    if bad:
        raise DataError(f"{len(bad)} clip(s) cannot be used: " + "; ".join(bad))
    return clips


def read_texts(data: str | Path, limit: int) -> list[str]:
    """Return the texts of a .txt or .jsonl file, empty lines left out."""
    data = Path(data)
    if data.suffix not in (".txt", ".jsonl") or not data.is_file():
        raise DataError(f"{data} is no .txt or .jsonl file; a language model needs texts, one a line")
    lines = [line for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    if data.suffix == ".jsonl":
        lines, bad = _from_json(lines)
        if bad:
            raise DataError(f"{data}: lines {bad[:10]} are not of the form {{\"text\": \"...\"}}")
    if not lines:
        raise DataError(f"{data} holds no text")
    return lines[:limit]


def positions_of(clips: Sequence[Clip]) -> int:
    """Return how many positions of 20 ms the longest clip takes."""
    return max(-(-len(c) // HOP) for c in clips)


def whisper_batches(stack: Stack, clips: Sequence[Clip], batch: int = 8) -> list[dict[str, Tensor]]:
    """Return log-mel batches as long as the encoder's context, with masks of the frames that are no padding."""
    transformers = need("transformers", extra="llm")
    positions = int(stack.config.max_source_positions)
    extract = transformers.WhisperFeatureExtractor(feature_size=stack.config.num_mel_bins)
    made = []
    for start in range(0, len(clips), batch):
        part = [c[: positions * HOP] for c in clips[start : start + batch]]
        mel = extract(part, sampling_rate=RATE, max_length=positions * HOP, return_tensors="np").input_features
        frames = torch.tensor([-(-len(c) // HOP) for c in part])
        mask = torch.arange(positions)[None] < frames[:, None]
        made.append({"input_features": torch.from_numpy(mel), "frame_mask": mask})
    return made


def refuse_options(limit: int, seconds: float, batch: int) -> None:
    """Raise KnobError for options out of range."""
    bad = [f"{n} is {v}; it must be at least 1" for n, v in (("limit", limit), ("batch", batch)) if v < 1]
    if not 0 < seconds <= LONGEST:
        bad.append(f"seconds is {seconds}; it must be above 0 and at most {LONGEST:.0f}")
    if bad:
        raise KnobError("; ".join(bad))


def _waves(clips: Sequence[Clip], folder: str | Path, batch: int) -> list[dict[str, Tensor]]:
    transformers = need("transformers", extra="llm")
    known = (Path(folder) / "preprocessor_config.json").is_file()
    kind: Any = transformers.Wav2Vec2FeatureExtractor
    extract = kind.from_pretrained(str(folder), local_files_only=True) if known else kind()
    made = []
    for start in range(0, len(clips), batch):
        part = extract(list(clips[start : start + batch]), sampling_rate=RATE, padding=True, return_attention_mask=True,
                       return_tensors="pt")  # fmt: skip
        made.append({"input_values": part["input_values"].float(), "attention_mask": part["attention_mask"].long()})
    return made


def _texts(texts: Sequence[str], folder: str | Path, batch: int) -> list[dict[str, Tensor]]:
    transformers = need("transformers", extra="llm")
    try:
        reader = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as err:
        raise DataError(f"{folder} holds no tokenizer that can be read: {err}") from err
    if reader.pad_token is None:
        reader.pad_token = reader.eos_token
    reader.padding_side = "right"
    made = []
    for start in range(0, len(texts), batch):
        part = reader(list(texts[start : start + batch]), padding=True, truncation=True, max_length=128,
                      return_tensors="pt")  # fmt: skip
        made.append({k: part[k] for k in ("input_ids", "attention_mask")})
    return made


def _read_clip(path: Path) -> Clip:
    if path.suffix.lower() == ".flac":
        values, rate = _sound_file().read(str(path), dtype="float32")
    else:
        rate, values = need("scipy.io.wavfile", extra="data").read(str(path))
    values = np.asarray(values)
    if values.dtype.kind in "iu":
        middle, half = (128, 128) if values.dtype == np.uint8 else (0, -int(np.iinfo(values.dtype).min))
        values = (values.astype(np.float32) - middle) / half
    values = values.astype(np.float32)
    mono: Clip = values.mean(axis=1) if values.ndim == 2 else values
    if not np.isfinite(mono).all():
        raise ValueError("holds NaN or infinity")
    if rate == RATE:
        return mono
    common = gcd(int(rate), RATE)
    resample = need("scipy.signal", extra="data").resample_poly
    return np.asarray(resample(mono, RATE // common, int(rate) // common), dtype=np.float32)


def _sound_file() -> Any:
    try:
        return need("soundfile", extra="data")
    except MissingExtra as err:
        raise MissingExtra("reading .flac needs the package soundfile; run: pip install soundfile") from err


def _from_json(lines: Sequence[str]) -> tuple[list[str], list[int]]:
    texts, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if isinstance(text, str) and text.strip():
            texts.append(text)
        else:
            bad.append(number)
    return texts, bad
