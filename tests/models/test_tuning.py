"""Fine-tuning and adaptation as a laboratory runs them, short, on the simulated slide."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the train extra (PyTorch)")

import torch

from agent.analysis.preprocessing import GROUND_BGR, LOOK_LAB, ground_gains, scale_channels
from agent.camera.simulated import render_training_crop, render_training_field
from agent.config import ModelsSection
from agent.domain import Box, Detection
from agent.inference.manifest import Crop, CropLook, load_manifest
from agent.inference.models import open_models
from models import adapt, finetune
from models.classifier import crops, tuning
from models.common.programs import Unfit
from models.finetune import Comparison, CropsUnfit
from tests.disks import mounted

pytestmark = [pytest.mark.train, pytest.mark.timeout(900)]

TOP = Path(__file__).parents[2]


def run(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)


def write_crops(folder: Path, shown_as: dict[str, str], each: int) -> None:
    """Simulated cells by the name that a laboratory gives to them: what it wants is not what the net says."""
    rng = np.random.default_rng(9)
    for name, shown in shown_as.items():
        (folder / name).mkdir(parents=True)
        for number in range(each):
            cv2.imwrite(str(folder / name / f"{number}.png"), render_training_crop(rng, shown, 96))


def after_steps(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Learning ends after so many steps, however slow the machine is."""
    tune = tuning.tune

    def tune_so_long(base: tuning.Base, examples: Any, _minutes: float, rate: float) -> None:
        ticks = itertools.count()
        tune(base, examples, steps / 60, rate, clock=lambda: float(next(ticks)))

    monkeypatch.setattr(tuning, "tune", tune_so_long)


def test_a_laboratory_teaches_its_own_cells_and_gets_a_folder_that_the_agent_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_crops(tmp_path / "crops", {"basophil": "lymphocyte", "platelet": "neutrophil"}, 24)
    output = tmp_path / "tuned"
    after_steps(monkeypatch, 10)
    monkeypatch.setattr(sys, "argv", ["finetune", str(tmp_path / "crops"), "--output", str(output), "--rate", "0.002"])
    finetune.main()
    said = capsys.readouterr()
    told = json.loads(said.out.splitlines()[-1])  # the converter talks before
    assert told["right_before"] <= 0.2 * told["crops_judged"]
    assert told["right_after"] >= 0.7 * told["crops_judged"]
    assert told["right_after"] - told["right_before"] == told["won"] - told["lost"]
    assert "better, by more than chance explains" in said.err
    assert "+tuned-" in open_models(ModelsSection(folder=output)).classifier.identity.version
    assert json.loads((output / "signoff.json").read_text()) == told


