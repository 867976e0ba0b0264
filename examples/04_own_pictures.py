"""How to go from a folder of one's own pictures to labels, a forecast of how good they are, and "unknown"."""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from thrifty.cli import main as thrifty
from thrifty.fewshot import NearestClassMean, WithUnknown
from thrifty.fewshot.features import encoder, folder_features

SHOTS, QUERIES = 8, 40
KNOWN, OTHER = range(6), range(6, 10)


def make_folders(root: Path) -> None:
    """Write digits as PNG files: mine/LABEL (a few of 0 to 5), new/LABEL (others of them), other/LABEL (6 to 9)."""
    digits, rng = load_digits(), np.random.default_rng(0)
    for label in (*KNOWN, *OTHER):
        for i, row in enumerate(rng.permutation(np.flatnonzero(digits.target == label))[: SHOTS + QUERIES]):
            place = "other" if label in OTHER else "mine" if i < SHOTS else "new"
            file = root / place / f"digit {label}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8(255 - digits.images[row] * 15.9)).resize((32, 32)).save(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="where folders and reports go; default: a temporary one")
    out = parser.parse_args().out or Path(tempfile.mkdtemp())
    make_folders(out)

    made = encoder("pixels", size=16)  # enough for digits; for photographs encoder("efficientnet-lite0")

    # In Python: folders to arrays, arrays to any estimator of scikit-learn.
    mine = folder_features(out / "mine", made, cache=out / "cache")
    new = folder_features(out / "new", made, cache=out / "cache")
    other = folder_features(out / "other", made, cache=out / "cache")
    model = NearestClassMean(preprocess="E").fit(mine.features, mine.labels)
    print(f"{made.name}: {len(mine)} shots of {len(mine.classes)} classes, {len(new)} new pictures")
    said, later = (model.forecast(mine.features, mine.labels, shots) for shots in (None, 50))
    print(f"forecast from the shots alone: accuracy {said.accuracy:.2f} ({1 - said.high:.2f} to {1 - said.low:.2f})")
    print(f"what came true: {model.score(new.features, new.labels):.2f}")
    print(f"forecast for 50 shots of each: {later.accuracy:.2f}")

    careful = WithUnknown(model, rate=0.1, preprocess="E").fit(mine.features, mine.labels)
    lost, found = (float((careful.predict(f.features) == "unknown").mean()) for f in (new, other))
    print(f"'unknown': {lost:.2f} of the known digits (10 % asked for), {found:.2f} of the digits never seen")

    # The same on the command line, with a report to look at.
    words = ["--encoder", "pixels:16", "--cache", str(out / "cache"), "--out", str(out / "answers")]
    return thrifty(["classify", str(out / "mine"), str(out / "new"), str(out / "other"), "--unknown", "10%", *words])


if __name__ == "__main__":
    raise SystemExit(main())
