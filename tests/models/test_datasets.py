"""Augmented fields keep their boxes on their cells; calibration is by plain minimum and maximum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra (PyTorch)")

from models.classifier import crops  # noqa: E402
from models.common import quantize  # noqa: E402
from models.common.datasets import AugmentedFields, LabelledField, load_fields, place, turn  # noqa: E402
from models.common.labels import cell_classes, clip_boxes, read_fields  # noqa: E402

pytestmark = pytest.mark.train


def painted_field(width: int = 90, height: int = 60) -> LabelledField:
    """A black field with one white rectangle, and its box."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[20:40, 30:70] = 255
    return LabelledField(pixels, np.array([[0, 30, 20, 70, 40]], np.float32))


def drawn_box(pixels: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(pixels[..., 0] > 180)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("mirror", [False, True])
def test_a_turned_box_lies_on_its_turned_cell(quarters: int, mirror: bool) -> None:
    field = painted_field()
    pixels, boxes = turn(field.pixels, field.boxes, quarters, mirror)
    assert tuple(boxes[0, 1:]) == drawn_box(pixels)


def test_a_placed_box_lies_on_its_placed_cell() -> None:
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(60):
        pixels, boxes = place(painted_field(), 128, float(rng.uniform(0.5, 2.5)), rng)
        if len(boxes) and (pixels[..., 0] > 180).any():
            seen += 1
            assert boxes[0, 1:] == pytest.approx(drawn_box(pixels), abs=1.6)
    assert seen > 30


def test_boxes_that_are_nearly_outside_are_dropped() -> None:
    boxes = np.array([[0, -9, 0, 1, 10], [1, -5, 0, 5, 10], [2, 50, 50, 60, 60]], np.float32)
    assert clip_boxes(boxes, 40, 40).tolist() == [[1, 0, 0, 5, 10]]


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_single_fields_are_drawn_at_the_scales_that_are_asked_for(scale: float) -> None:
    fields = iter(AugmentedFields([([painted_field(90, 90)], 1.0)], 90, 3, 0.0, (scale, scale)))
    sides = [box[3:] - box[1:3] for _, found in (next(fields) for _ in range(30)) for box in found.numpy()]
    widest = max(float(side.max()) for side in sides)
    assert widest == pytest.approx(40 * scale, rel=0.25)


def test_the_stream_of_fields_repeats_with_its_seed() -> None:
    def first(seed: int) -> np.ndarray:
        return next(iter(AugmentedFields([([painted_field()], 1.0)], 96, seed, 0.0)))[0].numpy()

    assert np.array_equal(first(1), first(1))
    assert not np.array_equal(first(1), first(2))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_so_many_fields_as_asked_for_keep_their_own_look(share: float) -> None:
    grey = LabelledField(np.full((60, 60, 3), 114, np.uint8), np.empty((0, 5), np.float32))  # as what is beside it
    fields = iter(AugmentedFields([([grey], 1.0)], 60, 4, 0.0, plain_share=share))
    plain = sum(bool((next(fields)[0] == 114).all()) for _ in range(60)) / 60
    assert plain == pytest.approx(share, abs=0.2)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_so_many_fields_as_asked_for_show_debris_and_keep_their_boxes(share: float) -> None:
    glass = LabelledField(np.full((90, 90, 3), 220, np.uint8), np.array([[0, 60, 60, 80, 80]], np.float32))
    fields = iter(AugmentedFields([([glass], 1.0)], 90, 4, 0.0, (1.0, 1.0), plain_share=1.0, debris_share=share))
    drawn = []
    for pixels, boxes in (next(fields) for _ in range(60)):
        drawn.append(bool(((pixels != 220) & (pixels != 114)).any()))
        assert len(boxes) == 1
    assert np.mean(drawn) == pytest.approx(share, abs=0.2)


def test_one_extreme_picture_widens_the_range_as_minimum_and_maximum_do(tmp_path: Path) -> None:
    class Scale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 1, bias=False)
            torch.nn.init.constant_(self.conv.weight, 10.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    quantize.export_float(Scale(), 16, tmp_path / "float.tflite")
    dim = [np.full((1, 16, 16, 3), 0.01, np.float32)] * 30
    bright = [np.ones((1, 16, 16, 3), np.float32)]
    quantize.quantize_file(tmp_path / "float.tflite", tmp_path / "int8.tflite", dim[:15] + bright + dim[15:])
    entry, (output,) = quantize.describe_tensors(tmp_path / "int8.tflite")
    assert (entry["scale"], entry["zero_point"]) == (pytest.approx(1 / 255), -128)
    # Three channels of weight 10 give 30 for the bright picture alone; a moving average would have forgotten it.
    assert output["scale"] * 255 == pytest.approx(30.0, rel=0.05)


def test_the_platelets_of_fields_are_cells_with_a_name(data: Path) -> None:
    wording = crops.Wording(cell_classes(data), {})
    found = crops.field_platelets(data, ("made",), ("test",), wording)
    fields = read_fields(data, "test")
    wanted = [box for field in load_fields(fields) for box in field.boxes if box[0] == 2]
    assert len(found) == len(wanted) > 0
    assert {example.label for example in found} == {wording.classes.index("platelet")}
    x, y, width, height = found[0].box
    assert (x - width / 2, y - height / 2, x + width / 2, y + height / 2) == pytest.approx(
        tuple(wanted[0][1:]), abs=0.1
    )
