"""What is known of one sample, whoever kept it: the device's own outbox, or the collector's database.

Both hand over the messages as the contract has them (docs/contract.md); what is made of them: `agent.report.document`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from agent.analysis.agreement import Answer
from agent.errors import HematoVisionError
from agent.review import KeptCell

Body = Mapping[str, Any]

Source = Literal["device", "collector"]


class NothingToReport(HematoVisionError):
    """There is no such sample here, or it has no differential."""


@dataclass(frozen=True, slots=True, eq=False)
class SampleRecord:
    """The messages of one sample.

    differentials: final and amended ones, oldest first; of a sample that has none, the running one. sample: its newest
    `sample` document. fields: in order; walked over once. answers: what persons said of its cells, newest of each.
    crops: by cell_id, its review list and gallery.
    """

    source: Source
    site: str
    device: str
    sid: str
    differentials: Sequence[Body]
    sample: Body | None = None
    fields: Iterable[Body] = ()
    answers: Sequence[Answer] = ()
    crops: Mapping[str, KeptCell] = field(default_factory=lambda: MappingProxyType({}))


def with_retained(reports: Sequence[Body], retained: Body | None) -> list[Body]:
    """The numbered differentials, and the retained one where it says something that they do not."""
    if retained is None:
        return list(reports)
    known = {report["report"] for report in reports}
    is_new = retained["report"] is not None and retained["report"] not in known
    return [*reports, retained] if is_new or not reports else list(reports)
