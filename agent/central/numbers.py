"""Which numbers of a device have arrived, which are missing, and up to where nothing is: plain arithmetic, no storage.

A device numbers each of its streams 1, 2, 3, ... over all its boots. When its outbox file is lost it begins at 1 again
under a higher boot, with all streams at once: a new *numbering*. Within one numbering a higher boot never has a lower
number, so two messages that contradict this show that a new one has begun between them.

    boot     5 5 5 6 6 . . 6 6        8 8 8
    number   1 2 3 4 5 6 7 8 9        1 2 3
                     ^ ^^^               ^
                     | a hole            another numbering, since boot 8
                     complete up to here
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Numbers from `first` to `last`, both included; `first <= last`."""

    first: int
    last: int

    def __contains__(self, seq: int) -> bool:
        return self.first <= seq <= self.last

    @property
    def size(self) -> int:
        return self.last - self.first + 1

    def overlaps(self, other: Span) -> bool:
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True, slots=True, order=True)
class Run:
    """Messages of one boot that arrived, without a hole among them."""

    first: int
    last: int
    boot: int


class Numbering:
    """What has arrived of one stream in one numbering.

    since_boot: the boot under which the numbering began.
    complete_seq: every number up to here has arrived or is gone for good. 0 = not even the first.
    complete_boot, received_seq: the highest message that arrived up to there; what may be acknowledged. 0 = none did.
    above: runs beyond `complete_seq`, in order.   gone: numbers that the device no longer has.
    """

    def __init__(
        self,
        since_boot: int,
        complete_seq: int = 0,
        complete_boot: int = 0,
        received_seq: int = 0,
        above: Iterable[Run] = (),
        gone: Iterable[Span] = (),
    ) -> None:
        self.since_boot = since_boot
        self.complete_seq = complete_seq
        self.complete_boot = complete_boot
        self.received_seq = received_seq
        self.above: list[Run] = sorted(above)
        self.gone: list[Span] = sorted(gone)
        self._advance()

    @property
    def highest_seq(self) -> int:
        """The highest number that arrived; 0 = none."""
        return self.above[-1].last if self.above else self.received_seq

    def take(self, boot: int, seq: int) -> bool:
        """Note an arrival; whether it is the first of its number. Not for a message that `contradicts`."""
        if seq <= self.complete_seq or any(seq in gone for gone in self.gone):
            late = next((gone for gone in self.gone if seq in gone), None)
            if late is None:
                return False
            self._take_late(boot, seq, late)
            return True
        if any(run.first <= seq <= run.last for run in self.above):
            return False
        self._insert(boot, seq)
        self._advance()
        return True

    def give_up(self, span: Span) -> None:
        """These numbers will not come: those of them that have not arrived are gone."""
        for hole in self.holes(span.last):
            if hole.overlaps(span):
                self.gone.append(Span(max(hole.first, span.first), min(hole.last, span.last)))
        self.gone.sort()
        self._advance()

    def holes(self, up_to: int | None = None) -> list[Span]:
        """Numbers that are missing: below the highest that arrived, or up to a number that is known to exist."""
        known = sorted(
            [*((run.first, run.last) for run in self.above), *((gone.first, gone.last) for gone in self.gone)]
        )
        holes, following = [], self.complete_seq + 1
        for first, last in known:
            if first > following and first <= self.highest_seq:
                holes.append(Span(following, first - 1))
            following = max(following, last + 1)
        if up_to is not None and up_to >= following:
            holes.append(Span(following, up_to))
        return holes

    def contradicts(self, boot: int, seq: int) -> bool:
        """Whether this message cannot stand in one numbering with those that arrived."""
        if self.complete_boot:
            if boot > self.complete_boot and seq <= self.received_seq:
                return True
            if boot < self.complete_boot and seq > self.received_seq:
                return True
        return any(
            (run.boot < boot and run.last >= seq) or (run.boot > boot and run.first <= seq) for run in self.above
        )

    # ---- inside

    def _take_late(self, boot: int, seq: int, gone: Span) -> None:
        """A number that was given up has come after all."""
        self.gone.remove(gone)
        self.gone += [
            Span(first, last) for first, last in ((gone.first, seq - 1), (seq + 1, gone.last)) if first <= last
        ]
        self.gone.sort()
        if seq > self.complete_seq:
            self._insert(boot, seq)
            self._advance()
        elif seq > self.received_seq:
            self.received_seq, self.complete_boot = seq, max(boot, self.complete_boot)

    def _insert(self, boot: int, seq: int) -> None:
        first = last = seq
        kept = []
        for run in self.above:
            if run.boot == boot and run.last == seq - 1:
                first = run.first
            elif run.boot == boot and run.first == seq + 1:
                last = run.last
            else:
                kept.append(run)
        self.above = sorted([*kept, Run(first, last, boot)])

    def _advance(self) -> None:
        while True:
            following = self.complete_seq + 1
            if self.above and self.above[0].first <= following:
                run = self.above.pop(0)
                if run.last >= following:
                    self.complete_seq = run.last
                if run.last > self.received_seq:
                    self.received_seq, self.complete_boot = run.last, run.boot
                continue
            gone = next((gone for gone in self.gone if following in gone), None)
            if gone is None:
                return
            self.complete_seq = gone.last


def beginning_of_another(runs: Sequence[Run], boot: int, seq: int) -> int:
    """The boot under which another numbering began, told from a message that contradicts the runs of one.

    runs: all that arrived of the stream in this numbering.
    """
    if any(run.boot < boot and run.last >= seq for run in runs):
        return boot
    return min(run.boot for run in runs if run.boot > boot and run.first <= seq)


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same numbers in as few spans as possible, in order."""
    joined: list[Span] = []
    for span in sorted(spans):
        if joined and span.first <= joined[-1].last + 1:
            joined[-1] = Span(joined[-1].first, max(joined[-1].last, span.last))
        else:
            joined.append(span)
    return joined
