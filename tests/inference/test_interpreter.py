"""The door to TFLite: what it needs of the computer, and what it lets through."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from agent.config import ModelsSection
from agent.inference.interpreter import _without_native_notes
from agent.inference.models import open_models


def test_models_open_where_no_file_can_be_put_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full /tmp says nothing about a model, and a service that ends with "models" is not started again."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "of-a-full-disk"))
    assert open_models(ModelsSection()).runtime


def test_of_what_is_said_meanwhile_all_but_the_runtimes_notes_is_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    with _without_native_notes():
        os.write(2, b"INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\nERROR: no such operator\n")
        os.write(2, b"2026-11-30 INFO agent: broker connected\n")
        assert capfd.readouterr().err == ""
    assert capfd.readouterr().err == "ERROR: no such operator\n2026-11-30 INFO agent: broker connected\n"
