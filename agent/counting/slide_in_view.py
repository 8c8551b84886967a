"""The slide under the microscope: its map, and whether another one lies there now."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from agent.analysis.duplicates import SlideMap
from agent.analysis.slide_change import Sight, SlideWatch
from agent.analysis.traces import Trace
from agent.delivery.outbox import Outbox
from agent.domain import Frame, SamplePhase, SampleState
from agent.machine import read_kernel_boot
from agent.reporting import ANSWERS
from agent.slide_notes import slide_from_notes

SEEN_NOTE = "slide-seen"
"""The outbox's note of when a slide was in view last; kept only where another slide begins a sample by itself."""

UNWATCHED: frozenset[SamplePhase] = frozenset({"idle", "paused", "finishing"})
"""In these phases of the sample a person decides which slide comes next."""


class SlideInView:
    """Holds the map of the sample's slide, made again from the outbox's notes at a start.

    absence_s: so long no slide is in view before another one is recognised; None = only commands begin samples.
    """

    def __init__(self, outbox: Outbox, sample: SampleState, absence_s: float | None) -> None:
        self.map = slide_from_notes(outbox, sample)
        self.hold_answered(outbox.notes(f"{ANSWERS}{sample.sid}/"))
        # Who has paused a sample or told it to stop says what comes next.
        before = None if sample.phase in UNWATCHED else outbox.note(SEEN_NOTE)
        self._absence_s = absence_s
        self._watch = _make_watch(absence_s, before)

    @property
    def seen_note(self) -> str | None:
        """The text of SEEN_NOTE now; None where nobody watches for another slide."""
        return None if self._watch is None else self._watch.note

    def use_absence(self, absence_s: float | None) -> None:
        """Recognise another slide after this time from now on; None = not."""
        if absence_s != self._absence_s:
            self._absence_s, self._watch = absence_s, _make_watch(absence_s)

    def turn_to(self, sample: SampleState) -> SlideMap:
        """The map of this sample's slide; an empty one where it has none yet."""
        if self.map.sid != sample.sid or (sample.fields == 0 and self.map.places.count > 0):
            self.map = SlideMap(sample.sid)
        return self.map

    def add(self, sid: str, trace: Trace) -> None:
        """The trace of a field of sample `sid`, which is stored."""
        if self.map.sid != sid:
            self.map = SlideMap(sid)
        self.map.add(trace)

    def hold_answered(self, keys: Iterable[str]) -> None:
        """Cells that a person has named stand still. keys: of stored notes; those of answers are looked at."""
        prefix = f"{ANSWERS}{self.map.sid}/"
        named = [key.removeprefix(prefix) for key in keys if key.startswith(prefix) and key != prefix]
        if named:
            self.map.hold(*named)

    def is_another(self, frame: Frame, phase: SamplePhase, look: Callable[[], Sight]) -> bool:
        """Whether the frame shows another slide than the sample's; false where nobody wants to know.

        phase: of the sample. look: what the frame shows; asked only where somebody wants to know.
        """
        if self._watch is None:
            return False
        if phase in UNWATCHED:
            self._watch.forget()
            return False
        places = self.map.places
        return self._watch.is_another(frame.captured_monotonic_ns, look(), lambda: places.is_lost(frame))


def _make_watch(absence_s: float | None, before: str | None = None) -> SlideWatch | None:
    """before: its note of the last run."""
    return None if absence_s is None else SlideWatch(absence_s, before, read_kernel_boot())
