"""Small architectures to compress and deploy: one family, one file. Ordinary layers, no weights."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from thrifty.errors import KnobError, NoMatch, close_to
from thrifty.recipe import mistyped
from thrifty.zoo.autoencoder import AutoEncoder
from thrifty.zoo.ds_cnn import DSCNN
from thrifty.zoo.lenet import LeNet
from thrifty.zoo.mobilenet_v1 import MobileNetV1
from thrifty.zoo.preact_resnet import PreActResNet18
from thrifty.zoo.resnet8 import ResNet8
from thrifty.zoo.resnetv1_6 import ResNetV16
from thrifty.zoo.wide_resnet import WideResNet

__all__ = [
    "DSCNN",
    "ZOO",
    "AutoEncoder",
    "LeNet",
    "MobileNetV1",
    "PreActResNet18",
    "ResNet8",
    "ResNetV16",
    "WideResNet",
    "create",
]

ZOO: dict[str, type[nn.Module]] = {
    "autoencoder": AutoEncoder,
    "ds-cnn": DSCNN,
    "lenet": LeNet,
    "mobilenet-v1": MobileNetV1,
    "preact-resnet-18": PreActResNet18,
    "resnet-8": ResNet8,
    "resnetv1-6": ResNetV16,
    "wide-resnet": WideResNet,
}


def create(name: str, **options: Any) -> nn.Module:
    """Return a fresh model of the named family. Raises NoMatch for the name, KnobError for an option
    that is unknown or of another type.

    Every model has `input_shape`, without the batch axis, and every option has a default.

    >>> create("resnetv1-6", filters=8).input_shape
    (9, 128)
    """
    if name not in ZOO:
        raise NoMatch(f"no architecture '{name}'; {close_to(name, ZOO)}")
    known = list(inspect.signature(ZOO[name]).parameters)
    strange = [f"'{o}' ({close_to(o, known)})" for o in options if o not in known]
    if strange:
        raise KnobError(f"'{name}' has no option {', '.join(strange)}")
    if wrong := mistyped(ZOO[name].__init__, options):
        raise KnobError(f"{name}: {'; '.join(wrong)}")
    return ZOO[name](**options)
