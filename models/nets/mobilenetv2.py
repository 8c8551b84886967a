"""MobileNetV2, written from its paper: Sandler et al., "Inverted Residuals and Linear Bottlenecks", arXiv 1801.04381.

Shapes in comments are (batch, channels, height, width); the input is RGB in [0, 1].
"""

from __future__ import annotations

from torch import Tensor, nn

STAGES = (
    # expansion, channels, blocks, stride of the first: table 2 of the paper
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM = 32
FEATURES = 1280


def in_eights(channels: float) -> int:
    """The nearest multiple of eight that is no more than a tenth smaller: how the authors' own code rounds widths."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def conv_bn(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, *, act: bool = True
) -> nn.Sequential:
    """Convolution and batch norm, with ReLU6 where `act`."""
    parts: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*parts, nn.ReLU6(inplace=True)) if act else nn.Sequential(*parts)


class InvertedResidual(nn.Module):
    """Widen, filter in depth, narrow without an activation; the input is added where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        wide = inputs * expansion
        widen = [conv_bn(inputs, wide)] if expansion > 1 else []
        self.body = nn.Sequential(
            *widen, conv_bn(wide, wide, 3, stride, groups=wide), conv_bn(wide, outputs, act=False)
        )
        self.is_added = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.is_added else self.body(x)


class MobileNetV2(nn.Module):
    """What it sees in a picture as 1280 numbers, (batch, features). width: 0.25 to 1; the features stay 1280."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        inputs = in_eights(STEM * width)
        self.stem = conv_bn(3, inputs, 3, 2)
        for expansion, channels, depth, stride in STAGES:
            outputs = in_eights(channels * width)
            for index in range(depth):
                blocks.append(InvertedResidual(inputs, outputs, stride if index == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = conv_bn(inputs, FEATURES)
        self.features = FEATURES

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(self.stem(x))).mean((2, 3))  # (b, 1280)
