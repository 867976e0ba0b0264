"""From pictures and texts to feature arrays: frozen encoders, extraction with a cache, folders of pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from thrifty.errors import NoMatch, close_to
from thrifty.fewshot.features.encoders import Encoder, TextEncoder, efficientnet_lite0, from_module, pixels
from thrifty.fewshot.features.extraction import extract
from thrifty.fewshot.features.folder import FolderFeatures, PictureFolder, find_pictures, folder_features
from thrifty.fewshot.features.hugging_face import MINILM, from_hugging_face, sentence_encoder
from thrifty.fewshot.features.pictures import CroppedPictures, PictureFiles, fit_picture, read_picture

__all__ = [
    "ENCODERS",
    "CroppedPictures",
    "Encoder",
    "FolderFeatures",
    "PictureFiles",
    "PictureFolder",
    "TextEncoder",
    "encoder",
    "extract",
    "find_pictures",
    "fit_picture",
    "folder_features",
    "from_hugging_face",
    "from_module",
    "pixels",
    "read_picture",
    "sentence_encoder",
]

ENCODERS: dict[str, Callable[..., Encoder]] = {
    "efficientnet-lite0": efficientnet_lite0,
    "pixels": pixels,
}
SENTENCE_ENCODERS = (MINILM,)


def encoder(name: str | Path, **options: Any) -> Encoder:
    """Return a picture encoder: one of ENCODERS by name, or the Hugging Face vision model in a local folder.

    options: of the maker, such as fit="pad", device="cuda" for "efficientnet-lite0" or size=16 for "pixels".
    Raises NoMatch when the name is neither; MissingExtra with what to install.

    >>> encoder("pixels", size=4).dimension
    48
    """
    if str(name) in ENCODERS:
        return ENCODERS[str(name)](**options)
    if Path(name).is_dir():
        return from_hugging_face(name, **options)
    known = close_to(str(name), ENCODERS)
    raise NoMatch(f"no encoder '{name}' and no such folder; {known}, or the folder of a Hugging Face vision model")
