"""Whether another slide lies under the microscope, told by what the camera shows and by nothing else.

Someone who changes a slide takes the old one away: for a while there is only light, or a blur. What comes into view
then lies at no place that is known. Both together make another slide; each for itself does not: a quick move of the
stage loses the place too, and a break leaves the old slide where it was. A stage that tells its place does not change
that: it tells the same places of the next slide, so only the picture says whether it is the old one.

While the agent is off nobody looks: from then on counts what was noted last, and from one start of the computer to the
next any slide may have come.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Sight = Literal["slide", "same", "nothing"]
"""What a frame shows: a field of a slide, the picture before once more, or nothing that can be counted."""


class SlideWatch:
    """Follows the frames of one camera. absence_s: s without a slide from which another one may have come.

    before: `note` of an earlier watch; None, or no note = whatever comes first is the slide. kernel_boot: names this
    start of the computer, since which the monotonic clock runs.
    """

    def __init__(self, absence_s: float, before: str | None = None, kernel_boot: str = "") -> None:
        self._absence_ns = int(absence_s * 1e9)
        self._kernel_boot = kernel_boot
        self._before = before or ""
        # Monotonic; None = no slide is known of, -inf = it was seen before the computer was last switched on.
        self._seen_ns: float | None = None
        self._is_in_view = False
        boot, seen, in_view = (*self._before.split("|"), "", "")[:3]
        if seen.isdecimal():
            is_same_boot = boot == kernel_boot
            self._seen_ns = int(seen) if is_same_boot else -math.inf
            self._is_in_view = is_same_boot and in_view == "in-view"

    @property
    def note(self) -> str:
        """When a slide was seen last, for the watch after a restart; empty where none is known of."""
        if self._seen_ns is None:
            return ""
        if self._seen_ns == -math.inf:
            return self._before
        return f"{self._kernel_boot}|{int(self._seen_ns)}|{'in-view' if self._is_in_view else 'gone'}"

    def is_another(self, at_ns: int, sight: Sight, is_lost: Callable[[], bool]) -> bool:
        """Whether this frame shows another slide than those before it.

        at_ns: monotonic. is_lost: whether it lies at no place that is known; asked only after an absence.
        """
        if sight == "nothing":
            self._is_in_view = False
            return False
        if sight == "same" and not self._is_in_view:
            return False
        was_away = self._seen_ns is not None and at_ns - self._seen_ns >= self._absence_ns
        self._seen_ns, self._is_in_view = at_ns, True
        return sight == "slide" and was_away and is_lost()

    def forget(self) -> None:
        """Whatever comes next is the slide: a person has said so."""
        self._seen_ns, self._is_in_view = None, False
