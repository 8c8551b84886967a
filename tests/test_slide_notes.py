"""The map of a slide is made again from its notes, of which there are never more than it remembers."""

from __future__ import annotations

import json

import pytest

from agent import slide_notes
from agent.analysis import placing
from agent.counting import intake
from agent.delivery.outbox import Outbox, begin_boot, open_outbox
from agent.domain import SampleState
from tests.counting.running import Runner, count_along, make_slide_frame
from tests.proofs.scanning import simulated_world


def test_a_sample_that_nobody_ends_keeps_the_notes_of_the_newest_fields_and_goes_on_after_a_restart(
    outbox: Outbox, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "FIELDS_REMEMBERED", 6)
    monkeypatch.setattr(intake, "CELLS_NAMEABLE", 40)
    world, other = simulated_world(51, 1700, 800), tmp_path_factory.mktemp("restarted")
    count_along(outbox, world, range(1, 27))
    assert list(outbox.notes("slide/")) == [f"slide/s-1/{number:07}" for number in range(21, 27)]
    last = outbox.sample_state().next_cell_number - 1  # type: ignore[union-attr]
    assert last > 80
    numbers = sorted(int(key.rpartition("-")[2]) for key in outbox.notes("cells/"))
    assert last - 40 < numbers[0] < numbers[-1] <= last
    assert len(outbox.notes("review/")) == 3, "the gallery of the first cells"
    begin_boot(other)
    with open_outbox(other, min_free_mb=0, device="dev") as restarted:
        for numbers in (range(1, 10), range(10, 20), range(20, 27)):
            count_along(restarted, world, numbers)
        assert restarted.notes("slide/") == outbox.notes("slide/")
        assert restarted.notes("cells/") == outbox.notes("cells/")
        states = [one.sample_state() for one in (restarted, outbox)]
        assert states[0] == states[1]


def test_what_an_older_version_has_noted_of_every_field_is_read_once_and_shortened(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "FIELDS_REMEMBERED", 6)
    world = simulated_world(51, 1700, 800)
    written: dict[str, str] = {}
    for begin in range(1, 20, 6):
        count_along(outbox, world, range(begin, begin + 6)[: 20 - begin])
        written |= outbox.notes("slide/")
    without = {key: json.dumps({**json.loads(text), "before": None}) for key, text in written.items()}
    outbox.append((), notes=without)
    assert len(outbox.notes("slide/")) == 19
    monkeypatch.setattr(slide_notes, "NOTES_AT_ONCE", 5)
    Runner(outbox, sample=outbox.sample_state())
    assert outbox.notes("slide/") == {f"slide/s-1/{n:07}": written[f"slide/s-1/{n:07}"] for n in range(14, 20)}


def test_a_map_that_cannot_be_read_begins_anew_and_leaves_none_of_the_old_notes(outbox: Outbox) -> None:
    world = simulated_world(51, 1700, 800)
    count_along(outbox, world, range(1, 4))
    outbox.append((), notes={"slide/s-1/0000002": "rubbish"})
    count_along(outbox, world, range(4, 6))
    assert list(outbox.notes("slide/")) == ["slide/s-1/0000004", "slide/s-1/0000005"]


def test_a_new_sample_begins_a_new_slide_and_forgets_the_old_one(outbox: Outbox) -> None:
    world = simulated_world(51, 1700, 800)
    for sid in ("s-1", "s-2"):
        runner = Runner(outbox, sample=SampleState(sid))
        runner.give(make_slide_frame(world, 1, 60.0))
        runner.run_to_end()
        assert runner.of_kind("field")[-1]["place"]["source"] == "unknown"
        assert [key.split("/")[1] for key in outbox.notes("slide/")] == [sid]
