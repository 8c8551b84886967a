"""What has to be asked for: commands and their refusals, the life of a sample, the Will."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta, timezone
from typing import Any

from .clauses import Findings
from .ears import Access, Ears, Heard
from .listening import RECEIVERS

ANSWER_S = 15.0
"""A command is answered between two frames; a large frame on a slow board takes some seconds."""

QUIET_S = 2.0
"""For things that must not happen."""

FIELDS_S = 60.0
"""Until some fields with cells have come."""


class Desk:
    """Sends commands to one device and hears its replies."""

    def __init__(self, ears: Ears, base: str, findings: Findings, *, is_v5: bool) -> None:
        self.ears = ears
        self.base = base
        self.findings = findings
        self.is_v5 = is_v5
        self._run = secrets.token_hex(4)
        self._asked = 0

    def transaction(self) -> str:
        self._asked += 1
        return f"kit-{self._run}-{self._asked}"

    def ask(self, name: str, /, **body: Any) -> dict[str, Any]:
        """Send a command and wait for its reply on `reply/{name}`; {} when none comes."""
        sent = {"transaction": self.transaction(), **body}
        reply = self.exchange(name, json.dumps(sent).encode(), lambda heard: _of(heard, sent["transaction"]))
        answer = {} if reply is None else reply.body or {}
        is_sound = answer.get("status") in ("ok", "refused", "failed") and answer.get("command") == name
        self.findings.look("7.1", is_sound, f"cmd/{name}: {answer or 'no reply'}")
        return answer

    def exchange(self, name: str, payload: bytes, is_it: Callable[[Heard], bool], **options: Any) -> Heard | None:
        since = len(self.ears.heard)
        self.ears.send(f"{self.base}/cmd/{name}", payload, **options)
        return self.ears.wait_for(is_it, ANSWER_S, since)

    def refused(self, clause: str, code: str, name: str, payload: bytes, **options: Any) -> None:
        """Send what must be refused with this code."""
        topic = f"{self.base}/reply/"
        reply = self.exchange(name, payload, lambda heard: heard.topic.startswith(topic), **options)
        told = None if reply is None or reply.body is None else (reply.body.get("status"), reply.body.get("code"))
        self.findings.look(clause, told == ("refused", code), f"cmd/{name}: {told}, expected refused, {code}")


def _of(heard: Heard, transaction: str) -> bool:
    return heard.kind == "reply" and heard.body is not None and heard.body.get("transaction") == transaction


def ask_harmless(desk: Desk) -> bool:
    """What changes nothing. Returns whether the device answers commands at all."""
    look = desk.findings.look
    alive = desk.ask("ping")
    if not alive:
        commands = ("7.2", "7.3", "7.4", "7.5", "7.6", "7.7", "7.8", "7.9", "7.10", "7.12")
        desk.findings.leave((*commands, "8.1"), "the device answers no command; has this user the right to send them?")
        return False

    # 7.2, 7.9: where replies go.
    if desk.is_v5:
        response = f"{desk.base}/reply/ping/kit"
        payload = json.dumps({"transaction": desk.transaction()}).encode()
        reply = desk.exchange(
            "ping", payload, lambda heard: heard.topic == response, response_topic=response, correlation=b"\x07kit"
        )
        is_there = reply is not None and reply.correlation == b"\x07kit"
        look("7.2", is_there, "no reply on the response topic with its correlation data")
        stolen = f"{desk.base}/state"
        payload = json.dumps({"transaction": desk.transaction()}).encode()
        reply = desk.exchange(
            "ping", payload, lambda heard: heard.body is not None and "command" in heard.body, response_topic=stolen
        )
        look("7.9", reply is not None and reply.topic != stolen, f"a reply went to {stolen}")
    else:
        desk.findings.leave(("7.9",), "MQTT 3.1.1 has no response topics")
        look("7.2", True, "")

    # 7.4, 7.5: too old, not understood.
    old = (datetime.now(timezone.utc) - timedelta(seconds=120)).isoformat()
    if _is_clock_true(desk):
        desk.refused("7.4", "expired", "ping", json.dumps({"transaction": desk.transaction(), "at": old}).encode())
    else:
        desk.findings.leave(("7.4",), "the device's clock follows no reference, so it does not judge `at`")
    known = {"transaction": desk.transaction()}
    desk.refused("7.5", "unknown-command", "dance", json.dumps(known).encode())
    desk.refused("7.5", "not-json", "ping", b"\xff{")
    desk.refused("7.5", "bad-request", "ping", json.dumps({**known, "colour": "red"}).encode())
    desk.refused("7.5", "bad-request", "ping", b"{}")
    desk.refused("7.5", "too-large", "ping", b" " * 20_000)

    # 7.6, 7.7, 8.1: once. A self-test changes no result.
    transaction = desk.transaction()
    first = desk.ask("selftest", transaction=transaction)
    again = desk.ask("selftest", transaction=transaction)
    same = {key: value for key, value in again.items() if key not in ("at", "repeated", "boot")}
    is_same = same == {key: value for key, value in first.items() if key not in ("at", "repeated", "boot")}
    look("7.6", is_same and again.get("repeated") is True, f"{first}, then {again}")
    other = desk.ask("snapshot", transaction=transaction)
    look("7.7", other.get("code") == "transaction-reused", f"{other}")
    entry = desk.ears.wait_for(
        lambda heard: heard.kind == "audit" and (heard.body or {}).get("transaction") == transaction, ANSWER_S
    )
    look("8.1", entry is not None, f"no audit entry of transaction {transaction}")

    # 7.8: an operator's command without a proof.
    answer = desk.ask("model.rollback", by="kit")
    if answer.get("code") == "not-allowed":
        audited = desk.ears.wait_for(
            lambda heard: heard.kind == "audit" and (heard.body or {}).get("action") == "cmd.model.rollback", ANSWER_S
        )
        look("7.8", audited is not None and (audited.body or {}).get("outcome") == "refused", "not audited as refused")
    else:
        words = "the device leaves it to the broker's access list, and this user may send them"
        desk.findings.leave(("7.8",), words)

    # 7.10: a sample that is not there.
    answer = desk.ask("pause", sample=f"kit-{secrets.token_hex(4)}")
    look("7.10", answer.get("status") == "refused", f"pause of another sample: {answer}")

    # 7.12
    answer = desk.ask("replay", stream="event", from_seq=1, to_seq=1)
    if answer.get("code") == "not-kept":
        desk.findings.leave(("7.12",), "the device keeps nothing that was acknowledged, and says so")
    else:
        again_heard = desk.ears.wait_for(
            lambda heard: (
                heard.kind == "event"
                and (heard.body or {}).get("seq") == 1
                and (heard.body or {}).get("historical") is True
            ),
            ANSWER_S,
        )
        is_told = answer.get("status") == "ok" and (again_heard is not None or bool(answer.get("data")))
        look("7.12", is_told, f"replay of event 1: {answer}")
    return True


def end_open_sample(desk: Desk) -> None:
    """So that the kit can begin one of its own."""
    where = desk.ask("ping").get("data", {})
    if where.get("phase") in ("running", "paused", "finishing"):
        desk.ask("stop")
        _wait_phase(desk, str(where.get("sample")), "finished")


def ask_samples(desk: Desk, alive_fields_s: float = FIELDS_S) -> None:
    """Begin, pause, stop, amend and throw over samples. Ends the one that is open."""
    look = desk.findings.look
    end_open_sample(desk)

    # 6.1, 6.2: it begins, its fields come, a pause is a pause.
    sid = f"kit-{secrets.token_hex(4)}"
    begun = desk.ask("start", sample=sid, accession="KIT-1", age_band="adult")
    is_begun = begun.get("status") == "ok" and _wait_phase(desk, sid, "running") is not None
    look("6.1", is_begun, f"start: {begun}, no sample/{sid} that runs")
    later = ("6.2", "6.3", "6.4", "6.5", "6.6", "6.7")
    if not is_begun:
        desk.findings.leave(later, "no sample could be begun")
        return
    answer = desk.ask("start", sample=f"{sid}-b")
    look("7.10", answer.get("code") == "not-now", f"a second start: {answer}")
    field = desk.ears.wait_for(lambda heard: _field_of(heard, sid) and bool(_nameable(heard)), alive_fields_s)
    if field is None:
        desk.findings.leave(later, f"no field with a nucleated cell came within {alive_fields_s:g} s")
    paused = desk.ask("pause", sample=sid)
    look("6.1", paused.get("data", {}).get("phase") == "paused", f"pause: {paused}")
    mark_s = time.monotonic()
    time.sleep(QUIET_S)
    late = [heard for heard in desk.ears.heard if heard.kind == "field" and heard.at_s > mark_s + QUIET_S / 2]
    look("6.2", not late, f"{len(late)} fields while the sample was paused")
    desk.ask("resume", sample=sid)

    # 6.3: it ends with its report.
    desk.ask("stop", sample=sid)
    final = desk.ears.wait_for(lambda heard: _report(heard, sid, "final") and "seq" in (heard.body or {}), ANSWER_S)
    kept = desk.ears.wait_for(lambda heard: _report(heard, sid, "final") and "seq" not in (heard.body or {}), ANSWER_S)
    look(
        "6.3",
        final is not None and kept is not None,
        f"{sid}: numbered {final is not None}, retained {kept is not None}",
    )
    _wait_phase(desk, sid, "finished")

    # 6.5: a person names a cell anew.
    cell = standing_cell(desk.ears.heard, sid)
    if cell is not None and final is not None and final.body is not None:
        other = next(name for name in cell["probabilities"] if name != cell["class"])
        answer = desk.ask("amend", sample=sid, cell_id=cell["cell_id"], **{"class": other}, by="kit")
        amended = desk.ears.wait_for(
            lambda heard: _report(heard, sid, "amended") and "seq" in (heard.body or {}), ANSWER_S
        )
        is_after = amended is not None and (amended.body or {}).get("supersedes") == final.body["report"]
        look("6.5", is_after, f"amend: {answer}")
    else:
        desk.findings.leave(("6.5",), "no cell to amend was heard")

    # 6.1, 6.6: the next one clears the one before; one that is thrown over leaves nothing.
    thrown = f"kit-{secrets.token_hex(4)}"
    since = len(desk.ears.heard)
    desk.ask("start", sample=thrown)
    gone = desk.ears.wait_for(
        lambda heard: heard.topic == f"{desk.base}/sample/{sid}" and not heard.payload, ANSWER_S, since
    )
    look("6.1", gone is not None, f"sample/{sid} is not cleared by the next start")
    desk.ears.wait_for(lambda heard: heard.topic == f"{desk.base}/differential/{thrown}", ANSWER_S, since)
    desk.ask("stop", sample=thrown, abort=True)
    cleared = desk.ears.wait_for(
        lambda heard: heard.topic == f"{desk.base}/differential/{thrown}" and not heard.payload, ANSWER_S, since
    )
    finals = [heard for heard in desk.ears.heard if _report(heard, thrown, "final")]
    look("6.6", cleared is not None and not finals, f"{thrown}: cleared {cleared is not None}, {len(finals)} finals")

    # 6.7: it stops by itself.
    counted = f"kit-{secrets.token_hex(4)}"
    desk.ask("start", sample=counted, stop_at_cells=1)
    report = desk.ears.wait_for(lambda heard: _report(heard, counted, "final"), alive_fields_s)
    if report is None:
        desk.findings.leave(("6.7",), "no nucleated cell came")
        desk.ask("stop", sample=counted, abort=True)
    else:
        ended = _wait_phase(desk, counted, "finished")
        reason = None if ended is None or ended.body is None else ended.body.get("end_reason")
        look("6.7", reason == "target-cells" and (report.body or {}).get("nucleated", 0) >= 1, f"ended by {reason}")


def said_first(heard: Iterable[Heard], since_s: float) -> list[str]:
    """The kinds of the first three messages of the device itself; others say things to it meanwhile."""
    return [one.kind for one in heard if one.at_s >= since_s and one.kind not in RECEIVERS][:3]


def knock_off(access: Access, desk: Desk) -> None:
    """2.2, 2.3: take the device's name, so that the broker throws its connection out, and see it come back."""
    site, device = desk.base.split("/")[2:4]
    since = len(desk.ears.heard)
    thief = Ears(access, (f"{desk.base}/state",), desk.base, client_id=f"hv-{site}-{device}")
    time.sleep(0.2)
    thief.close()
    lost = desk.ears.wait_for(
        lambda heard: heard.kind == "state" and (heard.body or {}).get("state") == "lost", ANSWER_S, since
    )
    if lost is None and not says_a_will(access, desk):
        words = "this broker says no Will of a client whose name another takes; kill the device's agent with --restart"
        desk.findings.leave(("2.2",), words)
    else:
        desk.findings.look("2.2", lost is not None and lost.qos == 1, "the broker did not say `lost`")
    back = desk.ears.wait_for(
        lambda heard: heard.kind == "state" and (heard.body or {}).get("state") not in (None, "lost"), 90, since
    )
    desk.ears.wait_for(lambda heard: heard.kind == "health" and back is not None and heard.at_s >= back.at_s, 20, since)
    if back is None:
        desk.findings.look("2.3", False, "the device did not come back within 90 s")
        return
    first = said_first(desk.ears.heard[since:], back.at_s)
    desk.findings.look("2.3", set(first) == {"state", "info", "health"}, f"on the new connection came first: {first}")


