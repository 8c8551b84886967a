"""Models and configuration change while the agent runs: real models, real slots, real files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.config import Config, config_sha256, loads
from agent.desk import Refused
from agent.errors import ClassifierUnknown, ConfigError, ModelError
from agent.health import Health
from agent.inference.manifest import load_manifest
from agent.inference.selftest import GoldenTest
from agent.inference.slots import ModelSlots
from agent.workshop import LIVE_KEYS, SELF_TEST_AGAIN_S, SELF_TEST_EVERY_S, Work, Workshop
from tests.model_folders import SHIPPED, put_models

pytestmark = pytest.mark.skipif(
    not (SHIPPED / "manifest.json").exists(), reason="the shipped models are not in models/"
)


class Place:
    def __init__(self, folder: Path, text: str = "models: {threads: 1}") -> None:
        self.text = text
        self.health = Health()
        self.changes: list[Work] = []
        self.slots = ModelSlots(folder / "models", SHIPPED, folder / "staging")
        self.workshop = Workshop(self.read(), self.slots, self.health, self.read, self.changes.append)

    def read(self) -> Config:
        return loads(self.text, "config.yaml", environment={})


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_changed_threshold_is_in_force_after_a_reload(place: Place) -> None:
    place.text = "models: {threads: 1, min_probability: 0.99}\nsample: {stop_at_cells: 100}"
    done = place.workshop.reload()
    assert done.facts["changed"] == ["models.min_probability", "sample.stop_at_cells"]
    (work,) = place.changes
    assert work.bench.rules.min_probability == 0.99
    assert work.bench.provenance.config_sha256 == done.facts["config_sha256"] == config_sha256(place.read())
    assert place.workshop.sample_section.stop_at_cells == 100
    assert work.models is place.changes[0].models


def test_what_is_usual_is_learnt_anew_from_as_many_slides_as_are_configured_or_not_at_all(place: Place) -> None:
    assert place.workshop.relearn().facts == {"slides": 30}
    place.text = "models: {threads: 1}\ndrift: {slides: 12}"
    place.workshop.reload()
    assert place.workshop.relearn().facts == {"slides": 12}
    place.text = "models: {threads: 1}\ndrift: {enabled: false}"
    place.workshop.reload()
    with pytest.raises(Refused, match=r"drift\.enabled is false"):
        place.workshop.relearn()


def test_a_faulty_configuration_is_refused_and_the_last_good_one_stays(place: Place) -> None:
    before = place.workshop.work
    place.text = "quality: {min_focus: many}\ncolour: red"
    with pytest.raises(ConfigError, match="2 faults"):
        place.workshop.reload()
    assert place.workshop.work is before
    assert place.changes == []


def test_a_key_that_a_running_part_was_built_from_needs_a_restart_and_nothing_is_changed(place: Place) -> None:
    place.text = "models: {threads: 2, min_probability: 0.9}\nbroker: {host: other}"
    with pytest.raises(Refused, match=r"broker\.host, models\.threads: restart") as refusal:
        place.workshop.reload()
    assert refusal.value.code == "needs-restart"
    assert place.workshop.work.config.models.min_probability is None


def test_a_reload_of_the_same_changes_nothing(place: Place) -> None:
    assert place.workshop.reload().facts["changed"] == []
    assert place.changes == []


def test_every_live_key_is_one_of_the_configuration() -> None:
    plain: dict[str, Any] = Config().model_dump(mode="json")
    for key in LIVE_KEYS:
        section, _, name = key.partition(".")
        assert section in plain
        assert not name or name in plain[section]


def test_staged_models_are_tried_and_then_counted_with(place: Place, tmp_path: Path) -> None:
    put_models(tmp_path / "staging" / "next", version="7.7")
    place.workshop.stage("next")
    assert place.workshop.work.models.classifier.identity.version != "7.7"
    done = place.workshop.activate()
    assert any("7.7" in words for words in done.facts["models"])
    assert place.changes[-1].bench.provenance.classifier.version == "7.7"
    place.workshop.mark_proven()
    again = Workshop(place.read(), place.slots, place.health, place.read)
    assert again.work.models.classifier.identity.version == "7.7"
    place.workshop.roll_back()
    assert place.changes[-1].bench.provenance.classifier.version != "7.7"


def test_without_staged_models_there_is_nothing_to_activate(place: Place) -> None:
    for switch in (place.workshop.activate, place.workshop.roll_back):
        with pytest.raises(Refused) as refusal:
            switch()
        assert refusal.value.code == "no-models"


def test_models_that_can_no_longer_be_used_give_way_to_those_before_and_it_is_told(
    place: Place, tmp_path: Path
) -> None:
    put_models(tmp_path / "staging" / "next", version="7.7")
    place.workshop.stage("next")
    place.workshop.activate()
    place.workshop.mark_proven()
    file = place.slots.path("a") / place.workshop.work.models.manifest.classifier.file
    file.write_bytes(file.read_bytes()[:-5])  # the disk has lost the end
    again = Workshop(place.read(), place.slots, place.health, place.read)
    assert again.work.models.classifier.identity.version != "7.7"
    assert again.went_back is not None
    assert "slot a cannot be used" in again.went_back
    assert place.slots.active.slot == "base"


def test_that_activated_models_gave_way_is_known_over_restarts_until_others_are_activated(
    place: Place, tmp_path: Path
) -> None:
    put_models(tmp_path / "staging" / "next", version="7.7")
    place.workshop.stage("next")
    place.workshop.activate()
    assert place.workshop.fell_back is None
    (place.slots.path("a") / "golden.json").unlink()
    first, second = (Workshop(place.read(), place.slots, place.health, place.read) for _ in range(2))
    assert first.fell_back == first.went_back == second.fell_back
    assert "the models in slot a cannot be used" in str(second.fell_back)
    assert second.went_back is None, "it was the start before that went back"
    with pytest.raises(ModelError, match="no known answers"):
        second.activate()
    assert second.fell_back is not None
    second.stage("next")
    second.activate()
    assert second.fell_back is None
    assert Workshop(place.read(), place.slots, place.health, place.read).fell_back is None


def test_a_full_disk_when_models_are_proven_ends_nothing_and_it_is_noted_at_the_next_field(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_path: Path, _content: bytes) -> None:
        raise OSError(28, "No space left on device")

    put_models(tmp_path / "staging" / "next", version="7.7")
    place.workshop.stage("next")
    place.workshop.activate()
    with monkeypatch.context() as full:
        full.setattr("agent.inference.slots.write_durably", fail)
        place.workshop.mark_proven()
    assert place.slots.active.trial_starts == 0
    place.workshop.mark_proven()
    assert place.slots.active.trial_starts is None


def test_altered_models_are_not_staged_and_the_ones_in_use_stay(place: Place, tmp_path: Path) -> None:
    folder = put_models(tmp_path / "staging" / "next", "9.9")
    file = folder / place.workshop.work.models.manifest.detector.file
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ModelError, match="SHA-256"):
        place.workshop.stage("next")
    assert place.changes == []


def test_the_configured_classifier_counts_and_must_be_among_those_that_come_next(tmp_path: Path) -> None:
    name = load_manifest(SHIPPED).other_classifiers[0].name
    place = Place(tmp_path, f"models: {{threads: 1, classifier: {name}}}")
    assert place.workshop.work.bench.provenance.classifier.name == name
    assert place.workshop.self_test().is_passed
    folder = put_models(tmp_path / "staging" / "next", "7.7")
    staged = place.workshop.stage("next")
    assert name in staged.facts["classifier"]
    assert name in str(place.workshop.activate().facts["models"])
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["other_classifiers"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=f"no classifier {name}"):
        place.workshop.stage("next")
    place.workshop.roll_back()
    assert place.workshop.work.bench.provenance.classifier.name == name


def test_a_refused_folder_leaves_the_models_before_where_they_are(place: Place, tmp_path: Path) -> None:
    name = load_manifest(SHIPPED).other_classifiers[0].name
    for version in ("7.7", "8.8"):
        put_models(tmp_path / "staging" / "next", version)
        place.workshop.stage("next")
        place.workshop.activate()
    folder = put_models(tmp_path / "staging" / "next", "9.9")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["other_classifiers"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=f"no classifier {name}"):
        place.slots.stage("next", name)
    place.workshop.roll_back()
    assert place.workshop.work.models.classifier.identity.version == "7.7"


def test_a_classifier_that_the_models_in_use_have_not_is_a_fault_of_the_configuration(
    place: Place, tmp_path: Path
) -> None:
    put_models(tmp_path / "staging" / "next", "7.7")
    place.workshop.stage("next")
    place.workshop.activate()
    place.workshop.mark_proven()
    wrong = loads("models: {classifier: resnet}", "config.yaml", environment={})
    with pytest.raises(ClassifierUnknown, match="no classifier resnet, but"):
        Workshop(wrong, place.slots, place.health, place.read)
    assert place.slots.active.slot == "a"


def test_a_self_test_is_told_to_health(place: Place) -> None:
    assert place.workshop.self_test().is_passed
    told = place.health.snapshot().last_self_test
    assert told is not None
    assert told.is_passed


def without_answers(folder: Path) -> Path:
    put_models(folder, "9.9")
    (folder / "golden.json").unlink()
    return folder


def test_base_models_that_fail_the_self_test_are_opened_and_health_says_so(tmp_path: Path) -> None:
    slots = ModelSlots(tmp_path / "models", without_answers(tmp_path / "base"), tmp_path / "staging")
    health = Health()
    workshop = Workshop(Config(), slots, health, Config)
    told = health.snapshot().last_self_test
    assert told is not None
    assert not told.is_passed
    assert health.is_self_test_failed
    assert "no known answers" in told.detail
    with pytest.raises(ModelError, match=r"golden\.json: .*--make-answers"):
        workshop.self_test()


def test_models_that_fail_the_self_test_are_not_activated_and_the_ones_in_use_stay(
    place: Place, tmp_path: Path
) -> None:
    without_answers(tmp_path / "staging" / "next")
    place.workshop.stage("next")
    with pytest.raises(ModelError, match="no known answers"):
        place.workshop.activate()
    assert place.slots.active.slot == "base"
    assert place.changes == []
    assert not place.health.is_self_test_failed, "the models in use have passed theirs"


def test_activated_models_whose_answers_are_lost_give_way_at_the_next_start(place: Place, tmp_path: Path) -> None:
    put_models(tmp_path / "staging" / "next", version="7.7")
    place.workshop.stage("next")
    assert "golden fields" in place.workshop.activate().message
    place.workshop.mark_proven()
    (place.slots.path("a") / "golden.json").unlink()
    again = Workshop(place.read(), place.slots, place.health, place.read)
    assert again.went_back is not None
    assert "no known answers" in again.went_back
    assert not place.health.is_self_test_failed


def test_the_self_test_is_due_daily_and_soon_again_after_a_failure(tmp_path: Path) -> None:
    now_s = [1000.0]
    health = Health()
    slots = ModelSlots(tmp_path / "models", SHIPPED, tmp_path / "staging")
    workshop = Workshop(Config(), slots, health, Config, monotonic_s=lambda: now_s[0])
    assert workshop.due_self_test() is None
    now_s[0] += SELF_TEST_EVERY_S
    daily = workshop.due_self_test()
    assert daily is not None
    assert daily.is_passed
    assert workshop.due_self_test() is None
    golden = workshop.work.golden
    workshop.work = replace(workshop.work, golden=GoldenTest(tmp_path / "nothing"))
    now_s[0] += SELF_TEST_EVERY_S
    failed = workshop.due_self_test()
    assert failed is not None
    assert not failed.is_passed
    assert health.is_self_test_failed
    workshop.work = replace(workshop.work, golden=golden)
    now_s[0] += SELF_TEST_AGAIN_S
    again = workshop.due_self_test()
    assert again is not None
    assert again.is_passed
    assert not health.is_self_test_failed
