"""What shows only when the agent is killed and started again: numbers, samples and commands go on."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections import Counter
from typing import Any

from .asking import ANSWER_S, FIELDS_S, Desk, _field_of, _of, _report, end_open_sample
from .ears import Heard

BACK_S = 120.0
"""Until the agent is back: it loads its models, asks them the golden fields and opens its camera."""


def ask_restart(desk: Desk, command: str) -> int:
    """Clauses 2.2, 3.4, 6.8, 7.11: a sample runs, the agent is killed by `command`, comes back and finishes it.

    command: for the shell; kills the agent without a word (SIGKILL, power off) and sees to it that it starts again.
    Returns how often the agent was started again.
    """
    look = desk.findings.look
    end_open_sample(desk)
    sid = f"kit-{secrets.token_hex(4)}"
    desk.ask("start", sample=sid)
    if desk.ears.wait_for(lambda heard: _field_of(heard, sid), FIELDS_S) is None:
        desk.findings.leave(("2.2", "6.8", "7.11"), f"no field came within {FIELDS_S:g} s")
        return 0
    before = _boot(desk)

    # The command is under way when the agent dies: it is done and answered, or not begun.
    transaction = desk.transaction()
    since = len(desk.ears.heard)
    body = {"transaction": transaction, "sample": sid}
    desk.ears.send(f"{desk.base}/cmd/pause", json.dumps(body).encode())
    done = subprocess.run(command, shell=True, check=False, stdout=subprocess.DEVNULL)
    if done.returncode != 0:
        desk.findings.leave(("2.2", "6.8", "7.11"), f"the command of --restart ended with {done.returncode}")
        return 0
    lost = desk.ears.wait_for(lambda heard: _state(heard) == "lost", BACK_S, since)
    look("2.2", lost is not None, "the agent was killed and the broker did not say `lost`")
    back = desk.ears.wait_for(
        lambda heard: _state(heard) in ("ready", "degraded", "sleeping") and (heard.body or {}).get("boot") != before,
        BACK_S,
        since,
    )
    if back is None:
        desk.findings.leave(("6.8", "7.11"), f"the agent was not back within {BACK_S:g} s")
        return 0
    look("3.4", (back.body or {})["boot"] == before + 1, f"boot {before}, after the restart {back.body}")

    first = desk.ears.wait_for(lambda heard: _of(heard, transaction), 0, since)
    again = desk.ask("pause", transaction=transaction, sample=sid)
    is_same = first is None or (
        again.get("repeated") is True and again.get("status") == (first.body or {}).get("status")
    )
    look("7.11", again.get("status") == "ok" and is_same, f"{first and first.body}, after the restart {again}")
    entry = desk.ears.wait_for(
        lambda heard: heard.kind == "audit" and (heard.body or {}).get("transaction") == transaction, ANSWER_S, since
    )
    look("7.11", entry is not None, f"no audit entry of transaction {transaction}")

    # The sample goes on, and its report holds every cell of its fields once.
    known = len(desk.ears.heard)
    desk.ask("resume", sample=sid)
    more = desk.ears.wait_for(lambda heard: _field_of(heard, sid), FIELDS_S, known)
    look("6.8", more is not None, f"no field of {sid} after the restart")
    desk.ask("stop", sample=sid)
    final = desk.ears.wait_for(lambda heard: _report(heard, sid, "final") and "seq" in (heard.body or {}), ANSWER_S)
    if final is None or final.body is None:
        look("6.8", False, f"{sid} has no final differential")
        return 1
    _judge_counts(desk, sid, final.body)
    return 1


def _judge_counts(desk: Desk, sid: str, report: dict[str, Any]) -> None:
    """6.8: what the fields say, each once, is what the report says."""
    fields = {(one.body or {})["id"]: one.body or {} for one in desk.ears.heard if _field_of(one, sid)}
    key = "unique_counts" if report["basis"] == "unique" else "counts"
    added: Counter[str] = Counter()
    for body in fields.values():
        added.update(body[key])
    told = {name: count for name, count in report["counts"].items() if count}
    expected = {name: count for name, count in added.items() if count}
    is_right = report["fields"] == len(fields) and told == expected
    desk.findings.look("6.8", is_right, f"{len(fields)} fields say {expected}, the report of {report['fields']} {told}")


def _boot(desk: Desk) -> int:
    return int(desk.ask("ping").get("boot", 0))


def _state(heard: Heard) -> str | None:
    return (heard.body or {}).get("state") if heard.kind == "state" else None
