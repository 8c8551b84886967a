"""A training run from its recipe to its checkpoints: what it is chosen by, how it resumes, where it computes."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs the train extra (PyTorch)")

import io
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.console import Console
from torch.overrides import TorchFunctionMode

from agent.camera.simulated import render_training_crop, render_training_field
from models.classifier import crops, train
from models.classifier.train import RunFile, batch_losses, judge, pooled_accuracy, read_run, taught_views
from models.common import labels, training
from models.common.checkpoints import read_run_checkpoint
from models.common.logs import read_log
from models.common.programs import Unfit
from models.common.training import Run, best_device, bfloat16
from models.detector import train as detector_train
from models.nets.cellnet import CellNet
from models.nets.yolov10 import YoloV10n, places

pytestmark = [pytest.mark.train, pytest.mark.timeout(300)]

CLASSES = ("basophil", "eosinophil", "erythroblast", "ig", "lymphocyte", "monocyte", "neutrophil", "platelet")
LABELS = {"RBC": 1, "platelet": 2}
SPLITS = {"train": 2, "val": 1}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled data to learn from, drawn: single cells, and two fields of each microscope."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(6)
    cells, fields, foreign = ["path,class,split"], ["path,source,split,labels"], [FOREIGN_COLUMNS]
    for name in CLASSES:
        (folder / "pbc" / name).mkdir(parents=True)
        for split, count in SPLITS.items():
            for number in range(count):
                key = f"pbc/{name}/{split}-{number}.png"
                cv2.imwrite(str(folder / key), render_training_crop(rng, name, 96))
                cells.append(f"{key},{name},{split}")
    for part in ("images", "labels"):
        (folder / "fields" / part).mkdir(parents=True)
    for source in ("bccd", "pbc", "raabin"):
        for split in SPLITS:
            pixels, truth = render_training_field(rng, 320, 240)
            key = f"fields/images/{source}-{split}.png"
            cv2.imwrite(str(folder / key), pixels)
            lines = [label_line(name, box, 320, 240) for name, box in truth]
            (folder / f"fields/labels/{source}-{split}.txt").write_text("\n".join(lines))
            fields.append(f"{key},{source},{split},complete")
            if source != "pbc":
                foreign += [
                    f"{key},{source},{split},{name},{b.x_min},{b.y_min},{b.x_max},{b.y_max}"
                    for name, b in truth
                    if name not in LABELS
                ]
    (folder / "pbc.csv").write_text("\n".join(cells))
    (folder / "fields.csv").write_text("\n".join(fields))
    (folder / "foreign.csv").write_text("\n".join(foreign))
    (folder / "attributes.csv").write_text("path,cell_size\npbc/ig/train-0.png,big\npbc/monocyte/val-0.png,small\n")
    return folder


FOREIGN_COLUMNS = "path,source,split,class,x_min,y_min,x_max,y_max"


def label_line(name: str, box: Any, width_px: int, height_px: int) -> str:
    x, y = box.centre_px
    shares = (x / width_px, y / height_px, box.width_px / width_px, box.height_px / height_px)
    return f"{LABELS.get(name, 0)} {' '.join(map(str, shares))}"


RECIPE = """\
backbone: shufflenetv2-x0.5
side_px: 32
batch: 8
epochs: {epochs}
epoch_crops: 16
foreign: [raabin]
simulated_each: 1
shares: {{pbc: 0.8, foreign: 0.1, no_cell: 0.1}}
threads: 1
"""


@pytest.fixture
def learn(labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Train a small classifier for so many epochs, or go on with it; the folder of its run."""
    monkeypatch.setattr(labels, "FOREIGN_CELLS", labelled / "foreign.csv")
    (tmp_path / "boxes.json").write_text("{}")

    def learn(epochs: int) -> Path:
        recipe = tmp_path / "small.yaml"
        recipe.write_text(RECIPE.format(epochs=epochs))
        places = ("--data", labelled, "--runs", tmp_path / "runs", "--boxes", tmp_path / "boxes.json")
        monkeypatch.setattr(sys, "argv", ["train", str(recipe), *map(str, places)])
        train.main()
        return tmp_path / "runs" / "small"

    return learn


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The pixels of each batch that is learnt, in order."""
    seen: list[bytes] = []

    def note(net: Any, teacher: Any, batch: train.Batch, *rest: Any) -> Any:
        seen.append(batch[0].numpy().tobytes())
        return batch_losses(net, teacher, batch, *rest)

    monkeypatch.setattr(train, "batch_losses", note)
    return seen


# ----------------------------------------------------------------------------------------------------------- choosing


def view_of(count: int) -> crops.View:
    return crops.View(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), torch.zeros(count), torch.zeros(count, 1))


def test_each_judged_cell_of_a_taught_microscope_counts_once_and_no_other_counts() -> None:
    settings = RunFile(shares={"pbc": 1.0}, foreign=("raabin",))
    sizes = {"pbc": 1000, "raabin": 50, "raabin_platelets": 10, "bccd": 70, "bccd_platelets": 5}
    views = {name: view_of(count) for name, count in sizes.items()}
    figures = {"pbc_accuracy": 0.9, "raabin_accuracy": 0.5, "raabin_platelets_accuracy": 1.0}
    unseen = {"bccd_accuracy": 0.0, "bccd_platelets_accuracy": 0.0}
    score, error = pooled_accuracy({**figures, **unseen}, views, taught_views(settings))
    assert score == (900 + 25 + 10) / 1060
    assert error == pytest.approx((score * (1 - score) / 1060) ** 0.5)
    better = {"bccd_accuracy": 1.0, "bccd_platelets_accuracy": 1.0}
    assert pooled_accuracy({**figures, **better}, views, taught_views(settings)) == (score, error)


@pytest.mark.parametrize(
    ("scores", "kept"),
    [((0.5, 0.8, 0.79), 3), ((0.5, 0.8, 0.77), 2), ((0.8, 0.785, 0.77), 2), ((0.8, None, 0.8), 3)],
)
def test_of_epochs_that_chance_may_tell_apart_the_last_is_kept(
    scores: tuple[float | None, ...], kept: int, tmp_path: Path
) -> None:
    run, _ = a_run(tmp_path, is_terminal=False)
    for score in scores:
        run.end_epoch(score, error=0.02)
    assert torch.load(tmp_path / "best.pt")["epoch"] == kept


def test_a_run_is_chosen_on_what_it_learns_from_and_logs_what_it_never_sees(learn: Callable[[int], Path]) -> None:
    (line,) = read_log(learn(1))
    names = {name.removeprefix("val_").removesuffix("_accuracy") for name in line if name.endswith("_accuracy")}
    assert {"pbc", "bccd", "raabin"} <= names
    sizes = {"pbc": 8, **{name: size for name, size in counted().items() if name in names}}
    right = sum(round(line[f"val_{name}_accuracy"] * size) for name, size in sizes.items() if "bccd" not in name)
    total = sum(size for name, size in sizes.items() if "bccd" not in name)
    assert line["score"] == pytest.approx(right / total, abs=1e-5)


def counted() -> dict[str, int]:
    """Cells of the `val` views of the other microscopes."""
    data = labels.FOREIGN_CELLS.parent
    found: dict[str, int] = {}
    for cell in labels.read_foreign_cells(data, ("val",)):
        found[cell.source] = found.get(cell.source, 0) + 1
    for cell in labels.read_field_platelets(data, ("val",)):
        found[f"{cell.source}_platelets"] = found.get(f"{cell.source}_platelets", 0) + 1
    return found


@pytest.mark.parametrize("line", ["foreign: [leica]", ""])
def test_a_recipe_of_an_unknown_microscope_or_of_nothing_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"shares: {{pbc: 1.0}}\n{line}\n" if line else "")
    with pytest.raises(SystemExit, match=r"leica is none of bccd, raabin|keys are those of RunFile"):
        read_run(tmp_path / "run.yaml")


# ----------------------------------------------------------------------------------------------------------- resuming


def test_a_run_that_was_killed_twice_goes_on_with_other_crops_each_time(
    learn: Callable[[int], Path], drawn: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    end_epoch = Run.end_epoch

    def killed(run: Run, *words: Any, **figures: Any) -> None:
        end_epoch(run, *words, **figures)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "end_epoch", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            learn(3)
    monkeypatch.setattr(Run, "end_epoch", end_epoch)
    folder = learn(3)
    assert len(drawn) == len(set(drawn)) == 6
    assert [line["epoch"] for line in read_log(folder)] == [1, 2, 3]


def test_a_run_that_is_begun_again_from_nothing_draws_the_same_crops(
    learn: Callable[[int], Path], drawn: list[bytes]
) -> None:
    folder = learn(1)
    first = list(drawn)
    drawn.clear()
    (folder / "last.pt").unlink()
    learn(1)
    assert drawn == first


@pytest.mark.parametrize("key", ["init", "teacher"])
def test_what_a_recipe_begins_with_is_asked_for_before_the_data_are_read(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_text(f"{key}: runs/gone.tflite\nshares: {{pbc: 1.0}}\n")
    monkeypatch.setattr(sys, "argv", ["train", str(recipe), "--data", str(tmp_path), "--runs", str(tmp_path)])
    told = r"runs/gone\.tflite: not there; the comment beside it in the recipe says how to make it"
    with pytest.raises(Unfit, match=told):
        train.main()


def test_a_detector_asks_for_what_it_begins_with_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text("init: runs/gone.pt\n")
    words = ["train", str(tmp_path / "run.yaml"), "--data", str(tmp_path), "--runs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(Unfit, match=r"runs/gone\.pt: not there; the comment beside it"):
        detector_train.main()


def test_a_checkpoint_that_is_none_or_of_another_kind_is_told(learn: Callable[[int], Path], tmp_path: Path) -> None:
    folder = learn(1)
    assert read_run_checkpoint(folder / "best.pt", train.FACTS)["backbone"] == "shufflenetv2-x0.5"
    with pytest.raises(SystemExit, match=r"last\.pt: is not the best\.pt of a run .* it has no command, classes"):
        read_run_checkpoint(folder / "last.pt", train.FACTS)
    with pytest.raises(SystemExit, match=r"gone\.pt: not there"):
        read_run_checkpoint(tmp_path / "gone.pt")
    with pytest.raises(SystemExit, match=r"best\.pt: is of a classifier; give best\.pt of a detector's run"):
        detector_train.averaged_net(folder / "best.pt")
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit, match=r"bad\.pt: cannot be read"):
        read_run_checkpoint(tmp_path / "bad.pt")


# -------------------------------------------------------------------------------------------------------- the device


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_gpu, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert best_device().type == kind


def test_a_gpu_convolves_in_bfloat16_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor of this machine is asked for the CPU alone."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(training.torch, "autocast", lambda *words, **keys: asked.append((*words, keys["enabled"])))
    for can in (True, False):
        training._is_bfloat16_fast.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda can=can, **_: can)
        bfloat16(torch.device("cuda"))
        bfloat16(torch.device("cuda"), is_wanted=False)
    training._is_bfloat16_fast.cache_clear()
    assert asked == [("cuda", torch.bfloat16, is_on) for is_on in (True, False, False, False)]


class Begun(Exception):
    """Training would begin now."""


def test_net_teacher_and_batches_are_where_the_run_computes(
    learn: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no GPU here: the device without memory stands for it, where nothing is computed and all can lie."""
    found: dict[str, set[str]] = {}

    def note(net: CellNet, teacher: CellNet, batch: train.Batch, *_: Any) -> None:
        found["batch"] = {part.device.type for part in batch}
        found["nets"] = {value.device.type for part in (net, teacher) for value in part.state_dict().values()}
        raise Begun

    monkeypatch.setattr(train, "read_run", lambda file: replace(read_run(file), teacher=Path("teacher.pt")))
    monkeypatch.setattr(train, "require_files", lambda *_: None)
    monkeypatch.setattr(train, "load_teacher", lambda *_: CellNet("shufflenetv2-x0.5", 8, [2]))
    monkeypatch.setattr(train, "best_device", lambda: torch.device("meta"))
    monkeypatch.setattr(train, "batch_losses", note)
    with pytest.raises(Begun):
        learn(1)
    assert found == {"batch": {"meta"}, "nets": {"meta"}}


