"""The classifier: one of three published nets as backbone, and three heads on what it sees.

`classes` names the cell, `morphology` describes it in the words of a haematologist (one group of logits for each
attribute, side by side), `is_cell` says whether the crop shows a cell that has a name at all. All learn together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.nets.darknet import Darknet19
from models.nets.mobilenetv2 import MobileNetV2
from models.nets.shufflenetv2 import ShuffleNetV2
from models.nets.yolov10 import YoloV10nBackbone


def efficientnet_lite0() -> nn.Module:
    """Imported when it is asked for: only a run with a teacher needs its packages."""
    from models.nets.efficientnet_lite import EfficientNetLite0

    return EfficientNetLite0()


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "shufflenetv2-x1.0": lambda: ShuffleNetV2(1.0),
    "shufflenetv2-x0.5": lambda: ShuffleNetV2(0.5),
    "mobilenetv2": MobileNetV2,
    "mobilenetv2-x0.5": lambda: MobileNetV2(0.5),
    "darknet-19": Darknet19,
    "darknet-19-x0.25": lambda: Darknet19(0.25),
    "efficientnet-lite0": efficientnet_lite0,
    "yolov10n-backbone": YoloV10nBackbone,
}
"""By the name that goes into the manifest; efficientnet-lite0 only teaches, yolov10n-backbone is the detector's."""


class Answers(NamedTuple):
    """Raw logits of a batch: (b, classes), (b, all values of all attributes), (b, 1)."""

    classes: Tensor
    morphology: Tensor
    is_cell: Tensor


class CellNet(nn.Module):
    """A backbone and its heads.

    backbone: a name of BACKBONES, the one that goes into the manifest. classes: how many there are. attribute_sizes:
    how many values each attribute has.
    """

    def __init__(self, backbone: str, classes: int, attribute_sizes: Sequence[int], dropout: float = 0.2):
        super().__init__()
        self.backbone = BACKBONES[backbone]()
        self.dropout = nn.Dropout(dropout)
        self.classes = nn.Linear(self.backbone.features, classes)
        self.morphology = nn.Linear(self.backbone.features, sum(attribute_sizes))
        self.is_cell = nn.Linear(self.backbone.features, 1)

    def forward(self, x: Tensor) -> Answers:
        features = self.dropout(self.backbone(x))
        return Answers(self.classes(features), self.morphology(features), self.is_cell(features))


@torch.no_grad()
def fold_batch_norm(net: nn.Module) -> nn.Module:
    """A copy for export with each batch norm folded into the convolution before it; the answers stay."""
    net = copy.deepcopy(net).eval()
    for module in net.modules():
        if isinstance(module, nn.Sequential) and len(module) >= 2 and isinstance(module[1], nn.BatchNorm2d):
            module[0] = torch.nn.utils.fuse_conv_bn_eval(module[0], module[1])
            module[1] = nn.Identity()
    return net
