"""YOLOv10n, written from its paper: Wang et al., "YOLOv10: Real-Time End-to-End Object Detection", arXiv 2405.14458.

The net has two heads on one neck. In training the one-to-many head gives rich supervision and the one-to-one head
learns to answer each cell once. The paper infers with the one-to-one head; what is shipped since detector 0.2.0 is the
one-to-many head, whose boxes of one cell the agent merges: docs/decisions/0003-boxes-of-one-cell-are-merged.md.

Shapes in comments are (batch, channels, height, width); the input is RGB in [0, 1].
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

STRIDES = (8, 16, 32)
BINS = (
    16  # distances to the box's sides are distributions over 0..15 strides (distribution focal loss, arXiv 2006.04388)
)


class ConvBnAct(nn.Module):
    """Convolution, batch norm, SiLU: the unit that everything else is made of."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, *, act: bool = True
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Bottleneck(nn.Module):
    """Two 3x3 convolutions, with the input added where `shortcut`."""

    def __init__(self, channels: int, shortcut: bool):
        super().__init__()
        self.body = nn.Sequential(ConvBnAct(channels, channels, 3), ConvBnAct(channels, channels, 3))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


class LargeKernelDepthwise(nn.Module):
    """7x7 and 3x3 depthwise side by side while training, one 7x7 afterwards (`fold_batch_norm`); section 3.2."""

    def __init__(self, channels: int):
        super().__init__()
        self.large = ConvBnAct(channels, channels, 7, groups=channels, act=False)
        self.small = ConvBnAct(channels, channels, 3, groups=channels, act=False)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.large(x) + self.small(x))


class CompactInvertedBlock(nn.Module):
    """The paper's CIB: depthwise convolutions for space, pointwise ones for channels (figure 3b)."""

    def __init__(self, channels: int, shortcut: bool):
        super().__init__()
        wide = 2 * channels
        self.body = nn.Sequential(
            ConvBnAct(channels, channels, 3, groups=channels),
            ConvBnAct(channels, wide),
            LargeKernelDepthwise(wide),
            ConvBnAct(wide, channels),
            ConvBnAct(channels, channels, 3, groups=channels),
        )
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


