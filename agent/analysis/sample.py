"""The life of a sample: which word leads from which state to which, and when it has enough cells.

    idle --start--> running --stop, target--> finishing --settled--> finished
                     |   ^                        |
                   pause resume                 abort ---> aborted
                     v   |
                    paused

`finishing` lasts while frames that were taken before the stop are still on their way: they belong to this sample.
Rules of this file
  * TRANSITIONS is all there is: what does not stand in it is refused, and the refusal says what would be possible.
  * A sample that has ended never counts again; `start` begins another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

from agent.analysis.differential import CellKind, count_kind, count_nucleated, still_needed
from agent.domain import SamplePhase, SampleState

Trigger = Literal["start", "pause", "resume", "stop", "settle", "abort"]

TRANSITIONS: Mapping[SamplePhase, Mapping[Trigger, SamplePhase]] = MappingProxyType(
    {
        "idle": {"start": "running"},
        "running": {"pause": "paused", "stop": "finishing", "abort": "aborted"},
        "paused": {"resume": "running", "stop": "finishing", "abort": "aborted"},
        "finishing": {"settle": "finished", "abort": "aborted"},
        "finished": {"start": "running"},
        "aborted": {"start": "running"},
    }
)

COUNTING: frozenset[SamplePhase] = frozenset({"running", "finishing"})
"""In these phases a frame is analysed and counted."""

ENDED: frozenset[SamplePhase] = frozenset({"finished", "aborted"})


class NotNow(ValueError):
    """A trigger that this phase does not know. Its words say which phase it is and what would be possible."""

    def __init__(self, phase: SamplePhase, trigger: Trigger) -> None:
        self.phase = phase
        self.trigger = trigger
        possible = ", ".join(word for word in TRANSITIONS[phase] if word != "settle")
        super().__init__(f"the sample is {phase}: it cannot {trigger}; possible now: {possible}")


def next_phase(phase: SamplePhase, trigger: Trigger) -> SamplePhase:
    """Where a trigger leads; raises NotNow."""
    try:
        return TRANSITIONS[phase][trigger]
    except KeyError:
        raise NotNow(phase, trigger) from None


def change(sample: SampleState, trigger: Trigger, at: str, reason: str | None = None) -> SampleState:
    """The sample after a trigger other than `start`, which makes a new one. at: now, RFC 3339. Raises NotNow.

    reason: why it ends; kept from the first stop on.
    """
    phase = next_phase(sample.phase, trigger)
    return replace(
        sample,
        phase=phase,
        ended_at=at if phase in ENDED else sample.ended_at,
        end_reason=sample.end_reason or reason,
    )


def begin(before: SampleState | None, fresh: SampleState, at: str) -> SampleState:
    """A new sample, running, after the one before; raises NotNow while that one has not ended."""
    phase = next_phase("idle" if before is None else before.phase, "start")
    return replace(fresh, phase=phase, opened_at=at, last_sha256_16=None if before is None else before.last_sha256_16)


def reached_target(
    sample: SampleState, counts: Mapping[str, int], kinds: Mapping[str, CellKind]
) -> Literal["target-cells", "target-width"] | None:
    """Why a running sample may stop by itself, or None.

    counts: unique ones where they are known. target_cells: nucleated cells with a name. target_half_width_pct: the
    widest interval of a leukocyte class.
    """
    if sample.phase != "running":
        return None
    if sample.target_cells is not None and count_nucleated(counts, kinds) >= sample.target_cells:
        return "target-cells"
    is_any = count_kind(counts, kinds, "leukocyte") > 0
    if sample.target_half_width_pct is not None and is_any:
        needed = still_needed(counts, kinds, sample.target_half_width_pct / 100)
        return "target-width" if needed == 0 else None
    return None
