"""Outboxes and drafts for these tests, and a way to fill a disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agent.delivery.messages import Draft
from agent.delivery.outbox import Outbox, begin_boot, open_outbox, read_boot


def make_draft(stream: str = "field", text: str = "x", **more: Any) -> Draft:
    return Draft(stream, f"hv/1/lab/scope/{stream}/s1", {"schema": f"hv/1/{stream}", "text": text}, **more)


def make_outbox(folder: Path, **options: Any) -> Outbox:
    if not read_boot(folder):
        begin_boot(folder)
    return open_outbox(folder, **{"device": "scope", "min_free_mb": 0, **options})


def messages(outbox: Outbox) -> list[dict[str, Any]]:
    return [json.loads(row.payload) for row in outbox.pending(0, 100_000)]