class SplitStack(nn.Module):
    """C2f: half of the channels run through `depth` blocks, and every intermediate result reaches the output."""

    def __init__(self, inputs: int, outputs: int, depth: int, *, shortcut: bool, compact: bool = False):
        super().__init__()
        half = outputs // 2
        block = CompactInvertedBlock if compact else Bottleneck
        self.enter = ConvBnAct(inputs, 2 * half)
        self.blocks = nn.ModuleList(block(half, shortcut) for _ in range(depth))
        self.leave = ConvBnAct((2 + depth) * half, outputs)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class SpatialChannelDown(nn.Module):
    """SCDown: change the channels with a 1x1 first, then halve the size with a depthwise 3x3."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.channels = ConvBnAct(inputs, outputs)
        self.space = ConvBnAct(outputs, outputs, 3, 2, groups=outputs, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.space(self.channels(x))


class PyramidPool(nn.Module):
    """SPPF: three max-pools in a row see 5, 9 and 13 pixels."""

    def __init__(self, channels: int):
        super().__init__()
        self.enter = ConvBnAct(channels, channels // 2)
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.leave = ConvBnAct(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        first = self.enter(x)
        second = self.pool(first)
        third = self.pool(second)
        return self.leave(torch.cat((first, second, third, self.pool(third)), 1))


class Attention(nn.Module):
    """Multi-head self-attention over all places of the smallest map, keys half as wide as values."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = channels // 64
        self.value_width = channels // self.heads
        self.key_width = self.value_width // 2
        self.qkv = ConvBnAct(channels, self.heads * (2 * self.key_width + self.value_width), act=False)
        self.place = ConvBnAct(channels, channels, 3, groups=channels, act=False)
        self.project = ConvBnAct(channels, channels, act=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(x).reshape(batch, self.heads, 2 * self.key_width + self.value_width, height * width)
        query, key, value = qkv.split(
            (self.key_width, self.key_width, self.value_width), 2
        )  # (b, heads, width, places)
        weights = ((query * self.key_width**-0.5).transpose(-2, -1) @ key).softmax(-1)  # (b, heads, places, places)
        mixed = (value @ weights.transpose(-2, -1)).reshape(batch, channels, height, width)
        return self.project(mixed + self.place(value.reshape(batch, channels, height, width)))


class PartialSelfAttention(nn.Module):
    """PSA: attention and a feed-forward part for half of the channels only (figure 3c)."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.enter = ConvBnAct(channels, channels)
        self.attention = Attention(half)
        self.feed_forward = nn.Sequential(ConvBnAct(half, 2 * half), ConvBnAct(2 * half, half, act=False))
        self.leave = ConvBnAct(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        kept, attended = self.enter(x).chunk(2, 1)
        attended = attended + self.attention(attended)
        attended = attended + self.feed_forward(attended)
        return self.leave(torch.cat((kept, attended), 1))


class Head(nn.Module):
    """For each of the three maps: box distances (4 x 16 bins) and class scores, both as raw numbers."""

    def __init__(self, widths: tuple[int, int, int], classes: int):
        super().__init__()
        box_width = max(16, widths[0] // 4, 4 * BINS)
        score_width = max(widths[0], min(classes, 100))
        self.box = nn.ModuleList(
            nn.Sequential(
                ConvBnAct(width, box_width, 3), ConvBnAct(box_width, box_width, 3), nn.Conv2d(box_width, 4 * BINS, 1)
            )
            for width in widths
        )
        self.score = nn.ModuleList(
            nn.Sequential(
                ConvBnAct(width, width, 3, groups=width),
                ConvBnAct(width, score_width),
                ConvBnAct(score_width, score_width, 3, groups=score_width),
                ConvBnAct(score_width, score_width),
                nn.Conv2d(score_width, classes, 1),
            )
            for width in widths
        )
        for box, score, stride in zip(self.box, self.score, STRIDES, strict=True):
            nn.init.constant_(box[-1].bias, 1.0)
            # About 5 cells among the places of a 640 px frame: scores start near that rate, not at one half.
            nn.init.constant_(score[-1].bias, float(torch.log(torch.tensor(5 / classes / (640 / stride) ** 2))))

    def forward(self, maps: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return [(box(x), score(x)) for box, score, x in zip(self.box, self.score, maps, strict=True)]


class YoloV10n(nn.Module):
    """The smallest YOLOv10 (depth 0.33, width 0.25). `forward` gives the one-to-one maps only."""

    def __init__(self, classes: int):
        super().__init__()
        self.stem = nn.Sequential(ConvBnAct(3, 16, 3, 2), ConvBnAct(16, 32, 3, 2), SplitStack(32, 32, 1, shortcut=True))
        self.stage_8 = nn.Sequential(ConvBnAct(32, 64, 3, 2), SplitStack(64, 64, 2, shortcut=True))
        self.stage_16 = nn.Sequential(SpatialChannelDown(64, 128), SplitStack(128, 128, 2, shortcut=True))
        self.stage_32 = nn.Sequential(
            SpatialChannelDown(128, 256),
            SplitStack(256, 256, 1, shortcut=True),
            PyramidPool(256),
            PartialSelfAttention(256),
        )
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.merge_16 = SplitStack(256 + 128, 128, 1, shortcut=False)
        self.merge_8 = SplitStack(128 + 64, 64, 1, shortcut=False)
        self.down_16 = ConvBnAct(64, 64, 3, 2)
        self.out_16 = SplitStack(64 + 128, 128, 1, shortcut=False)
        self.down_32 = SpatialChannelDown(128, 128)
        self.out_32 = SplitStack(128 + 256, 256, 1, shortcut=True, compact=True)
        self.one_to_many = Head((64, 128, 256), classes)
        self.one_to_one = copy.deepcopy(self.one_to_many)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Feature maps of strides 8, 16, 32 with 64, 128, 256 channels."""
        at_8 = self.stage_8(self.stem(x))
        at_16 = self.stage_16(at_8)
        at_32 = self.stage_32(at_16)
        merged_16 = self.merge_16(torch.cat((self.up(at_32), at_16), 1))
        out_8 = self.merge_8(torch.cat((self.up(merged_16), at_8), 1))
        out_16 = self.out_16(torch.cat((self.down_16(out_8), merged_16), 1))
        return [out_8, out_16, self.out_32(torch.cat((self.down_32(out_16), at_32), 1))]

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        return self.one_to_one(self.pyramid(x))

    def forward_both(self, x: Tensor) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """(one-to-many, one-to-one). The one-to-one head learns from detached maps: it must not steer the backbone."""
        maps = self.pyramid(x)
        return self.one_to_many(maps), self.one_to_one([m.detach() for m in maps])


class YoloV10nBackbone(nn.Module):
    """The detector's stem and stages alone, so that they can learn to tell cells apart before they look for them.

    What they see in a picture as 256 numbers, (batch, features). The names are those of the detector.
    """

    def __init__(self) -> None:
        super().__init__()
        net = YoloV10n(1)
        self.stem, self.stage_8, self.stage_16, self.stage_32 = net.stem, net.stage_8, net.stage_16, net.stage_32
        self.features = 256

    def forward(self, x: Tensor) -> Tensor:
        return self.stage_32(self.stage_16(self.stage_8(self.stem(x)))).mean((2, 3))


def places(height_px: int, width_px: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Centres of all map places in input pixels, (places, 2) as x, y, and their strides, (places, 1), on a device."""
    centres, strides = [], []
    for stride in STRIDES:
        ys = (torch.arange(height_px // stride, device=device) + 0.5) * stride
        xs = (torch.arange(width_px // stride, device=device) + 0.5) * stride
        grid_y, grid_x = torch.meshgrid(ys, xs, indexing="ij")
        centres.append(torch.stack((grid_x.reshape(-1), grid_y.reshape(-1)), 1))
        strides.append(torch.full((len(ys) * len(xs), 1), float(stride), device=device))
    return torch.cat(centres), torch.cat(strides)


def flatten(maps: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Raw maps in one row each: distances (batch, places, 4, bins) and scores (batch, places, classes), float32."""
    distances = torch.cat([box.flatten(2) for box, _ in maps], 2).float()
    scores = torch.cat([score.flatten(2) for _, score in maps], 2).float()
    return distances.transpose(1, 2).unflatten(2, (4, BINS)), scores.transpose(1, 2)


def decode_boxes(distances: Tensor, centres: Tensor, strides: Tensor) -> Tensor:
    """Boxes x_min, y_min, x_max, y_max in input pixels, (batch, places, 4), from raw distance bins."""
    steps = torch.arange(BINS, device=distances.device, dtype=distances.dtype)
    sides = distances.softmax(-1) @ steps * strides  # left, top, right, bottom
    return torch.cat((centres - sides[..., :2], centres + sides[..., 2:]), -1)


@torch.no_grad()
def fold_batch_norm(net: nn.Module) -> nn.Module:
    """A copy for export: batch norms and the 7x7 + 3x3 pair are folded into plain convolutions; the answers stay."""
    net = copy.deepcopy(net).eval()
    for module in list(net.modules()):
        if isinstance(module, LargeKernelDepthwise):
            _merge_kernels(module)
    for module in list(net.modules()):
        if isinstance(module, ConvBnAct) and isinstance(module.norm, nn.BatchNorm2d):
            module.conv = torch.nn.utils.fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()
    return net


def _merge_kernels(module: LargeKernelDepthwise) -> None:
    large = torch.nn.utils.fuse_conv_bn_eval(module.large.conv, module.large.norm)
    small = torch.nn.utils.fuse_conv_bn_eval(module.small.conv, module.small.norm)
    large.weight += nn.functional.pad(small.weight, (2, 2, 2, 2))
    large.bias += small.bias
    module.large = large
    module.small = _Zero()


class _Zero(nn.Module):
    def forward(self, x: Tensor) -> float:  # noqa: ARG002  (adds nothing: the merged kernel holds both branches)
        return 0.0
