"""The operators of a program, one file each: what they accept, how they lower, what they compute."""

from __future__ import annotations

from thrifty.deploy.ops.add import Add
from thrifty.deploy.ops.argmax import ArgMax
from thrifty.deploy.ops.avgpool import AvgPool
from thrifty.deploy.ops.clamp import Clamp
from thrifty.deploy.ops.concat import Concat
from thrifty.deploy.ops.conv import Conv
from thrifty.deploy.ops.copy import Copy
from thrifty.deploy.ops.depthwise import Depthwise
from thrifty.deploy.ops.hardswish import HardSwish
from thrifty.deploy.ops.linear import Linear
from thrifty.deploy.ops.lookup import Lookup
from thrifty.deploy.ops.maxpool import MaxPool
from thrifty.deploy.ops.operator import KINDS, Operator
from thrifty.deploy.ops.permute import Permute
from thrifty.deploy.ops.rescale import Rescale
from thrifty.deploy.ops.softmax import Softmax

OPS: dict[str, Operator] = {
    "add": Add(),
    "argmax": ArgMax(),
    "avgpool": AvgPool(),
    "clamp": Clamp(),
    "concat": Concat(),
    "conv": Conv(),
    "copy": Copy(),
    "depthwise": Depthwise(),
    "hardswish": HardSwish(),
    "linear": Linear(),
    "lookup": Lookup(),
    "maxpool": MaxPool(),
    "permute": Permute(),
    "rescale": Rescale(),
    "softmax": Softmax(),
}

# The operator that lowers each operator of a graph.
LOWERED_BY: dict[str, Operator] = {op: operator for operator in OPS.values() for op in operator.lowers}

__all__ = ["KINDS", "LOWERED_BY", "OPS", "Operator"]
