"""A power cut in the middle of a sample, as SIGKILL: the final count is that of a run without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from agent_process import Bench, wait_until

from agent.delivery.outbox import open_outbox

FIELDS, CELLS = 12, 30


def make_bench(folder: Path) -> Bench:
    """A slide whose fields overlap, counted until there are enough nucleated cells; no broker."""
    folder.mkdir()
    bench = Bench(folder)
    bench.use_broker(1)
    slide = {"seed": 11, "fields": FIELDS, "interval_s": 0, "overlap": 0.2, "nucleated_cells_per_field": 5}
    bench.config["camera"] = {"kind": "simulated", "simulated": slide}
    bench.config["sample"] = {"id": "s-1", "stop_at_cells": CELLS}
    return bench


def final_report(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    """The one final differential, and the ids of all cells that were told."""
    with open_outbox(bench.outbox_folder, verify=False, create=False) as outbox:
        rows = [(row.stream, json.loads(row.payload)) for row in outbox.pending(0, 100_000)]
    (report,) = (body for stream, body in rows if stream == "differential")
    return report, [cell["cell_id"] for stream, body in rows if stream == "field" for cell in body["cells"]]


@pytest.mark.timeout(400)
def test_a_power_cut_in_the_middle_of_a_sample_changes_nothing_in_the_final_count(tmp_path: Path) -> None:
    whole, cut = make_bench(tmp_path / "whole"), make_bench(tmp_path / "cut")
    try:
        assert whole.start().wait(150) == 0
        for fields in (2, 4):
            agent = cut.start()
            wait_until(lambda fields=fields: cut.finished() >= fields, f"{fields} fields are counted", 150)
            agent.kill()
        assert cut.start().wait(150) == 0
    finally:
        whole.close()
        cut.close()
    expected, cells = final_report(whole)
    report, cells_after_cuts = final_report(cut)
    assert expected["nucleated"] >= CELLS
    assert report["boot"] == 3
    for key in ("counts", "nucleated", "leukocytes", "fields", "shares", "report", "unidentified", "not_classed"):
        assert report[key] == expected[key], key
    assert cells_after_cuts == cells
    assert len(set(cells)) == len(cells)
