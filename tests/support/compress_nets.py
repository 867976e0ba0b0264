"""Small networks that together use every operator, and a trained one."""

import functools
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from thrifty.data import load_task
from thrifty.task import Split, Task


class Residual(nn.Module):
    """Batch norms that fold and one that cannot, a depthwise stride, a sum, a concatenation, two pools."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.late = nn.BatchNorm2d(8)
        self.narrow = nn.Conv2d(8, 8, 3, padding=1, groups=8, stride=2, bias=False)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = (x + self.bn2(self.conv2(x))).relu()
        x = self.late(x)
        x = torch.cat([F.max_pool2d(x, 2), self.narrow(x).relu()], 1)
        return self.head(x.mean((2, 3)))


class Odd(nn.Module):
    """Unequal padding, groups, hard swish, ReLU6, padded pools, two readers of a sum, softmax."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, (3, 2))
        self.conv2 = nn.Conv2d(8, 12, 3, groups=4, stride=(2, 1), padding=1)
        self.pool = nn.AvgPool2d(3, 2, padding=1)
        self.head = nn.Linear(12 * 3 * 4, 10)

    def forward(self, x):
        x = F.hardswish(self.conv1(F.pad(x, (1, 0, 2, 1))))
        y = self.conv2(x)
        x = F.relu6(y) + F.hardswish(y)
        x = F.max_pool2d(x, 3, 1, padding=1)
        return self.head(self.pool(x).flatten(1)).softmax(1)


class Signal(nn.Module):
    """One axis; a block that runs three times with the same weights; a channel-wise affine map; argmax."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(8, 6, 3, padding=1)
        self.again = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6)
        self.gain, self.offset = nn.Parameter(torch.rand(1, 6, 1) + 0.5), nn.Parameter(torch.randn(1, 6, 1))
        self.head = nn.Linear(6, 10)

    def features(self, x):
        x = self.first(x).relu()
        for _ in range(3):
            x = x + self.norm(self.again(x)).relu()
        x = x * self.gain + self.offset
        return x.amax(2)

    def forward(self, x):
        return self.head(self.features(x)).argmax(1)


NETS = {"residual": Residual, "odd": Odd, "signal": Signal}


@functools.cache
def digits() -> Task:
    return load_task("digits", seed=0)


@functools.cache
def signals() -> Task:
    """Return the digits' rows as eight channels."""
    task = digits()
    splits = {n: Split(getattr(task, n).x[:, 0], getattr(task, n).y) for n in ("train", "validation", "test")}
    return replace(task, **splits)


def task_of(name: str) -> Task:
    """Return the task whose inputs fit the net."""
    return signals() if name == "signal" else digits()


def net(name: str) -> nn.Module:
    """Return a fresh net with settled batch norms."""
    torch.manual_seed(0)
    made = NETS[name]()
    for module in made.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.2, 2.0)
    made.eval()
    if isinstance(made, Signal):  # no class wins everywhere
        with torch.no_grad():
            made.head.bias.copy_(-made.head.weight @ made.features(signals().train.x).mean(0))
    return made


@functools.cache
def trained() -> Residual:
    """Return a Residual that tells the digits apart; do not change it."""
    torch.manual_seed(0)
    return digits().fit(Residual(), 12, 0.05).eval()
