"""Darknet-19, written from its paper: Redmon & Farhadi, "YOLO9000", arXiv 1612.08242, table 6.

Two things differ. ReLU in place of the leaky one, which stays float between int8 layers on TFLite. The 1 x 1
convolution to the classes is a dense layer behind the pooling, as with the other backbones: their order is free.

Shapes in comments are (batch, channels, height, width); the input is RGB in [0, 1].
"""

from __future__ import annotations

from torch import Tensor, nn

from models.nets.shufflenetv2 import conv_bn

STAGES = (
    # channels of the convolutions of a stage, 3 x 3 and 1 x 1 in turn; a 2 x 2 max-pool stands between two stages
    (32,),
    (64,),
    (128, 64, 128),
    (256, 128, 256),
    (512, 256, 512, 256, 512),
    (1024, 512, 1024, 512, 1024),
)


class Darknet19(nn.Module):
    """What it sees in a picture as 1024 x width numbers, (batch, features). width: 0.25 to 1."""

    def __init__(self, width: float = 1.0):
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for number, stage in enumerate(STAGES):
            if number:
                layers.append(nn.MaxPool2d(2))
            for index, channels in enumerate(stage):
                outputs = round(channels * width)
                layers.append(conv_bn(inputs, outputs, 1 if index % 2 else 3, act=True))
                inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.features = inputs

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))  # (b, 1024)
