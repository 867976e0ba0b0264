"""Quantise a model to integers: after training, or with training that knows of it."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from thrifty.capture import capture
from thrifty.compress.calibrate import (
    common_scale,
    correct_biases,
    set_activation_ranges,
    set_fixed_scale,
    set_weight_ranges,
)
from thrifty.compress.fold import fold_batch_norms
from thrifty.compress.points import Arithmetic, weights_of
from thrifty.compress.quantized_model import QuantizedModel
from thrifty.compress.ranges import RANGES, SCALES
from thrifty.compress.refuse import copied, refusals
from thrifty.compress.train import fine_tune
from thrifty.errors import Incompatible, KnobError, NoMatch, NothingToDo, UnsupportedModel, close_to
from thrifty.graph import Graph
from thrifty.integer import ROUNDINGS
from thrifty.recipe import mistyped, refuse_mistyped
from thrifty.training import Training

if TYPE_CHECKING:
    from thrifty.task import Task

CHOICES = {
    "scales": SCALES,
    "granularity": ("network", "layer", "channel"),
    "ranges": RANGES,
    "weight_ranges": ("auto", "minmax", "mse"),
    "rounding": ROUNDINGS,
}


@dataclass(frozen=True)
class Quantize:
    """Store weights and activations as integers, and compute with integers only.

    Without epochs, ranges come from calibration data (post-training quantisation); with epochs, the model
    trains on with rounding in the forward pass and straight-through gradients, the last part on the exact
    integers. MicroAI's schemes (Novac et al. 2021, arXiv:2105.13331): `Quantize.microai(16)` and
    `Quantize.microai(8)`.

    >>> Quantize(bits=8, weight_bits=4).weight_bits
    4
    """

    bits: int = 8  # of activations, and of weights unless weight_bits says otherwise: 2..16
    weight_bits: int | None = None  # of weights: 2..16, at most 8 when bits is at most 8
    scales: str = "multiplier"  # "multiplier": any scale, a 32-bit multiplication; "power_of_two": a shift
    granularity: str = "channel"  # a weight scale per output channel, per "layer", or one for the "network"
    ranges: str = "mse"  # how far those of activations reach: "minmax", "percentile", "mse" (least squared error)
    weight_ranges: str = "auto"  # the same of weights: "minmax", "mse", "auto" = mse at 3 bits and fewer
    percentile: float = 99.99  # of ranges="percentile": share of the values, in percent, inside the range
    calibration_samples: int = 256  # training inputs that set the activation ranges
    per_layer: Mapping[str, int] = field(default_factory=dict)  # module path pattern -> weight bits; first match
    fraction_bits: int | None = None  # of granularity="network": every scale is 2^-fraction_bits
    rounding: str = "half_up"  # "floor" only to compare with MicroAI's own arithmetic
    unsigned: bool = True  # bits <= 8: tensors that cannot be negative use 0..2^bits-1
    bias_correction: bool = True  # add the mean rounding error of each layer to its bias
    epochs: int = 0  # of quantisation-aware training
    lr: float = 0.005
    training: Mapping[str, Any] = field(default_factory=dict)  # further fields of thrifty.training.Training

    def __post_init__(self) -> None:
        """Refuse values of the wrong type, or outside their range, all at once."""
        refuse_mistyped(self)
        trained = {**self.training, "epochs": self.epochs, "lr": self.lr}
        if wrong := mistyped(Training, trained):
            raise KnobError(f"Quantize.training: {'; '.join(wrong)}")
        bad = [sentence for sentence, fine in self._rules().items() if not fine]
        if bad:
            raise KnobError("Quantize: " + "; ".join(bad))
        Training.of(trained)

    def _rules(self) -> dict[str, bool]:
        widths = [b for b in (self.weight_bits, *self.per_layer.values()) if b is not None]
        largest = 8 if self.bits <= 8 else 16
        power_of_two, network = self.scales == "power_of_two", self.granularity == "network"
        fraction, samples = self.fraction_bits, self.calibration_samples
        rules = {
            f"bits is {self.bits}; it must be 2..16": 2 <= self.bits <= 16,
            f"weight_bits and per_layer hold {widths}; with bits={self.bits} they must be 2..{largest}": all(
                2 <= b <= largest for b in widths
            ),
            f"percentile is {self.percentile}; it must be in (50, 100]": 50 < self.percentile <= 100,
            f"calibration_samples is {samples}; it must be positive": samples > 0,
            "granularity='network' needs scales='power_of_two'": power_of_two or not network,
            "fraction_bits needs granularity='network'": network or fraction is None,
            f"fraction_bits is {fraction}; it must be -16..24": fraction is None or -16 <= fraction <= 24,
            "rounding='floor' needs scales='power_of_two'": power_of_two or self.rounding != "floor",
            f"epochs is {self.epochs}; it must not be negative": self.epochs >= 0,
        }
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            rules[f"{name} is '{value}'; {close_to(str(value), choices)}"] = value in choices
        return rules

    @classmethod
    def microai(cls, bits: int = 8, epochs: int = 0, rounding: str = "half_up") -> Quantize:
        """Return MicroAI's own scheme: 16 bits as Q7.9, or fewer bits with a power of two per layer."""
        common: dict[str, Any] = {
            "scales": "power_of_two", "ranges": "minmax", "unsigned": False, "bias_correction": False,
            "rounding": rounding, "epochs": epochs,
        }  # fmt: skip
        if bits == 16:
            return cls(bits=16, granularity="network", fraction_bits=9, **common)
        return cls(bits=bits, granularity="layer", **common)

    @classmethod
    def example(cls) -> Quantize:
        """Return a fast instance, for the contract tests."""
        return cls(bits=8, calibration_samples=32)

    def edit(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a QuantizedModel around a copy of `model`.

        Raises Incompatible for a model that is quantised already or cannot be copied, UnsupportedModel that lists
        every part without an integer form, NoMatch for a pattern of per_layer that fits no layer, NothingToDo
        without weights, KnobError that names the layers whose scales or biases do not fit, DataError for values
        that are not finite.
        """
        if any(isinstance(m, QuantizedModel) for m in model.modules()):
            raise Incompatible("the model is quantised already; quantise the float model, or use Train to train on")
        model = fold_batch_norms(copied(model).eval(), task.example)
        graph = capture(model, task.example)
        if refused := tuple(refusals(graph, self.bits)):
            raise UnsupportedModel(refused)
        quantized = QuantizedModel(model, graph, self._arithmetic(), self._widths(graph))
        self._calibrate(quantized, task)
        if self.epochs:
            fine_tune(quantized, task, {**self.training, "epochs": self.epochs, "lr": self.lr})
        quantized.prepare()
        return quantized

    def _arithmetic(self) -> Arithmetic:
        return Arithmetic(
            bits=self.bits,
            scales=self.scales,
            per_channel=self.granularity == "channel",
            rounding=self.rounding,
            unsigned=self.unsigned,
            fixed_scale=None if self.fraction_bits is None else 2.0**-self.fraction_bits,
        )

    def _widths(self, graph: Graph) -> dict[str, int]:
        """Return the bits of each weight, by tensor name."""
        layers = weights_of(graph)
        if not layers:
            raise NothingToDo("the model has no convolution and no linear layer: nothing to quantise")
        modules = [nodes[0].module for nodes in layers.values()]
        lost = [p for p in self.per_layer if not fnmatch.filter(modules, p)]
        if lost:
            raise NoMatch("; ".join(f"per_layer: '{p}' matches no layer, {close_to(p, modules)}" for p in lost))
        default = self.weight_bits or self.bits
        return {
            name: next((b for p, b in self.per_layer.items() if fnmatch.fnmatch(nodes[0].module, p)), default)
            for name, nodes in layers.items()
        }

    def _calibrate(self, quantized: QuantizedModel, task: Task) -> None:
        x = task.calibration(self.calibration_samples, task.seed).to(next(quantized.buffers()).device)
        if self.granularity == "network":
            set_fixed_scale(quantized, quantized.arithmetic.fixed_scale or common_scale(quantized, x))
        else:
            set_weight_ranges(quantized, self.weight_ranges)
            set_activation_ranges(quantized, x, self.ranges, self.percentile)
        if self.bias_correction:
            correct_biases(quantized, x)
