"""Messages about samples: where one stands, and its differential; and about what needs a person: alerts and replies.

`sample/{sid}`, `differential/{sid}` and `alert/{id}` are retained documents: whoever subscribes sees how it is now.
A final or amended differential is a numbered message besides, so that none of them can be missed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from agent.analysis.differential import Concentration, Differential, Ratio, Share
from agent.delivery.messages import LONGEST_TEXT, Body, Draft, Severity, _provenance_body, rfc3339_ms, schema_name
from agent.delivery.topics import Topics
from agent.domain import Provenance, SampleState

ReportStatus = Literal["preliminary", "final", "amended"]

ReplyStatus = Literal["ok", "refused", "failed"]


@dataclass(frozen=True, slots=True)
class Alert:
    """An open problem. alert_id: one for each kind of problem; since: when it was first seen."""

    alert_id: str
    severity: Severity
    message: str
    since: datetime


def sample_body(sample: SampleState, topics: Topics, *, boot: int, at: datetime, nucleated: int) -> Body:
    """Where a sample stands. nucleated: cells with a nucleus and a name, as the stop by itself counts them."""
    return {
        "schema": schema_name("sample"),
        "device": topics.device,
        "site": topics.site,
        "boot": boot,
        "at": rfc3339_ms(at),
        "sample": sample.sid,
        "phase": sample.phase,
        "accession": sample.accession,
        "age_band": sample.age_band,
        "opened_at": sample.opened_at,
        "ended_at": sample.ended_at,
        "end_reason": sample.end_reason,
        "stop_at": {"cells": sample.target_cells, "half_width_pct": sample.target_half_width_pct},
        "fields": int(sample.fields),
        "refused": {reason: int(count) for reason, count in sample.refused.items()},
        "counts": {name: int(count) for name, count in sample.counts.items()},
        "nucleated": int(nucleated),
        "ruo": True,
    }


def report_id(sid: str, number: int) -> str:
    """Names one final or amended differential of a sample; number from 1."""
    return f"{sid}-r{number}"


def differential_body(
    made: Differential,
    sample: SampleState,
    topics: Topics,
    provenance: Provenance,
    *,
    boot: int,
    at: datetime,
    status: ReportStatus,
    amendments: int = 0,
) -> Body:
    """The differential of a sample. A final or amended one carries the number `sample.reports` and names the one that
    it supersedes; a preliminary one is replaced by the next and carries none.
    """
    is_report = status != "preliminary"
    return {
        "schema": schema_name("differential"),
        "device": topics.device,
        "site": topics.site,
        "boot": boot,
        "at": rfc3339_ms(at),
        "sample": sample.sid,
        "accession": sample.accession,
        "age_band": sample.age_band,
        "status": status,
        "report": report_id(sample.sid, sample.reports) if is_report else None,
        "supersedes": report_id(sample.sid, sample.reports - 1) if is_report and sample.reports > 1 else None,
        "amendments": amendments,
        "fields": int(made.tally.fields),
        "refused": {reason: int(count) for reason, count in sample.refused.items()},
        "basis": "unique" if made.tally.is_unique else "all",
        "counts": {name: int(count) for name, count in made.tally.counts.items()},
        "leukocytes": made.leukocytes,
        "nucleated": made.nucleated,
        "interval": {"method": made.method, "level_pct": 95},
        "shares": [_share_body(share) for share in made.shares],
        "per_100_leukocytes": [_ratio_body(ratio) for ratio in made.per_100],
        "per_field": [_ratio_body(ratio) for ratio in made.per_field],
        "red_cells_per_leukocyte": None
        if made.red_cells_per_leukocyte is None
        else _ratio_body(made.red_cells_per_leukocyte),
        "per_ul": [_concentration_body(concentration) for concentration in made.concentrations],
        "unidentified": made.unidentified,
        "not_classed": made.not_classed,
        "still_needed": made.still_needed,
        "provenance": _provenance_body(provenance),
        "ruo": True,
    }


def differential_draft(body: Body, topics: Topics, sid: str) -> Draft:
    """A final or amended differential, ready for the outbox."""
    return Draft("differential", topics.differential(sid), body)


def alert_body(alert: Alert, topics: Topics, *, boot: int) -> Body:
    """An open problem; its topic is cleared when it is solved."""
    return {
        "schema": schema_name("alert"),
        "device": topics.device,
        "site": topics.site,
        "boot": boot,
        "alert": alert.alert_id,
        "severity": alert.severity,
        "message": alert.message[:LONGEST_TEXT] or alert.alert_id,
        "since": rfc3339_ms(alert.since),
        "ruo": True,
    }


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a command. code: a word for machines, `ok` or why not; detail: what was asked for."""

    command: str
    transaction: str | None
    status: ReplyStatus
    code: str
    message: str
    data: Mapping[str, Any]


def reply_body(reply: Reply, topics: Topics, *, boot: int, at: datetime, is_repeated: bool = False) -> Body:
    """The reply as it is sent. is_repeated: the command was done before, this is what was said then."""
    return {
        "schema": schema_name("reply"),
        "device": topics.device,
        "site": topics.site,
        "boot": boot,
        "at": rfc3339_ms(at),
        "command": reply.command[:64],
        "transaction": reply.transaction,
        "status": reply.status,
        "code": reply.code,
        "message": reply.message[:LONGEST_TEXT] or reply.code,
        "data": dict(reply.data),
        "repeated": is_repeated,
        "ruo": True,
    }


# ------------------------------------------------------------------------------------------------------- the parts


def _share_body(share: Share) -> Body:
    judged, corrected = share.judgement, share.corrected
    return {
        "class": share.class_name,
        "count": share.count,
        "pct": _pct(share.pct),
        "low_pct": _pct(share.low_pct),
        "high_pct": _pct(share.high_pct),
        "corrected": None
        if corrected is None
        else {"pct": _pct(corrected.pct), "low_pct": _pct(corrected.low_pct), "high_pct": _pct(corrected.high_pct)},
        "flag": None if judged is None else judged.flag,
        "reference": None
        if judged is None
        else {
            "low_pct": judged.reference.low_pct,
            "high_pct": judged.reference.high_pct,
            "source": judged.reference.source,
        },
    }


def _ratio_body(ratio: Ratio) -> Body:
    return {
        "name": ratio.name,
        "count": ratio.count,
        "ratio": round(ratio.ratio, 3),
        "low": round(ratio.low, 3),
        "high": None if ratio.high is None else round(ratio.high, 3),
    }


def _concentration_body(concentration: Concentration) -> Body:
    return {
        "name": concentration.kind,
        "count": concentration.count,
        "per_ul": round(concentration.per_ul, 1),
        "low_per_ul": round(concentration.low_per_ul, 1),
        "high_per_ul": round(concentration.high_per_ul, 1),
    }


def _pct(value: float) -> float:
    return round(value, 2) + 0.0
