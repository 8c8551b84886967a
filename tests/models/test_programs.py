"""A mistake of whoever starts a program is told in a line, with an exit code, and never as a traceback."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.errors import ConfigError, FrameUnreadable, ModelError
from models.common.labels import DataUnfit, read_label_file, read_rgb, read_rows
from models.common.programs import EXTRA, Unfit, require_writable, run_program
from tests.disks import mounted

TOP = Path(__file__).parents[2]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Start a program in this process: its exit code and what it said on standard error."""

    def start(module: str, *words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [module, *map(str, words)])
        monkeypatch.chdir(TOP)
        capsys.readouterr()
        with pytest.raises(SystemExit) as asked:
            runpy.run_module(module, run_name="__main__")
        assert isinstance(asked.value.code, int)
        return asked.value.code, capsys.readouterr().err

    return start


def failing(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (Unfit("a.csv: has no line"), 2, "a.csv: has no line"),
        (SystemExit("--sizes: 3 is wrong"), 2, "--sizes: 3 is wrong"),
        (ConfigError("config.yaml", ("x",)), 2, "config.yaml: 1 fault"),
        (ModelError("models: none"), 3, "models: none"),
        (FrameUnreadable("a.png", "cut off"), 4, "a.png: cut off"),
        (FileNotFoundError(2, "No such file", "runs/x.json"), 2, "runs/x.json: it is not there"),
        (
            ModuleNotFoundError("No module", name="matplotlib.figure"),
            2,
            "matplotlib.figure is not installed: this needs",
        ),
        (KeyboardInterrupt(), 130, "ended by Ctrl-C"),
    ],
)
def test_what_was_foreseen_is_told_in_a_line(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as asked:
        run_program(failing(error))
    assert asked.value.code == code
    assert capsys.readouterr().err.startswith(words)


@pytest.mark.parametrize(
    "error",
    [KeyError("a"), ValueError("b"), OSError(5, "no file is named"), ModuleNotFoundError("x", name="models.gone")],
)
def test_what_nobody_foresaw_stays_a_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_program(failing(error))


def test_an_exit_code_that_a_program_gives_itself_stays(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as asked:
        run_program(failing(SystemExit(1)))
    assert asked.value.code == 1
    assert capsys.readouterr().err == ""


NOWHERE = Path("/nowhere/at/all")


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (
            ("models.evaluate", "classifier", "--data", NOWHERE),
            2,
            f"{NOWHERE}/pbc.csv: not there; --data takes a folder",
        ),
        (("models.evaluate", "detector", "--data", NOWHERE), 2, f"{NOWHERE}/fields.csv: not there"),
        (
            ("models.evaluate", "two-stage", "--models", NOWHERE),
            3,
            f"{NOWHERE}/manifest.json: there is no model manifest",
        ),
        (("models.evaluate", "two-stage", "--classifier", "vgg"), 3, "vgg"),
        (("models.common.parity", "--float", NOWHERE), 2, f"{NOWHERE}: no float models there; models.detector.export"),
        (("models.common.parity", "--float", "models", "--data", NOWHERE), 2, f"{NOWHERE}/fields.csv: not there"),
        (("models.choose_thresholds", "--models", NOWHERE), 3, f"{NOWHERE}/manifest.json"),
        (("models.choose_thresholds", "--classifier", "vgg"), 3, "vgg"),
        (("models.robustness", "--data", NOWHERE), 2, f"{NOWHERE}/fields.csv: not there"),
        (("models.contradictions", "--data", NOWHERE), 2, f"{NOWHERE}/attributes.csv: not there"),
        (("models.classifier.locate", "--data", NOWHERE), 2, f"{NOWHERE}/pbc.csv: not there"),
        (("models.classifier.speed", "--models", NOWHERE), 3, f"{NOWHERE}/manifest.json"),
        (("models.transfer", NOWHERE), 2, f"{NOWHERE}: not the folder of a training run"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_a_wrong_folder_or_name_is_told(
    words: tuple[object, ...], code: int, told: str, ended: Callable[..., tuple[int, str]]
) -> None:
    found, error = ended(*words)
    assert (found, told in error, error.count("\n")) == (code, True, 1), error


@pytest.mark.parametrize(
    "words",
    [
        ("models.evaluate", "two-stage", "--threads", "0"),
        ("models.evaluate", "two-stage", "--threads", "-1"),
        ("models.evaluate", "two-stage", "--most-tiles", "0"),
        ("models.robustness", "--threads", "0"),
        ("models.contradictions", "--threads", "0"),
        ("models.classifier.speed", "--threads", "0"),
        ("models.common.parity", "--threads", "0"),
    ],
    ids=" ".join,
)
def test_a_number_that_the_agent_would_refuse_in_its_configuration_is_refused_in_words(
    words: tuple[str, ...], ended: Callable[..., tuple[int, str]]
) -> None:
    *_, option, number = words
    code, error = ended(*words, "--data" if words[0] != "models.classifier.speed" else "--models", NOWHERE)
    assert code == 2
    assert error.endswith(f"error: argument {option}: {number}: Input should be greater than or equal to 1\n")


def test_every_program_that_asks_for_threads_asks_in_the_same_way() -> None:
    asking = [file.name for file in (TOP / "models").rglob("*.py") if '"--threads"' in file.read_text()]
    assert asking == ["asking.py"]


def test_a_file_that_cannot_be_written_is_told_before_minutes_of_work(
    tmp_path: Path, ended: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "file").touch()
    for output, told in (
        (tmp_path, "is a folder; --output takes the name of a file"),
        (tmp_path / "file" / "boxes.json", f"cannot be made in {tmp_path}/file; give another --output"),
    ):
        found = ended("models.classifier.locate", "--data", NOWHERE, "--output", output)
        assert found == (2, f"{output}: {told}\n")


def test_what_may_be_written_is_asked_of_the_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        (disk / "there").touch()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for name, told in (("there", "cannot be overwritten"), ("new/boxes.json", f"cannot be made in {disk}")):
            with pytest.raises(Unfit, match=f"{name}: {told}; give another --output"):
                require_writable(disk / name)
    require_writable(tmp_path / "new" / "boxes.json")
    (tmp_path / "boxes.json").touch()
    require_writable(tmp_path / "boxes.json")


def test_a_float_folder_without_one_of_the_classifiers_is_told_before_anything_is_measured(
    tmp_path: Path, ended: Callable[..., tuple[int, str]]
) -> None:
    folder = tmp_path / "float"
    shutil.copytree(TOP / "models", folder, ignore=shutil.ignore_patterns("*.py", "recipes", "__pycache__"))
    manifest = json.loads((folder / "manifest.json").read_text())
    missing = manifest["other_classifiers"].pop()["name"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    code, error = ended("models.common.parity", "--float", folder, "--data", NOWHERE)
    assert (code, error) == (2, f"{folder}: has no {missing}; models.classifier.export writes it there\n")


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("models.finetune", "torch"),
        ("models.adapt", "torch"),
        ("models.detector.train", "torch"),
        ("models.classifier.export", "torch"),
        ("models.plots", "matplotlib"),
    ],
)
def test_without_the_train_extra_a_program_that_learns_or_draws_says_what_it_needs(module: str, package: str) -> None:
    blocked = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = ['x', '--help']"
    command = f"{blocked}; runpy.run_module({module!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", command], cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"{package} is not installed: this needs the extra train: pip install -e '.[train]', see models/README.md\n"
    )


