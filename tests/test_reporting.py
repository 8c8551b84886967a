"""What is kept of an ended sample, so that it can be amended by an agent of a later version."""

from __future__ import annotations

import json

from agent.analysis.differential import Rules
from agent.delivery.topics import Topics
from agent.domain import ModelIdentity, Provenance, SampleState, Software, Thresholds
from agent.reporting import Reporter, kept_key, read_kept

PROVENANCE = Provenance(
    "0.1",
    ModelIdentity("det", "1", "a" * 64),
    ModelIdentity("cls", "2", "b" * 64),
    "litert",
    "none",
    "c" * 64,
    Software("aarch64", "3.11.2", "2.3.4", "4.12.0"),
    Thresholds(0.25, 0.75, 0.5, "d" * 64),
)


def keep(provenance: Provenance) -> str:
    kept = Reporter(Topics("lab", "scope"), Rules({}), provenance).keep(SampleState("s-1", phase="finished"))
    return str(kept[kept_key("s-1")])


def test_who_counted_comes_back_whole() -> None:
    assert read_kept(keep(PROVENANCE)).provenance == PROVENANCE


def test_what_an_older_agent_kept_can_still_be_read() -> None:
    note = json.loads(keep(PROVENANCE))
    del note["provenance"]["software"], note["provenance"]["thresholds"]
    found = read_kept(json.dumps(note)).provenance
    assert (found.software, found.thresholds, found.classifier) == (None, None, PROVENANCE.classifier)
