"""Training a segmentation head, and what the method trains of the encoder, on a few labelled pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thrifty.errors import DataError, Incompatible, KnobError
from thrifty.fewshot.segmentation.augment import Augment
from thrifty.fewshot.segmentation.encoder import Encoder, check, fingerprint
from thrifty.fewshot.segmentation.methods import Method, method_of
from thrifty.fewshot.segmentation.pictures import IGNORE, LabelledPictures, Pixels, pair
from thrifty.fewshot.segmentation.segmenter import Segmenter, build, evaluate, upsampled
from thrifty.fewshot.segmentation.support import Support

Report = Callable[[int, int, float], None]  # step, steps, loss
Batch = tuple[Tensor, Tensor]  # features or pictures, masks


@dataclass(frozen=True)
class Fitting:
    """How to train: SGD with momentum, polynomial decay at every step, no warm-up.

    The benchmark: 200 epochs of batch 4 for Cityscapes, 100 of 8 for COCO, 200 of 2 for PPD, learning rates of 0.2,
    0.05 and 0.001 in its configurations. Each encoder and method needs its own rate: see `choose_rate`.
    """

    epochs: int = 200
    steps: int | None = None  # instead of epochs: so many steps, whatever the size of the support
    batch: int = 4
    lr: float = 0.05  # the first step size
    momentum: float = 0.9
    weight_decay: float = 1e-4  # not on batch norm
    power: float = 0.9  # of the decay: lr * (1 - t / T) ** power
    drop_last: bool = False  # True as in the benchmark: what does not fill a batch is left out of that epoch
    encoder_statistics: bool = False  # True: batch norm inside a trained encoder moves (noisy in batches of 4)
    cache: bool = False  # keep the features of a frozen encoder; needs augment.views
    augment: Augment = field(default_factory=Augment)
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values outside their range, all at once."""
        rules = {
            f"epochs is {self.epochs}; it must be at least 0": self.epochs >= 0,
            f"steps is {self.steps}; it must be at least 0 (None: by epochs)": self.steps is None or self.steps >= 0,
            f"batch is {self.batch}; it must be at least 1": self.batch >= 1,
            f"lr is {self.lr}; it must be positive and finite": 0 < self.lr < math.inf,
            f"momentum is {self.momentum}; it must be in [0, 1)": 0 <= self.momentum < 1,
            f"weight_decay is {self.weight_decay}; it must not be negative": self.weight_decay >= 0,
            f"power is {self.power}; it must be positive": self.power > 0,
            "cache needs augment=Augment(views=...): features of endless new views cannot be kept": not self.cache
            or self.augment.views > 0,
        }
        bad = [sentence for sentence, fine in rules.items() if not fine]
        if bad:
            raise KnobError("Fitting: " + "; ".join(bad))

    def total(self, items: int) -> int:
        """Return the number of steps for a support of so many items."""
        if self.steps is not None:
            return self.steps
        return self.epochs * self.steps_per_epoch(items)

    def steps_per_epoch(self, items: int) -> int:
        """Return the steps of one pass; at least one, also with drop_last."""
        return max(1, items // self.batch if self.drop_last else -(-items // self.batch))

    def rate(self, step: int, total: int) -> float:
        """Return the step size of step 0..total.

        >>> [round(Fitting(lr=1.0).rate(t, 4), 3) for t in range(5)]
        [1.0, 0.772, 0.536, 0.287, 0.0]
        """
        return float(self.lr * (1 - step / max(total, 1)) ** self.power)


def adapt(
    encoder: Encoder, support: Support | LabelledPictures, method: str | Method = "linear",
    fitting: Fitting | None = None, start: Segmenter | None = None, progress: Report | None = None,
) -> Segmenter:  # fmt: skip
    """Return a model that segments pictures into the classes of the support, trained on it alone.

    encoder: stays as it is. method: "linear", "multilayer", "svf", "lora", "finetune", or an object of methods.py. The
    last three are second stages: their head begins as that of `start`, a finished "linear" model of the same encoder;
    None trains one first, with the same fitting. progress: called with (step, steps, loss). The last step is what is
    returned; nothing is selected.
    Raises KnobError, DataError (also when the loss is no longer finite), Incompatible for another model's start.

    Source: Bensaid et al. 2025, A novel benchmark for few-shot semantic segmentation (arXiv:2401.11311).
    """
    check(encoder)
    chosen, fitting = method_of(method), fitting or Fitting()
    few = support if isinstance(support, Support) else Support.whole(support)
    if chosen.trains_encoder and start is None:
        start = adapt(encoder, few, "linear", fitting, progress=progress)
    generator = torch.Generator().manual_seed(fitting.seed)
    model = build(encoder, chosen, tuple(few.data.classes), generator)
    if start is not None:
        _continue(model, start)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fitting.seed)
        _train(model, few, fitting, progress)
    return model.eval()