def test_each_program_that_imports_pytorch_or_matplotlib_asks_for_it_first() -> None:
    """Told by its imports: a new program that learns or draws must not begin with a traceback."""
    programs = [file for file in (TOP / "models").rglob("*.py") if "run_program(main" in file.read_text()]
    asked = 0
    for file in programs:
        text = file.read_text()
        learns = "\nimport torch\n" in text or ("CONVERTER" in text and file.name != "programs.py")
        draws = "\nimport matplotlib" in text or "\nfrom matplotlib" in text
        for needed, words in ((learns, "needs_torch"), (draws, "needs_matplotlib")):
            assert not needed or f"import {words}  # isort: skip" in text, file
            asked += needed
    assert asked >= 10


def test_the_converter_is_asked_for_before_minutes_of_learning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_quantizer", None)
    with pytest.raises(SystemExit) as asked:
        run_program(lambda: pytest.fail("it began"), ("ai_edge_quantizer",))
    assert asked.value.code == 2
    assert capsys.readouterr().err.startswith("ai_edge_quantizer is not installed")
    assert "ai_edge_quantizer" in EXTRA


@pytest.mark.parametrize("words", [(), ("--hepl",)])
def test_golden_fields_are_drawn_only_where_they_are_asked_for(
    words: tuple[str, ...], ended: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "write_bytes", lambda *_: pytest.fail("it wrote"))
    code, error = ended("models.draw_golden", *words)
    assert code == 2
    assert "--output" in error