@pytest.mark.parametrize(
    ("before", "after", "words", "is_offered"),
    [
        ("++++++++++", "++++++++++", "nothing was left to gain: the old classifier names all of them right", True),
        ("++++++++++", "+++++++++-", "nothing was left to gain: .* and what was lost may be chance", True),
        ("++++++++--", "++++++++--", "no more than chance explains", True),
        ("+++++++---", "++++++++++", "no more than chance explains", True),
        ("++++++++--", "++++++----", "no more than chance explains", True),
        ("+++++-----", "++++++++++", "the tuned classifier is better, by more than chance explains", True),
        ("++++++++++", "+++++-----", "the tuned classifier is worse, by more than chance explains", False),
        ("++++++----", "------+---", "no more than chance explains", True),
        ("+++++++---", "----------", "the tuned classifier is worse, by more than chance explains", False),
    ],
)
def test_a_tuned_classifier_is_offered_unless_it_is_worse_than_chance_allows_and_the_counts_are_told(
    before: str,
    after: str,
    words: str,
    is_offered: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What it names right is given here; the rest is as it is."""
    put_pictures(tmp_path / "crops" / "neutrophil", ".png", 60)
    output, work = tmp_path / "tuned", tmp_path / "tuned.part"
    monkeypatch.setattr(tuning, "open_base", lambda *_: None)
    monkeypatch.setattr(tuning, "with_own_stain", lambda base: base)
    monkeypatch.setattr(tuning, "tune", lambda *_: None)
    monkeypatch.setattr(tuning, "write_models", lambda *_: work.mkdir())
    named = iter([[sign == "+" for sign in signs] for signs in (before, after)])
    monkeypatch.setattr(tuning, "named_right", lambda *_: next(named))
    monkeypatch.setattr(sys, "argv", ["finetune", str(tmp_path / "crops"), "--output", str(output)])
    if is_offered:
        finetune.main()
    else:
        with pytest.raises(SystemExit) as refused:
            finetune.main()
        assert refused.value.code == 1
    said = capsys.readouterr()
    assert re.search(words, said.err)
    right = [signs.count("+") for signs in (before, after)]
    assert f"of 10 crops that were kept back the old classifier names {right[0]} (" in said.err
    assert (output.exists(), "nothing is changed" in said.err) == (is_offered, not is_offered)
    told = json.loads(((output if is_offered else work) / "signoff.json").read_text())
    assert [told["right_before"], told["right_after"]] == right
    assert told["interval_before"][0] <= told["accuracy_before"] <= told["interval_before"][1]


def test_a_sign_off_tells_the_interval_that_the_truth_lies_in() -> None:
    found = Comparison.of([True] * 8 + [False] * 2, [True] * 9 + [False])
    assert (found.won, found.lost, found.right_after) == (1, 0, 9)
    assert "8 (80.0%, 95% interval 44.4% to 97.5%) right" in found.words  # Clopper and Pearson's


def test_crops_are_decoded_as_the_agent_decodes_them(tmp_path: Path) -> None:
    """Transparent parts are white, as the ground is, whatever colour lies behind them."""
    pixels = np.zeros((40, 40, 4), np.uint8)
    pixels[:20] = (30, 60, 200, 255)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    crop = finetune.read_crop(tmp_path / "a.png")
    assert crop[0, 0].tolist() == [200, 60, 30]
    assert crop[39, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kept", [0.6, 0.0])
def test_a_crop_that_is_cut_off_is_refused_by_name(kept: float, tmp_path: Path) -> None:
    put_pictures(tmp_path / "crops" / "neutrophil", ".png", 60)
    noise = np.random.default_rng(1).integers(0, 256, (80, 80, 3), np.uint8)
    _, coded = cv2.imencode(".jpg", noise)
    content = coded.tobytes()
    (tmp_path / "crops" / "neutrophil" / "cut.jpg").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CropsUnfit, match=r"cut\.jpg: .*; mend or remove it$"):
        finetune.read_crops(tmp_path / "crops", WORDING)


def test_a_crop_of_a_few_pixels_is_refused_by_name(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "tiny.png"), np.zeros((7, 30, 3), np.uint8))
    with pytest.raises(CropsUnfit, match=r"tiny\.png: .*too small"):
        finetune.read_crop(tmp_path / "tiny.png")
    cv2.imwrite(str(tmp_path / "small.png"), np.zeros((8, 30, 3), np.uint8))
    assert finetune.read_crop(tmp_path / "small.png").shape == (8, 30, 3)


@pytest.mark.parametrize(
    ("names", "words"),
    [((), "folders must be named"), (("neutrofil",), "neutrofil"), (("neutrophil",), "too few")],
)
def test_a_folder_that_nothing_can_be_learnt_from_is_refused_in_words(
    tmp_path: Path, names: tuple[str, ...], words: str
) -> None:
    (tmp_path / "crops").mkdir()
    for name in names:
        (tmp_path / "crops" / name).mkdir()
    done = run("models.finetune", str(tmp_path / "crops"), "--output", str(tmp_path / "tuned"))
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def put_pictures(folder: Path, ending: str, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        done, coded = cv2.imencode(".webp", np.full((60, 60, 3), number, np.uint8))
        assert done
        (folder / f"{number}{ending}").write_bytes(coded.tobytes())


WORDING = crops.Wording(("neutrophil", "platelet"), {})


def test_crops_in_each_format_that_the_agent_reads_are_learnt_from_and_others_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_pictures(tmp_path / "crops" / "neutrophil", ".webp", 60)
    put_pictures(tmp_path / "crops" / "platelet", ".gif", 3)
    learnt, judged = finetune.read_crops(tmp_path / "crops", WORDING)
    assert len(learnt) + len(judged) == 60
    assert capsys.readouterr().err == f"{tmp_path / 'crops'}; left out because of their ending: 3 .gif\n"


def test_why_crops_are_too_few_is_told_as_it_is(tmp_path: Path) -> None:
    put_pictures(tmp_path / "crops" / "no-cell", ".png", 60)
    (tmp_path / "crops" / "neutrophil").mkdir()
    learnt = next(p for p in sorted((tmp_path / "crops" / "no-cell").iterdir()) if not finetune.is_kept_back(p))
    learnt.rename(tmp_path / "crops" / "neutrophil" / "one.png")
    with pytest.raises(CropsUnfit, match=r"1 crops of cells are too few: none of them is among .* not in no-cell$"):
        finetune.read_crops(tmp_path / "crops", WORDING)
    put_pictures(tmp_path / "others" / "neutrophil", ".gif", 60)
    told = r"0 crops are too few: .* 20 are the least; left out because of their ending: 60 \.gif$"
    with pytest.raises(CropsUnfit, match=told):
        finetune.read_crops(tmp_path / "others", WORDING)


def test_fields_without_labels_adapt_the_classifier(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    (tmp_path / "fields").mkdir()
    for number in range(30):
        pixels, _ = render_training_field(rng, 640, 480)
        cv2.imwrite(str(tmp_path / f"fields/{number}.png"), pixels)
    output = tmp_path / "adapted"
    done = run("models.adapt", "--images", str(tmp_path / "fields"), "--output", str(output), "--minutes", "0.3")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])  # the converter talks before
    assert told["cells"] >= 60
    assert told["same_name"] >= 0.7
    assert told["trusted_kept"] >= adapt.LEAST_KEPT
    assert "+adapted-" in open_models(ModelsSection(folder=output)).classifier.identity.version


@pytest.mark.parametrize(
    ("before", "after", "kept", "is_offered"),
    [
        # A capital is a trusted name, a small letter one in doubt; the letter is the class. Each stands for ten cells.
        ("AAAAABBBBB", "AAAAABBBBB", "100.0%", True),
        ("AAAAAbbbbb", "AAAAAACCCC", "100.0%", True),
        ("AAAAABBBBB", "AAAABBBBBC", "80.0%", True),
        ("AAAAABBBBB", "AAAAAAAABB", "70.0%", False),
        ("AAAAABBBBB", "AAAAABBaaa", "70.0%", False),
        ("AAAAABBBBB", "AAAAABBbbb", "70.0%", False),
        ("AAbbbbbbbb", "BBbbbbbbbb", "0.0%", False),
    ],
)
def test_an_adapted_classifier_is_offered_unless_too_many_trusted_names_are_lost(
    before: str,
    after: str,
    kept: str,
    is_offered: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without any labels. What is said of the cells is given here; the rest is as it is."""
    output, work = tmp_path / "adapted", tmp_path / "adapted.part"
    adapt_to_given_names(before, after, output, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["adapt", "--images", str(tmp_path), "--output", str(output)])
    if is_offered:
        adapt.main()
    else:
        with pytest.raises(SystemExit) as refused:
            adapt.main()
        assert refused.value.code == 1
    said = capsys.readouterr().err
    assert f"of those that had one, {kept} keep it" in said
    bound = f"of the cells whose name was trusted {kept} keep it, where 80% are the least: nothing is changed"
    assert (output.exists(), bound in said) == (is_offered, not is_offered)
    assert is_offered or "name some crops and use models.finetune" in said
    told = json.loads(((output if is_offered else work) / "signoff.json").read_text())
    assert f"{told['trusted_kept']:.1%}" == kept


def adapt_to_given_names(before: str, after: str, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapting without any learning: what is said of ten cells each before and after is told by a letter."""
    work = output.with_name(output.name + ".part")

    def write(*_: object) -> Any:
        work.mkdir()
        return open_models(ModelsSection())

    told = iter([[(ord(sign.lower()), 1.0, float(sign.isupper())) for sign in signs] * 10 for signs in (before, after)])
    monkeypatch.setattr(adapt, "find_cells", lambda *_: [None] * 10 * len(before))
    monkeypatch.setattr(adapt, "move_norms", lambda *_: None)
    monkeypatch.setattr(adapt, "sure_cells", lambda *_: [])
    monkeypatch.setattr(tuning, "answers_to", lambda *_: next(told))
    monkeypatch.setattr(tuning, "agent_squares", lambda *_: iter(()))
    monkeypatch.setattr(tuning, "open_base", lambda *_: SimpleNamespace(net=None, entry=None, wording=None))
    monkeypatch.setattr(tuning, "write_models", write)


def test_too_few_trusted_names_to_judge_by_are_told_before_minutes_of_learning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapt_to_given_names("Aaaaaaaa", "Aaaaaaaa", tmp_path / "adapted", monkeypatch)
    monkeypatch.setattr(adapt, "move_norms", lambda *_: pytest.fail("it began"))
    monkeypatch.setattr(sys, "argv", ["adapt", "--images", str(tmp_path), "--output", str(tmp_path / "adapted")])
    with pytest.raises(CropsUnfit, match=r"of 80 cells 10 have a trusted name, where 20 are the least to judge by"):
        adapt.main()


@pytest.mark.parametrize("program", [adapt, finetune])
def test_a_folder_that_is_there_is_left_alone_and_told_before_minutes_of_learning(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--images", str(tmp_path)] if program is adapt else [str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["program", *given, "--output", str(tmp_path)])
    with pytest.raises(Unfit, match="exists already; give another --output, or move it away first"):
        program.main()


@pytest.mark.parametrize("program", [adapt, finetune])
def test_a_folder_that_cannot_be_made_is_told_before_minutes_of_learning(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--images", str(tmp_path)] if program is adapt else [str(tmp_path)]
    with mounted(tmp_path / "of-root", "ro") as others:
        for output in (others / "my-models", others / "new" / "my-models"):
            monkeypatch.setattr(sys, "argv", ["program", *given, "--output", str(output)])
            with pytest.raises(Unfit, match=f"my-models: cannot be made in {others}; give another --output"):
                program.main()


@pytest.mark.parametrize(
    ("program", "rows", "words"),
    [
        (adapt, ["neutrophil,test"], "has no picture of split train"),
        (adapt, ["neutrophil,train"], "has no picture of split val"),
        (adapt, ["neutrophil,train", "Neutrophil,val"], "Neutrophil is no class of the model: basophil"),
        (finetune, ["neutrophil,test"], "has no picture of split train"),
        (finetune, ["Neutrophil,train"], "Neutrophil is no class of the model: basophil"),
    ],
)
def test_pictures_that_teach_and_judge_nothing_are_told_before_minutes_of_learning(
    program: ModuleType, rows: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a laboratory gives its own crops with --data, whose pbc.csv says test in each line."""
    put_pictures(tmp_path / "crops" / "neutrophil", ".png", 60)
    lines = [f"neutrophil/0.png,{row}" for row in rows]
    (tmp_path / "crops" / "pbc.csv").write_text("\n".join(["path,class,split", *lines]))
    if program is adapt:
        adapt_to_given_names("AAAAABBBBB", "AAAAABBBBB", tmp_path / "new", monkeypatch)
    else:
        monkeypatch.setattr(tuning, "open_base", lambda *_: None)
        monkeypatch.setattr(tuning, "with_own_stain", lambda base: base)
    monkeypatch.setattr(tuning, "tune", lambda *_: pytest.fail("it began"))
    monkeypatch.setattr(tuning, "write_models", lambda *_: pytest.fail("it went on"))
    given = ["--images", str(tmp_path)] if program is adapt else [str(tmp_path / "crops")]
    given += ["--output", str(tmp_path / "new"), "--data", str(tmp_path / "crops")]
    monkeypatch.setattr(sys, "argv", ["program", *given])
    with pytest.raises(Unfit, match=words):
        program.main()


@pytest.mark.parametrize("program", [adapt, finetune])
@pytest.mark.parametrize("minutes", ["0", "-1", "inf", "nan"])
def test_minutes_with_which_learning_would_never_begin_or_end_are_refused(
    minutes: str, program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--images", "fields"] if program is adapt else ["crops"]
    monkeypatch.setattr(sys, "argv", ["program", *given, "--output", "out", f"--minutes={minutes}"])
    with pytest.raises(SystemExit) as refused:
        program.parse()
    assert refused.value.code == 2
    assert f"--minutes: {minutes} is no finite number above zero" in capsys.readouterr().err


def test_what_is_forgotten_of_pbc_is_told_with_its_bound() -> None:
    facts = {"trusted_kept": 0.9, "pbc_before": 0.97, "pbc_after": 0.955}
    (fault,) = adapt.what_is_wanting(facts)
    assert fault == (
        "of the PBC pictures 95.5% are named right, 97.0% before, where 1 point is the most that may be lost"
    )
    assert adapt.what_is_wanting({**facts, "pbc_after": 0.965}) == []


def test_a_tuned_classifier_leaves_the_stain_that_it_was_taught_as_it_is() -> None:
    picture = cv2.GaussianBlur(np.random.default_rng(3).integers(0, 256, (90, 90, 3), np.uint8), (0, 0), 4)
    cell = crops.Example(picture, (45, 45, 40, 40), 0, (-1,) * 11)
    base = tuning.open_base(TOP / "models", [cell] * 4)
    entry = base.entry.model_copy(update={"crop": Crop(margin=0.2, look=CropLook(ground_bgr=GROUND_BGR, lab=LOOK_LAB))})
    own = tuning.with_own_stain(replace(base, entry=entry)).entry
    gains = ground_gains(np.ascontiguousarray(picture[..., ::-1]), GROUND_BGR)
    lit = scale_channels(crops.square(picture, cell.box, base.side_px), gains[::-1])
    (as_taught,), (as_before,) = (list(tuning.agent_squares(told, [cell])) for told in (own, entry))
    assert np.array_equal(as_taught, lit)
    assert not np.array_equal(as_before, lit)
    assert own.crop.look is not None
    assert own.crop.look.lab is None


@pytest.mark.parametrize(("seen", "tells"), [(("platelet", "WBC"), True), (("platelet", "platelet"), False)])
def test_the_stain_of_a_laboratorys_field_is_told_by_its_white_cells(
    seen: tuple[str, str], tells: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cv2.imwrite(str(tmp_path / "field.png"), np.full((200, 300, 3), 220, np.uint8))
    found = [
        Detection(Box(10 + 40 * (n % 5), 10, 40 + 40 * (n % 5), 40), seen[n % 2], 0.9)
        for n in range(adapt.FEWEST_CELLS)
    ]
    manifest = load_manifest(Path("models"))
    models: Any = SimpleNamespace(manifest=manifest, detector=SimpleNamespace(detect=lambda _pixels: found))
    wording = crops.Wording(manifest.classifier.classes, {})
    (tmp_path / "field.vsi").touch()
    cells = adapt.find_cells(models, tmp_path, wording)
    assert capsys.readouterr().err == f"{tmp_path}; left out because of their ending: 1 .vsi\n"
    assert len(cells) == adapt.FEWEST_CELLS
    assert {cell.has_nucleus or cell.is_in_field for cell in cells} == {tells}


@pytest.mark.parametrize(("side", "most", "mean"), [(100, 0, 0), (300, 40, 2)])
def test_a_cell_with_its_surroundings_only_gives_the_crops_that_its_whole_field_gives(
    side: float, most: int, mean: float
) -> None:
    field, _ = render_training_field(np.random.default_rng(8), 1600, 1200)
    small = crops.small_picture(field)
    whole = [
        crops.Example(field, (x, y, side, 0.9 * side), 0, (-1,), is_in_field=True)
        for x, y in ((700, 500), (30, 20), (1580, 600.5))
    ]
    kept = [example.without_the_rest(small) for example in whole]
    assert all(example.pixels.base is None for example in kept), "a view would keep the whole field"
    assert all(max(example.pixels.shape[:2]) <= 3.3 * crops.KEPT_SIDE_PX for example in kept)
    assert [example.share for example in kept] == [example.share for example in whole]
    looks = [crops.TrainingCrops(e, 128, plain_share=1.0, normalised_share=1.0) for e in (whole, kept)]
    for number in range(30):
        pair = []
        for look in looks:
            torch.manual_seed(number)
            pair.append(look[number % 3][0].numpy().astype(int))
        apart = abs(pair[0] - pair[1])
        assert apart.max() <= most
        assert apart.mean() <= mean


def test_fields_are_not_kept_whole_and_too_many_cells_are_refused_before_the_memory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cv2.imwrite(str(tmp_path / "field.png"), np.full((1200, 1600, 3), 220, np.uint8))
    found = [Detection(Box(20 * n, 10, 40 + 20 * n, 40), "WBC", 0.9) for n in range(adapt.FEWEST_CELLS)]
    manifest = load_manifest(Path("models"))
    models: Any = SimpleNamespace(manifest=manifest, detector=SimpleNamespace(detect=lambda _pixels: found))
    wording = crops.Wording(manifest.classifier.classes, {})
    cells = adapt.find_cells(models, tmp_path, wording)
    assert sum(cell.pixels.nbytes for cell in cells) < 1600 * 1200 * 3 / 2
    monkeypatch.setattr(adapt, "MOST_BYTES", 10_000)
    with pytest.raises(CropsUnfit, match=r"60 cells up to field\.png take more than .* take fewer pictures"):
        adapt.find_cells(models, tmp_path, wording)


def test_a_crop_at_which_the_net_shouts_takes_no_steps_of_a_tuned_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    pictures = [np.ascontiguousarray(render_training_crop(rng, "lymphocyte", 128)) for _ in range(4)]
    cells = [crops.Example(picture, (64, 64, 100, 100), 0, (-1,) * 11) for picture in pictures]
    glass = crops.Example(np.full((128, 128, 3), 230, np.uint8), (64, 64, 100, 100), -1, (-1,) * 11, is_cell=False)
    base = tuning.open_base(TOP / "models", cells)
    asked: list[list[Any]] = []

    def keep(_float_file: Path, _file: Path, pictures: Any) -> None:
        asked.append(list(pictures))

    def within(_net: Any, shown: list[Any], not_shown: list[Any]) -> list[Any]:
        assert (len(shown), len(not_shown)) == (4, 1)
        return shown

    monkeypatch.setattr(tuning, "quantize_file", keep)
    monkeypatch.setattr(tuning, "within_reach", within)
    tuning.write_models(base, [*cells, glass], tmp_path / "tuned", "tuned", {})
    assert len(asked[0]) == 4
    assert load_manifest(TOP / "models").classifier.confusion is not None
    assert load_manifest(tmp_path / "tuned").classifier.confusion is None, "it was measured on the file before"