def choose_rate(
    encoder: Encoder, support: Support, rates: Sequence[float], validation: LabelledPictures | None = None,
    method: str | Method = "linear", fitting: Fitting | None = None, start: Segmenter | None = None,
) -> tuple[float, dict[float, float]]:  # fmt: skip
    """Return the learning rate with the best mIoU, and the mIoU in percent of each: report them all.

    validation: pictures that are neither support nor test; None holds a third of the support out. Never give the test
    set. A rate that diverges scores 0.
    """
    fitting = fitting or Fitting()
    if not rates:
        raise KnobError("no rates to choose from")
    if validation is None:
        if start is not None:
            raise KnobError("a part of the support is held out, but `start` has seen it; drop it, or give validation")
        support, held = support.split(1 / 3, np.random.default_rng(fitting.seed))
        pairs = [pair(held.data, item.picture) for item in held.items]
        validation = _Pairs(pairs, held.data.classes)
    found: dict[float, float] = {}
    for lr in rates:
        try:
            model = adapt(encoder, support, method, replace(fitting, lr=lr), start)
        except DataError:
            found[lr] = 0.0
            continue
        found[lr] = evaluate(model, validation).miou()
    return max(found, key=lambda lr: found[lr]), found


@dataclass(frozen=True, eq=False)
class _Pairs:
    """A list of (picture, mask) as a labelled set."""

    pairs: list[tuple[Pixels, Pixels]]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pairs)

    def picture(self, i: int) -> Pixels:
        return self.pairs[i][0]

    def mask(self, i: int) -> Pixels:
        return self.pairs[i][1]


def _continue(model: Segmenter, start: Segmenter) -> None:
    if start.method.name != "linear" or start.classes != model.classes or start.origin != model.origin:
        raise Incompatible(
            f"start is a '{start.method.name}' model of {len(start.classes)} classes; it must be a 'linear' one of "
            "the same encoder and classes"
        )
    if model.method.multilayer:
        raise Incompatible("'multilayer' has another head than 'linear'; it takes no start")
    model.head.load_state_dict(start.head.state_dict())


def _train(model: Segmenter, few: Support, fitting: Fitting, progress: Report | None) -> None:
    total = fitting.total(len(few))
    tuned = model.method.trains_encoder
    optimizer = torch.optim.SGD(_groups(model, fitting), lr=fitting.lr, momentum=fitting.momentum)
    before = None if tuned else fingerprint(model.encoder)
    for step, (x, y) in enumerate(_batches(model, few, fitting, total)):
        _modes(model, fitting)
        for group in optimizer.param_groups:
            group["lr"] = fitting.rate(step, total)
        if fitting.cache and not tuned:
            features = x
        else:
            with torch.set_grad_enabled(tuned):
                features = model.encoder.features(x, model.method.multilayer)
        loss = F.cross_entropy(upsampled(model.head(features), y.shape[1:]), y, ignore_index=IGNORE)
        if not torch.isfinite(loss):
            raise DataError(
                f"the loss is {float(loss.detach())} at step {step} of {total}: all pixels are ignored, or "
                f"lr {fitting.lr} is too large"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if progress is not None:
            progress(step + 1, total, float(loss.detach()))
    if before is not None and fingerprint(model.encoder) != before:
        raise Incompatible("the frozen encoder has changed in training; its forward must not write state")


def _groups(model: Segmenter, fitting: Fitting) -> list[dict[str, object]]:
    """Return the trained parameters, those of batch norm without weight decay."""
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters(recurse=False)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) not in norms], "weight_decay": fitting.weight_decay},
        {"params": [p for p in parameters if id(p) in norms], "weight_decay": 0.0},
    ]


def _modes(model: Segmenter, fitting: Fitting) -> None:
    """Train mode where it belongs: a frozen encoder must not drop out, and its statistics must not move."""
    model.train()
    if not model.method.trains_encoder:
        model.encoder.eval()
    elif not fitting.encoder_statistics:
        for m in model.encoder.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.eval()


def _batches(model: Segmenter, few: Support, fitting: Fitting, total: int) -> Iterator[Batch]:
    """Yield `total` batches: the items in a new order each epoch; the order depends on the seed alone."""
    rng = np.random.default_rng([fitting.seed, 1])
    device = next(model.head.parameters()).device
    kept: dict[tuple[int, int], Batch] = {}
    per_epoch = fitting.steps_per_epoch(len(few))
    step = epoch = 0
    while step < total:
        order = rng.permutation(len(few))
        for place in range(min(per_epoch, total - step)):
            rows = order[place * fitting.batch : (place + 1) * fitting.batch]
            samples = [_sample(model, few, fitting, int(i), epoch, rng, kept) for i in rows]
            yield torch.cat([x for x, _ in samples]), torch.cat([y for _, y in samples]).to(device)
            step += 1
        epoch += 1


def _sample(
    model: Segmenter, few: Support, fitting: Fitting, i: int, epoch: int, rng: np.random.Generator,
    kept: dict[tuple[int, int], Batch],
) -> Batch:  # fmt: skip
    """Return one example (1, ...): view `epoch` of item i, from the cache if it is kept."""
    views = fitting.augment.views
    view = epoch % views if views else None
    key = (i, view or 0)
    if fitting.cache and key in kept:
        return kept[key]
    item = few.items[i]
    picture, mask = pair(few.data, item.picture)
    draw = rng if view is None else np.random.default_rng([fitting.seed, 2, i, view])
    picture, mask = fitting.augment(picture, mask, draw, item.centre, view)
    x = model.encoder.prepare(picture[None])
    y = torch.from_numpy(mask.astype(np.int64))[None]
    if fitting.cache and not model.method.trains_encoder:
        model.encoder.eval()
        with torch.no_grad():
            x = model.encoder.features(x, model.method.multilayer)
    if fitting.cache:
        kept[key] = (x, y)
    return x, y