def test_golden_fields_go_into_the_folder_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["draw_golden", "--output", str(tmp_path / "fields")])
    runpy.run_module("models.draw_golden", run_name="__main__")
    assert {file.stem for file in (tmp_path / "fields").iterdir()} == {"a", "b", "c", "empty"}


# ------------------------------------------------------------------------------------------------------ labelled data


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("path,class\na.png,ig\n", "has no column split"),
        ("path,class,split\na.png,ig\n", "line 2 has not as many values"),
        ("path,class,split\na.png,ig,test,MY,x\n", "line 2 has not as many values"),
        ("", "has no column path, class, split"),
    ],
)
def test_a_table_that_is_not_as_it_should_be_is_told_with_its_name(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "pbc.csv").write_text(text)
    with pytest.raises(DataUnfit, match=rf"pbc\.csv: {told}"):
        read_rows(tmp_path, "pbc.csv")


def test_a_table_from_a_spreadsheet_is_read(tmp_path: Path) -> None:
    (tmp_path / "pbc.csv").write_bytes(b"\xef\xbb\xbfpath,class,split\r\na.png,ig,test\r\n")
    assert read_rows(tmp_path, "pbc.csv") == [{"path": "a.png", "class": "ig", "split": "test"}]


@pytest.mark.parametrize("text", ["0 0.5 0.5 0.1\n", "WBC 0.5 0.5 0.1 0.1\n", "0 0.5 0.5 0.1 0.1 0.9\n"])
def test_a_label_file_with_other_lines_is_told_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataUnfit, match=r"a\.txt: each line must be five numbers"):
        read_label_file(tmp_path / "a.txt", 100, 100)


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    for name in ("a.png", "gone.png"):
        with pytest.raises(FrameUnreadable, match=name):
            read_rgb(tmp_path / name)


def write_cell(data: Path, class_name: str, content: bytes) -> None:
    (data / "pbc.csv").write_text(f"path,class,split\nmine.png,{class_name},test\n")
    (data / "mine.png").write_bytes(content)


def test_one_picture_that_cannot_be_read_ends_an_evaluation_with_its_name(
    tmp_path: Path, ended: Callable[..., tuple[int, str]]
) -> None:
    write_cell(tmp_path, "ig", b"no picture")
    code, error = ended("models.evaluate", "classifier", "--data", tmp_path)
    assert code == 4
    assert error.startswith(f"{tmp_path}/mine.png: ")


@pytest.mark.parametrize(
    ("class_name", "split", "told"),
    [
        ("neutrofil", "test", "pbc.csv: neutrofil is no class of the model: basophil, "),
        ("ig", "val", "has nothing of split val that this measures"),
    ],
)
def test_pictures_that_give_no_figures_are_told(
    class_name: str, split: str, told: str, tmp_path: Path, ended: Callable[..., tuple[int, str]]
) -> None:
    write_cell(tmp_path, class_name, b"")
    code, error = ended("models.evaluate", "classifier", "--data", tmp_path, "--split", split)
    assert code == 2
    assert told in error


def test_an_attribute_that_the_model_does_not_tell_is_named(
    tmp_path: Path, ended: Callable[..., tuple[int, str]]
) -> None:
    write_cell(tmp_path, "ig", b"")
    (tmp_path / "attributes.csv").write_text("path,colour_of_hair\nmine.png,grey\n")
    code, error = ended("models.evaluate", "classifier", "--data", tmp_path)
    assert code == 2
    assert error.startswith("attributes.csv: colour_of_hair is no attribute of the model: ")


def test_a_laboratorys_own_pictures_need_names_only(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = next((data / "pbc" / "neutrophil").iterdir())
    write_cell(tmp_path, "neutrophil", source.read_bytes())
    monkeypatch.chdir(TOP)
    monkeypatch.setattr(sys, "argv", ["evaluate", "classifier", "--data", str(tmp_path), "--json"])
    runpy.run_module("models.evaluate", run_name="__main__")
    figures = json.loads(capsys.readouterr().out)
    assert (figures["n"], figures["morphology"]) == (1, None)


def test_the_help_says_how_a_folder_of_ones_own_looks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module("models.evaluate", run_name="__main__")
    told = capsys.readouterr().out
    assert "path,class,split" in told
    assert "pictures of one's own pbc.csv is enough" in told


def test_a_locator_that_was_not_run_is_asked_for(tmp_path: Path) -> None:
    from models.classifier.locate import read_boxes

    assert read_boxes(None) == {}
    with pytest.raises(Unfit, match=r"boxes\.json: not there; python -m models\.classifier\.locate makes it"):
        read_boxes(tmp_path / "boxes.json")
