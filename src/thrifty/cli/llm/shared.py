"""What the methods share: the flags of model and data, refusals all at once, checkpoint folders, JSON answers."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from thrifty.errors import DataError, KnobError, StoreError, ThriftyError

if TYPE_CHECKING:
    from thrifty.llm.loading import Encoded

MODEL = "a folder of a Hugging Face causal language model, or a .gguf file"
EXAMPLES = "a JSONL file: {\"prompt\", \"completion\"} or {\"text\"} on each line"
DTYPES = ("float32", "bfloat16", "float16")  # keys of thrifty.llm.loading.DTYPES
T = TypeVar("T")


def add_model(parser: argparse.ArgumentParser, needed: bool = True, what: str = MODEL) -> None:
    """Add the flags of a causal language model."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=needed, metavar="MODEL", help=what)
    group.add_argument("--dtype", choices=DTYPES, help="of the weights in memory (the checkpoint's; float32 for .gguf)")
    group.add_argument("--device", default="cpu", help="where it runs, such as cuda (%(default)s)")


def add_reading(parser: argparse.ArgumentParser, batch: int, tokens: int = 256) -> None:
    """Add the flags that say how data become tokens."""
    parser.add_argument("--max-tokens", type=int, default=tokens, metavar="N", help="of an example (%(default)s)")
    parser.add_argument("--chat", action="store_true", help="write prompts with the tokenizer's chat template")
    parser.add_argument("--batch", type=int, default=batch, help="examples at a time (%(default)s)")


def add_answer(parser: argparse.ArgumentParser, seed: bool = True) -> None:
    """Add the flags of the answer."""
    if seed:
        parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="the answer as JSON, into FILE or printed alone"
    )


class Refusals:
    """Collects what is wrong, to say all of it at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def check(self, call: Callable[[], T]) -> T | None:
        """Return what a call gives, or None when it refuses."""
        try:
            return call()
        except ThriftyError as err:
            self.found.append(str(err))
            return None

    def unless(self, fine: bool, words: str) -> None:
        """Refuse with these words when something is not fine."""
        if not fine:
            self.found.append(words)

    def raise_all(self) -> None:
        """Raise KnobError with everything that is wrong, if anything is."""
        if len(self.found) == 1:
            raise KnobError(self.found[0])
        if self.found:
            raise KnobError(f"{len(self.found)} things are wrong:\n" + "\n".join(f"  - {w}" for w in self.found))


def check_model(refusals: Refusals, path: str) -> None:
    """Refuse a path that holds no checkpoint, without loading it."""
    from thrifty.llm.loading import _source

    refusals.check(lambda: _source(Path(path)))


def check_reading(refusals: Refusals, args: argparse.Namespace) -> None:
    """Refuse numbers outside their range."""
    refusals.unless(args.max_tokens >= 2, f"--max-tokens is {args.max_tokens}; it must be at least 2")
    refusals.unless(args.batch >= 1, f"--batch is {args.batch}; it must be at least 1")


def check_new(refusals: Refusals, folder: str | None, flag: str) -> None:
    """Refuse a folder that exists and is not empty, and one that cannot be made."""
    if folder is None:
        return
    path = Path(folder)
    taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    refusals.unless(not taken, f"{flag} {path} exists already; name a new folder")


def check_file(refusals: Refusals, path: str | None, flag: str, *suffixes: str) -> None:
    """Refuse a file that cannot be written where it is to go, or has another suffix."""
    if path is None or path == "-":
        return
    file = Path(path)
    refusals.unless(not suffixes or file.suffix in suffixes, f"{flag} {path} must end in {' or '.join(suffixes)}")
    refusals.unless(not file.is_dir(), f"{flag} {path} is a folder; name a file")
    place = file.absolute().parent
    while not place.exists():
        place = place.parent
    refusals.unless(place.is_dir() and os.access(place, os.W_OK), f"{flag} {path}: {place} cannot be written to")


def quiet() -> None:
    """Silence the bars and warnings of transformers, which are not ours to print."""
    from thrifty.errors import need

    logging = need("transformers", extra="llm").utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def dtype_of(path: str, wanted: str | None, training: bool = False) -> str:
    """Return the dtype to load a model with: what is wanted, else the checkpoint's; float16 is not for training."""
    from thrifty.llm.loading import stored_dtype

    found = wanted or stored_dtype(path)
    return "float32" if training and not wanted and found == "float16" else found


def load(args: argparse.Namespace, dtype: str | None = None, training: bool = False) -> tuple[Any, Any]:
    """Return (model, tokenizer) of the flags, and say that it takes a while where somebody looks."""
    from thrifty.llm.loading import load_model

    quiet()
    with waiting(f"reading {args.model}"), redirect_stderr(io.StringIO()):  # more bars of others
        return load_model(args.model, dtype or dtype_of(args.model, args.dtype, training), device=args.device)


@contextmanager
def waiting(words: str) -> Iterator[None]:
    """Show words on stderr, when it is a terminal, until the work is done."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(file=sys.stderr).status(words):
        yield


def pad_of(model: Any) -> int:
    """Return the token that fills up batches; what it is does not matter."""
    pad = getattr(model.config, "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0


def losses_of(model: Any, encoded: Sequence[Encoded], batch: int) -> Any:
    """Return the mean cross-entropy of each example, (n,) float64, nats a token."""
    import numpy as np
    import torch

    from thrifty.llm.loading import batches, completion_losses

    with torch.inference_mode():
        rows = batches(encoded, batch, pad_of(model))
        parts = [completion_losses(model, b.to(model.device)).double().cpu() for b in rows]
    return np.concatenate([p.numpy() for p in parts])


def some(items: Sequence[T], count: int, seed: int) -> list[T]:
    """Return at most `count` items, drawn by the seed, in their order."""
    import torch

    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[:count]
    return [items[i] for i in sorted(order.tolist())]


def write_folder(folder: str | Path, write: Callable[[Path], object]) -> Path:
    """Write a folder whole or not at all: under another name, then renamed."""
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        for file in partial.rglob("*"):
            readable(file)
        if folder.is_dir():
            folder.rmdir()  # empty: see check_new
        os.replace(partial, folder)
    except OSError as err:
        raise StoreError(f"{folder} cannot be written: {err.strerror or err}") from err
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def readable(path: Path) -> None:
    """Give a file the rights that a new one has; safetensors keeps them to the owner."""
    from thrifty.report import _umask

    path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def answer(args: argparse.Namespace, found: dict[str, Any], lines: Sequence[str]) -> int:
    """Print the lines, or the JSON alone; write the JSON where a file is named. Return exit code 0."""
    from thrifty.cli.show import say
    from thrifty.report import write_text

    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
        return 0
    for line in lines:
        say(line)
    if args.json:
        write_text(args.json, text)
        say(f"JSON: {args.json}")
    return 0


def rounded(value: float | None, digits: int = 4) -> str | None:
    """Return a number as text with its sign where it is a difference; None stays None."""
    return None if value is None else f"{value:.{digits}f}"


def read_prompt(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """Return the token ids (1, t) of a prompt."""
    import torch

    from thrifty.llm.loading import _prompt_ids

    ids = _prompt_ids(prompt, tokenizer, chat)
    if not ids:
        raise DataError("the prompt has no tokens; give some text")
    return torch.tensor([ids])
