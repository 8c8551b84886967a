"""Models are switched whole or not at all, whatever is staged and wherever the power goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from agent.errors import ModelError
from agent.inference.slots import ACTIVE_NAME, Active, ModelSlots, NothingToSwitchTo
from tests.model_folders import SHIPPED, put_models

pytestmark = pytest.mark.skipif(
    not (SHIPPED / "manifest.json").exists(), reason="the shipped models are not in models/"
)


@pytest.fixture
def slots(tmp_path: Path) -> ModelSlots:
    put_models(tmp_path / "staging" / "next", "9.9")
    return ModelSlots(tmp_path / "models", SHIPPED, tmp_path / "staging")


def take(_path: Path) -> None:
    """Models that can be used."""


def refuse(_path: Path) -> None:
    raise ModelError("self-test: no")


def test_nothing_was_ever_activated(slots: ModelSlots) -> None:
    assert slots.active == Active("base", None, None)
    assert slots.begin() == (Active("base"), None)
    assert slots.path("base") == SHIPPED
    with pytest.raises(NothingToSwitchTo, match="stage some first"):
        slots.switch(take)
    with pytest.raises(NothingToSwitchTo, match="nothing was ever activated"):
        slots.switch(take, is_rollback=True)


def test_staged_models_are_copied_activated_and_rolled_back(slots: ModelSlots) -> None:
    assert slots.stage("next").classifier.version == "9.9"
    tried: list[Path] = []
    assert slots.switch(tried.append) == Active("a", "base", 0)
    assert tried == [slots.path("a")]
    assert slots.active.slot == "a"
    assert slots.switch(take, is_rollback=True) == Active("base", "a", None)


def test_all_classifiers_of_a_folder_are_staged_with_their_answers(slots: ModelSlots, tmp_path: Path) -> None:
    folder = tmp_path / "staging" / "next"
    manifest = json.loads((folder / "manifest.json").read_text())
    another = {**manifest["classifier"], "name": "another", "file": "classifier/another.tflite"}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "other_classifiers": [another]}))
    shutil.copyfile(folder / manifest["classifier"]["file"], folder / another["file"])
    (folder / "golden-another.json").write_text("{}")
    slots.stage("next")
    staged = slots.path("a")
    assert (staged / another["file"]).read_bytes() == (folder / another["file"]).read_bytes()
    assert (staged / "golden-another.json").read_text() == "{}"

    (folder / another["file"]).write_bytes(b"half")
    with pytest.raises(ModelError, match=r"another\.tflite: refused"):
        slots.stage("next")


def test_the_slot_in_use_is_never_written_to(slots: ModelSlots) -> None:
    slots.stage("next")
    slots.switch(take)
    before = (slots.path("a") / "manifest.json").stat()
    slots.stage("next")
    assert (slots.path("a") / "manifest.json").stat() == before
    assert slots.switch(take) == Active("b", "a", 0)
    slots.stage("next")
    assert slots.switch(take) == Active("a", "b", 0)


def test_models_that_fail_their_trial_are_not_taken_into_use(slots: ModelSlots) -> None:
    slots.stage("next")
    with pytest.raises(ModelError, match="self-test"):
        slots.switch(refuse)
    assert slots.active == Active("base")


@pytest.mark.parametrize("fault", ["altered", "missing", "no manifest", "outside", "absolute"])
def test_what_is_not_what_its_manifest_says_is_not_staged(slots: ModelSlots, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "staging" / "next"
    manifest = json.loads((folder / "manifest.json").read_text())
    file = folder / manifest["classifier"]["file"]
    if fault == "altered":
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    elif fault == "missing":
        file.unlink()
    elif fault == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        manifest["classifier"]["file"] = "../../evil.tflite" if fault == "outside" else str(tmp_path / "evil.tflite")
        shutil.copyfile(file, tmp_path / "evil.tflite")
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError):
        slots.stage("next")
    assert not (tmp_path / "models" / "a").exists()
    assert slots.active == Active("base")


def test_a_folder_that_is_not_there_is_told(slots: ModelSlots) -> None:
    with pytest.raises(ModelError, match="no model manifest"):
        slots.stage("other")


def test_models_on_trial_that_never_count_a_field_give_way_at_the_third_start(slots: ModelSlots) -> None:
    slots.stage("next")
    slots.switch(take)
    assert slots.begin() == (Active("a", "base", 0), None)
    assert slots.begin() == (Active("a", "base", 1), None)
    active, words = slots.begin()
    assert active == Active("base", fell_back=words)
    assert words is not None
    assert "slot a did not count a field in 2 starts" in words
    assert slots.begin() == (Active("base", fell_back=words), None)
    slots.switch(take)
    assert slots.active == Active("a", "base", 0), "the reason is kept until the next switch"


def test_models_that_were_staged_over_the_ones_before_are_not_gone_back_to_untried(slots: ModelSlots) -> None:
    for _ in range(2):
        slots.stage("next")
        slots.switch(take)
    assert slots.active == Active("b", "a", 0)
    slots.stage("next")
    assert slots.active == Active("b", "base", 0)
    assert slots.go_back("slot b cannot be used").slot == "base"


def test_models_that_have_counted_a_field_stay(slots: ModelSlots) -> None:
    slots.stage("next")
    slots.switch(take)
    slots.begin()
    slots.mark_proven()
    for _ in range(5):
        assert slots.begin() == (Active("a", "base", None), None)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"slot":"x","before":null,"trial_starts":0}', '{"slot":"a","before":1,"trial_starts":"z"}'],
)
def test_a_note_that_cannot_be_read_means_the_base_models(slots: ModelSlots, tmp_path: Path, text: str) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / ACTIVE_NAME).write_text(text)
    assert slots.active == Active("base")
    active, words = slots.begin()
    assert active == Active("base")
    assert words == f"{slots.fault}; the configured ones are in use"
    assert "is damaged" in words


def test_a_note_of_a_version_that_did_not_note_why_it_fell_back_is_read(slots: ModelSlots, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / ACTIVE_NAME).write_text('{"slot": "b", "before": "a", "trial_starts": 1}')
    assert slots.active == Active("b", "a", 1)
    assert slots.fault is None


def test_a_copy_that_was_cut_off_is_begun_anew(slots: ModelSlots, tmp_path: Path) -> None:
    half = tmp_path / "models" / "a.new" / "classifier"
    half.mkdir(parents=True)
    (half / "half.tflite").write_bytes(b"half")
    slots.stage("next")
    assert not (tmp_path / "models" / "a" / "classifier" / "half.tflite").exists()
    assert not (tmp_path / "models" / "a.new").exists()
