"""The review list on a real disk and outbox, behind a real pipeline and desk; the models are doubles."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.analysis.agreement import Answer
from agent.analysis.differential import Rules
from agent.camera.grabber import FrameQueue
from agent.cli import main
from agent.config import ReviewSection, SampleSection
from agent.counting.thread import Pipeline
from agent.delivery.outbox import Outbox
from agent.delivery.topics import Topics
from agent.domain import Classification, SampleState
from agent.health import Health
from agent.pictures import PictureStore
from agent.report.device import read_device
from agent.report.document import compose
from agent.reporting import Reporter
from agent.review import CropStore, answer_note, read_answers, read_kept_cells
from agent.samples import begin_sample, close_sample
from tests.counting.running import AT, KINDS, Place
from tests.frames import RED, WHITE, make_bench, make_models

JPEG = b"\xff\xd8" + b"x" * 996 + b"\xff\xd9"


def count_two_fields(
    outbox: Outbox, answer: Classification, whole_fields: PictureStore | None = None, **section: Any
) -> Place:
    """A finished sample of two fields, each with a white cell that the model answers so, and a red one."""
    models = make_models((WHITE, RED), lambda _crop: answer)
    bench = replace(make_bench(models), review=ReviewSection(**{"gallery": 0, **section}))
    crops = CropStore(outbox.path.parent / "crops")
    place = Place(outbox, bench=replace(bench, counting=Rules(KINDS)), crops=crops, whole_fields=whole_fields)
    place.do("start", "a", sample="s-1")
    place.give(1, 2)
    place.run_a_while(lambda: place.pipeline.sample.fields == 2)
    place.do("stop", "b")
    place.pipeline._finish_when_drained(None)
    return place


def name(first: float, second: float) -> Classification:
    return Classification("round", first, {"round": first, "lobed": second})


def kept(outbox: Outbox) -> list[Any]:
    return read_kept_cells(outbox.notes("review/"), outbox.notes("answers/"), CropStore(outbox.path.parent / "crops"))


def test_a_cell_that_the_model_is_unsure_of_waits_with_its_picture(outbox: Outbox) -> None:
    count_two_fields(outbox, name(0.55, 0.45))
    cells = kept(outbox)
    assert [(cell.cell_id, cell.class_name, cell.reason, cell.is_open) for cell in cells] == [
        ("s-1-1", "round", "low-margin", True),
        ("s-1-3", "round", "low-margin", True),
    ]
    assert all(cell.jpeg.startswith(b"\xff\xd8") for cell in cells)


def test_an_unidentified_cell_waits_with_the_models_best_guess(outbox: Outbox) -> None:
    count_two_fields(outbox, name(0.45, 0.1))
    assert {(cell.class_name, cell.guess, cell.reason) for cell in kept(outbox)} == {
        ("unidentified", "round", "unidentified")
    }


def test_a_sure_cell_does_not_wait_and_the_first_of_a_class_are_kept_for_the_gallery(outbox: Outbox) -> None:
    count_two_fields(outbox, name(0.9, 0.1), gallery=1)
    assert [(cell.cell_id, cell.reason, cell.is_open) for cell in kept(outbox)] == [("s-1-1", "gallery", False)]


def test_switched_off_nothing_is_kept(outbox: Outbox) -> None:
    count_two_fields(outbox, name(0.55, 0.45), enabled=False, gallery=9)
    assert kept(outbox) == []
    assert not (outbox.path.parent / "crops").exists()


def amend(place: Place, transaction: str, cell: str, to: str, by: str = "mtl-7") -> Any:
    return place.do("amend", transaction, **{"sample": "s-1", "cell_id": cell, "class": to, "by": by})


def test_an_answer_closes_the_entry_amends_the_report_and_overwrites_no_other_answer(outbox: Outbox) -> None:
    place = count_two_fields(outbox, name(0.55, 0.45))
    amend(place, "t-1", "s-1-1", "lobed")
    amend(place, "t-2", "s-1-1", "round", by="mtl-8")
    first, other = kept(outbox)
    assert [(a.model, a.person, a.by) for a in first.answers] == [
        ("round", "lobed", "mtl-7"),
        ("round", "round", "mtl-8"),
    ]
    assert (first.is_open, other.is_open) == (False, True)
    assert [message["status"] for message in place.messages("differential")] == ["final", "amended", "amended"]


def test_a_report_does_not_take_two_answers_to_one_cell_for_two_cells(outbox: Outbox) -> None:
    place = count_two_fields(outbox, name(0.55, 0.45))
    amend(place, "t-1", "s-1-1", "lobed")
    assert "A person has changed the name of a cell once." in remarks(outbox)
    amend(place, "t-2", "s-1-1", "round")
    assert "A person has changed the name of a cell 2 times." in remarks(outbox)


def remarks(outbox: Outbox) -> list[str]:
    return list(compose(read_device(outbox, Topics("site", "dev"), "s-1"), AT)["remarks"])


def test_that_a_person_agrees_is_noted_and_audited_and_changes_no_report(outbox: Outbox) -> None:
    place = count_two_fields(outbox, name(0.55, 0.45))
    assert amend(place, "t-1", "s-1-1", "round")["status"] == "ok"
    assert len(place.messages("differential")) == 1
    entry = place.messages("audit")[-1]
    assert {key: entry["detail"][key] for key in ("cell_id", "from", "to")} == {
        "cell_id": "s-1-1",
        "from": "round",
        "to": "round",
    }
    record = read_device(outbox, Topics("site", "dev"), "s-1")
    assert [(answer.model, answer.person) for answer in record.answers] == [("round", "round")]


def test_a_refused_answer_leaves_the_cell_waiting(outbox: Outbox) -> None:
    place = count_two_fields(outbox, name(0.55, 0.45))
    assert amend(place, "t-1", "s-1-1", "unicorn")["status"] == "refused"
    assert all(cell.is_open for cell in kept(outbox))


def test_an_answer_to_a_cell_of_an_earlier_run_of_a_named_sample_changes_no_count_of_this_run(outbox: Outbox) -> None:
    """A folder that is read once more under the `sample.id` of the configuration."""
    ended = count_two_fields(outbox, name(0.55, 0.45)).pipeline
    close_sample(outbox, ended.sample, "s-1")
    section, reporter = SampleSection(id="s-1"), Reporter(Topics("site", "dev"), Rules(KINDS), make_bench().provenance)
    again, _ = begin_sample(outbox, section, AT, reporter, takes_all_anew=True)
    place = Place(outbox, again, replace(make_bench(), counting=Rules(KINDS)))
    place.give(3)
    place.run_a_while(lambda: place.pipeline.sample.fields == 1)
    amend(place, "t-1", "s-1-1", "lobed")
    assert place.pipeline.sample.counts == {"round": 1, "red": 1}
    assert place.replies[-1]["code"] == "unknown-cell"
    assert kept(outbox) == []
    assert amend(place, "t-2", "s-1-5", "lobed")["status"] == "ok"


def test_what_a_person_has_said_outlasts_the_next_run_of_a_named_sample_with_its_picture(outbox: Outbox) -> None:
    """A computer that was switched off and on reads its folder again: the crops are not exported yet."""
    place = count_two_fields(outbox, name(0.55, 0.45))
    amend(place, "t-1", "s-1-1", "lobed")
    (before,) = [cell for cell in kept(outbox) if cell.answers]
    close_sample(outbox, place.pipeline.sample, "s-1")
    reporter = Reporter(Topics("site", "dev"), Rules(KINDS), make_bench().provenance)
    begin_sample(outbox, SampleSection(id="s-1"), AT, reporter, takes_all_anew=True)
    assert kept(outbox) == [before]
    assert before.jpeg


def test_what_a_person_has_said_of_a_sample_that_is_thrown_over_can_be_exported_until_the_next_begins(
    outbox: Outbox,
) -> None:
    bench = replace(make_bench(), counting=Rules(KINDS), review=ReviewSection(max_margin=1.0))
    place = Place(outbox, bench=bench)
    place.do("start", "a", sample="s-1")
    place.give(1)
    place.run_a_while(lambda: place.pipeline.sample.fields == 1)
    amend(place, "t-1", "s-1-1", "lobed")
    before = kept(outbox)
    place.do("stop", "b", abort=True)
    assert kept(outbox) == before
    assert before[0].answers
    place.do("start", "c", sample="s-2")
    assert kept(outbox) == []


def test_no_cell_of_a_sample_that_was_thrown_over_waits_for_a_person(outbox: Outbox) -> None:
    bench = replace(make_bench(), counting=Rules(KINDS), review=ReviewSection(max_margin=1.0))
    place = Place(outbox, bench=bench)
    place.do("start", "a", sample="s-1")
    place.give(1)
    place.run_a_while(lambda: place.pipeline.sample.fields == 1)
    assert [cell.is_open for cell in kept(outbox)] == [True]
    place.do("stop", "b", abort=True)
    assert kept(outbox) == []
    assert outbox.notes("cells/") == {}


def test_the_list_of_a_sample_goes_with_the_sample(outbox: Outbox) -> None:
    place = count_two_fields(outbox, name(0.55, 0.45))
    amend(place, "t-1", "s-1-1", "lobed")
    for number in range(2, 19):
        place.do("start", f"start-{number}", sample=f"s-{number}")
        place.do("stop", f"stop-{number}")
        place.pipeline._finish_when_drained(None)
    assert kept(outbox) == []


def test_a_picture_that_was_torn_by_a_power_cut_is_not_here(tmp_path: Path) -> None:
    crops = CropStore(tmp_path)
    crops.put("s-1", "s-1-1", JPEG)
    crops.path("s-1", "s-1-2").write_bytes(JPEG[:500])
    assert crops.read("s-1", "s-1-1") == JPEG
    assert crops.read("s-1", "s-1-2") == crops.read("s-1", "s-1-3") == b""


def test_for_room_the_oldest_answered_pictures_go_first_then_the_oldest_that_wait(tmp_path: Path) -> None:
    crops = CropStore(tmp_path)
    for number in range(1, 7):
        crops.put("s-1", f"s-1-{number}", JPEG)
        os.utime(crops.path("s-1", f"s-1-{number}"), (number, number))
    done = {f"s-1-{number}": number in (3, 5) for number in range(1, 7)}

    def left() -> list[int]:
        return [number for number in range(1, 7) if crops.read("s-1", f"s-1-{number}")]

    assert crops.make_room(6000, done) == 0
    crops.make_room(5600, done)
    assert left() == [1, 2, 4, 5, 6]
    crops.make_room(3500, done)
    assert left() == [2, 4, 6]
    assert crops.size_bytes() == 3000


def test_on_a_short_disk_all_pictures_go_before_a_result_waits(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    place = count_two_fields(outbox, name(0.55, 0.45), PictureStore(outbox.path.parent / "pictures", 10**6))
    folders = [outbox.path.parent / "pictures", outbox.path.parent / "crops" / "s-1"]
    seen: list[tuple[int, ...]] = []

    def free_bytes(_path: Path) -> int:
        seen.append(tuple(len(list(folder.iterdir())) for folder in folders))
        return 0 if sum(seen[-1]) else 2**30

    monkeypatch.setattr("agent.delivery.outbox.room.disk_free_bytes", free_bytes)
    place.do("start", "c", sample="s-2")
    assert list(dict.fromkeys(seen)) == [(2, 2), (1, 2), (0, 2), (0, 0)]
    assert len(kept(outbox)) > 0  # the entries stay
    assert outbox.dropped() == {}


def test_pictures_of_forgotten_samples_go(tmp_path: Path) -> None:
    crops = CropStore(tmp_path)
    for sid in ("s-1", "s-2"):
        crops.put(sid, f"{sid}-1", JPEG)
    crops.keep_only({"s-2"})
    assert (crops.read("s-1", "s-1-1"), crops.read("s-2", "s-2-1")) == (b"", JPEG)


def test_a_disk_that_takes_no_picture_does_not_stop_the_counting(tmp_path: Path) -> None:
    (tmp_path / "crops").write_text("a file where the folder should be")
    CropStore(tmp_path / "crops").put("s-1", "s-1-1", JPEG)


def test_an_answer_keeps_the_models_first_name() -> None:
    note = answer_note(None, Answer("c", "round", "lobed", "a"))
    answers = read_answers(answer_note(note, Answer("c", "lobed", "young", "b")))
    assert [(answer.model, answer.person) for answer in answers] == [("round", "lobed"), ("round", "young")]


def test_after_a_restart_an_answered_cell_of_an_open_slide_stands_still(outbox: Outbox) -> None:
    """A better view of a cell that a person has named must not count it under its old class once more."""
    bench = make_bench(make_models((WHITE,), lambda _crop: name(0.55, 0.45)))
    place = Place(outbox, bench=replace(bench, counting=Rules(KINDS)))
    place.do("start", "a", sample="s-1")
    place.give(1)
    place.run_a_while(lambda: place.pipeline.sample.fields == 1)
    assert amend(place, "t-1", "s-1-1", "lobed")["status"] == "ok"
    assert place.pipeline._count.slide.map._merit(1) == float("inf")
    again = Pipeline(
        frames=FrameQueue(1),
        outbox=outbox,
        bench=bench,
        sample=outbox.sample_state() or SampleState("x"),
        health=Health(),
    )
    assert again._count.slide.map._merit(1) == float("inf")


# --------------------------------------------------------------------------------------------------- the commands


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0)


def make_config(folder: Path) -> str:
    file = folder / "config.yaml"
    file.write_text(f"site: site\ndevice: dev\noutbox: {{folder: {folder}}}\n")
    return str(file)


def test_the_commands_list_show_and_compare(outbox: Outbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = count_two_fields(outbox, name(0.55, 0.45))
    amend(place, "t-1", "s-1-1", "lobed")
    config = make_config(tmp_path)
    assert run("review", "list", "--config", config) == 0
    listed = capsys.readouterr().out
    assert "s-1-3" in listed
    assert "s-1-1 " not in listed
    assert "1 cells wait" in listed
    assert run("review", "list", "s-1", "--all", "--config", config) == 0
    assert "lobed by mtl-7" in capsys.readouterr().out
    assert run("review", "show", "s-1-3", "--config", config) == 0
    assert Path(json.loads(capsys.readouterr().out)["picture"]).is_file()
    assert run("review", "agreement", "--config", config) == 0
    assert "agreed 0 of 1" in capsys.readouterr().out
    assert run("review", "show", "s-1-99", "--config", config) == 1
    assert run("review", "answer", "s-1-3", "lobed", "--config", config) == 2
    assert run("review", "show", "--config", config) == 2


def exported(target: Path) -> list[str]:
    return sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())


def test_answered_crops_are_exported_in_class_folders(
    outbox: Outbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = count_two_fields(outbox, name(0.55, 0.45))
    target = tmp_path / "crops-for-training"
    assert run("review", "export", str(target), "--config", make_config(tmp_path)) == 1
    assert "0 crops. `review answer` names cells first." in capsys.readouterr().out
    amend(place, "t-1", "s-1-1", "lobed")
    amend(place, "t-2", "s-1-3", "artefact")
    assert run("review", "export", str(target), "--config", make_config(tmp_path)) == 0
    assert exported(target) == ["lobed/dev-s-1-1.jpg", "no-cell/dev-s-1-3.jpg"]
    assert "2 crops" in capsys.readouterr().out
    amend(place, "t-3", "s-1-1", "unidentified")
    other = tmp_path / "other"
    assert run("review", "export", str(other), "--config", make_config(tmp_path)) == 0
    assert "a person could not name it either" in capsys.readouterr().out


def test_a_cell_answered_anew_leaves_the_folder_of_the_answer_before(
    outbox: Outbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = count_two_fields(outbox, name(0.55, 0.45))
    target = tmp_path / "shared"
    export = ("review", "export", str(target), "--config", make_config(tmp_path))
    amend(place, "t-1", "s-1-1", "lobed")
    amend(place, "t-2", "s-1-3", "round")
    assert run(*export) == 0
    amend(place, "t-3", "s-1-1", "artefact")
    assert run(*export) == 0
    assert exported(target) == ["no-cell/dev-s-1-1.jpg", "round/dev-s-1-3.jpg"]
    assert "1  answered anew" in capsys.readouterr().out

    # Of a picture that has left the device the exported one is taken; what nobody can name stands nowhere.
    crop = (target / "no-cell/dev-s-1-1.jpg").read_bytes()
    CropStore(tmp_path / "crops").path("s-1", "s-1-1").unlink()
    amend(place, "t-4", "s-1-1", "lobed")
    amend(place, "t-5", "s-1-3", "unidentified")
    assert run(*export) == 0
    assert exported(target) == ["lobed/dev-s-1-1.jpg"]
    assert (target / "lobed/dev-s-1-1.jpg").read_bytes() == crop


def test_devices_share_a_folder_and_what_an_older_version_exported_is_not_there_twice(
    outbox: Outbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = count_two_fields(outbox, name(0.55, 0.45))
    amend(place, "t-1", "s-1-1", "lobed")
    amend(place, "t-2", "s-1-3", "lobed")
    target = tmp_path / "shared"
    for file, content in {
        "lobed/other-s-1-1.jpg": JPEG,
        "lobed/s-1-1.jpg": JPEG,  # of another device, or taken from here: nobody knows
        "round/s-1-3.jpg": CropStore(tmp_path / "crops").read("s-1", "s-1-3"),
    }.items():
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        (target / file).write_bytes(content)
    assert run("review", "export", str(target), "--config", make_config(tmp_path)) == 0
    assert exported(target) == [f"lobed/{name}.jpg" for name in ("dev-s-1-1", "dev-s-1-3", "other-s-1-1", "s-1-1")]
    assert (target / "lobed/other-s-1-1.jpg").read_bytes() == JPEG
    assert f"1  named as an older version did, perhaps of another device; stays in {target}/lobed" in (
        capsys.readouterr().out
    )
