"""What can be judged by listening alone. Each function looks at all that was heard."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import jsonschema

from agent.delivery.audit import verify
from agent.delivery.messages import KINDS, load_schema

from .clauses import Findings
from .ears import Heard

RETAINED = frozenset({"state", "info", "health", "sample", "differential", "alert"})
RECEIVERS = ("cmd", "ack", "fleet")
"""Said to or of a device, by others."""

NUMBERED = ("field", "cell", "event", "differential", "audit")
PICTURES = "image"

_PART = re.compile(r"[a-z0-9-]{1,63}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
_TIME_KEYS = frozenset({"at", "captured_at", "started_at", "since", "opened_at", "ended_at"})


def judge_all(heard: Sequence[Heard], findings: Findings, base: str, *, is_v5: bool, restarts: int = 0) -> None:
    """All that listening shows. The kit's own commands are not the device's and are passed over.

    restarts: how often the agent was started again while the kit listened.
    """
    own = [one for one in heard if one.kind and one.kind not in RECEIVERS]
    judge_form(own, findings, base, is_v5=is_v5)
    bodies = [(one, one.body) for one in own if one.body is not None]
    judge_numbers(bodies, findings, restarts)
    judge_fields(bodies, findings)
    judge_models(bodies, findings)
    judge_differentials(bodies, findings)
    judge_times(bodies, findings)
    judge_audit(bodies, findings)
    for one in own:
        if one.kind == "alert":
            is_sound = one.payload == b"" or (one.body is not None and "since" in one.body)
            findings.look("2.6", is_sound, f"{one.topic}: {one.payload[:80]!r}")
        if one.kind == "health" and one.body is not None:
            missing = set(load_schema("health")["required"]) - set(one.body)
            findings.look("2.5", not missing, f"{one.topic}: without {sorted(missing)}")


def judge_form(heard: Iterable[Heard], findings: Findings, base: str, *, is_v5: bool) -> None:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    validators = {kind: jsonschema.Draft202012Validator(load_schema(kind), format_checker=checker) for kind in KINDS}
    for one in heard:
        parts = one.topic.removeprefix(f"{base}/").split("/")
        last_is_long = one.kind in (PICTURES, "reply")
        checked = [*base.split("/"), *(parts[:-1] if last_is_long else parts)]
        findings.look("1.1", all(_PART.fullmatch(part) for part in checked), one.topic)
        findings.look("1.4", one.qos == 1, f"{one.topic}: QoS {one.qos}")
        findings.look("1.6", one.kind in RETAINED or not one.is_retained, f"{one.topic}: retained")
        if one.payload == b"" and one.kind in RETAINED:
            continue  # cleared
        if one.kind == PICTURES:
            if is_v5:
                findings.look("1.5", one.content_type == "image/jpeg", f"{one.topic}: {one.content_type}")
            continue
        faults = _faults(one, validators)
        findings.look("1.2", not faults, f"{one.topic}: {faults}")
        findings.look("1.3", one.body is not None and one.body.get("ruo") is True, f"{one.topic}: no ruo")
        if is_v5:
            findings.look("1.5", one.content_type == "application/json", f"{one.topic}: {one.content_type}")


def judge_numbers(bodies: Sequence[tuple[Heard, dict[str, Any]]], findings: Findings, restarts: int = 0) -> None:
    by_id: dict[tuple[str, str], dict[str, Any]] = {}
    last: dict[str, int] = {}
    boots: set[Any] = set()
    for one, body in bodies:
        if one.kind in ("state", "info", "health") and not one.is_retained:
            boots.add(body.get("boot"))
        if one.kind not in NUMBERED or "seq" not in body:
            continue
        seq, name = body["seq"], body.get("id")
        parts = str(name).split(":")
        is_named = len(parts) == 3 and parts[0] == body.get("device") and parts[2] == str(seq)
        findings.look("3.2", is_named, f"{one.kind} {seq}: id {name}")
        before = by_id.get((one.kind, str(name)))
        if before is not None:
            same = [json.dumps({**each, "historical": None}, sort_keys=True) for each in (before, body)]
            findings.look("3.2", same[0] == same[1], f"{one.kind} {name}: came twice and says two things")
            continue
        by_id[one.kind, str(name)] = body
        if one.kind in last and not body.get("historical"):
            findings.look("3.1", seq <= last[one.kind] + 1, f"{one.kind}: {seq} after {last[one.kind]}")
            findings.look("3.3", seq > last[one.kind], f"{one.kind}: {seq} after {last[one.kind]}")
        last[one.kind] = max(seq, last.get(one.kind, 0))
        if "boot" in body and not body.get("historical"):
            boots.add(body["boot"])
            findings.look("3.4", parts[1] == str(body["boot"]), f"{one.kind} {name}: boot {body['boot']}")
    if len(boots) > 1 + restarts:
        findings.look("3.4", False, f"boots {sorted(map(str, boots))} with {restarts} restarts")


def judge_fields(bodies: Sequence[tuple[Heard, dict[str, Any]]], findings: Findings) -> None:
    cells_of: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {}
    classes = _class_names(bodies)
    seen: set[str] = set()
    for one, body in bodies:
        if one.kind != "field" or "cells" not in body or body.get("id") in seen:
            continue
        seen.add(body["id"])
        counted: Counter[str] = Counter()
        again: Counter[str] = Counter()
        frame = body["frame"]
        for cell in body["cells"]:
            name = cell["cell_id"]
            findings.look("3.5", name not in cells_of and name.startswith(f"{body['sample']}-"), f"cell_id {name}")
            cells_of[name] = (body["id"], cell, body)
            if cell["status"] in ("accepted", "edge"):
                counted[cell["class"]] += 1
            elif cell["status"] == "unidentified":
                counted["unidentified"] += 1
            elif cell["status"] == "duplicate":
                again[cell["class"]] += 1
            _judge_cell(cell, frame, classes, findings)
        is_right = sum(body["counts"].values()) == counted.total() + again.total() and all(
            counted[name] <= body["counts"].get(name, 0) <= counted[name] + (again[name] or again.total())
            for name in {*counted, *body["counts"]}
        )
        findings.look("4.1", is_right, f"{body['id']}: {body['counts']}, counted {dict(counted)} and {dict(again)}")
        _judge_unique(body, cells_of, findings)
    for one, body in bodies:
        if one.kind == "cell" and body.get("cell_id") in cells_of:
            field_id, cell, field = cells_of[body["cell_id"]]
            expected = {**cell, "field_id": field_id, "sample": field["sample"], "captured_at": field["captured_at"]}
            wrong = [key for key, value in expected.items() if body.get(key) != value]
            findings.look("4.4", not wrong, f"{body['cell_id']}: differs in {wrong}")


def _judge_unique(
    body: dict[str, Any], cells_of: dict[str, tuple[str, dict[str, Any], dict[str, Any]]], findings: Findings
) -> None:
    """Every cell that stands adds one, every line that no longer stands takes one away."""
    lines = [(1, cell) for cell in body["cells"] if cell.get("counted")]
    gone = [old for cell in body["cells"] for old in cell.get("supersedes", ())]
    if any(old not in cells_of for old in gone):
        return  # told before the kit began to listen
    lines += [(-1, cells_of[old][1]) for old in gone]
    added: Counter[str] = Counter()
    for change, cell in lines:
        added["unidentified" if cell["status"] == "unidentified" else cell["class"]] += change
    told = {name: count for name, count in body["unique_counts"].items() if count}
    expected = {name: count for name, count in added.items() if count}
    findings.look("4.6", told == expected, f"{body['id']}: unique_counts {told}, its cells say {expected}")


def _judge_cell(cell: dict[str, Any], frame: dict[str, Any], classes: set[str], findings: Findings) -> None:
    x_min, y_min, x_max, y_max = cell["box"]
    is_inside = 0 <= x_min < x_max <= frame["width_px"] and 0 <= y_min < y_max <= frame["height_px"]
    findings.look("4.2", is_inside, f"{cell['cell_id']}: box {cell['box']}")
    shares = sorted(cell["probabilities"].values(), reverse=True)
    if shares:
        margin = shares[0] - (shares[1] if len(shares) > 1 else 0)
        is_sound = math.isclose(sum(shares), 1, abs_tol=1e-6) and abs(cell["margin"] - margin) <= 2e-4
    else:
        is_sound = cell["margin"] is None
    findings.look("4.3", is_sound, f"{cell['cell_id']}: {cell['probabilities']}, margin {cell['margin']}")
    if classes:
        findings.look("4.5", cell["class"] in classes, f"{cell['cell_id']}: class {cell['class']}")


def judge_models(bodies: Sequence[tuple[Heard, dict[str, Any]]], findings: Findings) -> None:
    """The digests in a field are those of an `info` that was said: the newest, or one before a switch of models."""
    told = {model["sha256"] for one, body in bodies if one.kind == "info" for model in body.get("models", ())}
    for one, body in bodies:
        if told and one.kind == "field" and "provenance" in body and not body.get("historical"):
            used = {body["provenance"][role]["sha256"] for role in ("detector", "classifier")}
            findings.look("2.4", used <= told, f"{body['id']}: {sorted(used - told)}")


def judge_differentials(bodies: Sequence[tuple[Heard, dict[str, Any]]], findings: Findings) -> None:
    finals: defaultdict[str, set[str]] = defaultdict(set)
    for one, body in bodies:
        if one.kind != "differential" or "shares" not in body:
            continue
        total = body["leukocytes"]
        is_whole = not body["shares"] or sum(share["count"] for share in body["shares"]) == total
        for share in body["shares"]:
            is_whole &= math.isclose(share["pct"], 100 * share["count"] / max(1, total), abs_tol=0.006)
            is_whole &= share["low_pct"] <= share["pct"] <= share["high_pct"]
        findings.look("6.4", is_whole, f"{body['sample']}: {total} leukocytes, {body['shares']}")
        if body["status"] == "final" and "seq" in body:
            finals[body["sample"]].add(body["report"])
    for sample, reports in finals.items():
        findings.look("6.3", len(reports) == 1, f"{sample}: final reports {sorted(reports)}")


def judge_times(bodies: Sequence[tuple[Heard, dict[str, Any]]], findings: Findings) -> None:
    before: dict[str, tuple[int, int]] = {}
    for one, body in bodies:
        for key in _TIME_KEYS & set(body):
            if body[key] is not None:
                is_time = bool(_TIME.fullmatch(str(body[key]))) and _is_date(str(body[key]))
                findings.look("5.1", is_time, f"{one.kind}: {key} {body[key]}")
        if one.kind == "field" and "captured_monotonic_ns" in body:
            findings.look("5.3", isinstance(body["clock"]["synchronised"], bool), f"{body['id']}: no clock")
            boot = str(body["id"]).split(":")[1]
            seq, ns = body["seq"], body["captured_monotonic_ns"]
            if boot in before and seq > before[boot][0]:
                findings.look("5.2", ns > before[boot][1], f"{body['id']}: {ns} after {before[boot][1]}")
            before[boot] = max((seq, ns), before.get(boot, (0, 0)))
        if one.kind in NUMBERED and "historical" in body:
            findings.look("5.4", isinstance(body["historical"], bool), f"{one.kind}: historical {body['historical']}")


def judge_audit(bodies: Sequence[tuple[Heard, dict[str, Any]]], findings: Findings) -> None:
    lines = [json.dumps(body) for one, body in bodies if one.kind == "audit"]
    if lines:
        verdict = verify(lines)
        findings.look("8.2", verdict.is_sound, "; ".join(verdict.faults))


# ------------------------------------------------------------------------------------------------------- the parts


def _faults(one: Heard, validators: dict[str, Any]) -> str:
    if one.body is None:
        return "not a JSON object"
    if one.kind not in validators:
        return f"no schema knows {one.kind}"
    return "; ".join(
        f"{error.json_path}: {error.message[:120]}" for error in validators[one.kind].iter_errors(one.body)
    )


def _class_names(bodies: Iterable[tuple[Heard, dict[str, Any]]]) -> set[str]:
    return {
        name
        for one, body in bodies
        if one.kind == "info"
        for model in body.get("models", ())
        for name in model.get("classes", ())
    }


def _is_date(text: str) -> bool:
    try:
        datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return False
    return True
