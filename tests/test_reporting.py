"""What is kept of an ended sample, so that it can be amended by an agent of a later version."""

from __future__ import annotations

import json

from agent.analysis.differential import Rules
from agent.delivery.topics import Topics
from agent.domain import Provenance, SampleState
from agent.reporting import Reporter, kept_key, read_kept
from tests.report.making import PROVENANCE


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