def says_a_will(access: Access, desk: Desk) -> bool:
    """Whether the broker says the Will of a client of ours whose name another client of ours takes."""
    name = f"hv-kit-{secrets.token_hex(4)}"
    topic = f"{desk.base}/cmd/ping"  # where the kit may write, and what does no harm
    payload = json.dumps({"transaction": desk.transaction()}).encode()
    since = len(desk.ears.heard)
    robbed = Ears(access, (), desk.base, client_id=name, will=(topic, payload))
    thief = Ears(access, (), desk.base, client_id=name)
    heard = desk.ears.wait_for(lambda heard: heard.topic == topic and heard.payload == payload, ANSWER_S, since)
    robbed.close()
    thief.close()
    return heard is not None


def ask_retained(access: Access, desk: Desk) -> None:
    """7.3: a command that lies retained when the device connects; needs `knock_off` to make it connect anew."""
    payload = {"transaction": desk.transaction(), "sample": f"kit-{secrets.token_hex(4)}"}
    topic = f"{desk.base}/cmd/resume"
    desk.ears.send(topic, json.dumps(payload).encode(), retain=True)
    desk.ears.wait_for(lambda heard: _of(heard, payload["transaction"]), ANSWER_S)
    late = Ears(access, (f"{desk.base}/cmd/+",), desk.base)
    is_handed_out = late.wait_for(lambda heard: heard.topic == topic and heard.is_retained, QUIET_S) is not None
    late.close()
    since = len(desk.ears.heard)
    try:
        knock_off(access, desk)
        reply = desk.ears.wait_for(
            lambda heard: heard.kind == "reply" and (heard.body or {}).get("code") == "retained", ANSWER_S, since
        )
        event = desk.ears.wait_for(
            lambda heard: heard.kind == "event" and (heard.body or {}).get("kind") == "command-refused", ANSWER_S, since
        )
        if not is_handed_out:
            words = "this broker hands nothing retained to a subscription with a wildcard, so the device never sees it"
            desk.findings.leave(("7.3",), words)
        else:
            is_refused = reply is not None and event is not None
            desk.findings.look("7.3", is_refused, "a retained command was not refused and told")
    finally:
        desk.ears.send(topic, b"", retain=True)


