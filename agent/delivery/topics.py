"""The topics of one device: `hv/1/{site}/{device}/...`."""

from __future__ import annotations

import re
from dataclasses import dataclass

CONTRACT_VERSION = 1
"""Goes up when a message loses a key or a key changes its meaning; new keys do not change it."""

DOTTED = "model"
"""What stands before the dot in the names of commands."""

_PART = re.compile(r"[a-z0-9-]{1,63}")
_PICTURE = re.compile(r"[a-z0-9-]{1,80}")
"""A cell's id is its sample's and a number."""


def is_part(text: str) -> bool:
    """Whether it can be a part of a topic: the id of a site, a device or a sample."""
    return _PART.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Topics:
    """Where this device publishes. Every part matches `[a-z0-9-]{1,63}`: dots mean something to RabbitMQ and NATS."""

    site: str
    device: str

    def __post_init__(self) -> None:
        _checked(self.site)
        _checked(self.device)

    @classmethod
    def of(cls, topic: str) -> Topics | None:
        """Those of the device that publishes here; None for a topic that is not one of a device."""
        parts = topic.split("/")
        if len(parts) < 5 or parts[:2] != ["hv", str(CONTRACT_VERSION)] or not all(map(is_part, parts[2:4])):
            return None
        return cls(*parts[2:4])

    @property
    def base(self) -> str:
        return f"hv/{CONTRACT_VERSION}/{self.site}/{self.device}"

    @property
    def state(self) -> str:
        return f"{self.base}/state"

    @property
    def info(self) -> str:
        return f"{self.base}/info"

    @property
    def health(self) -> str:
        return f"{self.base}/health"

    @property
    def event(self) -> str:
        return f"{self.base}/event"

    @property
    def audit(self) -> str:
        return f"{self.base}/audit"

    @property
    def commands(self) -> str:
        """The filter of all commands to this device."""
        return f"{self.base}/cmd/+"

    @property
    def dotted_commands(self) -> str:
        """The same at RabbitMQ, to which a dot is a level: `cmd/model.stage` arrives as `cmd/model/stage`."""
        return f"{self.base}/cmd/{DOTTED}/+"

    def command(self, topic: str) -> str | None:
        """The name of the command that came on this topic; None for a topic of another kind."""
        prefix = f"{self.base}/cmd/"
        name = topic.removeprefix(prefix)
        if not topic.startswith(prefix):
            return None
        return name.replace("/", ".", 1) if name.startswith(f"{DOTTED}/") else name

    def ack(self, receiver: str) -> str:
        """Where a receiver says what it has on its disk."""
        return f"{self.base}/ack/{_checked(receiver)}"

    def reply(self, command: str) -> str:
        """Where a command is answered that named no response topic. command: a word of the command list."""
        return f"{self.base}/reply/{command}"

    def alert(self, alert_id: str) -> str:
        return f"{self.base}/alert/{_checked(alert_id)}"

    def sample(self, sid: str) -> str:
        return f"{self.base}/sample/{_checked(sid)}"

    def differential(self, sid: str) -> str:
        return f"{self.base}/differential/{_checked(sid)}"

    def image(self, sid: str, picture: str) -> str:
        """picture: a cell_id, or `frame-{n}` for a whole frame."""
        if not _PICTURE.fullmatch(picture):
            raise ValueError(f"{picture!r} cannot stand in a topic")
        return f"{self.base}/image/{_checked(sid)}/{picture}"

    def field(self, sid: str) -> str:
        return f"{self.base}/field/{_checked(sid)}"

    def cell(self, sid: str) -> str:
        return f"{self.base}/cell/{_checked(sid)}"


def _checked(part: str) -> str:
    if not is_part(part):
        raise ValueError(f"{part!r} cannot stand in a topic: 1 to 63 of a-z, 0-9 and hyphen are allowed")
    return part
