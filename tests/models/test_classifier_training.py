"""What a recipe says is what is done: frozen parts stay, classes are drawn as it asks, unknown words are refused."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs the train extra (PyTorch)")

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from agent.analysis.preprocessing import Look
from agent.inference.manifest import load_manifest
from models.classifier import crops
from models.classifier.train import (
    RunFile,
    as_seen,
    freeze,
    load_teacher,
    read_run,
    teacher_losses,
    train_loader,
    undersampled,
)
from models.common.labels import CellImage
from models.common.training import Run, told_command
from models.evaluation.names import cut_picture
from models.nets.cellnet import Answers, CellNet

pytestmark = pytest.mark.train


def test_a_frozen_stem_keeps_its_weights_and_its_statistics_while_the_rest_learns() -> None:
    net = CellNet("shufflenetv2-x0.5", 3, [2])
    net.train()
    freeze(net, ["backbone.stem"])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(torch.rand(4, 3, 64, 64)).classes.square().sum().backward()
    optimiser.step()
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("backbone.stem") for name in before)
    assert not any(name.startswith("backbone.stem") for name in moved)
    assert "classes.weight" in moved
    assert any(name.endswith("running_mean") for name in moved)


WORDING = crops.Wording(("basophil", "platelet"), {"size": ("big", "small")})


def drawn_share_of_the_rare_class(balance: str) -> float:
    """Of an epoch over 10 basophils and 90 platelets."""
    pixels = np.full((40, 40, 3), 200, np.uint8)
    examples = [crops.Example(pixels, (20, 20, 20, 20), label, (-1,)) for label in [0] * 10 + [1] * 90]
    settings = RunFile(shares={"pbc": 1.0}, balance=balance, epoch_crops=4000, side_px=32)
    loader = train_loader(settings, {"pbc": examples}, WORDING)
    drawn = Counter(examples[k].label for k in loader.sampler)
    return drawn[0] / drawn.total()


@pytest.mark.parametrize(("balance", "share"), [("even", 0.5), ("root", 0.25), ("none", 0.1)])
def test_a_rare_class_is_drawn_as_the_recipe_asks(balance: str, share: float) -> None:
    assert drawn_share_of_the_rare_class(balance) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(("plain_share", "looks"), [(1.0, 1), (0.0, 40)])
def test_the_share_of_plain_crops_keeps_the_look_of_its_own_laboratory(plain_share: float, looks: int) -> None:
    pixels = np.full((40, 40, 3), (90, 60, 140), np.uint8)
    example = crops.Example(pixels, (20, 20, 20, 20), 0, (-1,))
    dataset = crops.TrainingCrops([example], 32, plain_share)
    torch.manual_seed(1)
    means = {tuple(dataset[0][0].float().mean((1, 2)).round().tolist()) for _ in range(50)}
    assert len(means) == 1 if looks == 1 else len(means) >= looks


def test_a_cut_piece_goes_by_what_it_shows_itself() -> None:
    """The far side of the field is lit differently: a piece around the cell knows nothing of it."""
    pixels = np.full((120, 240, 3), 150, np.uint8)
    pixels[:, 100:] = 230
    pixels[50:70, 30:50] = (90, 60, 140)
    example = crops.Example(pixels, (40, 60, 20, 20), 0, (-1,))
    look = Look((200, 200, 200), None)
    crop = pixels[45:75, 25:55]
    relooks = crops.Relooks(look)
    of_piece = relooks.cell_of_cut(crop, example, np.random.default_rng(1))
    assert of_piece[0, 0] == pytest.approx(200, abs=2)  # the near ground
    assert relooks.cell(crop, example)[0, 0].mean() < 150  # the far ground is most of the field
    assert (relooks.cell_of_cut(crop, example, np.random.default_rng(2)) == of_piece).all()
    assert (crops.Relooks(None).cell_of_cut(crop, example, np.random.default_rng(1)) == crop).all()


@pytest.mark.parametrize(("box", "shape"), [((40, 60, 20, 10), (40, 40, 3)), ((5, 60, 20, 20), (40, 25, 3))])
def test_a_piece_is_as_wide_as_the_picture_allows(box: crops.CentredBox, shape: tuple[int, ...]) -> None:
    assert cut_picture(np.zeros((120, 240, 3), np.uint8), crops.corners_of(box), 2.0).shape == shape


@pytest.mark.parametrize("kind", ["ruined", "under debris"])
def test_what_is_spoilt_is_no_cell_and_looks_another_way_each_time(kind: str) -> None:
    rng = np.random.default_rng(3)
    pixels = np.full((90, 90, 3), 220, np.uint8)
    pixels[30:60, 30:60] = 90
    cell = crops.Example(pixels, (45, 45, 30, 30), 2, (1, 0))
    spoil = crops.ruined if kind == "ruined" else crops.under_debris
    (spoilt,) = spoil([cell], rng, 5)
    assert (spoilt.label, spoilt.attributes, spoilt.is_cell) == (crops.UNKNOWN, (crops.UNKNOWN,) * 2, False)
    assert (cell.label, cell.is_cell) == (2, True)
    torch.manual_seed(1)
    drawn = crops.TrainingCrops([spoilt, cell], 32, plain_share=1.0)
    shown = [drawn[0][0].float() for _ in range(8)]
    assert drawn[0][3] == 0.0
    assert drawn[1][3] == 1.0
    edges = [float((picture[:, :, 1:] - picture[:, :, :-1]).abs().max()) for picture in shown]
    assert max(edges) < 60 if kind == "ruined" else max(edges) > 60
    assert len(set(edges)) > 4


def test_undersampling_leaves_so_many_of_each_class() -> None:
    cells = [CellImage(f"{k}", Path(), "basophil" if k % 5 else "platelet", "train") for k in range(50)]
    kept = undersampled(cells, 12, np.random.default_rng(1))
    assert Counter(cell.class_name for cell in kept) == {"basophil": 12, "platelet": 10}


@pytest.mark.parametrize(
    ("line", "word"),
    [("balance: fair", "fair"), ("weights: {looks: 1}", "looks"), ("backbone: vgg", "vgg"), ("pace: 3", "pace")],
)
def test_a_recipe_with_an_unknown_word_is_refused_by_name(line: str, word: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"shares: {{pbc: 1.0}}\n{line}\n")
    with pytest.raises(SystemExit, match=word):
        read_run(file)


@pytest.mark.parametrize("file", sorted(Path("models/classifier/recipes").rglob("*.yaml")), ids=lambda file: file.stem)
def test_each_recipe_that_we_keep_can_be_read(file: Path) -> None:
    assert read_run(file).shares


def test_a_teacher_who_agrees_costs_nothing_and_crops_without_a_cell_do_not_count() -> None:
    torch.manual_seed(1)
    told = Answers(torch.randn(6, 2), torch.randn(6, 2), torch.zeros(6, 1))
    are_cells = torch.tensor([1.0, 1, 1, 0, 0, 0])
    same = teacher_losses(told, told, NO_LABELS, are_cells, WORDING)
    assert [float(loss) for loss in same.values()] == pytest.approx([0, 0], abs=1e-6)
    classes, morphology = told.classes.clone(), told.morphology.clone()
    classes[3:] += torch.randn(3, 2)
    morphology[3:] += torch.randn(3, 2)
    elsewhere = teacher_losses(Answers(classes, morphology, told.is_cell), told, NO_LABELS, are_cells, WORDING)
    assert [float(loss) for loss in elsewhere.values()] == pytest.approx([0, 0], abs=1e-6)
    flipped = Answers(told.classes.flip(1), told.morphology.flip(1), told.is_cell)
    assert all(loss > 0.01 for loss in teacher_losses(flipped, told, NO_LABELS, are_cells, WORDING).values())


def test_a_shipped_file_teaches_whichever_net_it_holds() -> None:
    entry = load_manifest(Path("models")).classifier
    wording = crops.Wording(entry.classes, entry.morphology.attributes if entry.morphology else {})
    pixels = np.random.default_rng(1).integers(0, 256, (160, 160, 3), np.uint8)
    examples = {"pbc": [crops.Example(pixels, (80, 80, 100, 100), 0, wording.no_attributes)] * 256}
    teacher = load_teacher(Path("models") / entry.file, examples, 128, wording)
    with torch.inference_mode():
        told = teacher(torch.from_numpy(pixels[:128, :128].transpose(2, 0, 1).copy())[None].float() / 255)
    assert not teacher.training
    assert told.classes.shape == (1, len(entry.classes))
    with pytest.raises(SystemExit, match=r"yolov10n\.tflite is no classifier of ours: none of shuffle"):
        load_teacher(Path("models/detector/yolov10n.tflite"), examples, 128, wording)


@pytest.mark.parametrize(("progress", "side_px"), [(0.0, 48), (0.59, 48), (0.6, 64)])
def test_crops_are_small_for_the_first_part_of_a_run(progress: float, side_px: int) -> None:
    settings = RunFile(shares={"pbc": 1.0}, side_px=64, small_px=48, small_until=0.6)
    assert as_seen(torch.rand(2, 3, 64, 64), settings, progress).shape == (2, 3, side_px, side_px)
    assert as_seen(torch.rand(2, 3, 64, 64), RunFile(shares={"pbc": 1.0}), progress).shape[-1] == 64


def test_nobody_listens_to_a_teacher_who_names_a_cell_wrongly() -> None:
    told = Answers(torch.tensor([[3.0, 0], [0, 3.0]]), torch.zeros(2, 2), torch.zeros(2, 1))
    answers = Answers(told.classes.flip(1), told.morphology, told.is_cell)
    losses = {
        labels: float(teacher_losses(answers, told, torch.tensor(labels), torch.ones(2), WORDING)["teacher"])
        for labels in ((0, 1), (0, 0), (1, 0))
    }
    assert losses[0, 1] == pytest.approx(losses[0, 0])
    assert losses[1, 0] == 0


NO_LABELS = torch.full((6,), crops.UNKNOWN)


@pytest.mark.parametrize(
    "places", [[], ["--data", "/home/a/data"], ["--data=/home/a/data", "--runs", "r"], ["--boxes", "b.json"]]
)
def test_a_command_is_told_without_the_places_of_this_machine(places: list[str]) -> None:
    told = told_command(["/usr/bin/python3.11", "-m", "models.classifier.train", *places, "recipe.yaml"])
    assert told == "python -m models.classifier.train recipe.yaml"


def test_a_run_of_so_many_steps_ends_there_however_long_it_takes_and_goes_on_where_it_stood(tmp_path: Path) -> None:
    def begin() -> Run:
        torch.manual_seed(1)
        return Run(tmp_path, torch.nn.Linear(2, 1), rate=0.1, minutes=0.0, steps=4)

    def step(run: Run) -> None:
        run.step(run.net(torch.ones(1, 2)).square().sum())

    run = begin()
    for _ in range(3):
        step(run)
    assert (run.schedule.progress, run.is_finished) == (0.75, False)
    run.end_epoch(score=None)
    again = begin()
    assert torch.equal(again.net.weight, run.net.weight)
    assert not again.is_finished
    step(again)
    assert again.is_finished
