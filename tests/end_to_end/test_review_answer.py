"""A person's answer, typed at the command line, over a real broker to the real agent, and what becomes of it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from agent_process import START_S, Bench, wait_until
from ledger import Ledger
from test_operator import use_lively_slide

from agent.cli import main
from agent.delivery.audit import verify


def test_an_answer_amends_the_differential_at_every_subscriber_and_is_audited(
    bench: Bench, mosquitto: Any, subscriber: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/#")
    bench.use_broker(broker.port)
    use_lively_slide(bench)
    bench.config["sample"] = {"id": "s-17", "age_band": "adult", "stop_at_cells": 6}
    bench.config["review"] = {"max_margin": 1.0}  # every named cell is on the list
    agent = bench.start()
    config = ("--config", str(bench.folder / "config.yaml"))

    def run(*words: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as ended:
            main([*words, *config])
        said = capsys.readouterr()
        return ended.value.code, said.out + said.err

    def reports() -> list[dict[str, Any]]:
        """The numbered differentials, as they were heard."""
        return [one.body for one in ears.messages if one.kind == "differential" and one.payload and "seq" in one.body]

    def wait_reports(count: int) -> None:
        ears.wait_for(lambda _heard: len(reports()) >= count, 2 * START_S)

    wait_reports(1)
    code, listed = run("review", "list", "s-17", "--json")
    named = [cell for cell in json.loads(listed) if cell["is_open"] and cell["class"] != "unidentified"]
    assert code == 0
    assert named
    cell, before = named[0], reports()[0]
    other = next(share["class"] for share in before["shares"] if share["class"] != cell["class"])

    # What cannot be: told to the person, audited, and nothing changes.
    code, said = run("review", "answer", cell["cell_id"], "unicorn", "--by", "mtl-7")
    assert code == 1
    assert "known are" in said
    code, said = run("review", "answer", "s-17-999999", other, "--by", "mtl-7")
    assert code == 1
    assert "no counted cell" in said

    # Another name: the differential is amended, at who listens and at who comes late.
    code, said = run("review", "answer", cell["cell_id"], other, "--by", "mtl-7", "--reason", "lobes")
    assert code == 0, said
    assert f"was {cell['class']}, is {other}" in said
    wait_reports(2)
    amended = reports()[1]
    assert (amended["status"], amended["amendments"]) == ("amended", 1)
    assert (amended["report"], amended["supersedes"]) == ("s-17-r2", before["report"])
    expected = Counter(before["counts"])
    expected.subtract({cell["class"]: 1, other: -1})
    assert amended["counts"] == {name: count for name, count in expected.items() if count}
    late = subscriber(broker, "hv/1/lab/scope/differential/#")
    (retained,) = late.wait_for(lambda heard: len(heard) == 1, START_S)
    assert (retained.body["report"], retained.body["counts"]) == (amended["report"], amended["counts"])

    # A person who agrees: noted, and no new report. A second person: both answers stay.
    agreed = named[1]
    assert run("review", "answer", agreed["cell_id"], agreed["class"], "--by", "mtl-7")[0] == 0
    assert run("review", "answer", cell["cell_id"], cell["class"], "--by", "mtl-8")[0] == 0
    wait_reports(3)
    assert reports()[2]["counts"] == before["counts"]
    code, shown = run("review", "show", cell["cell_id"])
    assert [(one["person"], one["by"]) for one in json.loads(shown)["answers"]] == [
        (other, "mtl-7"),
        (cell["class"], "mtl-8"),
    ]
    code, report = run("report", "s-17", "--format", "json")
    assert (code, json.loads(report)["report"]) == (0, "s-17-r3")
    assert json.loads(report)["review"]["persons"] == ["mtl-7", "mtl-8"]

    wait_until(lambda: bench.waiting() == {}, "everything is sent")
    assert agent.terminate() == 0
    ledger = Ledger(ears.messages)
    ledger.check_numbers()
    entries = [entry for entry in ledger.audit.values() if entry["action"] == "cmd.amend"]
    assert [(entry["outcome"], entry["by"]) for entry in entries] == [
        ("refused", "mtl-7"),
        ("refused", "mtl-7"),
        ("done", "mtl-7"),
        ("done", "mtl-7"),
        ("done", "mtl-8"),
    ]
    assert {key: entries[2]["detail"][key] for key in ("sample", "cell_id", "from", "to", "reason")} == {
        "sample": "s-17",
        "cell_id": cell["cell_id"],
        "from": cell["class"],
        "to": other,
        "reason": "lobes",
    }
    assert verify(json.dumps(entry) for entry in ledger.audit.values()).is_sound
    assert "Traceback" not in agent.log_text
