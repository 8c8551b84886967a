"""Commands are stored as a whole, once, with their audit entry, and answered whatever the outbox does."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

from agent.analysis.differential import Rules
from agent.analysis.duplicates import map_from_traces
from agent.delivery.audit import verify
from agent.delivery.outbox import Outbox, begin_boot, open_outbox
from agent.desk import NO_SAMPLE_YET
from agent.domain import SampleState
from agent.pipeline import NO_SAMPLE
from tests.counting.running import BASE, KINDS, FullOutbox, Place, wait_until
from tests.frames import WHITE, make_bench, make_models


def test_the_same_transaction_is_not_done_again_and_gets_the_same_answer(outbox: Outbox) -> None:
    place = Place(outbox)
    first = place.do("start", "t-1", sample="s-1")
    again = place.do("start", "t-1", sample="s-1")
    assert again["repeated"]
    assert {**again, "at": first["at"], "repeated": False} == first
    assert len(place.messages("audit")) == 1
    assert place.do("stop", "t-1")["code"] == "transaction-reused"


def test_a_transaction_is_remembered_over_a_restart(tmp_path: Path) -> None:
    for _ in range(2):
        begin_boot(tmp_path)
        with open_outbox(tmp_path, min_free_mb=0, device="dev") as outbox:
            reply = Place(outbox, outbox.sample_state() or NO_SAMPLE_YET).do("start", "t-1", sample="s-1")
    assert (reply["status"], reply["repeated"]) == ("ok", True)


def test_every_command_that_does_something_is_in_the_chain_and_the_chain_goes_on_over_restarts(tmp_path: Path) -> None:
    for boot in (1, 2):
        begin_boot(tmp_path)
        with open_outbox(tmp_path, min_free_mb=0, device="dev") as outbox:
            place = Place(outbox, outbox.sample_state() or NO_SAMPLE_YET)
            place.do("ping", f"p-{boot}")
            place.do("start", f"a-{boot}", sample=f"s-{boot}", by="tech-1")
            place.do("stop", f"b-{boot}")
            place.pipeline._finish_when_drained(None)
            place.do("selftest", f"c-{boot}")
            entries = place.messages("audit")
    assert [entry["action"] for entry in entries] == ["cmd.start", "cmd.stop", "cmd.selftest"] * 2
    assert entries[0]["by"] == "tech-1"
    assert verify(json.dumps(entry) for entry in entries).is_sound


def test_a_command_is_done_wholly_or_not_at_all(outbox: Outbox) -> None:
    full = FullOutbox(outbox)
    full.is_full = True
    place = Place(full)  # type: ignore[arg-type]
    reply = place.do("start", "t-1", sample="s-1")
    assert (reply["status"], reply["code"]) == ("failed", "outbox-stopped")
    assert place.phase == "idle"
    full.is_full = False
    assert place.do("start", "t-1", sample="s-1")["status"] == "ok"
    assert [entry["n"] for entry in place.messages("audit")] == [1]


def test_what_has_changed_the_configuration_is_recorded_as_soon_as_the_disk_takes_it(outbox: Outbox) -> None:
    full = FullOutbox(outbox)
    place = Place(full)  # type: ignore[arg-type]
    place.send("reload", "t-1")
    place.pipeline.start()
    try:
        wait_until(lambda: full.refused > 3)
        assert place.health.snapshot().outbox == "stopped"
        assert place.replies == []
        full.is_full = False
        wait_until(lambda: bool(place.replies))
    finally:
        full.is_full = False
        assert place.pipeline.stop(5)
    assert place.replies[0]["status"] == "ok"
    assert place.health.snapshot().outbox == "ok"
    assert [entry["action"] for entry in place.messages("audit")] == ["cmd.reload"]


def test_what_was_done_and_cannot_be_recorded_is_not_called_undone(outbox: Outbox) -> None:
    full = FullOutbox(outbox)
    place = Place(full)  # type: ignore[arg-type]
    place.send("reload", "t-1")
    place.pipeline.start()
    wait_until(lambda: full.refused > 3)
    assert place.pipeline.stop(5)
    (reply,) = place.replies
    assert (reply["status"], reply["code"]) == ("failed", "not-recorded")
    assert "it was done" in reply["message"]


def test_while_a_frame_waits_for_the_disk_commands_are_answered_at_once(outbox: Outbox) -> None:
    full = FullOutbox(outbox)
    full.is_full = False
    place = Place(full, replace(NO_SAMPLE_YET, sid="s-1", phase="running"))  # type: ignore[arg-type]
    full.is_full = True
    place.give(1)
    place.pipeline.start()
    try:
        deadline_s = time.monotonic() + 10
        while full.refused < 3 and time.monotonic() < deadline_s:
            time.sleep(0.005)
        place.send("stop", "t-1")
        place.send("ping", "t-2")
        while len(place.replies) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.005)
        full.is_full = False
        while place.pipeline.sample.fields == 0 and time.monotonic() < deadline_s:
            time.sleep(0.005)
    finally:
        full.is_full = False
        assert place.pipeline.stop(5)
    assert [reply["code"] for reply in place.replies] == ["outbox-stopped", "ok"]
    assert place.pipeline.sample.fields == 1


def test_a_sample_can_be_stopped_and_the_next_begun_while_the_outbox_is_full(tmp_path: Path) -> None:
    """Nothing waits for the broker, so nothing that the broker does makes room: only a person does."""
    begin_boot(tmp_path)
    with open_outbox(tmp_path, max_mb=2, min_free_mb=0, device="dev") as outbox:
        place = Place(outbox, SampleState("s-1", fields=3))
        for number in range(2000):
            if outbox.file.used_bytes() <= 2 * 2**20:
                outbox.append((), notes={f"slide/s-1/{number:07}": "x" * 10_000})
        place.pipeline._count.slide.map = map_from_traces("s-1", ())
        place.pipeline._count.slide.map.places.count = 3
        place.give(1)
        place.pipeline.start()
        try:
            wait_until(lambda: place.health.snapshot().outbox == "stopped")
            assert "nothing waits for the broker" in place.health.snapshot().outbox_detail
            place.send("reload", "t-0")
            place.send("stop", "t-1")
            wait_until(lambda: place.phase == "finished")
            assert [(reply["status"], reply["code"]) for reply in place.replies] == [
                ("failed", "outbox-stopped"),
                ("ok", "ok"),
            ]
            place.send("start", "t-2", sample="s-2")
            wait_until(lambda: place.pipeline.sample.sid == "s-2")
            place.give(2)
            wait_until(lambda: place.pipeline.sample.fields == 1)
            assert list(outbox.notes("slide/")) == ["slide/s-2/0000001"]
        finally:
            assert place.pipeline.stop(5)
        assert [field["sample"] for field in place.messages("field")] == ["s-1", "s-2"]
        assert [report["status"] for report in place.messages("differential")] == ["final"]
        assert [entry["action"] for entry in place.messages("audit")] == ["cmd.stop", "cmd.start"]


def test_a_snapshot_is_the_next_frame_as_a_picture(outbox: Outbox) -> None:
    place = Place(outbox)
    place.do("snapshot")
    place.give(7, 8)
    place.run_a_while(lambda: place.health.snapshot().dropped.get(NO_SAMPLE) == 2)
    ((topic, jpeg),) = place.pictures
    assert topic == f"{BASE}/image/none/frame-7"
    assert jpeg.startswith(b"\xff\xd8")


def test_crops_are_published_when_the_configuration_asks_for_them(outbox: Outbox) -> None:
    bench = replace(make_bench(make_models((WHITE,))), with_images=True, counting=Rules(KINDS))
    place = Place(outbox, bench=bench)
    place.do("start", sample="s-1")
    place.give(1)
    place.run_a_while(lambda: place.pipeline.sample.fields == 1)
    assert [topic for topic, _ in place.pictures] == [f"{BASE}/image/s-1/s-1-1"]
