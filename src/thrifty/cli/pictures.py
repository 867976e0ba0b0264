"""What the verbs on folders of pictures share: the flags of the encoder, reading folders, percentages."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thrifty.errors import KnobError

if TYPE_CHECKING:
    from thrifty.fewshot.features import Encoder, FolderFeatures, PictureFiles, PictureFolder

ENCODER = "efficientnet-lite0, pixels, pixels:SIZE, or the folder of a Hugging Face vision model"


def add_encoder(parser: argparse.ArgumentParser) -> None:
    """Add the flags that decide how a picture becomes features."""
    group = parser.add_argument_group("features")
    group.add_argument("--encoder", default="efficientnet-lite0", metavar="ENCODER", help=f"{ENCODER} (%(default)s)")
    group.add_argument("--device", default="cpu", help="where the encoder runs, such as cuda (%(default)s)")
    group.add_argument(
        "--fit", choices=("crop", "pad", "stretch"), default="crop", help="how a picture becomes square (%(default)s)"
    )
    group.add_argument(
        "--background", type=colour, default=(255, 255, 255), metavar="R,G,B",
        help="what transparent pictures lie on (255,255,255)",
    )  # fmt: skip
    group.add_argument(
        "--crops", type=int, default=0, metavar="COUNT", help="average features over random crops; 0: the whole picture"
    )
    group.add_argument(
        "--preprocess", default="E", metavar="LETTERS",
        help="R: relu, P: square root, E: unit length, in this order; '' for none (%(default)s)",
    )  # fmt: skip
    group.add_argument("--batch", type=int, default=32, help="pictures encoded at once (%(default)s)")
    group.add_argument("--cache", metavar="FOLDER", help="where features are kept (~/.cache/thrifty/features)")
    group.add_argument("--no-cache", action="store_true", help="keep no features")


def colour(text: str) -> tuple[int, int, int]:
    """Return the colour of "R,G,B"."""
    values = [int(n) for n in text.split(",")] if re.fullmatch(r"\d+,\d+,\d+", text) else []
    if len(values) != 3 or max(values) > 255:
        raise argparse.ArgumentTypeError(f"'{text}' is not a colour such as 255,255,255")
    return values[0], values[1], values[2]


def share(text: str) -> float:
    """Return a share in (0, 1) from "90%" or "0.9".

    >>> share("90%"), share("0.05")
    (0.9, 0.05)
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(%?)", text)
    value = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a share such as 5% or 0.05")
    return round(value, 12)


def counts(text: str) -> tuple[int, ...]:
    """Return the numbers of "1,2,5", ascending."""
    if not re.fullmatch(r"\d+(,\d+)*", text) or 0 in (found := sorted({int(n) for n in text.split(",")})):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of shots such as 1,2,5,10")
    return tuple(found)


class Features:
    """Features of picture folders and files, as the flags say; shows a bar while the encoder works."""

    def __init__(self, args: argparse.Namespace) -> None:
        from thrifty.fewshot.easy import Crops
        from thrifty.fewshot.preprocess import check_letters

        check_letters(args.preprocess)
        if "M" in args.preprocess:
            raise KnobError("--preprocess: 'M' needs the mean of base classes, which the command line has not; use E")
        if args.crops < 0:
            raise KnobError(f"--crops is {args.crops}; it must be at least 1, or 0 for the whole picture")
        self.args = args
        self.crops = Crops(views=args.crops) if args.crops else None
        self.encoder: Encoder = read_encoder(args)

    def of_folder(self, folder: PictureFolder, title: str) -> FolderFeatures:
        """Return the features of a folder, before preprocessing."""
        import numpy as np

        from thrifty.fewshot.features import FolderFeatures

        features = self.of_files(folder.pictures(self.args.background), title)
        files = tuple(f.as_posix() for f in folder.files)
        return FolderFeatures(features, np.array(folder.labels, dtype=np.str_), files, folder.classes)

    def of_files(self, pictures: PictureFiles, title: str) -> Any:
        """Return the features (n, d) of picture files, before preprocessing."""
        from thrifty.cli.show import progress_bar
        from thrifty.fewshot.features.folder import picture_features

        with progress_bar(title) as progress:
            return picture_features(
                pictures, self.encoder, crops=self.crops, seed=self.args.seed, batch=self.args.batch,
                progress=progress, cache=cache_of(self.args),
            )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """Return what decides the features, for the written results."""
        return {
            "encoder": self.encoder.name,
            "encoder_sha256": self.encoder.identity,
            "dimension": self.encoder.dimension,
            "fit": self.encoder.fit,
            "background": list(self.args.background),
            "crops": self.args.crops,
            "preprocess": self.args.preprocess,
            "seed": self.args.seed,
        }


def read_encoder(args: argparse.Namespace) -> Encoder:
    """Return the encoder of the flags."""
    from thrifty.fewshot.features import encoder

    name, _, size = args.encoder.partition(":")
    if name == "pixels":
        if size and not size.isdigit():
            raise KnobError(f"--encoder {args.encoder}: write pixels, or pixels:16 for 16 x 16 pixels")
        return encoder("pixels", fit=args.fit, **({"size": int(size)} if size else {}))
    if Path(args.encoder).is_dir() and (Path(args.encoder) / "config.json").is_file():
        if args.fit != "crop":
            raise KnobError(f"--fit {args.fit}: {args.encoder} has its own image processor, which decides that")
        return encoder(args.encoder, device=args.device)
    return encoder(args.encoder, fit=args.fit, device=args.device)


def cache_of(args: argparse.Namespace) -> Path | None:
    """Return the folder in which features are kept."""
    if args.no_cache:
        return None
    from thrifty.data.source import cache_folder

    return Path(args.cache) if args.cache else cache_folder() / "features"


def refuse_out(out: str | None) -> None:
    """Raise before any work when the folder for results cannot be made."""
    if out is None:
        return
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise KnobError(f"--out {out} cannot be a folder: {err.strerror or err}") from err


def thumbnail(path: Path, background: tuple[int, int, int], size: int = 96) -> str:
    """Return a picture as the base64 of a small JPEG."""
    import base64
    import io

    from PIL import Image

    from thrifty.fewshot.features import fit_picture, read_picture

    buffer = io.BytesIO()
    Image.fromarray(fit_picture(read_picture(path, background), size, "pad", background)).save(
        buffer, "JPEG", quality=80
    )
    return base64.b64encode(buffer.getvalue()).decode()


def percent(value: float | None, places: int = 1) -> str:
    """Return a share as a percentage.

    >>> percent(0.9312)
    '93.1 %'
    """
    return "–" if value is None else f"{100 * value:.{places}f} %"


def joined(words: Sequence[Any], most: int = 8) -> str:
    """Return the first of some names, and how many more there are."""
    shown = ", ".join(f"'{w}'" for w in list(words)[:most])
    return shown if len(words) <= most else f"{shown} and {len(words) - most} more"