# ------------------------------------------------------------------------------------------------------- the parts


def _is_clock_true(desk: Desk) -> bool:
    told = [heard.body for heard in desk.ears.heard if heard.kind == "health" and heard.body]
    return bool(told) and told[-1].get("clock", {}).get("synchronised") is True


def _wait_phase(desk: Desk, sid: str, phase: str) -> Heard | None:
    return desk.ears.wait_for(
        lambda heard: heard.topic == f"{desk.base}/sample/{sid}" and (heard.body or {}).get("phase") == phase, ANSWER_S
    )


def _field_of(heard: Heard, sid: str) -> bool:
    return heard.kind == "field" and (heard.body or {}).get("sample") == sid


def _nameable(heard: Heard) -> list[dict[str, Any]]:
    """Counted cells of a field that the classifier named and that are no platelets."""
    cells = (heard.body or {}).get("cells", ())
    named = (cell for cell in cells if cell["probabilities"] and cell["status"] in ("accepted", "edge"))
    return [dict(cell) for cell in named if cell["class"] != "platelet"]


def standing_cell(heard: Iterable[Heard], sid: str) -> dict[str, Any] | None:
    """A nameable cell of the sample that no better view has superseded, and that is counted."""
    fields = [one for one in heard if _field_of(one, sid)]
    gone = {old for one in fields for cell in (one.body or {})["cells"] for old in cell.get("supersedes", ())}
    cells = (cell for one in fields for cell in _nameable(one))
    return next((c for c in cells if c["cell_id"] not in gone and c.get("counted") is not False), None)


def _report(heard: Heard, sid: str, status: str) -> bool:
    return heard.topic.endswith(f"/differential/{sid}") and (heard.body or {}).get("status") == status
