"""`python -m models.common.parity` passes a file that answers as its float net does, and fails one that does not."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agent.inference.manifest import load_manifest
from models.common.parity import Comparison, compare

TOP = Path(__file__).parents[2]


def parity(reference: Path, folder: Path, data: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "models.common.parity", "--float", str(reference), "--int8", str(folder)]
    return subprocess.run([*command, "--data", str(data)], cwd=TOP, capture_output=True, text=True, check=False)


def test_a_file_is_on_a_par_with_itself(data: Path) -> None:
    done = parity(TOP / "models", TOP / "models", data)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("within") == 2 + len(load_manifest(TOP / "models").classifiers)


@pytest.mark.parametrize("role", ["classifier", "detector"])
def test_a_file_whose_weights_were_spoiled_fails_the_run(role: str, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    shutil.copytree(TOP / "models", folder, ignore=shutil.ignore_patterns("*.py", "recipes", "__pycache__"))
    spoil(folder, role)
    done = parity(TOP / "models", folder, data)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ABOVE" in done.stdout


def spoil(folder: Path, role: str) -> None:
    """A third of a model's file, which is nearly all weights, becomes noughts; its manifest entry vouches for it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    file = folder / manifest[role]["file"]
    content = bytearray(file.read_bytes())
    third = len(content) // 3
    content[third : 2 * third] = bytes(third)
    file.write_bytes(content)
    manifest[role]["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["detector mAP50", "detector mAP50-95", "first accuracy", "second accuracy"])
def test_each_figure_alone_can_fail(name: str) -> None:
    before = dict.fromkeys(("detector mAP50", "detector mAP50-95", "first accuracy", "second accuracy"), 0.9)
    worse = {**before, name: 0.9 - Comparison(name, 0, 0).bound - 1e-6}
    assert [c.name for c in compare(before, worse) if not c.is_within] == [name]


def test_a_classifier_that_was_not_measured_before_cannot_pass() -> None:
    with pytest.raises(KeyError):
        compare({"first accuracy": 0.9}, {"first accuracy": 0.9, "second accuracy": 0.9})


def test_a_gain_is_no_loss() -> None:
    assert Comparison("first accuracy", 0.9, 0.99).is_within