def test_the_detectors_batches_are_where_the_run_computes(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: set[str] = set()

    def note(net: YoloV10n, *batch: torch.Tensor) -> None:
        found.update(value.device.type for value in (*batch, *net.state_dict().values()))
        raise Begun

    (tmp_path / "run.yaml").write_text("epochs: 1\nsteps: 1\nbatch: 2\nsmall_px: 96\nsimulated: 0\nthreads: 1\n")
    words = ["train", str(tmp_path / "run.yaml"), "--data", str(labelled), "--runs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(labels, "FOREIGN_CELLS", labelled / "foreign.csv")
    monkeypatch.setattr(detector_train, "best_device", lambda: torch.device("meta"))
    monkeypatch.setattr(detector_train, "batch_loss", note)
    with pytest.raises(Begun):
        detector_train.main()
    assert found == {"meta"}


@pytest.fixture
def brought_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked back from the device without memory comes as noughts."""
    back = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: torch.zeros_like(x, device="cpu") if x.is_meta else back(x))


@pytest.mark.usefixtures("brought_back")
def test_what_is_judged_goes_to_the_net_and_its_answers_come_back() -> None:
    view = crops.View(
        torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 0, 1]), torch.tensor([[0], [1], [-1]])
    )
    net = CellNet("shufflenetv2-x0.5", 2, [2]).to("meta").eval()
    figures = judge(net, {"pbc": view}, crops.Wording(("a", "b"), {"s": ("x", "y")}))
    assert figures["pbc_accuracy"] == pytest.approx(2 / 3)  # noughts name the first class
    assert figures["pbc_morphology"] == pytest.approx(1 / 2)
    detector = YoloV10n(3).to("meta").eval()
    assert detector_train.find(detector, np.zeros((40, 60, 3), np.uint8), 0.9).shape == (0, 6)


class SayingWhere(TorchFunctionMode):
    """Tensors out of nothing must be made on a device that is named: else they lie on the CPU."""

    MAKERS = frozenset({torch.zeros, torch.ones, torch.full, torch.arange, torch.tensor, torch.empty, torch.eye})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.MAKERS or (kwargs or {}).get("device") is not None, func
        return func(*args, **(kwargs or {}))


def test_nothing_in_a_step_is_made_on_the_cpu_by_default() -> None:
    wording = crops.Wording(("a", "b"), {"s": ("x", "y")})
    net = CellNet("shufflenetv2-x0.5", 2, [2]).train()
    detector = YoloV10n(3).train()
    pixels = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    batch = (pixels, torch.tensor([0, 1]), torch.tensor([[0], [-1]]), torch.ones(2))
    targets = torch.tensor([[[0.0, 8, 8, 40, 40]], [[1, 4, 4, 60, 60]]])
    real = torch.ones(2, 1, dtype=torch.bool)
    settings = RunFile(shares={"pbc": 1.0}, small_px=48)
    with pytest.raises(AssertionError), SayingWhere():
        torch.zeros(2)
    with SayingWhere():
        parts = batch_losses(net, net, batch, settings, 0.1, wording)
        loss = detector_train.batch_loss(detector, pixels, targets, real)
    assert len(parts) == 5
    assert loss.item() > 0


def test_places_lie_where_they_are_asked_for() -> None:
    assert {part.device.type for part in places(64, 64, "meta")} == {"meta"}
    assert {part.device.type for part in places(64, 64)} == {"cpu"}


# ------------------------------------------------------------------------------------------------------- what is shown


def a_run(folder: Path, *, is_terminal: bool) -> tuple[Run, io.StringIO]:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=is_terminal, width=100)
    return Run(folder, torch.nn.Linear(2, 1), rate=0.1, minutes=0.0, steps=4, console=console), screen


def take_steps(run: Run, scores: list[float | None]) -> None:
    with run.begun():
        for score in scores:
            run.step(run.net(torch.ones(1, 2)).square().sum() * 0 + 1.25)
            run.end_epoch(score)
        run.step(run.net(torch.ones(1, 2)).square().sum() * 0 + 0.75)


def test_a_terminal_sees_how_far_a_run_is_with_its_newest_loss_and_score(tmp_path: Path) -> None:
    run, screen = a_run(tmp_path, is_terminal=True)
    take_steps(run, [0.5, None])
    last = screen.getvalue().split("\r")[-1]
    assert "epoch 3" in last
    assert "75%" in last
    assert "loss 0.750" in last
    assert "val 0.5000" in last


def test_what_is_no_terminal_gets_no_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, screen = a_run(tmp_path, is_terminal=False)
    take_steps(run, [0.5, None])
    assert screen.getvalue() == ""
    told = capsys.readouterr()
    assert told.err == ""
    assert len(told.out.splitlines()) == 2  # the log, as ever


def test_the_log_stays_on_standard_output_while_the_bar_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, screen = a_run(tmp_path, is_terminal=True)
    take_steps(run, [0.5])
    assert '"score": 0.5' in capsys.readouterr().out
    assert '"score"' not in screen.getvalue()
