"""ShuffleNetV2, written from its paper: Ma et al., "ShuffleNet V2: Practical Guidelines", arXiv 1807.11164.

Shapes in comments are (batch, channels, height, width); the input is RGB in [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS = {0.5: (24, 48, 96, 192, 1024), 1.0: (24, 116, 232, 464, 1024)}  # table 5 of the paper
DEPTHS = (4, 8, 4)


def conv_bn(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, *, act: bool
) -> nn.Sequential:
    """Convolution and batch norm, with ReLU where `act`."""
    parts: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*parts, nn.ReLU(inplace=True)) if act else nn.Sequential(*parts)


def shuffle_channels(x: Tensor) -> Tensor:
    """Interleave the two halves of the channels, so that the next unit's halves have seen both.

    What lies channels last stays so: the convolutions would lay it out anew, a tenth of the time of a training step.
    """
    batch, channels, height, width = x.shape
    if x.is_contiguous(memory_format=torch.channels_last):
        halves = x.permute(0, 2, 3, 1).reshape(batch, height, width, 2, channels // 2)
        return halves.transpose(3, 4).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
    halves = x.reshape(batch, 2, channels // 2, height, width)
    return halves.transpose(1, 2).reshape(batch, channels, height, width)


class Unit(nn.Module):
    """The basic unit (half of the channels pass through untouched) and, with stride 2, the one that halves the size."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        half = outputs // 2
        self.stride = stride
        entering = inputs if stride == 2 else half
        self.main = nn.Sequential(
            conv_bn(entering, half, act=True),
            conv_bn(half, half, 3, stride, groups=half, act=False),
            conv_bn(half, half, act=True),
        )
        self.side = (
            nn.Sequential(conv_bn(inputs, inputs, 3, 2, groups=inputs, act=False), conv_bn(inputs, half, act=True))
            if stride == 2
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            return shuffle_channels(torch.cat((self.side(x), self.main(x)), 1))
        kept, worked = x.chunk(2, 1)
        return shuffle_channels(torch.cat((kept, self.main(worked)), 1))


class ShuffleNetV2(nn.Module):
    """What it sees in a picture as 1024 numbers, (batch, features). width: 0.5 or 1.0."""

    def __init__(self, width: float = 1.0):
        super().__init__()
        first, *stages, last = WIDTHS[width]
        self.stem = nn.Sequential(conv_bn(3, first, 3, 2, act=True), nn.MaxPool2d(3, 2, 1))
        units: list[nn.Module] = []
        inputs = first
        for outputs, depth in zip(stages, DEPTHS, strict=True):
            units.append(Unit(inputs, outputs, 2))
            units.extend(Unit(outputs, outputs, 1) for _ in range(depth - 1))
            inputs = outputs
        self.units = nn.Sequential(*units)
        self.last = conv_bn(inputs, last, act=True)
        self.features = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.units(self.stem(x))).mean((2, 3))  # (b, 1024)
