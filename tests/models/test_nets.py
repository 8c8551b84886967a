"""The nets against their papers, and the loss against cases with known answers."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra (PyTorch)")

from models.detector.loss import assign, complete_iou, head_loss  # noqa: E402
from models.nets import cellnet, yolov10  # noqa: E402
from models.nets.cellnet import BACKBONES, CellNet  # noqa: E402
from models.nets.shufflenetv2 import shuffle_channels  # noqa: E402

pytestmark = pytest.mark.train


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def stir_norms(net: torch.nn.Module) -> torch.nn.Module:
    """Batch norms with statistics that folding must not lose."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return net.eval()


def test_yolov10n_has_the_papers_parameters() -> None:
    net = yolov10.YoloV10n(80)
    assert round((count(net) - count(net.one_to_many)) / 1e6, 1) == 2.3  # table 1: 2.3 M
    assert count(net) == 2_775_504  # the authors' 2,775,520 less the 16 fixed bins of their decoder


def test_yolov10n_gives_three_pairs_of_maps() -> None:
    maps = yolov10.YoloV10n(3).eval()(torch.rand(1, 3, 416, 416))
    assert [(b.shape, s.shape) for b, s in maps] == [((1, 64, n, n), (1, 3, n, n)) for n in (52, 26, 13)]


PAPERS = [
    # backbone, parameters with a dense layer to 1000 classes, millions of multiply-adds at 224 x 224, features
    ("shufflenetv2-x0.5", 1_366_792, 41, 1024),  # arXiv 1807.11164, table 8: 1.4 M, 41 M
    ("shufflenetv2-x1.0", 2_278_604, 146, 1024),  # the same: 2.3 M, 146 M
    ("mobilenetv2", 3_504_872, 300, 1280),  # arXiv 1801.04381, table 4: 3.4 M, 300 M
    ("mobilenetv2-x0.5", 1_968_680, 97, 1280),  # the authors' own table of widths: 1.95 M, 97 M
    ("darknet-19", 20_842_376, 2790, 1024),  # arXiv 1612.08242: 5.58 billion operations, two to a multiply-add
]


@pytest.mark.parametrize(("name", "parameters", "_", "features"), PAPERS)
def test_backbones_have_their_papers_parameters(name: str, parameters: int, _: int, features: int) -> None:
    net = BACKBONES[name]()
    assert net.features == features
    assert count(net) + 1000 * features + 1000 == parameters


@pytest.mark.parametrize(("name", "_", "multiply_adds", "features"), PAPERS)
def test_backbones_cost_what_their_papers_say(name: str, _: int, multiply_adds: int, features: int) -> None:
    net = BACKBONES[name]().eval()
    assert millions_of_multiply_adds(net, 224) + features / 1000 == pytest.approx(multiply_adds, rel=0.03)


def test_shuffled_channels_alternate_and_stay_as_they_lie_in_memory() -> None:
    plain = torch.arange(6.0)[None, :, None, None] * torch.ones(2, 6, 4, 5)
    for layout in (torch.contiguous_format, torch.channels_last):
        shuffled = shuffle_channels(plain.to(memory_format=layout))
        assert shuffled[1, :, 2, 3].tolist() == [0, 3, 1, 4, 2, 5]
        assert shuffled.is_contiguous(memory_format=layout)


def test_yolov10n_costs_what_its_paper_says() -> None:
    net = yolov10.YoloV10n(80).eval()
    # Table 1: 6.7 G operations at 640 x 640, two to a multiply-add; the attention's products are not counted there.
    assert 2 * millions_of_multiply_adds(net, 640) / 1000 == pytest.approx(6.7, rel=0.05)


def millions_of_multiply_adds(net: torch.nn.Module, side_px: int) -> float:
    """Of the convolutions that one picture runs through."""
    total = 0

    def add(layer: torch.nn.Conv2d, _inputs: object, output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(add)
    net(torch.rand(1, 3, side_px, side_px))
    return total / 1e6


def test_the_heads_stand_side_by_side_on_any_backbone() -> None:
    for name in BACKBONES:
        answers = CellNet(name, 8, [2, 6, 3]).eval()(torch.rand(2, 3, 64, 64))
        assert [tuple(part.shape) for part in answers] == [(2, 8), (2, 11), (2, 1)]


def test_folding_changes_no_answer() -> None:
    x = torch.rand(1, 3, 96, 96)
    detector = stir_norms(yolov10.YoloV10n(3))
    for pair, folded in zip(detector(x), yolov10.fold_batch_norm(detector)(x), strict=True):
        torch.testing.assert_close(pair, folded, atol=1e-4, rtol=1e-4)
    for name in BACKBONES:
        classifier = stir_norms(CellNet(name, 8, [2, 3]))
        for answer, folded in zip(classifier(x), cellnet.fold_batch_norm(classifier)(x), strict=True):
            torch.testing.assert_close(answer, folded, atol=1e-3, rtol=1e-3)


def test_the_one_to_one_head_does_not_steer_the_backbone() -> None:
    net = yolov10.YoloV10n(3)
    _, one = net.forward_both(torch.rand(2, 3, 64, 64))
    sum(part.sum() for pair in one for part in pair).backward()
    assert net.stem[0].conv.weight.grad is None
    assert net.one_to_one.box[0][2].weight.grad is not None


def test_complete_iou_is_one_for_equal_and_lower_for_shifted_boxes() -> None:
    first = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]])
    second = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]])
    values = complete_iou(first, second)
    assert values[0] == pytest.approx(1, abs=1e-5)
    assert values[1] == pytest.approx(1 / 3 - 25 / 325, abs=1e-4)
    assert values[2] < 0


def test_one_place_answers_for_one_cell_and_one_cell_has_one_place() -> None:
    centres, _ = yolov10.places(64, 64)
    targets = torch.tensor([[[0.0, 4, 4, 40, 40], [1, 10, 10, 50, 50], [0, 0, 0, 0, 0]]])
    boxes = torch.cat((centres - 18, centres + 18), 1)[None]
    scores = torch.full((1, len(centres), 2), 0.5)
    real = torch.tensor([[True, True, False]])
    picture, place, cell, aim = assign(scores, boxes, centres, targets, real, 1)
    assert sorted(cell.tolist()) == [0, 1]
    assert len(set(place.tolist())) == 2
    assert aim.max() <= 1
    many = assign(scores, boxes, centres, targets, real, 10)
    assert len(many[1]) > 2
    assert len(set(many[1].tolist())) == len(many[1])
    assert picture.tolist() == [0, 0]


def test_the_loss_falls_on_one_field() -> None:
    torch.manual_seed(0)
    net = yolov10.YoloV10n(2)
    centres, strides = yolov10.places(96, 96)
    x = torch.rand(2, 3, 96, 96)
    targets = torch.tensor([[[0.0, 10, 10, 40, 40]], [[1.0, 30, 30, 80, 80]]])
    real = torch.ones(2, 1, dtype=torch.bool)
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3)
    losses = []
    for _ in range(12):
        many, one = net.forward_both(x)
        loss = head_loss(many, centres, strides, targets, real, 10) + head_loss(one, centres, strides, targets, real, 1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_field_without_cells_has_a_finite_loss() -> None:
    net = yolov10.YoloV10n(2)
    centres, strides = yolov10.places(64, 64)
    maps = net(torch.rand(1, 3, 64, 64))
    loss = head_loss(maps, centres, strides, torch.zeros(1, 1, 5), torch.zeros(1, 1, dtype=torch.bool), 1)
    assert torch.isfinite(loss)
