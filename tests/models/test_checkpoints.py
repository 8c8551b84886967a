"""A net takes from a checkpoint what fits, by name or by order, and says what it did not get."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra (PyTorch)")

from models.common.checkpoints import load_fitting  # noqa: E402
from models.nets.cellnet import CellNet  # noqa: E402
from models.nets.shufflenetv2 import ShuffleNetV2  # noqa: E402
from models.nets.yolov10 import YoloV10n  # noqa: E402

pytestmark = pytest.mark.train


def stirred(net: torch.nn.Module) -> torch.nn.Module:
    """Every tensor of its own, norms' statistics too."""
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.dtype.is_floating_point:
                value.copy_(torch.rand_like(value) + 0.5)
    return net


def saved(state: object, folder: Path) -> Path:
    torch.save(state, folder / "weights.pt")
    return folder / "weights.pt"


def test_a_run_of_ours_is_taken_by_name_and_a_head_of_other_size_is_not(tmp_path: Path) -> None:
    before = stirred(CellNet("shufflenetv2-x0.5", 5, [2, 3]))
    net = CellNet("shufflenetv2-x0.5", 8, [2, 3])
    fit = load_fitting(net, saved({"average": before.state_dict(), "epoch": 3}, tmp_path))
    assert fit.by == "name"
    assert fit.missing == ("classes.weight", "classes.bias")
    kept = net.backbone.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in before.backbone.state_dict().items())
    assert "classes.weight" in str(fit)


def test_the_detector_begins_with_a_backbone_that_learnt_the_classes(tmp_path: Path) -> None:
    taught = stirred(CellNet("yolov10n-backbone", 8, [2]))
    net = YoloV10n(3)
    fit = load_fitting(net, saved({"average": taught.state_dict()}, tmp_path))
    assert fit.by == "name"
    learnt = [name for name in net.state_dict() if name.startswith(("stem.", "stage_"))]
    assert not set(learnt) & set(fit.missing)
    assert torch.equal(net.stage_32[3].leave.conv.weight, taught.backbone.stage_32[3].leave.conv.weight)


def test_foreign_names_are_matched_by_order_and_what_is_more_or_less_is_passed_over(tmp_path: Path) -> None:
    """As of a net from another library: other names, a head for 1000 classes, no heads of ours."""
    theirs = stirred(ShuffleNetV2(0.5))
    named = {f"layer.{k}": value for k, value in enumerate(theirs.state_dict().values())}
    named["fc.weight"] = torch.rand(1000, 1024)
    net = CellNet("shufflenetv2-x0.5", 8, [2, 3])
    fit = load_fitting(net, saved({"state_dict": named}, tmp_path))
    assert fit.by == "order"
    assert all(name.startswith(("classes", "morphology", "is_cell")) for name in fit.missing)
    x = torch.rand(2, 3, 64, 64)
    assert torch.allclose(net.eval().backbone(x), theirs.eval()(x))


def test_a_checkpoint_of_which_nothing_fits_is_refused(tmp_path: Path) -> None:
    file = saved({"a": torch.rand(7, 7, 7)}, tmp_path)
    with pytest.raises(SystemExit, match="none of its 1 tensors"):
        load_fitting(CellNet("shufflenetv2-x0.5", 8, [2]), file)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_file_that_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    file.write_bytes(content)
    with pytest.raises(SystemExit, match="cannot be read"):
        load_fitting(CellNet("shufflenetv2-x0.5", 8, [2]), file)
