"""Runs side by side: equal epochs stand together, epochs that were not judged are left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.transfer import main


def write_log(folder: Path, lines: list[dict[str, float]]) -> Path:
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_equal_epochs_of_two_runs_stand_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_log(tmp_path / "scratch", [{"epoch": n, "val_pbc_accuracy": 0.1 * n} for n in (1, 2, 3)])
    judged = [{"epoch": n, "val_pbc_accuracy": 0.3 * n, "loss_teacher": 3} for n in (2, 3)]
    second = write_log(tmp_path / "taught", [{"epoch": 1}, *judged])
    monkeypatch.setattr("sys.argv", ["transfer", str(first), str(second), "--epochs", "1", "2", "3"])
    main()
    assert capsys.readouterr().out.splitlines()[:7] == [
        "| run | epochs | pbc accuracy |",
        "|---|---|---|",
        "| scratch | 1 | 0.100 |",
        "| scratch | 2 | 0.200 |",
        "| taught | 2 | 0.600 |",
        "| scratch | 3 | 0.300 |",
        "| taught | 3 | 0.900 |",
    ]


def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["transfer", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="nothing: not the folder of a training run"):
        main()
